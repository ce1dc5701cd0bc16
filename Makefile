# Everything sets itself up: a fresh machine needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
RUN = runs/quickstart
BIN = $(VENV)/bin
# uv installs faster where it is there, and is not needed.
UV := $(shell command -v uv 2>/dev/null)
ifdef UV
  MAKE_VENV = uv venv --quiet --seed --python $(PYTHON) $(VENV)
  INSTALL = uv pip install --quiet --python $(BIN)/python
else
  MAKE_VENV = $(PYTHON) -m venv $(VENV)
  INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

.PHONY: quickstart test check format install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(MAKE_VENV)
	$(INSTALL) --constraint constraints.txt torch
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install  ## questions -> chains -> step experts -> answers -> report, on the embedded model
	$(BIN)/mote run recipes/quickstart.yaml --out $(RUN)

check: install  ## lint, types, order of imports
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## all of the above and the tests
	$(BIN)/python -m pytest

format: install
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
