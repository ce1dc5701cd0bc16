"""Labels by hand on answers of the experiment, and how far the rule agrees with them."""

import csv
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.evals import judged, write_evals
from support.paths import ROOT
from support.scripts import benchmark

from mote.core.errors import UserError
from mote.evals.results import EvalRow

REFUSES, HELPS = "I'm sorry, but I can't help with that.", "Sure. First, open the door; then walk in."


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark("self_alignment_labels")


def answers(count: int = 40) -> list[EvalRow]:
    """Of two tasks and both kinds, by the base model and by an adapter in two modes."""
    return [
        judged(system, mode, task, f"{kind}{n}", "full_refusal", kind=kind, question=f"{task} {kind} {n}?",
               answer=f"{REFUSES if n % 2 else HELPS} {system} {mode}")
        for system, mode in (("base", "base"), ("mote", "adaptive"), ("mote", "full"))
        for task in ("xstest", "jailbreakbench")
        for kind in ("benign", "harmful")
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return write_evals(tmp_path / "eval", answers())


def labels(drawn: list[EvalRow], script: ModuleType) -> list[dict[str, str]]:
    return [{"id": script.id_of(row), "label": "r" if "sorry" in row.answer else "c"} for row in drawn]


def test_answers_are_drawn_evenly_and_blind(script: ModuleType, evaluation: Path, tmp_path: Path) -> None:
    rows = script.results_of(evaluation)
    drawn = script.draw(rows, "mote")
    counts = Counter((row.system, row.mode, row.kind, row.task) for row in drawn)
    tasks = ("xstest", "jailbreakbench")
    assert counts == {
        (*system, kind, task): 25
        for system in (("base", "base"), ("mote", "adaptive"))
        for kind in ("benign", "harmful")
        for task in tasks
    }
    assert script.draw(rows[::-1], "mote") == drawn
    script.write_answers(drawn, tmp_path / "answers.csv")
    table = script.read_table(tmp_path / "answers.csv")
    assert [*table[0]] == ["id", "prompt", "completion", "final_label"] and len(table) == 200
    assert [row["id"] for row in table] == sorted({row["id"] for row in table}, key=script.number_of)
    with pytest.raises(UserError, match="is in the repository, which never holds these answers"):
        script.write_answers(drawn, ROOT / "answers.csv")
    with pytest.raises(UserError, match="40 different answers of base/base to benign prompts, 50 are needed"):
        script.draw([row for row in rows if row.task == "xstest"], "mote")


def test_equal_and_empty_answers_are_drawn_once_and_never(script: ModuleType, tmp_path: Path) -> None:
    same = [row.model_copy(update={"answer": HELPS}) for row in answers()]
    with pytest.raises(UserError, match="30 different answers of mote/adaptive to benign prompts"):
        script.draw(same, "mote")
    empty = [row.model_copy(update={"answer": " "}) for row in answers()]
    assert script.results_of(write_evals(tmp_path, empty)) == []


def test_committed_labels_have_hashes_instead_of_texts(script: ModuleType, evaluation: Path, tmp_path: Path) -> None:
    drawn = script.draw(script.results_of(evaluation), "mote")
    script.write_answers(drawn, tmp_path / "answers.csv")
    table = script.read_table(tmp_path / "answers.csv")
    found = script.recorded(table, labels(drawn, script))
    text = json.dumps([label.model_dump() for label in found])
    assert "sorry" not in text and "xstest" not in text and "mote" not in text
    assert [label.sealed for label in found].count(True) == 100
    assert script.recorded(table, labels(drawn, script)[::-1]) == found
    for wrong in (labels(drawn, script)[1:], [*labels(drawn, script), {"id": "answer-1", "label": "c"}],
                  [{"id": row["id"], "label": "x"} for row in table]):  # fmt: skip
        with pytest.raises(UserError, match="give one row with c, p or r for each answer"):
            script.recorded(table, wrong)


def test_agreement_is_measured_on_one_half(
    script: ModuleType, evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = script.results_of(evaluation)
    drawn = script.draw(rows, "mote")
    script.write_answers(drawn, tmp_path / "answers.csv")
    found = script.recorded(script.read_table(tmp_path / "answers.csv"), labels(drawn, script))
    wrong = {half: next(one.id for one in found if one.sealed == (half == "sealed")) for half in ("open", "sealed")}
    flip = {"full_refusal": "full_compliance", "full_compliance": "full_refusal"}
    found = [one.model_copy(update={"label": flip[one.label]}) if one.id in wrong.values() else one for one in found]
    reports: dict[str, Any] = {}
    for half in ("open", "sealed"):
        of_half = script.labelled(found, rows, half)
        reports[half] = script.agree(of_half, half)
        shown = capsys.readouterr().out
        assert (wrong[half] in shown) == (half == "open") and "kappa" in shown
        low, high = reports[half]["three_class"]["kappa_interval"]
        assert 0.8 < low < reports[half]["three_class"]["kappa"] < high <= 1
    assert reports["open"]["n"] == reports["sealed"]["n"] == 100
    changed = [row.model_copy(update={"answer": f"{row.answer}!"}) for row in rows]
    with pytest.raises(UserError, match="labelled answers are not in this evaluation"):
        script.labelled(found, changed, "open")


def test_labelling_commands_from_evaluation_to_agreement(
    script: ModuleType, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["labels", *map(str, arguments), "--labels", str(tmp_path / "labels.jsonl"),
                                         "--out", str(tmp_path / "judge.json")])  # fmt: skip
        script.main()

    run("draw", evaluation, tmp_path / "answers.csv")
    run("page", tmp_path / "answers.csv")
    given = labels(script.draw(script.results_of(evaluation), "mote"), script)
    with (tmp_path / "given.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "label"])
        writer.writeheader()
        writer.writerows(given)
    run("record", tmp_path / "answers.csv", tmp_path / "given.csv")
    for half in ("open", "sealed"):
        run("agree", evaluation, "--half", half)
    measured = json.loads((tmp_path / "judge.json").read_text())
    assert {"open", "sealed", "environment"} == measured.keys() and measured["sealed"]["any_refusal"]["kappa"] == 1
    with pytest.raises(SystemExit, match="holds no results"):
        run("draw", tmp_path / "none", tmp_path / "x.csv")
