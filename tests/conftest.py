"""A tiny random Llama with a real BPE tokenizer and chat template, made once per test session."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import Hub
from support.tiny import Write, make_tiny_model

pytest_plugins = ("support.adapters", "support.commands", "support.gpu", "support.judged_runs")

# One thread: tiny models are faster so, and test processes side by side do not wait for each other's threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"


# Test files that train, measure, draw whole reports or go through many architectures: most of the time of all tests
# without processes.
SLOW_FILES = {
    *("test_ablations", "test_bench", "test_bench_training", "test_paper", "test_self_align_recipes"),
    *("test_arguments", "test_base_limits", "test_methods", "test_train", "test_window_training"),
    *("test_report", "test_report_compare", "test_export", "test_provider", "test_bitsandbytes", "test_cpu_decode"),
    *("test_bases", "test_windowed_bases", "test_window_batches", "test_window_masks"),
    *("test_llamacpp", "test_llamacpp_architectures", "test_self_check", "test_sequential", "test_compare_base"),
    *("test_rope", "test_eval_tasks", "test_plan"),
}
SLOW_MODULES = {f"support.{name}" for name in ("processes", "cli_runs", "servers", "fake_server", "hub_server", "vllm")}


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark as slow what `make test-fast` leaves out: `SLOW_FILES`, processes, servers, browsers, embedded model.

    Tests marked `gpu` are skipped without CUDA.
    """
    from support.gpu import WHY_NOT  # a plugin, which pytest has to import first

    for item in items:
        names = vars(item.module).values()
        imported = {getattr(name, "__module__", None) or getattr(name, "__name__", None) for name in names}
        if (
            item.path.parent.name == "end_to_end"
            or item.path.stem in SLOW_FILES
            or {"browser", "hub"} & set(item.fixturenames)
            or any(item.get_closest_marker(name) for name in ("model", "vllm"))
            or imported.intersection(SLOW_MODULES)
            or "subprocess" in item.function.__code__.co_names
        ):
            item.add_marker(pytest.mark.slow)
        if "browser" in item.fixturenames:
            item.add_marker(pytest.mark.browser)
        if WHY_NOT and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of another tiny random Llama of the same shape."""
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; tests that need it are skipped where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with pytest.importorskip("playwright.sync_api", reason="playwright is not installed").sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows, text or bytes to a file and gives its path."""

    def write(content: object, name: str = "questions.jsonl") -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        data = content if isinstance(content, bytes) else str(content).encode()
        path.write_bytes(data)
        return str(path)

    return write
