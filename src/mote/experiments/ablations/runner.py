"""Runs every variant with every seed: shared chains first, then training and evaluation in separate run folders."""

import sys
from pathlib import Path

from mote.chains.importing import import_chains
from mote.core.errors import UserError
from mote.core.files import write_atomic, write_json
from mote.core.machine import environment
from mote.core.recipe import Recipe
from mote.core.records import ChainRow, read_rows, rewrite_rows
from mote.core.scheme import load_scheme
from mote.experiments.ablations.ablation_recipe import Ablations, Variant
from mote.experiments.ablations.ablation_results import Result, markdown, summary_of
from mote.experiments.ablations.collect import measured
from mote.experiments.ablations.judged import check_tasks, evaluate
from mote.experiments.ablations.paper import beside_the_paper
from mote.experiments.run import Run


def run_ablations(wanted: Ablations, folder: Path, judge: str = "rule", data: Path | None = None) -> Result:
    """Make the shared chains, then train and evaluate every variant with every seed; existing results are reused.

    Args:
        wanted: The ablations.
        folder: Gets `shared/` with the chains, `<variant>/seed-<n>/` run folders, `ablations.json`, `ablations.md` and,
            with a table of the paper, `table.json` and `table.md`.
        judge: The judge of the tasks.
        data: Folder of the upstream files of the tasks; without it they ask `mote:test`.

    Raises:
        UserError: A setting cannot work, or the folder holds other runs.
    """
    runs = wanted.runs()
    check_tasks(wanted, judge, data)
    from mote.train import check_settings  # refuse wrong settings before the chains are made

    for _, recipe in runs:
        check_settings(recipe, load_scheme(recipe.scheme), folder)
    shared = folder / "shared"
    if any(variant.chains is None and not variant.own_scheme for variant in wanted.variants):
        Run(wanted.recipe, shared).chains()
    rows = []
    for number, (variant, recipe) in enumerate(runs, 1):
        print(f"ablations: {number}/{len(runs)}, {variant.name}, seed {recipe.seed}", file=sys.stderr)
        run = Run(recipe, folder / variant.folder / f"seed-{recipe.seed}")
        chains = _chains_of(wanted, variant, folder, run) if variant.kind != "prompted" else None
        if chains and variant.kind == "trained":
            adapter = run.train(chains)
            if not wanted.tasks:
                run.answer(adapter)
        summary = None
        if wanted.tasks and variant.kind != "chains":
            summary = evaluate(wanted, variant, recipe, run.folder, judge, data)
        rows.append(measured(variant, recipe, run.folder, chains, summary))
        result = Result(name=wanted.name, seeds=wanted.seeds, rows=tuple(rows), summary=summary_of(rows))
        _write(wanted, result, folder, judge, data)
    return result


def _write(wanted: Ablations, result: Result, folder: Path, judge: str, data: Path | None) -> None:
    """Write the results so far, so that an interrupted run keeps them."""
    here = environment()
    write_json(folder / "ablations.json", {**result.model_dump(mode="json"), "environment": here})
    write_atomic(folder / "ablations.md", markdown(result))
    if wanted.table:
        table = beside_the_paper(wanted, result, judge, data)
        write_json(folder / "table.json", {**table.model_dump(mode="json"), "environment": here})
        write_atomic(folder / "table.md", table.markdown())


def _chains_of(wanted: Ablations, variant: Variant, folder: Path, run: Run) -> Path:
    """The chains that a variant is trained on; with its own scheme they are made here, once for all seeds."""
    source = Path(variant.chains) if variant.chains else folder / "shared" / "chains.jsonl"
    if variant.own_scheme:
        own = Run(_with_scheme(wanted.recipe, run.recipe.scheme), folder / variant.folder / "shared")
        own.chains()
        source = own.folder / "chains.jsonl"
    if not source.exists():
        raise UserError(f"chains: {source} of the variant '{variant.name}' does not exist")
    if not variant.replies:
        return source
    path = run.folder / "chains.jsonl"
    replies = folder / variant.folder / "replies"
    if not replies.exists():
        import_chains(Path(wanted.recipe.questions), replies)
    given = {row.id: row for row in read_rows(replies / "chains.jsonl", ChainRow)}
    rows = [row for row in read_rows(source, ChainRow) if row.id in given]
    # Rejected chains stay rejected, so that both variants train on the same questions.
    rewrite_rows(path, [row.model_copy(update={"steps": given[row.id].steps, "checks": ()}) for row in rows])
    return path


def _with_scheme(recipe: Recipe, scheme: str) -> Recipe:
    return recipe.model_copy(update={"scheme": scheme})
