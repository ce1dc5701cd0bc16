"""Two reports compared: paired on the same prompts, from their intervals elsewhere, and not at all across judges."""

from pathlib import Path

import pytest
from support.evals import HARM, RULE, judged, small, write_evals

from mote.core.errors import UserError
from mote.evals.statistics import Estimate
from mote.report.compare import Compared, TwoReports, compare, independent
from mote.report.report_page import write_report


def number(found: TwoReports, metric: str, mode: str = "direct", task: str | None = None) -> Compared:
    (one,) = [
        row for row in found.numbers if (row.metric, row.mode) == (metric, mode) and task in (None, row.task)
    ]  # fmt: skip
    return one


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return write_evals(tmp_path / "a", small()), write_evals(tmp_path / "b", small(shift=2), seed=1)


def test_the_same_prompts_are_paired(two: tuple[Path, Path]) -> None:
    found = compare(*two)
    one = number(found, "refusal")
    assert one.first and one.second and (one.first.value, one.second.value) == (0.75, 0.25)
    assert one.difference and (one.difference.value, one.difference.method, one.difference.n) == (-0.5, "mcnemar", 4)
    assert one.judges == (RULE, RULE) and one.note == "" and one.difference.p == 0.5
    tokens = number(found, "tokens")
    assert tokens.difference and (tokens.difference.value, tokens.difference.n) == (0.0, 10)
    assert number(found, "refusal_on_unsafe").unparsed == (1, 1)


def test_only_differing_facts_are_listed(two: tuple[Path, Path]) -> None:
    assert {
        row.what: (row.first, row.second) for row in compare(*two).differs if not row.what.startswith("files.")
    } == {
        "seed": ("0", "1"),
        "evaluation.seed": ("0", "1"),
    }
    assert not compare(two[0], two[0]).differs


def test_only_common_prompts_are_paired(tmp_path: Path, two: tuple[Path, Path]) -> None:
    rows = [row for row in small(shift=2) if row.id != "h0"]
    moved = [row.model_copy(update={"question": "another"}) if row.id == "h1" else row for row in rows]
    one = number(compare(two[0], write_evals(tmp_path / "b", moved)), "refusal")
    assert one.difference and (one.difference.n, one.note) == (2, "on the prompts that both answered")


def test_report_json_alone_is_not_paired(two: tuple[Path, Path]) -> None:
    write_report(two[1])
    one = number(compare(two[0], two[1] / "report.json"), "refusal")
    assert one.difference and one.difference.method == "independent" and one.difference.p is None
    assert one.note == "not paired: a report.json holds no answers"
    assert one.difference.value == -0.5 and one.difference.low and one.difference.high
    assert one.difference.low < -0.5 < one.difference.high


def test_numbers_of_different_judges_are_not_subtracted(tmp_path: Path, two: tuple[Path, Path]) -> None:
    other = RULE.model_copy(update={"revision": "2"})
    one = number(compare(two[0], write_evals(tmp_path / "b", small(), [other])), "refusal")
    assert one.first and one.second and one.difference is None
    assert one.judges == (RULE, other) and one.note == "not subtracted: different judges"
    rows = [judged("base", "base", "hh-harm", "h0", "safe", judge="llm:big", measures="harm")]
    found = compare(two[0], write_evals(tmp_path / "b", rows, [HARM]))
    assert number(found, "harmless", "base").first is None and number(found, "refusal", "base").second is None
    assert {row.what for row in found.differs} >= {"judge.rule (refusal).name", "judge.llm:big (harm).name"}


def test_goodness_of_other_techniques_is_not_subtracted(tmp_path: Path, two: tuple[Path, Path]) -> None:
    rows = [row.model_copy(update={"technique": row.technique.replace("rot13", "hex")}) for row in small()]
    found = compare(two[0], write_evals(tmp_path / "b", rows))
    attacked, plain = number(found, "refusal@0.5"), number(found, "refusal")
    assert attacked.difference is None and attacked.note == "not subtracted: different techniques"
    assert plain.difference is not None


def test_interval_of_independent_differences() -> None:
    first = Estimate(value=0.5, low=0.4, high=0.6, n=9, method="wilson")
    second = Estimate(value=0.7, low=0.4, high=0.8, n=9, method="wilson")
    found = independent(first, second)
    assert found is not None
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - (0.3**2 + 0.1**2) ** 0.5)
    assert found.high == pytest.approx(0.2 + (0.1**2 + 0.1**2) ** 0.5)
    single = Estimate(value=1.5, low=None, high=None, n=1, method="none")
    without = independent(single, single)
    assert without is not None and (without.value, without.low, without.method) == (0.0, None, "none")
    assert independent(first, first.model_copy(update={"value": None})) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.json", None, "no.json does not exist; give a run folder or a report.json"),
        ("report.json", '{"name": "old"}', "report.json is not a report.json of this version .*; give the run folder"),
        ("report.json", "torn", "report.json is not a report.json of this version"),
    ],
)
def test_invalid_report_is_refused(
    two: tuple[Path, Path], tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        compare(two[0], tmp_path / name)
