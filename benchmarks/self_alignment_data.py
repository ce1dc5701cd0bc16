"""The files of the self-alignment experiment (recipes/suites/self-align.yaml), drawn from upstream files with seed 0.

    python benchmarks/self_alignment_data.py --data path/to/upstream --out path/to/experiment

XSTest and JailbreakBench are copied whole; 40 StrongREJECT rows and 100 rows each of MMLU and GSM8K are drawn, with
their columns. Benign prompts are 40 of self-instruct's tasks without an input and of MT-Bench's first turns (writing,
science, humanities) with at most 25 words: plain requests that a small model can answer, `NOT_PLAIN` are left out. The
files are upstream's, so they never go into the repository.
"""

import argparse
import csv
import io
import json
import random
from pathlib import Path
from typing import Any, TypeVar

from mote.core.errors import UserError
from mote.core.files import write_atomic
from mote.core.records import Message, Question, rewrite_rows

SEED = 0
WHOLE = (
    "xstest/xstest_prompts.csv",
    "jailbreakbench/harmful-behaviors.csv",
    "jailbreakbench/benign-behaviors.csv",
)
DRAWN = {"strongreject/strongreject_dataset.csv": 40, "capability/mmlu.csv": 100, "capability/gsm8k.csv": 100}
BENIGN = "benign/questions.jsonl"
BENIGN_COUNT = 40
MOST_WORDS = 25
SUBJECTS = ("writing", "stem", "humanities")  # of MT-Bench
NOT_PLAIN = {
    **dict.fromkeys(
        [f"seed_task_{number}" for number in (21, 55, 80, 84, 90, 93, 112)],
        "a good answer need have none of its words, so that whether it was read cannot be told",
    ),
    "seed_task_27": "about a group of people",
    "seed_task_46": "asks for wrongdoing",
    "seed_task_56": "quotes a novel",
    "seed_task_88": "a form to fill in",
    "seed_task_101": "a translation",
    "seed_task_105": "about the answerer's life",
    "seed_task_106": "a notation of chess",
    "seed_task_133": "about the answerer's opinion",
    "seed_task_138": "a service that is gone",
    "seed_task_142": "legal advice",
}
ROOT = Path(__file__).resolve().parents[1]
_Item = TypeVar("_Item")


def draw(items: list[_Item], count: int) -> list[_Item]:
    """So many items in their order, all of a shorter list."""
    chosen = random.Random(SEED).sample(range(len(items)), min(count, len(items)))
    return [items[index] for index in sorted(chosen)]


def drawn_table(text: str, count: int) -> str:
    """A CSV text with so many of its rows."""
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([header, *draw(rows, count)])
    return table.getvalue()


def benign_questions(data: Path) -> list[Question]:
    """The pool of plain benign prompts: self-instruct's tasks first, then MT-Bench's turns."""
    found = []
    for row in rows_of(data / "self-instruct" / "seed_tasks.jsonl"):
        if row["id"] not in NOT_PLAIN and not any(instance["input"] for instance in row["instances"]):
            found.append(benign(f"self-instruct-{row['id']}", row["instruction"], "self-instruct"))
    for row in rows_of(data / "mt-bench" / "question.jsonl"):
        if row["category"] in SUBJECTS:
            found.append(benign(f"mt-bench-{row['question_id']}", row["turns"][0], "mt-bench"))
    return [question for question in found if len(question.text.split()) <= MOST_WORDS]


def benign(id_: str, text: str, source: str) -> Question:
    """A benign prompt."""
    return Question(id=id_, messages=(Message(role="user", content=text.strip()),), kind="benign", source=source)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_files(data: Path, out: Path) -> dict[str, int]:
    """Write all files; file -> number of its prompts.

    Raises:
        UserError: An upstream file is missing, or `out` is in the repository.
    """
    if out.resolve().is_relative_to(ROOT):
        raise UserError(f"out: {out} is in the repository, which never holds upstream files; give another folder")
    upstream = [*WHOLE, *DRAWN, "self-instruct/seed_tasks.jsonl", "mt-bench/question.jsonl"]
    if missing := [name for name in upstream if not (data / name).is_file()]:
        raise UserError(f"data: {data} lacks {', '.join(missing)}; get them from upstream")
    texts = {name: (data / name).read_text(encoding="utf-8") for name in WHOLE}
    texts |= {name: drawn_table((data / name).read_text(encoding="utf-8"), count) for name, count in DRAWN.items()}
    counts = {}
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out / name, text)
        counts[name] = len(list(csv.reader(io.StringIO(text, newline="")))) - 1
    chosen = draw(benign_questions(data), BENIGN_COUNT)
    (out / BENIGN).parent.mkdir(parents=True, exist_ok=True)
    rewrite_rows(out / BENIGN, chosen)
    return counts | {BENIGN: len(chosen)}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the upstream files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, outside of the repository")
    given = parser.parse_args()
    try:
        counts = write_files(given.data, given.out)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    for name, count in counts.items():
        print(f"{given.out / name}: {count}")


if __name__ == "__main__":
    main()
