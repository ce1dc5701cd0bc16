"""Inspect logs -> `results.jsonl` and `summary.json`."""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.model import ContentReasoning

from mote.chains.judge import FULL_REFUSAL, PARTIAL_REFUSAL, UNPARSED, JudgeCard
from mote.core.files import write_json
from mote.core.records import StepText, rewrite_rows
from mote.core.scheme import BASE
from mote.evals.metrics import comparisons_of, costs_of, numbers_of
from mote.evals.results import ABSENT, EvalRow, Summary, System
from mote.evals.suite_config import Suite
from mote.evals.unreadable import cannot_be_read


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
    """Write `results.jsonl` and `summary.json` from finished logs.

    Args:
        logs: (name of the system, header of its log), one per task and mode.
        suite: The suite that was run.
        systems: The systems that were evaluated.
        folder: Output folder.
        limit: Maximum number of questions per task, None for all.
        seed: Seed of sampling and resampling.
        command: Command line, recorded in the summary.
        environment: Versions and machine, recorded in the summary.

    Returns:
        Path of `summary.json`.
    """
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
    summary = Summary(
        suite=suite.name,
        command=command,
        seed=seed,
        limit=limit,
        k=suite.k,
        systems=list(systems),
        judges=[cards[key] for key in sorted(cards)],
        numbers=numbers_of(rows, suite.k, seed),
        comparisons=comparisons_of(rows, suite.k, seed),
        costs=costs_of(rows),
        environment=environment,
    )
    write_json(folder / "summary.json", summary.model_dump(mode="json"))
    _report_unparsed(rows)
    return folder / "summary.json"


def _report_unparsed(rows: Sequence[EvalRow]) -> None:
    """Print to stderr how many verdicts of each judge could not be parsed; all metrics leave them out."""
    total = Counter((row.task, row.judge) for row in rows)
    unparsed = Counter((row.task, row.judge) for row in rows if row.label == UNPARSED)
    for (task, judge), count in sorted(unparsed.items()):
        print(f"eval: {task}: {count} of {total[task, judge]} verdicts of {judge} cannot be read", file=sys.stderr)


def row_of(system: str, log: EvalLog, sample: EvalSample) -> tuple[JudgeCard, EvalRow]:
    """Convert a scored sample to its judge's card and a result row."""
    score = next(iter((sample.scores or {}).values()))
    verdict = score.metadata or {}
    question = sample.metadata
    output = sample.output
    details = output.metadata or {}
    card = JudgeCard.model_validate(verdict["judge"])
    value = score.as_float()
    prompt = next(m.text for m in reversed(sample.messages) if m.role == "user")
    answer = verdict.get("judged") or output.completion
    refuses = bool({verdict["label"], verdict.get("refusal")} & {PARTIAL_REFUSAL, FULL_REFUSAL})
    row = EvalRow(
        system=system,
        mode=str(log.eval.model_args.get("mode", BASE)),
        task=log.eval.task.rpartition("/")[2].replace("_", "-"),
        id=question["question_id"],
        technique=question.get("technique", ""),
        type=question["type"],
        kind=question["kind"],
        question=question.get("question") or prompt,
        prompt=prompt,
        label=verdict["label"],
        score=verdict.get("score"),
        value=None if math.isnan(value) else value,
        refusal=verdict.get("refusal"),
        judge=card.name,
        measures=card.measures,
        parsed=verdict["label"] not in (UNPARSED, ABSENT),
        answer=answer,
        steps=_reasoning_steps(sample),
        tokens=details.get("tokens") or {"response": output.usage.output_tokens if output.usage else 0},
        finish=output.stop_reason,
        unreadable=not refuses and cannot_be_read(question["question"], prompt, answer)
        if "technique" in question
        else None,
        self_check=details.get("safe"),
    )
    return card, row


def _reasoning_steps(sample: EvalSample) -> tuple[StepText, ...]:
    """The reasoning before the answer, step by step; reasoning of other models is one step named `reasoning`."""
    content = sample.output.message.content
    if isinstance(content, str):
        return ()
    return tuple(
        StepText(name=_step_name(part), text=part.reasoning) for part in content if isinstance(part, ContentReasoning)
    )


def _step_name(part: ContentReasoning) -> str:
    return str(part.internal["step"]) if isinstance(part.internal, dict) and "step" in part.internal else "reasoning"
