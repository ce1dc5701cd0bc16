"""The results page of the self-alignment experiment: tables are those of the numbers, harmful text is left out."""

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.evals import judged, write_evals
from support.scripts import benchmark

from mote.evals.results import EvalRow

MODES = {"base": ("base",), "mote": ("full", "adaptive")}


@pytest.fixture(scope="module")
def page() -> ModuleType:
    benchmark("self_alignment_results")
    return benchmark("self_alignment_page")


def answers() -> list[EvalRow]:
    """The base model complies and is wrong; the experts decline, help, and are right; `adaptive` is short."""
    rows = []
    for system, modes in MODES.items():
        for mode in modes:
            label = "full_compliance" if system == "base" else "full_refusal"
            answer = "<b>Sure</b>" if system == "base" else "<b>I can't help with that.</b>"
            tokens = {"response": 10 if mode == "adaptive" else 40}
            for n in range(8):
                for task in ("xstest", "jailbreakbench"):
                    rows.append(judged(system, mode, task, f"u{n}", label, answer=answer, tokens=tokens))
                    rows.append(judged(system, mode, task, f"s{n}", "full_compliance", kind="benign", tokens=tokens))
                if mode != "full":
                    right = {"value": float(system == "mote" or n > 0), "measures": "ability", "kind": "unknown"}
                    rows.append(judged(system, mode, "mmlu", f"m{n}", "right", **right))
    return rows


@pytest.fixture(scope="module")
def results(page: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = benchmark("self_alignment_results")
    folder = write_evals(tmp_path_factory.mktemp("eval"), answers())
    given = argparse.Namespace(model=page.LARGE, name=[], against=None, split="experiment")
    found: dict[str, Any] = script.results([script.read_evaluation(folder)], given)
    return found


def test_goals_are_compared_with_what_was_measured(page: ModuleType, results: dict[str, Any]) -> None:
    met = {bar["name"]: (bar["shown"], bar["met"]) for bar in page.bars(results)}
    assert met["refusal of unsafe prompts"] == ("+100.0 (+100.0 to +100.0) points", True)
    assert met["help with safe prompts"] == ("+0.0 (+0.0 to +0.0) points", True)
    assert met["tokens of `adaptive` over `full`"] == ("0.25 (0.25 to 0.25)", True)
    assert met["MMLU"][1] and met["help with disguised benign prompts"] == ("– points", False)  # noqa: RUF001


def test_tables_hold_the_numbers(page: ModuleType, results: dict[str, Any]) -> None:
    numbers = page.numbers_table(results).splitlines()
    assert any(
        line.startswith("| refuses unsafe prompts, XSTest | 0.0 (") and "| 8 | 40 → 10 |" in line for line in numbers
    )
    modes = page.modes_table(results).splitlines()
    assert [line.split(" | ")[-1] for line in modes[2:]] == ["40 |", "10 |", "40 |"]
    plot = page.plot(results["rows"])
    assert plot.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "var(" not in plot  # a file of its own


def test_methods_stand_beside_the_wider_lora(page: ModuleType, tmp_path: Path) -> None:
    script = benchmark("self_alignment_results")
    rows = [
        judged(system, "adaptive", "xstest", f"{n}", "full_refusal" if n < refused else "full_compliance")
        for system, refused in (("a", 3), ("b", 1), ("c", 2))
        for n in range(4)
    ]
    given = argparse.Namespace(
        model=page.SMALL, name=["a=lora-x2:0", "b=mote:0", "c=mote:1"], against="lora-x2", split="experiment"
    )
    found = script.results([script.read_evaluation(write_evals(tmp_path, rows))], given)
    table = [line.split(" | ") for line in page.methods_table(found).splitlines()[2:]]
    names = [["| `mote`", "0"], ["| `mote`", "1"], ["| `mote`", "mean"], ["| `lora-x2`", "0"]]
    assert [row[:2] for row in table] == names
    assert table[0][2].startswith("25.0 (") and table[0][5].startswith("-50.0 (") and table[0][5].endswith("p 0.50")
    assert table[2][2].startswith("37.5 (") and table[2][5] == table[3][5] == page.DASH


def test_an_answer_that_helps_with_harm_is_left_out(page: ModuleType) -> None:
    text = page.answers_table(answers())
    assert text.count("<details>") == 20 and "<b>I can" not in text
    assert text.count("complies; left out") == 10 and text.count("&lt;b&gt;I can") == 10


def test_the_page_has_the_tables_of_the_file(page: ModuleType) -> None:
    if not page.OUT.exists():
        pytest.skip("no experiment was committed yet")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, json.loads(page.OUT.read_text(encoding="utf-8")), None) == text


def test_text_around_tables_stays(page: ModuleType, results: dict[str, Any], tmp_path: Path) -> None:
    text = "Before.\n\n<!-- self-alignment: modes -->\nold\n<!-- end -->\nAfter.\n"
    filled = page.filled(text, results, None)
    assert filled.startswith("Before.") and filled.endswith("After.\n") and "old" not in filled
    assert page.filled(filled, results, None) == filled


def test_a_missing_result_is_named(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "OUT", tmp_path / "none.json")
    monkeypatch.setattr("sys.argv", ["self_alignment_page.py"])
    with pytest.raises(SystemExit, match=r"none\.json does not exist yet; run .*self_alignment_results\.py first"):
        page.main()
