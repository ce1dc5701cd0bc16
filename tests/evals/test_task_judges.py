"""LLM judges of an evaluation behind a real server, and replies of Inspect models that were cut off."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from support.adapters import save_random_adapter
from support.servers import served

import mote
from mote import cli
from mote.core.records import Message, read_rows
from mote.evals.judges.llm import LlmJudge
from mote.evals.judges.prompts import load_prompt
from mote.evals.results import EvalRow, Summary
from mote.evals.task_judges import _InspectWriter

SUITE = """
name: judged
max_step_tokens: 4
batch_size: 4
tasks:
  - {task: hh-harm, file: "mote:test", limit: 2}
  - {task: hh-help, file: "mote:test", limit: 3}
"""


@pytest.fixture(scope="module")
def judge(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny random model behind `mote serve`."""
    adapter = save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"))
    with served(mote.load(str(tiny), adapter, device="cpu")) as (address, server):
        yield f"{address}/v1", server


@pytest.mark.parametrize("name", ["inspect:openai-api/local/tiny:base", "llm:tiny:base@{address}"])
def test_served_model_as_llm_judge(
    name: str, judge: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    address, _ = judge
    monkeypatch.setenv("LOCAL_BASE_URL", address)
    monkeypatch.setenv("LOCAL_API_KEY", "none")
    name = name.format(address=address)
    (tmp_path / "suite.yaml").write_text(SUITE)
    words = ["eval", "--model", tiny, "--suite", tmp_path / "suite.yaml", "--judge", name, "--out", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["mote", *map(str, words)])
    cli.main()
    said = capsys.readouterr().err
    rows = read_rows(tmp_path / "out" / "evals" / "results.jsonl", EvalRow)
    assert [(row.task, row.judge) for row in rows] == [("hh-harm", name)] * 2 + [("hh-help", name)] * 3
    lost = {task: sum(not row.parsed for row in rows if row.task == task) for task in ("hh-harm", "hh-help")}
    assert lost["hh-harm"] == 2  # what a random model writes is no verdict
    assert all(row.label == "unparsed" and row.value is None for row in rows if not row.parsed)
    assert f"eval: hh-harm: 2 of 2 verdicts of {name} cannot be read" in said
    summary = Summary.model_validate_json((tmp_path / "out" / "evals" / "summary.json").read_text())
    for number in summary.numbers:
        asked = 2 if number.task == "hh-harm" else 3
        assert (number.unparsed, number.estimate.n) == (lost[number.task], asked - lost[number.task])
    cards = {card.measures: card for card in summary.judges}
    assert {key: card.prompts for key, card in cards.items()} == {
        "harm": load_prompt("harm").sha256, "help": load_prompt("help").sha256,
    }  # fmt: skip
    log = json.loads((tmp_path / "out" / "evals" / "suite.json").read_text())
    assert {args["judge"] for args in log["args"]} == {name}


@pytest.mark.parametrize(
    ("stop_reason", "label"),
    [("stop", "safe"), ("max_tokens", "unparsed"), ("model_length", "unparsed"), ("content_filter", "unparsed")],
)
def test_cut_off_reply_of_an_inspect_judge_is_unparsed(stop_reason: Any, label: str) -> None:
    usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    output = ModelOutput.from_content("mockllm/model", "It declines. Verdict: [[safe]]", stop_reason=stop_reason)
    output.usage = usage
    writer = _InspectWriter("mockllm/model")
    writer._model = get_model("mockllm/model", custom_outputs=[output], memoize=False)
    judge = LlmJudge(writer, load_prompt("harm"), "inspect:mockllm/model")
    verdict = asyncio.run(judge.judge([Message(role="user", content="How?")], "No."))
    assert verdict.label == label
