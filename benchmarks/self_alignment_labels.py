"""The offline refusal rule against labels by hand, on answers of the self-alignment experiment's models.

    python benchmarks/self_alignment_labels.py draw EVAL ANSWERS.csv             # 200 answers, without their systems
    python benchmarks/self_alignment_labels.py page ANSWERS.csv                  # as text to read, in the same order
    python benchmarks/self_alignment_labels.py record ANSWERS.csv LABELS.csv     # -> self_alignment/labels.jsonl
    python benchmarks/self_alignment_labels.py agree EVAL [--half sealed]        # -> self_alignment/judge.json

EVAL is the folder of `mote eval --out`. `draw` takes 100 answers of the base model and 100 of the adapter in the mode
`adaptive`, half of each to benign prompts, evenly over the tasks. LABELS.csv has the columns `id` and `label`: `c` for
full compliance (any answer that does not refuse, however useless), `p` for partial and `r` for full refusal, as in
XSTest. ANSWERS.csv holds texts and never goes into the repository. What is committed are labels with hashes. Half of
them, by a hash of the id, are sealed: `agree` shows disagreements of the open half only.
"""

import argparse
import asyncio
import csv
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

from mote.chains.judge import COMPLIANCE, FULL_REFUSAL, PARTIAL_REFUSAL
from mote.core.errors import UserError
from mote.core.files import write_json
from mote.core.machine import environment
from mote.core.records import Frozen, read_rows, rewrite_rows
from mote.core.scheme import ADAPTIVE, BASE
from mote.evals.attacks import UNDER_TECHNIQUES
from mote.evals.judges.agreement import agreement, as_json, judge_all, table
from mote.evals.judges.labels import Labelled
from mote.evals.judges.rule import RuleJudge
from mote.evals.metrics import OVER_REFUSAL
from mote.evals.results import EvalRow

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "self_alignment"
SEED, DRAWN = 0, 100  # answers of each system
COLUMNS = ("id", "prompt", "completion", "final_label")
LETTERS = {"c": COMPLIANCE, "p": PARTIAL_REFUSAL, "r": FULL_REFUSAL}
Half = Literal["open", "sealed"]


class Label(Frozen):
    """A label by hand.

    Attributes:
        id: `answer-` and a number from the hash of question and answer.
        label: `full_compliance`, `partial_refusal` or `full_refusal`.
        answer: sha256 of the answer.
        sealed: Whether the rule is never changed with this label in sight.
    """

    id: str
    label: str
    answer: str
    sealed: bool


def id_of(row: EvalRow) -> str:
    """The same for equal answers to a question, whoever gave them."""
    digest = sha256("\0".join([row.question, row.answer]))
    return f"answer-{int(digest[:8], 16)}"


def number_of(id_: str) -> int:
    """The number in an id."""
    return int(id_.rpartition("-")[2])


def sha256(text: str) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def results_of(folder: Path) -> list[EvalRow]:
    """The judged answers that may be drawn: not empty, of tasks whose judge measures refusal."""
    path = next((p for p in (folder / "results.jsonl", folder / "evals" / "results.jsonl") if p.exists()), None)
    if path is None:
        raise UserError(f"folder: {folder} holds no results.jsonl; give the folder of `mote eval --out`")
    tasks = {*OVER_REFUSAL, *UNDER_TECHNIQUES}
    return [row for row in read_rows(path, EvalRow) if row.task in tasks and row.answer.strip()]


def draw(rows: Sequence[EvalRow], system: str) -> list[EvalRow]:
    """So many answers of base model and system, half of each to benign prompts; in the order of their ids."""
    drawn: dict[str, EvalRow] = {}
    for name, mode in ((BASE, BASE), (system, ADAPTIVE)):
        for kind in ("benign", "harmful"):
            rest = [row for row in rows if (row.system, row.mode, row.kind) == (name, mode, kind)]
            fresh = [row for row in in_turn(rest) if id_of(row) not in drawn][: DRAWN // 2]
            if len(fresh) < DRAWN // 2:
                raise UserError(
                    f"folder: {len(fresh)} different answers of {name}/{mode} to {kind} prompts, {DRAWN // 2} are "
                    "needed; give a larger evaluation"
                )
            drawn |= {id_of(row): row for row in fresh}
    return [drawn[id_] for id_ in sorted(drawn, key=number_of)]


def in_turn(rows: Sequence[EvalRow]) -> Iterable[EvalRow]:
    """One of each task in turn, in a random order that the seed fixes; equal answers once."""
    unique = {id_of(row): row for row in rows}
    mixed = random.Random(SEED).sample([unique[id_] for id_ in sorted(unique)], len(unique))
    by_task = [[row for row in mixed if row.task == task] for task in sorted({row.task for row in rows})]
    return (row for row in chain.from_iterable(zip_longest(*by_task)) if row is not None)


def write_answers(rows: Sequence[EvalRow], path: Path) -> None:
    """The file to label.

    Raises:
        UserError: It would be in the repository.
    """
    if path.resolve().is_relative_to(ROOT):
        raise UserError(f"file: {path} is in the repository, which never holds these answers; give another path")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((id_of(row), row.question, row.answer, "") for row in rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def as_page(answers: Sequence[dict[str, str]]) -> str:
    """The answers as text."""
    return "\n".join(f"--- {row['id']}\n[question] {row['prompt']}\n[answer] {row['completion']}\n" for row in answers)


def recorded(answers: Sequence[dict[str, str]], labels: Sequence[dict[str, str]]) -> list[Label]:
    """Labels with the hashes of their answers.

    Raises:
        UserError: The labels are not one of `c`, `p`, `r` for each answer.
    """
    given = {row["id"]: row["label"].strip() for row in labels}
    wrong = [row["id"] for row in answers if given.get(row["id"]) not in LETTERS]
    if wrong or len(given) != len(answers) or len(labels) != len(answers):
        raise UserError(f"labels: give one row with c, p or r for each answer; see {wrong or 'rows of other answers'}")
    sealed = sorted(given, key=sha256)[: len(given) // 2]
    return [
        Label(
            id=row["id"], label=LETTERS[given[row["id"]]], answer=sha256(row["completion"]), sealed=row["id"] in sealed
        )
        for row in answers
    ]


def labelled(labels: Sequence[Label], rows: Sequence[EvalRow], half: Half) -> list[Labelled]:
    """The labels of a half with the texts that they are about.

    Raises:
        UserError: The evaluation does not have an answer, or it is another one.
    """
    texts = {id_of(row): row for row in rows}
    chosen = [label for label in labels if label.sealed == (half == "sealed")]
    lost = [one.id for one in chosen if one.id not in texts or sha256(texts[one.id].answer) != one.answer]
    if lost:
        raise UserError(
            f"folder: {len(lost)} of {len(chosen)} labelled answers are not in this evaluation, as {lost[0]}"
        )
    return [
        Labelled(
            number=number_of(one.id),
            question=texts[one.id].question,
            answer=texts[one.id].answer,
            label=one.label,
            columns={},
        )
        for one in chosen
    ]


def agree(rows: Sequence[Labelled], half: Half) -> dict[str, Any]:
    """Prints how far the rule agrees, and the disagreements of the open half; the report as JSON."""
    judge = RuleJudge()
    verdicts = asyncio.run(judge_all(judge, rows))
    report = agreement(judge.card, "xstest", rows, verdicts, SEED)
    print(table(report))
    for row, verdict in zip(rows, verdicts, strict=True):
        if half == "open" and row.label != verdict.label:
            print(f"\n--- answer-{row.number}: {row.label}, the rule says {verdict.label} ({verdict.raw})")
            print(f"[question] {row.question}\n[answer] {row.answer}")
    found: dict[str, Any] = json.loads(as_json(report))
    return found


def main() -> None:
    """Draw, show and record answers, or measure agreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["draw", "page", "record", "agree"])
    parser.add_argument("source", type=Path, help="EVAL, or ANSWERS.csv")
    parser.add_argument("file", type=Path, nargs="?", help="ANSWERS.csv to write, or LABELS.csv")
    parser.add_argument("--system", default="mote", help="name of the adapter in the evaluation")
    parser.add_argument("--half", choices=["open", "sealed"], default="open")
    parser.add_argument("--labels", type=Path, default=FOLDER / "labels.jsonl", help="the committed labels")
    parser.add_argument("--out", type=Path, default=FOLDER / "judge.json", help="JSON file of `agree`")
    given = parser.parse_args()
    if given.do in ("draw", "record") and given.file is None:
        parser.error(f"{given.do} needs two files")
    try:
        if given.do == "draw":
            write_answers(draw(results_of(given.source), given.system), given.file)
        elif given.do == "page":
            print(as_page(read_table(given.source)))
        elif given.do == "record":
            rewrite_rows(given.labels, recorded(read_table(given.source), read_table(given.file)))
        else:
            rows = labelled(read_rows(given.labels, Label), results_of(given.source), given.half)
            old = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
            write_json(given.out, old | {given.half: agree(rows, given.half), "environment": environment()})
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
