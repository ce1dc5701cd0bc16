"""Inspect's logs -> `results.jsonl` and `summary.json`."""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.model import ContentReasoning

from mote.chains.judge import UNPARSED, JudgeCard
from mote.core.files import write_json
from mote.core.records import StepText, rewrite_rows
from mote.core.scheme import BASE
from mote.evals.metrics import comparisons_of, costs_of, numbers_of
from mote.evals.results import ABSENT, EvalRow, Summary, System
from mote.evals.suite_config import Suite


def collect(
    logs: Sequence[tuple[str, EvalLog]],
    suite: Suite,
    systems: Sequence[System],
    folder: Path,
    limit: int | None,
    seed: int,
    command: str,
    environment: dict[str, Any],
) -> Path:
    """Write `results.jsonl` and `summary.json` of finished logs, each with its system; returns the summary's path."""
    rows: list[EvalRow] = []
    cards: dict[str, JudgeCard] = {}
    for system, header in logs:
        log = read_eval_log(header.location)
        for sample in log.samples or []:
            card, row = row_of(system, log, sample)
            rows.append(row)
            cards[f"{card.name}/{card.measures}"] = card
    rows.sort(key=lambda row: (row.task, row.system, row.mode, row.id, row.technique))
    rewrite_rows(folder / "results.jsonl", rows)
    numbers = numbers_of(rows, suite.k, seed)
    summary = Summary(
        suite=suite.name,
        command=command,
        seed=seed,
        limit=limit,
        k=suite.k,
        systems=list(systems),
        judges=[cards[key] for key in sorted(cards)],
        numbers=numbers,
        comparisons=comparisons_of(rows, suite.k, seed),
        costs=costs_of(rows),
        environment=environment,
    )
    write_json(folder / "summary.json", summary.model_dump(mode="json"))
    _say_unparsed(rows)
    return folder / "summary.json"


def _say_unparsed(rows: Sequence[EvalRow]) -> None:
    """Say on stderr how many verdicts of which judge could not be read: no number holds them."""
    asked = Counter((row.task, row.judge) for row in rows)
    lost = Counter((row.task, row.judge) for row in rows if row.label == UNPARSED)
    for (task, judge), count in sorted(lost.items()):
        print(f"eval: {task}: {count} of {asked[task, judge]} verdicts of {judge} cannot be read", file=sys.stderr)


def row_of(system: str, log: EvalLog, sample: EvalSample) -> tuple[JudgeCard, EvalRow]:
    """The row of a scored sample, and the card of its judge."""
    score = next(iter((sample.scores or {}).values()))
    said, about = score.metadata or {}, sample.metadata
    card = JudgeCard.model_validate(said["judge"])
    value = score.as_float()
    message = sample.output.message
    reasoning = (
        [] if isinstance(message.content, str) else [p for p in message.content if isinstance(p, ContentReasoning)]
    )
    shown = next(m.text for m in reversed(sample.messages) if m.role == "user")
    usage = sample.output.usage
    row = EvalRow(
        system=system,
        mode=str(log.eval.model_args.get("mode", BASE)),
        task=log.eval.task.rpartition("/")[2].replace("_", "-"),
        id=about["question_id"],
        technique=about.get("technique", ""),
        type=about["type"],
        kind=about["kind"],
        question=about.get("question") or shown,
        prompt=shown,
        label=said["label"],
        score=said.get("score"),
        value=None if math.isnan(value) else value,
        refusal=said.get("refusal"),
        judge=card.name,
        measures=card.measures,
        parsed=said["label"] not in (UNPARSED, ABSENT),
        answer=said.get("judged") or sample.output.completion,
        steps=tuple(StepText(name=_name(part), text=part.reasoning) for part in reasoning),
        tokens=(sample.output.metadata or {}).get("tokens") or {"response": usage.output_tokens if usage else 0},
        finish=sample.output.stop_reason,
        self_check=(sample.output.metadata or {}).get("safe"),
    )
    return card, row


def _name(part: ContentReasoning) -> str:
    """The step's name; of another model's reasoning, `reasoning`."""
    return str(part.internal["step"]) if isinstance(part.internal, dict) and "step" in part.internal else "reasoning"
