"""The page of two reports, and its JSON file."""

import json
from pathlib import Path

from support.evals import RULE, small, write_evals
from support.reports import NASTY, Page, add_answers, add_chains, add_metrics, add_recipe

from mote.report.compare import TwoReports
from mote.report.compare_page import write_comparison


def test_page_and_json_hold_both_reports(tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for number, folder in enumerate(folders):
        folder.mkdir()
        add_recipe(folder)
        add_chains(folder)
        add_metrics(folder)
        add_answers(folder)
        write_evals(folder, small(number), [RULE.model_copy(update={"scale": NASTY})])
    out = tmp_path / "out" / "two.html"
    assert write_comparison(*folders, out) == tmp_path / "out" / "two.json"
    found = TwoReports.model_validate(json.loads((tmp_path / "out" / "two.json").read_text()))
    assert {row.part for row in found.numbers} == {"evaluation", "chains", "training", "answers"}
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == [] and NASTY in page.text and "img" not in [tag for tag, _ in page.tags]
    assert "script" not in [tag for tag, _ in page.tags] and "script-src" not in html
    for text in ("75.0\u202f%", "50.0\u202f%", "\u221225.0\u202fpoints", "held out: all", "with analysis"):
        assert text in page.text, text
    accepted = next(row for row in found.numbers if row.metric == "accepted")
    assert accepted.first and (accepted.first.n, accepted.first.method) == (7, "wilson")
