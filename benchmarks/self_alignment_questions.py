"""Training questions of the self-alignment recipes: mote:train, plain and wrapped.

Every plain question of mote:train is kept. Wrapped ones are drawn in addition with a fixed seed, with the same
wrappings for harmful and harmless questions (self_alignment/framings.yaml), and the rows are interleaved so that any
beginning of the file has about the same mix.

    python benchmarks/self_alignment_questions.py        # writes benchmarks/self_alignment/questions.jsonl
"""

import random
from itertools import cycle
from pathlib import Path

import yaml

from mote.core.records import Message, Question, rewrite_rows
from mote.questions.load import load_questions

FOLDER = Path(__file__).parent / "self_alignment"
SEED = 0
WRAPPED = {"harmful": 84, "looks": 36, "benign": 24}  # how many of each group are wrapped, multi-turn ones never


def group(question: Question) -> str:
    """`harmful`, `looks` (benign, and looks harmful) or `benign`."""
    return "looks" if "/looks-" in question.source else str(question.kind)


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


def main() -> None:
    """Write the questions."""
    rng = random.Random(SEED)
    plain = load_questions("mote:train", None, 20_000)
    framings = [(row["name"], row["text"]) for row in yaml.safe_load((FOLDER / "framings.yaml").read_text("utf-8"))]
    rows: list[tuple[float, Question]] = []
    for name in ("harmful", "looks", "benign"):
        own = [question for question in plain if group(question) == name]
        chosen = rng.sample([question for question in own if len(question.messages) == 1], WRAPPED[name])
        mixed = own + [wrapped(one, *framing) for one, framing in zip(chosen, cycle(framings), strict=False)]
        rng.shuffle(mixed)
        rows += [((place + rng.random()) / len(mixed), question) for place, question in enumerate(mixed)]
    rewrite_rows(FOLDER / "questions.jsonl", [question for _, question in sorted(rows, key=lambda row: row[0])])


if __name__ == "__main__":
    main()
