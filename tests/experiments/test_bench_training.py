"""The training benchmark: the seven data sets, FLOP counts, and a complete result file."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chains import made
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mote.core.errors import UserError
from mote.core.records import append_rows
from mote.experiments.bench import trainers
from mote.experiments.bench.skipping import UNCOUNTED, Pass, batches, seven, step_occurrences
from mote.experiments.bench.targets import table
from mote.experiments.bench.trainers import ARMS, with_experts
from mote.experiments.bench.training import (
    FLOPS,
    MASKED,
    MEASURES,
    SEVEN,
    TWO_DRAWS,
    TrainingBenchSettings,
    choose,
    held_out_lines,
    measure_training,
    training_targets,
)
from mote.experiments.bench.workload import Workload, facts, prepare, random_rows
from mote.tokens.encode import IGNORED, Tokens
from mote.tokens.masks import document_mask, masks_for
from mote.tokens.routing import Markers

CHAIN = Tokens(
    ids=[1, 2, 3, 10, 4, 11, 12, 5, 13, 14, 6, 15, 9],
    labels=[IGNORED] * 3 + [10, 4, 11, 12, 5, 13, 14, 6, 15, 9],
    steps=[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3],
)


def quick(only: str, **changes: Any) -> TrainingBenchSettings:
    few = {"rounds": 1, "whole": 2, "first_seed": 1, "seeds": 1, "trained_on": 3, "epochs": 2}
    given = {"count": 8, "batch": 4, "length": 512, **few, **changes}
    return choose(None, "tiny", "cpu", "auto", only, skip_p=0.2, checkpointing=False, held_out=False, **given)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return prepare(None, "tiny", "cpu", "float32", None, 8)


def test_full_chain_has_seven_forms() -> None:
    assert [sorted(set(form.steps)) for form in seven(CHAIN)] == [
        [0, 1], [0, 2], [0, 3], [0, 1, 2], [0, 1, 3], [0, 2, 3], [0, 1, 2, 3],
    ]  # fmt: skip
    forms = seven(CHAIN)
    assert forms[-1] == CHAIN
    assert forms[4].ids == [1, 2, 3, 10, 4, 11, 14, 6, 15, 9]  # the end of the turn goes with the response
    assert all(len(form.ids) == len(form.labels) == len(form.steps) for form in forms)
    assert (step_occurrences([CHAIN]), step_occurrences(forms)) == (3, 12)
    assert len(seven(forms[4])) == 3 and len(seven(forms[2])) == 1


def test_counted_flops_equal_the_matmul_flops() -> None:
    """The in-place matmul and CPU attention, which PyTorch's counter misses."""

    def counted(action: Any) -> int:
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            action()
        return int(counter.get_total_flops())

    one = torch.randn(3, 5)
    other = torch.randn(5, 7)
    assert counted(lambda: torch.zeros(3, 7).addmm_(one, other)) == counted(lambda: one @ other) == 2 * 3 * 5 * 7
    query, key, value = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))

    def attend() -> Tensor:
        out: Tensor = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return out

    assert counted(attend) == 2 * (2 * 2 * 4 * 6 * 6 * 8)
    backward = counted(lambda: attend().sum().backward())  # type: ignore[no-untyped-call]
    assert backward == 7 * (2 * 2 * 4 * 6 * 6 * 8)


def test_masked_pass_needs_at_most_30_percent_of_the_flops(workload: Workload) -> None:
    model = with_experts(workload, workload.config, False)
    whole = [row for row in workload.rows if {1, 2, 3} <= set(row.steps)]
    built = [form for row in whole for form in seven(row)]
    masked, all_forms = (
        Pass(model, batches(rows, skip_p, 512, 1, 0, "cpu"), masks_for(model.config, document_mask)).flops()
        for rows, skip_p in ((whole, 0.2), (built, 0.0))
    )
    assert 1 / 7 < masked / all_forms < 0.30


def test_training_bench_writes_every_measure(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    result = measure_training(quick("skipping,masks,trainers,held-out"), out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert {"torch", "transformers", "peft", "trl"} <= set(result["versions"]) and result["machine"]["threads"]
    assert result["chains"]["chains"] == 8 and "random tokens" in result["chains"]["source"]
    assert result["chains"]["step occurrences, masked and built"] == [6, 24]
    for measure in result["measures"].values():
        assert all(len(row["rounds"]) == 1 and row["ratio"]["median"] > 0 for row in measure["variants"].values())
    with_control = [name for name, measure in result["measures"].items() if "control" in measure]
    assert len(with_control) == 4 and not any("FLOPs" in name for name in with_control)
    assert len(result["targets"]) == 9
    flops = result["measures"][FLOPS]["variants"]
    assert flops[MASKED]["median"] < flops[TWO_DRAWS]["median"] < flops[SEVEN]["median"]
    held_out = result["held_out"]
    assert (held_out["epochs"], held_out["updates"]) == (2, 2)
    assert all(len(found["ratios"]) == 1 for found in held_out["draws"].values())
    assert held_out["chains"]["held out"] >= 1
    losses = [losses[0] for losses in held_out["loss of all forms, of whole chains"].values()]
    assert len(losses) == 5 and len(set(map(tuple, losses))) == 5  # before, three kinds of draws, seven data sets
    text = table(result) + held_out_lines(result)
    assert text.count("held-out loss, masked with skip_p") == 3 and "SFTTrainer, padded" in text


def test_training_targets_are_judged_by_the_median() -> None:
    def measured(values: dict[str, list[float]]) -> dict[str, Any]:
        return {FLOPS: {"variants": {name: {"rounds": rounds} for name, rounds in values.items()}}}

    [target] = training_targets(measured({SEVEN: [10.0] * 3, MASKED: [2.0, 2.9, 9.0]}), on_gpu=False)
    assert target["met"] and target["at_most"] == 0.30 and target["ratio"]["median"] == 0.29
    [target] = training_targets(measured({SEVEN: [10.0] * 3, MASKED: [3.1] * 3}), on_gpu=False)
    assert not target["met"]


def test_each_trainer_prints_its_peak_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trainers", json.dumps(asdict(quick("memory", count=3))), ARMS[-1]])
    trainers.main()
    assert float(capsys.readouterr().out.split()[-1]) > 100


def test_only_accepted_chains_are_benchmarked(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "chains.jsonl"
    rows = [made("one", "How?", response="So."), made("two", "Why?", analysis="It asks.", response="Hence.")]
    append_rows(file, [*rows, made("three", "What?", safe=False, response="No.")])
    found = prepare(str(tiny), None, "cpu", "float32", file, 10)
    assert facts(found.rows)["chains of one, two, three steps"] == [1, 1, 0]
    with pytest.raises(UserError, match="no tokenizer"):
        prepare(None, "tiny", "cpu", "float32", file, 10)
    with pytest.raises(UserError, match="none has analysis, guidance and response"):
        measure_training(replace(quick("skipping"), model=str(tiny), shape=None, chains=str(file)))


def test_random_chains_have_the_papers_depths() -> None:
    rows = random_rows(400, 100, Markers((101, 103, 105), (102, 104, 106)))
    one, two, three = facts(rows)["chains of one, two, three steps"]
    assert abs(three / 400 - 0.614) < 0.08 and abs(two / 400 - 0.101) < 0.05 and one + two + three == 400
    assert rows == random_rows(400, 100, Markers((101, 103, 105), (102, 104, 106)))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="only: 'speed' is not known"):
        quick("speed")
    with pytest.raises(UserError, match="exclude each other"):
        choose("m", "tiny", "cpu", "auto", None, False)
    assert set(MEASURES) == {"memory", "skipping", "masks", "trainers", "held-out"}
