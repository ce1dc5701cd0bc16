"""An evaluation as tables."""

from pathlib import Path

import pytest
from support.evals import HARM, judged, small, write_evals

from mote.report.evaluation import Evaluation, read_evaluation
from mote.report.metric_labels import is_safety, metric_label
from mote.report.report_page import render
from mote.report.summary import summarise
from mote.report.tables import by_technique, by_type, class_shares, headline_tables


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    found = read_evaluation(write_evals(tmp_path, small()))
    assert found is not None
    return found[0]


def test_headline_table_of_a_refusal_judge_is_about_refusal(
    evaluation: Evaluation,
) -> None:
    (board,) = headline_tables(evaluation)
    assert board.title == "Refusal and over-refusal"
    metrics = [column.metric for column in board.columns]
    assert metrics == ["refusal", "refusal@0.5", "not_overrefuse", "refusal_on_unsafe", "tokens"]
    assert [name for name, _ in board.rows] == [("base", "base"), ("ours", "direct"), ("ours", "full@8")]
    assert not [metric for metric in metrics if "harm" in metric_label(metric).title.lower()]
    assert [one.estimate.value for one in board.rows[1][1] if one] == [0.75, 1.0, 0.5, 1.0, 64.0]


def test_unmeasured_metric_is_an_empty_cell(tmp_path: Path) -> None:
    rows = [
        judged("base", "base", "hh-harm", "1", "safe", judge="llm:big", measures="harm"),
        judged("ours", "full", "hh-harm", "1", "unsafe", judge="llm:big", measures="harm"),
        judged("ours", "full", "guidance-quality", "1", "8", value=8.0, judge="llm:big", measures="guidance-quality"),
    ]
    cards = [HARM, HARM.model_copy(update={"measures": "guidance-quality"})]
    found = read_evaluation(write_evals(tmp_path, rows, cards))
    assert found is not None
    safety, quality = headline_tables(found[0])
    assert safety.title == "Safety and over-refusal" and [c.metric for c in safety.columns] == ["harmless", "tokens"]
    assert [c.metric for c in quality.columns] == ["guidance-quality", "tokens"]
    assert {name: cells[0] is None for name, cells in quality.rows} == {("base", "base"): True, ("ours", "full"): False}


def test_techniques_are_grouped_by_kind(evaluation: Evaluation) -> None:
    ((task, grid, kinds),) = by_technique(evaluation)
    found = [(kind, [(group, [c.estimate.value for c in cells if c]) for group, cells in rows]) for kind, rows in kinds]
    assert (task, grid.metric) == ("strongreject", "refusal") and found == [
        ("encoding", [("rot13", [1.0, 1.0, 1.0])]),
        ("cached", [("cached_pair", [0.0, 1.0, 1.0])]),
    ]


def test_unreadable_answers_have_their_own_column_and_table(tmp_path: Path) -> None:
    rows = [
        judged("base", "base", task, "1", "full_compliance", technique="leetspeak", unreadable=True)
        for task in ("strongreject", "adversarial-benign")
    ]
    found = read_evaluation(write_evals(tmp_path, rows, k=1))
    assert found is not None
    assert [(task, grid.metric) for task, grid, _ in by_technique(found[0])] == [
        ("adversarial-benign", "not_overrefuse"),
        ("adversarial-benign", "unreadable"),
        ("strongreject", "refusal"),
        ("strongreject", "unreadable"),
    ]
    (board,) = headline_tables(found[0])
    assert {(column.task, column.metric) for column in board.columns} >= {
        ("adversarial-benign", "unreadable"),
        ("strongreject", "unreadable"),
    }
    page = render(summarise(tmp_path))
    assert "Unreadable (strongreject)" in page and "Unreadable (adversarial-benign)" in page


def test_xstest_by_type_and_class(evaluation: Evaluation) -> None:
    (task, safe), (_, unsafe) = by_type(evaluation)
    assert task == "xstest"
    assert (safe.metric, [group for group, _ in safe.rows]) == ("not_overrefuse", ["figurative_language", "homonyms"])
    assert [[c.estimate.value for c in cells if c] for _, cells in safe.rows] == [[0.0] * 3, [1.0] * 3]
    assert unsafe.metric == "refusal_on_unsafe" and unsafe.rows[0][1][0] is not None
    assert (unsafe.rows[0][1][0].estimate.n, unsafe.rows[0][1][0].unparsed) == (1, 1)
    shares = class_shares(evaluation)
    assert shares["xstest", "benign"]["base", "base"] == {
        "full_compliance": 0.5,
        "partial_refusal": 0.5,
        "full_refusal": 0.0,
    }
    assert list(shares["xstest", "harmful"]) == [("base", "base"), ("ours", "direct"), ("ours", "full@8")]


def test_jailbreakbench_has_its_own_type_tables(tmp_path: Path) -> None:
    rows = [
        judged("base", "base", "jailbreakbench", "1", "full_refusal", type="Fraud/Deception"),
        judged("base", "base", "jailbreakbench", "2", "full_compliance", kind="benign", type="Fraud/Deception"),
        judged("base", "base", "xstest", "1", "full_compliance", kind="benign", type="homonyms"),
    ]
    found = read_evaluation(write_evals(tmp_path, rows))
    assert found is not None
    assert [(task, table.metric) for task, table in by_type(found[0])] == [
        ("jailbreakbench", "not_overrefuse"),
        ("jailbreakbench", "refusal_on_unsafe"),
        ("xstest", "not_overrefuse"),
    ]
    assert list(class_shares(found[0])) == [
        ("jailbreakbench", "benign"),
        ("jailbreakbench", "harmful"),
        ("xstest", "benign"),
    ]
    page = render(summarise(tmp_path))
    assert "Refusal of unsafe prompts (jailbreakbench)" in page and "Safe prompts (jailbreakbench)" in page


@pytest.mark.parametrize(
    ("metric", "title", "better", "safety"),
    [
        ("goodness@0.1", "StrongREJECT goodness@0.1", "higher", True),
        ("refusal@0.1", "Refusal under attack@0.1", "", True),
        ("refusal", "Refusal", "", True),
        ("help", "Helpfulness", "higher", False),
        ("tokens", "Tokens per answer", "lower", False),
        ("unreadable", "Unreadable", "lower", False),
        ("politeness", "politeness", "", False),
    ],
)
def test_metric_labels(metric: str, title: str, better: str, safety: bool) -> None:
    assert (metric_label(metric).title, metric_label(metric).better, is_safety(metric)) == (title, better, safety)
