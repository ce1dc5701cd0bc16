"""`mote run` and its stages as commands: `chains`, `train`, `answer`, `report`."""

import json
from pathlib import Path
from typing import Any

import click

from mote.cli.options import WithCommands, file_of, folder_of, locked, mote, options, run_of, settings_of
from mote.core.errors import UserError
from mote.core.recipe_file import load_recipe


@mote.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@options("out")
@click.option("--dry-run", is_flag=True, help="Print stages, sizes, estimated memory and time, then exit.")
def run(recipe: Path, overrides: tuple[str, ...], out: Path | None, dry_run: bool) -> None:
    """Run a RECIPE: questions, chains, train, answer, eval, report.

    KEY=VALUE overrides a setting of the recipe, such as limit=32 or train.learning_rate=1e-4. The run folder is
    runs/<name of the recipe> by default; run the same command again to resume.
    """
    settings = load_recipe(recipe, overrides)
    if dry_run:
        from mote.experiments.plan import plan

        print(plan(settings).table())
        return
    folder = Path("runs") / settings.name if out is None else folder_of(out)
    with locked(folder):
        run_of(settings, folder).all()
    print(_summary(folder))


@mote.command(cls=WithCommands)
@options("recipe", "model", "questions", "engine", "seed", "limit", "out")
def chains(recipe: Path | None, overrides: tuple[str, ...], out: Path | None, **flags: Any) -> None:
    """Generate reasoning chains: questions -> OUT/chains.jsonl."""
    settings = settings_of(recipe, overrides, flags)
    folder = folder_of(out)
    with locked(folder):
        run_of(settings, folder).chains()


@mote.command()
@options("recipe", "model", "chains", "seed", "limit", "out")
@click.option("--engine", help="transformers: nothing else trains.")
def train(
    recipe: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    chains: Path | None,
    engine: str | None,
    **flags: Any,
) -> None:
    """Train step experts: chains -> OUT/adapter and OUT/metrics.jsonl."""
    if engine not in (None, "transformers") or "engine=llamacpp" in overrides:
        raise UserError(f"engine: {engine or 'llamacpp'} cannot train, only transformers can; leave it out")
    settings = settings_of(recipe, overrides, flags)
    folder = folder_of(out)
    source = chains or folder / "chains.jsonl"
    if not source.exists():
        raise UserError(f"chains: {source} does not exist; make it with `mote chains --out {folder}` or give --chains")
    with locked(folder, launched=True):
        run_of(settings, folder).train(source)


@mote.command()
@options("recipe", "model", "adapter", "questions", "mode", "answer-engine", "seed", "limit", "out")
def answer(
    recipe: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    adapter: str | None,
    modes: tuple[str, ...],
    questions: str | None,
    limit: int | None,
    **flags: Any,
) -> None:
    """Answer questions in one or more modes -> OUT/answers/<system>-<mode>.jsonl."""
    folder = folder_of(out)
    given = {"answer.questions": questions, "answer.limit": limit, "answer.modes": list(modes) or None}
    settings = settings_of(recipe, overrides, flags | given)
    with locked(folder):
        run_of(settings, folder).answer(Path(adapter) if adapter else folder / "adapter")


@mote.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path), help="HTML file of a comparison.  [default: comparison.html]")
def report(folder: Path, other: Path | None, out: Path | None) -> None:
    """Write FOLDER/report.json and FOLDER/report.html from the files of the run folder.

    With OTHER, compare two run folders or report.json files: one HTML page, and a JSON file of the same name.
    """
    if other is not None:
        from mote.report.compare_page import write_comparison

        page = file_of(out or Path("comparison.html"), ".html")
        write_comparison(folder, other, page)
        print(page)
        return
    from mote.report.report_page import write_report

    if out is not None:
        raise UserError(
            "out: a single report is written to its run folder; leave out --out, or give a second folder to compare"
        )
    if not folder.is_dir():
        raise UserError(f"report: {folder} is not a run folder; give the folder that `mote run` wrote")
    write_report(folder)
    print(folder / "report.html")


def _summary(folder: Path) -> str:
    """The stages as a table, and the path of the report."""
    stages = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["stages"]
    lines = ["", f"{'stage':<10}{'seconds':>10}{'peak MB':>10}  "]
    for stage in stages:
        note = "reused" if stage["reused"] else ""
        lines.append(f"{stage['stage']:<10}{stage['seconds']:>10.1f}{stage['peak_memory_mb']:>10}  {note}")
    return "\n".join([*lines, "", f"report: {folder / 'report.html'}"])
