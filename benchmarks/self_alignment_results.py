"""Evaluations of the self-alignment experiment -> rows of benchmarks/self_alignment.json.

    python benchmarks/self_alignment_results.py runs/self-align-1.5b-eval --model Qwen/Qwen2.5-Coder-1.5B-Instruct
    python benchmarks/self_alignment_results.py runs/eval-a runs/eval-b --name lora-x2-1=lora-x2:1 --against lora-x2 ...

A system of an evaluation is a training method by its own name (`mote eval --adapter mote=FOLDER`) with seed 0, or what
`--name SYSTEM=METHOD:SEED` says. Three lists are written:

- `rows`: every number, with its interval and the mean tokens of its answers; `unsafe` and `safe` are the means over
  XSTest and JailbreakBench, each task with the same weight, `refusal` without a technique is the mean over all of them.
  `seed: null` is the mean over a method's seeds, prompt by prompt: its interval is about other prompts, not about other
  seeds.
- `differences`: paired, by prompt: every method and mode less the base model's, `adaptive` less `full` and `direct`,
  and with `--against METHOD` every method less that one with the same seed, in the same mode or in
  `adaptive`.
- `ratios`: of `adaptive` to `full` and `direct`, in safety and in tokens (over safe and unsafe prompts).

A run again replaces the rows of the same model, split, methods, seeds, modes and tasks. `--keep FOLDER` writes the
verdicts of every prompt without any text, as evaluation folders that can be given again, for instance the base model's.
"""

import argparse
import asyncio
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mote.chains.judge import COMPLIANCE
from mote.core.errors import UserError
from mote.core.files import write_atomic, write_json
from mote.core.machine import environment
from mote.core.methods import METHODS
from mote.core.records import Message, read_rows, rewrite_rows
from mote.core.scheme import ADAPTIVE, BASE
from mote.evals.attacks import UNDER_TECHNIQUES
from mote.evals.judges.rule import RuleJudge
from mote.evals.metrics import MetricScores, Scores, all_scores
from mote.evals.results import EvalRow, Summary
from mote.evals.scorers import value_of as value_of_verdict
from mote.evals.statistics import RESAMPLES, Estimate, Paired, estimate, paired

RULE = RuleJudge()
OUT = Path(__file__).parent / "self_alignment.json"
OVER_BOTH = {"refusal_on_unsafe": "unsafe", "not_overrefuse": "safe"}  # metric -> task of its mean over TASKS
TASKS = ("xstest", "jailbreakbench")
OTHER_MODES = ("full", "direct")  # that `adaptive` is compared with
ALL_PROMPTS = "safe and unsafe"  # task of the tokens over both kinds of prompts
OF_ROW = ("model", "split", "method", "seed", "mode", "task")  # what a run again replaces


class System(NamedTuple):
    """A trained model in a mode."""

    method: str
    seed: int | None  # None for the mean over its seeds
    mode: str


class Measure(NamedTuple):
    """A metric of a system: scores by prompt, in strata of equal weight (one but for means over two tasks)."""

    system: System
    task: str
    metric: str
    group: str
    judge: str
    strata: tuple[Scores, ...]
    tokens: tuple[Scores, ...]  # of the same answers, in the same strata


class Evaluated(NamedTuple):
    """An evaluation folder."""

    folder: Path
    summary: Summary
    rows: list[EvalRow]


def read_evaluation(folder: Path) -> Evaluated:
    """An evaluation, by the folder of `mote eval --out` or its `evals`; the refusal rule judges again, as it is now."""
    evals = folder if (folder / "summary.json").exists() else folder / "evals"
    if not (evals / "summary.json").exists():
        raise UserError(f"folder: {folder} holds no evaluation; give the folder of `mote eval --out`")
    summary = Summary.model_validate_json((evals / "summary.json").read_bytes())
    summary.judges = [RULE.card if judge.name == RULE.card.name else judge for judge in summary.judges]
    return Evaluated(folder, summary, [judged_again(row) for row in read_rows(evals / "results.jsonl", EvalRow)])


def judged_again(row: EvalRow) -> EvalRow:
    """A row whose judge is the refusal rule, with its verdict of today: all answers are judged by one revision.

    A row without its text keeps the verdict that it has.
    """
    if row.judge != RULE.card.name or not row.parsed or not row.answer:
        return row
    verdict = asyncio.run(RULE.judge([Message(role="user", content=row.question)], row.answer))
    update = {
        "label": verdict.label,
        "score": verdict.score,
        "value": value_of_verdict(verdict, RULE.card),
        "refusal": verdict.label,
        "unreadable": row.unreadable and verdict.label == COMPLIANCE,
    }
    return row.model_copy(update=update)


def keep(one: Evaluated, folder: Path) -> None:
    """Write an evaluation without the texts, which may help with harm and are not ours to copy."""
    no_text = {"question": "", "prompt": "", "answer": "", "steps": ()}
    rewrite_rows(folder / "results.jsonl", [row.model_copy(update=no_text) for row in one.rows])
    write_atomic(folder / "summary.json", one.summary.model_dump_json(indent=1) + "\n")


def named(names: Sequence[str], systems: Sequence[str]) -> dict[str, tuple[str, int]]:
    """System -> method and seed."""
    given = {}
    for name in names:
        system, _, text = name.partition("=")
        method, _, seed = text.partition(":")
        if not method or not (seed or "0").isdigit():
            raise UserError(f"name: '{name}' is not SYSTEM=METHOD:SEED; write for instance ours=mote:0")
        given[system] = (method, int(seed or 0))
    found = {system: given.get(system, (system, 0)) for system in systems}
    for system, (method, _) in found.items():
        if method not in {BASE, *METHODS}:
            raise UserError(f"name: '{system}' is no training method; add --name {system}=METHOD:SEED ({[*METHODS]})")
    if len({*found.values()}) < len(found):
        raise UserError(f"name: two systems are the same method and seed in {found}; tell them apart with --name")
    return found


def measures_of(evaluations: Sequence[Evaluated], names: Sequence[str]) -> list[Measure]:
    """All metrics of all systems; the base model's of a task that several folders have are the first folder's."""
    measures: dict[tuple[Any, ...], Measure] = {}
    systems = dict.fromkeys(row.system for one in evaluations for row in one.rows)
    methods = named(names, list(systems))
    for one in evaluations:
        for scored in all_scores(one.rows, one.summary.k):
            measure = measure_of(scored, System(*methods[scored.system], scored.mode))
            key = measure[:4]
            if key in measures and scored.system != BASE:
                raise UserError(f"folder: {one.folder} repeats {scored.task} of {scored.name}; name its system apart")
            measures.setdefault(key, measure)
    found = list(measures.values())
    found += over_techniques(found)
    found += over_seeds(found)
    return [*found, *over_both(found)]


def measure_of(scored: MetricScores, system: System) -> Measure:
    """A metric as it was scored, with the mean tokens of each prompt's answers."""
    tokens: dict[str, list[int]] = {}
    for row in scored.rows:
        tokens.setdefault(row.id, []).append(sum(row.tokens.values()))
    means = {id_: sum(counts) / len(counts) for id_, counts in tokens.items()}
    judge = scored.rows[0].judge
    return Measure(system, scored.task, scored.metric, scored.group, judge, (scored.scores,), (means,))


def over_techniques(measures: Sequence[Measure]) -> Iterator[Measure]:
    """Mean refusal over the techniques."""
    under: dict[tuple[System, str], list[Measure]] = {}
    for one in measures:
        if one.task in UNDER_TECHNIQUES and one.metric == "refusal" and one.group:
            under.setdefault((one.system, one.task), []).append(one)
    for parts in under.values():
        yield averaged(parts)._replace(group="")


def over_seeds(measures: Sequence[Measure]) -> Iterator[Measure]:
    """Means over the seeds of a method that was trained with several, of what each was asked."""
    trained = Counter(system._replace(seed=None) for system in {one.system for one in measures})
    by_method: dict[tuple[Any, ...], list[Measure]] = {}
    for one in measures:
        by_method.setdefault((one.system._replace(seed=None), *one[1:4]), []).append(one)
    for (system, *_), parts in by_method.items():
        if len(parts) == trained[system] > 1:
            yield averaged(parts)._replace(system=system)


def averaged(parts: Sequence[Measure]) -> Measure:
    """The first of the measures, with the mean over all of them of each prompt that they have in common."""

    def mean(runs: Sequence[Scores]) -> Scores:
        prompts = set.intersection(*({*scores} for scores in runs))
        return {key: sum(scores[key] for scores in runs) / len(runs) for key in runs[0] if key in prompts}

    scores = mean([part.strata[0] for part in parts])
    tokens = mean([part.tokens[0] for part in parts])
    return parts[0]._replace(strata=(scores,), tokens=(tokens,))


def over_both(measures: Sequence[Measure]) -> Iterator[Measure]:
    """Means over XSTest and JailbreakBench where both were run: refusal, compliance, and tokens by kind and in all."""
    found = {(one.system, one.metric, one.task): one for one in measures if not one.group}
    for system in dict.fromkeys(one.system for one in measures):
        tokens: tuple[Scores, ...] = ()
        for metric, task in OVER_BOTH.items():
            parts = [found[system, metric, name] for name in TASKS if (system, metric, name) in found]
            if len(parts) < len(TASKS):
                continue
            strata = tuple(scores for part in parts for scores in part.strata)
            its_tokens = tuple(scores for part in parts for scores in part.tokens)
            tokens += its_tokens
            yield Measure(system, task, metric, "", parts[0].judge, strata, its_tokens)
            yield Measure(system, task, "tokens", "", "", its_tokens, its_tokens)
        if len(tokens) == len(TASKS) * len(OVER_BOTH):
            yield Measure(system, ALL_PROMPTS, "tokens", "", "", tokens, tokens)


# --- statistics over strata


def resampled_means(strata: Sequence[Mapping[str, float]], seed: int) -> np.ndarray:
    """Bootstrap of the mean over strata, prompts drawn within their stratum.

    Strata with the same prompts are resampled alike, so that differences and ratios are paired.
    """
    draw = np.random.default_rng(seed)
    means = []
    for scores in strata:
        values_N = np.asarray([scores[key] for key in sorted(scores)], dtype=float)
        means.append(values_N[draw.integers(0, len(values_N), (RESAMPLES, len(values_N)))].mean(1))
    return np.asarray(np.mean(means, axis=0))


def mean_of(strata: Sequence[Mapping[str, float]]) -> float:
    """The mean over strata of their means."""
    return float(np.mean([np.mean([*scores.values()]) for scores in strata]))


def value_of(strata: Sequence[Scores], seed: int) -> Estimate:
    """A number as `mote eval` estimates it; the interval over strata comes from theirs (Zou and Donner 2008)."""
    parts = [estimate([*scores.values()], seed) for scores in strata]
    n = sum(part.n for part in parts)
    if len(parts) == 1 or not all(strata):
        return parts[0] if len(parts) == 1 else Estimate(value=None, low=None, high=None, n=n, method="none")
    value = mean_of(strata)
    if any(part.low is None for part in parts):  # a mean of one prompt
        return Estimate(value=value, low=None, high=None, n=n, method="none")
    below = math.hypot(*((part.value or 0) - (part.low or 0) for part in parts)) / len(parts)
    above = math.hypot(*((part.high or 0) - (part.value or 0) for part in parts)) / len(parts)
    return Estimate(value=value, low=value - below, high=value + above, n=n, method=parts[0].method)


def common(first: Sequence[Scores], second: Sequence[Scores]) -> tuple[list[Scores], list[Scores]]:
    """Both, with the prompts that both have."""
    both = [a.keys() & b.keys() for a, b in zip(first, second, strict=True)]
    return tuple(  # type: ignore[return-value]
        [{key: scores[key] for key in keys} for scores, keys in zip(strata, both, strict=True)]
        for strata in (first, second)
    )


def difference_of(first: Sequence[Scores], second: Sequence[Scores], seed: int) -> Paired:
    """Second less first, on the prompts that both have."""
    if len(first) == 1:
        return paired(first[0], second[0], seed)
    first, second = common(first, second)
    if not all(first):
        return Paired(difference=None, low=None, high=None, p=None, test="paired bootstrap", n=0)
    value = mean_of(second) - mean_of(first)
    resampled = resampled_means(second, seed) - resampled_means(first, seed)
    low, high = np.percentile(resampled, [2.5, 97.5])
    beyond = int(np.sum(np.abs(resampled - value) >= abs(value) - 1e-12))
    return Paired(
        difference=value,
        low=float(low),
        high=float(high),
        p=(beyond + 1) / (RESAMPLES + 1),
        test="paired bootstrap",
        n=sum(map(len, first)),
    )


# --- rows of the file


def number_row(one: Measure, shared: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A number."""
    found = value_of(one.strata, seed)
    return head(one, shared) | {
        "value": rounded(found.value), "lower": rounded(found.low), "upper": rounded(found.high), "n": found.n,
        "tokens": rounded(mean_of(one.tokens), 2), "judge": one.judge, "split": shared["split"],
    } | place(one)  # fmt: skip


def difference_row(one: Measure, reference: Measure, shared: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One measure less another."""
    found = difference_of(reference.strata, one.strata, seed)
    return head(one, shared) | against(reference) | {
        "value": rounded(found.difference), "lower": rounded(found.low), "upper": rounded(found.high),
        "p": rounded(found.p), "test": found.test, "n": found.n, "judge": one.judge, "split": shared["split"],
    } | place(one)  # fmt: skip


def ratio_row(one: Measure, reference: Measure, shared: Mapping[str, Any], seed: int) -> dict[str, Any] | None:
    """One measure in relation to another, on the prompts that both have; None where the other is 0."""
    first, second = common(reference.strata, one.strata)
    if not all(first) or not mean_of(first):
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = resampled_means(second, seed) / resampled_means(first, seed)
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return head(one, shared) | against(reference) | {
        "value": rounded(mean_of(second) / mean_of(first)), "lower": rounded(float(low)), "upper": rounded(float(high)),
        "n": sum(map(len, first)), "judge": one.judge, "split": shared["split"],
    }  # fmt: skip


def head(one: Measure, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What a row is about."""
    return {"model": shared["model"], **one.system._asdict(), "task": one.task, "metric": one.metric}


def against(reference: Measure) -> dict[str, Any]:
    """What a row compares with."""
    return {f"against_{key}": value for key, value in reference.system._asdict().items()}


def place(one: Measure) -> dict[str, Any]:
    """Technique, or type or kind of prompt; empty for a whole task."""
    return {"technique" if one.task in UNDER_TECHNIQUES else "group": one.group} if one.group else {}


def rounded(value: float | None, digits: int = 6) -> float | None:
    """A number as it stands in the file."""
    return None if value is None else round(value, digits)


def references(measures: Sequence[Measure], other: str | None) -> Iterator[tuple[Measure, Measure]]:
    """(measure, what it is compared with)."""
    found = {one[:4]: one for one in measures}
    for one in measures:
        method, seed, mode = one.system
        compared = [system for system in dict.fromkeys(m.system for m in measures) if system.method == BASE]
        if mode == ADAPTIVE:
            compared += [System(method, seed, other_mode) for other_mode in OTHER_MODES]
        if other:
            same = System(other, seed, mode)  # a method that answers in another mode is compared with `adaptive`
            compared.append(same if (same, *one[1:4]) in found else same._replace(mode=ADAPTIVE))
        for system in dict.fromkeys(compared):
            reference = found.get((system, *one[1:4]))
            if reference and method != BASE and system != one.system:
                yield one, reference


def results(evaluations: Sequence[Evaluated], given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The lists of the file."""
    shared = {"model": given.model, "split": given.split}
    seed = evaluations[0].summary.seed
    measures = measures_of(evaluations, given.name)
    found = {one[:4]: one for one in measures}
    ratios = []
    for one in measures:
        wanted = one.task in (*OVER_BOTH.values(), ALL_PROMPTS) and one.system.mode == ADAPTIVE
        for mode in OTHER_MODES:
            reference = found.get((one.system._replace(mode=mode), *one[1:4]))
            if wanted and reference and (row := ratio_row(one, reference, shared, seed)):
                ratios.append(row)
    methods = named(given.name, list(dict.fromkeys(row.system for one in evaluations for row in one.rows)))
    return {
        "rows": [number_row(one, shared, seed) for one in measures],
        "differences": [difference_row(*pair, shared, seed) for pair in references(measures, given.against)],
        "ratios": ratios,
        "runs": [run_row(one, methods, shared) for one in evaluations],
    }


def run_row(one: Evaluated, methods: Mapping[str, tuple[str, int]], shared: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation: what was judged by whom, with which weights and versions."""
    return {
        **shared,
        "suite": one.summary.suite,
        "methods": ["{}:{}".format(*methods[system.name]) for system in one.summary.systems],
        "fingerprints": [system.fingerprint for system in one.summary.systems],
        "k": one.summary.k,
        "seed": one.summary.seed,
        "limit": one.summary.limit,
        "answers": len(one.rows),
        "judges": [judge.model_dump() for judge in one.summary.judges],
        "environment": one.summary.environment,
    }


def merged(old: Mapping[str, Any], new: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The file with the new lists; rows of the same model, split, method, seed, mode and task are replaced."""
    lists: dict[str, Any] = {}
    for name, rows in new.items():
        keys = ("model", "split", "suite", "methods") if name == "runs" else OF_ROW

        def key(row: Mapping[str, Any], keys: tuple[str, ...] = keys) -> str:
            return json.dumps([row[part] for part in keys], sort_keys=True)

        replaced = {key(row) for row in rows}
        lists[name] = sorted([row for row in old.get(name, []) if key(row) not in replaced] + rows, key=key)
    return {"name": "self-alignment: a model before and after", **lists, "environment": environment()}


def main() -> None:
    """Add evaluations to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of `mote eval --out`, of one model")
    parser.add_argument("--model", required=True, help="the hub's id of the base model")
    parser.add_argument("--name", action="append", default=[], metavar="SYSTEM=METHOD:SEED")
    parser.add_argument("--against", metavar="METHOD", help="also compare every method with this one")
    parser.add_argument("--split", default="experiment", help="which rows of the sets were judged")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="also write the verdicts there, without texts")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    try:
        evaluations = [read_evaluation(folder) for folder in given.folders]
        new = results(evaluations, given)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    old = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    write_json(given.out, merged(old, new))
    for one in evaluations if given.keep else []:
        keep(one, given.keep / one.folder.name)
    print(f"{given.out}: {len(new['rows'])} rows, {len(new['differences'])} differences")


if __name__ == "__main__":
    main()
