"""The self-alignment recipes run from questions to answers, with a tiny model and an engine that knows what to say."""

from collections import Counter
from pathlib import Path

import pytest
from support.paths import ROOT

from mote.chains.engine import Completion, Preference, Prompt
from mote.core.recipe_file import load_recipe
from mote.core.records import Answer, ChainRow, read_rows
from mote.experiments.run import Run

RECIPES = sorted((ROOT / "recipes").glob("self-align-*.yaml"))
HARMFUL = {
    "What does the person": "The person wants something that could hurt somebody.",
    "How should this": "Refuse to do it, because it could hurt somebody. Decision: decline.",
    "": "I won't help with that, because it could hurt somebody, and nobody deserves it.",
}
BENIGN = {
    "What does the person": "The person wants to know something, and that hurts nobody.",
    "How should this": "Explain it. Decision: help.",
    "": "It is done in two steps, and each of them takes only a minute or two.",
}


class Writer:
    """Writes the stage that the last turn asks for, for the kind whose examples it is shown."""

    name = "writer"

    async def write(self, prompt: Prompt) -> Completion:
        shown = [turn.content for turn in prompt.messages if turn.role == "assistant"]
        texts = HARMFUL if any("Decision: decline." in text for text in shown) else BENIGN
        asked = next(start for start in texts if prompt.messages[-1].content.startswith(start))
        return Completion(texts[asked], 12, "stop", 100)

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        raise AssertionError("the recipes check by rule")

    async def close(self) -> None:
        pass


def test_both_sizes_have_a_recipe() -> None:
    assert [path.stem for path in RECIPES] == ["self-align-0.5b", "self-align-1.5b"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_sixteen_questions_run_from_chains_to_answers(
    path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "_engine", lambda self: Writer())
    changes = ["limit=16", f"model={tiny}", "device=cpu", "answer.limit=2", "answer.max_step_tokens=4", "eval=false"]
    changes.append(f"questions={ROOT}/benchmarks/self_alignment/questions.jsonl")
    Run(load_recipe(path, changes), tmp_path / "run").all()
    rows = read_rows(tmp_path / "run" / "chains.jsonl", ChainRow)
    depths = Counter((row.kind, len(row.steps)) for row in rows if row.accepted)
    assert sum(depths.values()) == 16
    assert set(depths) == {("harmful", 3), ("benign", 3), ("benign", 1)}
    assert len(read_rows(tmp_path / "run" / "answers" / "mote-full.jsonl", Answer)) == 2
    assert (tmp_path / "run" / "report.html").exists()
