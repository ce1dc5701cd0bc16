"""`mote ablations`: several methods and seeds on the same chains; the paper's tables."""

from pathlib import Path

import click

from mote.cli.options import folder_of, locked, mote, options


@mote.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@options("out")
@click.option("--judge", default="rule", show_default=True, help="Judge of the tasks, as in mote eval.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Folder of the upstream files; without it mote:test is asked."
)
@click.option("--dry-run", is_flag=True, help="Print what would be trained, asked and judged, then exit.")
def ablations(
    recipe: Path, overrides: tuple[str, ...], out: Path | None, judge: str, data: Path | None, dry_run: bool
) -> None:
    """Compare the variants of a RECIPE, or reproduce a table of the paper: train, ask, judge, one table with intervals.

    KEY=VALUE overrides a setting of the recipe that all variants share; recipe=FILE uses another one, seeds=[0] and
    tasks=[hh-harm] replace those of the file. Run the same command again to resume.
    """
    from mote.experiments.ablations import load_ablations, run_ablations
    from mote.experiments.ablations.ablation_results import markdown

    wanted = load_ablations(recipe, overrides)
    if dry_run:
        from mote.experiments.ablations.dry_run import table

        print(table(wanted, judge, data))
        return
    folder = folder_of(out)
    with locked(folder):
        result = run_ablations(wanted, folder, judge, data)
    print((folder / "table.md").read_text(encoding="utf-8") if wanted.table else markdown(result))
