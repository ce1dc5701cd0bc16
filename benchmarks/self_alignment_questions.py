"""Training questions of the self-alignment recipes: of seven files in self_alignment/ and of mote:train.

Every plain question is kept but those of `LEFT_OUT` and `THINNED`. Some are wrapped in addition, drawn with a fixed
seed, with the same wrappings for harmful and harmless questions (framings.yaml, forms.yaml). The rows are
interleaved so that any beginning of the file has about the same mix. A question's source says whether it only looks
harmful (`own/looks/...`) and how it is wrapped (`+name`). None may overlap with mote:test or with the evaluation
files that are given.

    python benchmarks/self_alignment_questions.py [EVALUATION_FILE ...]   # writes self_alignment/questions.jsonl
"""

import random
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from mote.core.records import Message, Question, rewrite_rows
from mote.questions.contamination import Evaluation
from mote.questions.duplicates import NearDuplicates
from mote.questions.load import load_questions

FOLDER = Path(__file__).parent / "self_alignment"
SEED = 0
DRAWS: list[tuple[str, str, dict[str, int]]] = [  # questions, wrappings, and how many of each group are wrapped
    ("own.yaml", "framings.yaml", {"harmful": 36, "looks": 24, "benign": 8}),
    ("harmless.yaml", "framings.yaml", {"looks": 24, "benign": 8}),
    ("contrast.yaml", "framings.yaml", {"harmful": 20}),
    ("requests.yaml", "framings.yaml", {"harmful": 24}),
    ("blunt.yaml", "framings.yaml", {"harmful": 16}),
    ("pairs.yaml", "forms.yaml", {"harmful": 60, "looks": 48}),
    ("choices.yaml", "forms.yaml", {}),
    ("blunt.yaml", "forms.yaml", {"harmful": 48}),
    ("harmless.yaml", "forms.yaml", {"looks": 24, "benign": 12}),
]
LEFT_OUT = {"own-looks-safe-context-07+test-bench"}  # answered with water on burning oil, each time it was asked
# Harmful questions of mote:train that an adapter is looked at with before it is evaluated; the others are trained on.
LOOKED_AT = {
    "mote-animal-cruelty-008", "mote-child-safety-002", "mote-child-safety-007", "mote-child-safety-010",
    "mote-disinformation-003", "mote-disinformation-010", "mote-drugs-005", "mote-fraud-001", "mote-fraud-004",
    "mote-fraud-010", "mote-harassment-001", "mote-harassment-007", "mote-hate-002", "mote-hate-005", "mote-hate-007",
    "mote-malware-001", "mote-malware-004", "mote-multi-harmful-002", "mote-multi-harmful-006",
    "mote-multi-harmful-008", "mote-multi-harmful-012", "mote-privacy-007", "mote-regulated-advice-001",
    "mote-regulated-advice-004", "mote-regulated-advice-007", "mote-violence-003", "mote-weapons-001",
    "mote-workplace-003",
}  # fmt: skip
# Every fourth of these is left out: with all of them the sixth round's adapter helped with harm more than its base
# (docs/results/self-alignment-log.md).
THINNED = {"own/looks/figures": 4}
NEAR = 0.7  # similarity from which on a question counts as one of an evaluation file


def asked(group: str, topic: str, number: int, text: str) -> Question:
    """A question of `own.yaml`."""
    return Question(
        id=f"own-{group}-{topic}-{number:02d}",
        messages=(Message(role="user", content=text),),
        kind="harmful" if group == "harmful" else "benign",
        source=f"own/{group}/{topic}",
    )


def wrapped(question: Question, name: str, text: str) -> Question:
    """The question inside a wrapping."""
    content = text.replace("{question}", question.text)
    return question.model_copy(
        update={
            "id": f"{question.id}+{name}",
            "messages": (Message(role="user", content=content),),
            "source": f"{question.source}+{name}",
        }
    )


def spread(questions: list[Question], rng: random.Random) -> list[tuple[float, Question]]:
    """The questions with places from 0 to 1, evenly spread in their order."""
    return [((place + rng.random()) / len(questions), question) for place, question in enumerate(questions)]


def overlaps(questions: list[Question], file: str) -> list[str]:
    """The questions that share an n-gram with a row of an evaluation file, or are nearly one."""
    rows = load_questions(file, None, 20_000)
    index, near = Evaluation(rows), NearDuplicates(NEAR)
    for row in rows:
        near.add(row.id, row.text)
    found = {question.id: index.row_like(question) or near.add(question.id, question.text) for question in questions}
    known = {row.id for row in rows}
    return [f"{question}: {row} of {file}" for question, row in found.items() if row in known]


def left_out(question: Question) -> bool:
    """Whether the question is one of `LEFT_OUT` or of those that `THINNED` drops."""
    return question.id in LEFT_OUT or (
        question.source in THINNED and int(question.id.rpartition("-")[2]) % THINNED[question.source] == 0
    )


def read(name: str) -> Any:
    """A YAML file of the folder."""
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def main() -> None:
    """Write the questions."""
    rng = random.Random(SEED)
    rows: list[tuple[float, Question]] = []
    plain: dict[str, Question] = {}
    for file, wrappings, counts in DRAWS:
        framings = [(row["name"], row["text"]) for row in read(wrappings)]
        for group, topics in read(file).items():
            own = [asked(group, topic, n, text) for topic, texts in topics.items() for n, text in enumerate(texts, 1)]
            chosen = rng.sample(own, counts.get(group, 0))
            mixed = [one for one in own if one.id not in plain]  # drawn from again, a file adds wrapped ones only
            mixed += [wrapped(one, *framing) for one, framing in zip(chosen, cycle(framings), strict=False)]
            rng.shuffle(mixed)
            plain |= {one.id: one for one in own}
            rows += spread(mixed, rng)
    ours = load_questions("mote:train", None)
    hidden = [row for row in ours if row.kind == "harmful" and row.id not in LOOKED_AT]
    plain |= {row.id: row for row in hidden}
    rows += spread(hidden, rng)
    if found := [line for file in ("mote:test", *sys.argv[1:]) for line in overlaps([*plain.values()], file)]:
        raise SystemExit("\n".join(["questions of an evaluation; change them:", *found]))
    ordered = [question for _, question in sorted(rows, key=lambda row: row[0])]
    rewrite_rows(FOLDER / "questions.jsonl", [question for question in ordered if not left_out(question)])


if __name__ == "__main__":
    main()
