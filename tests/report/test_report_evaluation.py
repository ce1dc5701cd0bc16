"""What a report reads of an evaluation: numbers with their judges, what they cost, and agreement with people."""

import json
from pathlib import Path

import pytest
from support.evals import HARM, RULE, judged, small, write_agreement, write_evals

from mote.core.errors import UserError
from mote.core.records import read_rows, rewrite_rows
from mote.evals.results import EvalRow
from mote.report.evaluation import Evaluation, mode_rank, read_evaluation


def evaluation(folder: Path) -> Evaluation:
    found = read_evaluation(folder)
    assert found is not None
    return found[0]


def test_headlines_carry_judge_and_difference_to_base(tmp_path: Path) -> None:
    found = evaluation(write_evals(tmp_path, small()))
    assert found.columns == (("base", "base"), ("ours", "direct"), ("ours", "full@8"))
    of_harm = [one for one in found.headline if one.task == "hh-harm"]
    assert [(one.metric, one.system, one.mode, one.estimate.value) for one in of_harm] == [
        ("refusal", "base", "base", 0.25),
        ("refusal", "ours", "direct", 0.75),
        ("refusal", "ours", "full@8", 1.0),
    ]
    assert {one.judge for one in of_harm} == {RULE}
    assert (of_harm[0].against, of_harm[0].difference) == (None, None)
    assert of_harm[1].against == "base/base" and of_harm[1].difference is not None
    assert (of_harm[1].difference.difference, of_harm[1].difference.n, of_harm[1].difference.test) == (
        0.5,
        4,
        "mcnemar",
    )
    unsafe = next(one for one in found.headline if one.metric == "refusal_on_unsafe")
    assert (unsafe.estimate.n, unsafe.unparsed) == (1, 1)
    assert not found.harm_judged


def test_tokens_are_a_headline_and_an_axis(tmp_path: Path) -> None:
    found = evaluation(write_evals(tmp_path, small()))
    tokens = {one.mode: one for one in found.headline if one.metric == "tokens"}
    assert {mode: one.estimate.value for mode, one in tokens.items()} == {"base": 40.0, "direct": 64.0, "full@8": 64.0}
    assert tokens["direct"].judge is None and tokens["direct"].difference is not None
    assert (tokens["direct"].difference.difference, tokens["direct"].difference.n) == (24.0, 10)
    points = {(point.metric, point.mode): point for point in found.curve}
    assert points["refusal", "full@8"].tokens.value == 64.0 and points["refusal", "full@8"].score.value == 1.0
    assert points["not_overrefuse", "base"].tokens.n == 2  # of the safe prompts alone


def test_judges_with_one_name_keep_separate_cards(tmp_path: Path) -> None:
    help_card = HARM.model_copy(update={"measures": "help", "prompts": "c" * 64})
    rows = [
        judged("base", "base", "hh-harm", "1", "safe", judge="llm:big", measures="harm"),
        judged("base", "base", "hh-help", "1", "7", value=7.0, judge="llm:big", measures="help", kind="benign"),
    ]
    found = evaluation(write_evals(tmp_path, rows, [HARM, help_card]))
    assert {one.metric: one.judge for one in found.headline} == {"harmless": HARM, "help": help_card, "tokens": None}
    assert found.harm_judged


def test_agreement_belongs_to_the_same_judge(tmp_path: Path) -> None:
    write_evals(tmp_path, small())
    write_agreement(tmp_path, RULE.model_copy(update={"name": "llm:other", "revision": "2"}))
    assert evaluation(tmp_path).agreement == ()
    wanted = write_agreement(tmp_path)
    assert evaluation(tmp_path).agreement == (wanted,)
    write_agreement(tmp_path, RULE.model_copy(update={"revision": "2"}))  # takes the place of the other revision
    assert evaluation(tmp_path).agreement == ()


def test_missing_evaluation_is_none_a_damaged_one_an_error(tmp_path: Path) -> None:
    assert read_evaluation(tmp_path) is None
    write_evals(tmp_path, small())
    results, suite = tmp_path / "evals" / "results.jsonl", tmp_path / "evals" / "suite.json"
    rows = read_rows(results, EvalRow)
    rewrite_rows(results, [row for row in rows if row.mode != "direct"])
    with pytest.raises(UserError, match="do not belong together; run `mote eval` again"):
        read_evaluation(tmp_path)
    rewrite_rows(results, rows)
    suite.write_text("[]")
    with pytest.raises(UserError, match=r"suite.json is damaged .*; run `mote eval` again"):
        read_evaluation(tmp_path)
    suite.unlink()
    assert evaluation(tmp_path).settings == {}
    summary = tmp_path / "evals" / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "k": "much"}))
    with pytest.raises(UserError, match=r"summary.json is damaged \(k: .*; remove it and make it again"):
        read_evaluation(tmp_path)


def test_mode_order_with_budgets_last() -> None:
    modes = ["adaptive", "full@16", "plan", "full", "base", "full@64", "direct"]
    assert sorted(modes, key=mode_rank) == ["base", "direct", "full", "full@64", "full@16", "plan", "adaptive"]
