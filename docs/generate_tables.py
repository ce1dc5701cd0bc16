"""Fill the tables of settings, fields and options in the pages from the code: `make docs`.

A table stands between `<!-- settings: ... -->` (or `fields:`, `keys:`, `options:`, `gpu:`, `bases:`) and
`<!-- end -->`; the rest of a page is prose. Descriptions are those of `Field(description=...)`, of `Attributes:` in a
docstring, and of the options' help.
"""

import importlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le, Lt
from check_models import bases_table
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mote.cli import mote
from mote.cli.options import WithCommands

DOCS = Path(__file__).parent
TABLE = re.compile(r"(<!-- (settings|fields|keys|options|gpu|bases): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def generated(page: str) -> str:
    """The page with its tables made anew."""
    return TABLE.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](*m[3].split())}\n\n{m[4]}", page)


# --- the kinds of tables


def settings_table(name: str, prefix: str = "") -> str:
    """Settings of a recipe's section; sections inside it have tables of their own."""
    model = model_of(name)
    rows = []
    for field, info in model.model_fields.items():
        if isinstance(info.default, BaseModel):
            continue
        meaning, _, cost = description(model, field).partition(" Cost: ")
        rows.append([f"`{prefix}{field}`", kind_text(info), default_text(info), meaning.removesuffix("."), cost])
    if not any(row[4] for row in rows):
        rows = [row[:4] for row in rows]
    return table(["Setting", "Type", "Default", "Meaning", "Cost"][: len(rows[0])], rows)


def fields_table(name: str, parent: str = "") -> str:
    """Fields of a row; without those of `parent`, whose rows begin alike."""
    model = model_of(name)
    inherited = model_of(parent).model_fields if parent else {}
    rows = [
        [f"`{field}`", type_text(info.annotation), description(model, field)]
        for field, info in model.model_fields.items()
        if field not in inherited
    ]
    return table(["Field", "Type", "Meaning"], rows)


def keys_table(name: str, *elsewhere: str) -> str:
    """Keys of a JSON object by dotted names; models named in `elsewhere` have tables of their own."""
    return table(["Key", "Meaning"], list(keys(model_of(name), {model_of(other) for other in elsewhere})))


def keys(model: type[BaseModel], elsewhere: set[type[BaseModel]], prefix: str = "") -> Iterator[list[str]]:
    """Name and meaning of every key, those of inner objects behind a dot."""
    for name, info in model.model_fields.items():
        if info.exclude:
            continue
        models = [part for part in parts_of(info.annotation) if issubclass(part, BaseModel)]
        named = [f"`{part.__name__}`" for part in models if part in elsewhere]
        meaning = description(model, name)
        yield [f"`{prefix}{name}`", f"{meaning}: {', '.join(named)}" if named else meaning]
        for part in models:
            if part not in elsewhere:
                yield from keys(part, elsewhere, f"{prefix}{name}.")


def options_table(*words: str) -> str:
    """Options of a command."""
    command = commands()[" ".join(words)]
    options = [param for param in command.params if isinstance(param, click.Option)]
    return table(["Option", "Meaning"], [option_row(option) for option in options])


def gpu_table(script: str, folder: str) -> str:
    """Every target of benchmarks/gpu.py with what each card gave.

    Args:
        script: The script.
        folder: Its JSON files, one of each part and card.
    """
    folder_of_scripts = str((DOCS.parent / script).parent)
    if folder_of_scripts not in sys.path:
        sys.path.append(folder_of_scripts)
    parts = importlib.import_module(Path(script).stem)
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((DOCS.parent / folder).glob("*.json"))]
    found = {
        (file["card"], target["name"]): target for file in files if not file["dry_run"] for target in file["targets"]
    }
    cards = sorted({card for card, _ in found}) or ["any GPU"]
    targets = [target for measures in parts.PARTS.values() for measure in measures for target in measure.targets]
    rows = [
        [target.name, target.text or "-", *(gpu_cell(found.get((card, target.name))) for card in cards)]
        for target in targets
    ]
    return table(["Measure", "Target", *cards], rows)


def gpu_cell(target: Mapping[str, Any] | None) -> str:
    """A measured target as text."""
    if target is None:
        return "not measured"
    quartiles = " ({:.4g} to {:.4g})".format(*target["quartiles"]) if "quartiles" in target else ""
    return f"{target['value']:.4g}{quartiles}{' **not met**' if target['met'] is False else ''}"


TABLES: Mapping[str, Any] = {
    "settings": settings_table,
    "fields": fields_table,
    "keys": keys_table,
    "options": options_table,
    "gpu": gpu_table,
    "bases": bases_table,
}


# --- what they are made of


def model_of(name: str) -> type[BaseModel]:
    """The model of a dotted name."""
    module, _, attribute = name.rpartition(".")
    found: type[BaseModel] = getattr(importlib.import_module(module), attribute)
    return found


def description(model: type[BaseModel], field: str) -> str:
    """What a field means, with decisions as links.

    Raises:
        ValueError: Neither the field nor the docstring of its model says it.
    """
    for owner in model.__mro__:
        text = model.model_fields[field].description or documented(owner).get(field)
        if text:
            text = re.sub(r"\s+", " ", text).strip().removesuffix(".")
            text = re.sub(r"(?:docs/)?\b(\w+)\.md", r"[\1](\1.md)", text)
            return re.sub(r"decision (\d+)", lambda m: f"[{m[0]}]({decision_page(int(m[1]))})", text)
    raise ValueError(f"{model.__name__}.{field} has no description; add it to Attributes in the docstring")


def decision_page(number: int) -> str:
    """The page of a decision, as the pages beside this script link it."""
    return str(next(DOCS.glob(f"decisions/{number:04}-*.md")).relative_to(DOCS))


def documented(model: type) -> dict[str, str]:
    """The `Attributes:` of a Google-style docstring."""
    _, _, section = (inspect.cleandoc(model.__doc__ or "") + "\n").partition("Attributes:\n")
    return {
        m[1]: m[2] for m in re.finditer(r"^ {4}(\w+): (.*?)(?=\n {4}\w|\n\S|\Z)", section, re.DOTALL | re.MULTILINE)
    }


def kind_text(info: FieldInfo) -> str:
    """Type and limits of a setting."""
    signs = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))
    limits = [f", {sign} {getattr(m, name):g}" for kind, name, sign in signs for m in info.metadata if type(m) is kind]
    return type_text(info.annotation) + "".join(limits)


def type_text(kind: Any) -> str:
    """A type as the pages write it."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_text(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (tuple, list):
        return f"list of {type_text(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"object of {type_text(get_args(kind)[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"`{kind.__name__}`"
    return {str: "string", int: "integer", float: "number", bool: "boolean", Any: "any"}[kind]


def parts_of(kind: Any) -> list[type]:
    """The classes that a type is made of."""
    return (
        [kind]
        if isinstance(kind, type) and not get_args(kind)
        else [found for part in get_args(kind) for found in parts_of(part)]
    )


def default_text(info: FieldInfo) -> str:
    """The default of a setting, as a recipe writes it."""
    return "required" if info.is_required() else f"`{json.dumps(info.default, ensure_ascii=False)}`"


def commands(group: click.Group = mote, prefix: str = "") -> dict[str, click.Command]:
    """All commands by the words they are called with; a group stands for those in it."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        words = f"{prefix}{name}"
        found |= commands(command, f"{words} ") if isinstance(command, click.Group) else {words: command}
        if isinstance(command, WithCommands):
            found |= {f"{words} {inner}": own for inner, own in command.commands.items()}
    return found


def option_row(option: click.Option) -> list[str]:
    """Names and help of an option, with its choices and default."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    text = (option.help or "").removesuffix(".")
    if isinstance(option.type, click.Choice) and not all(choice in text for choice in option.type.choices):
        text += ": " + ", ".join(f"`{choice}`" for choice in option.type.choices)
    default = option.to_info_dict()["default"]
    if option.required:
        text += " (required)"
    elif isinstance(default, (str, int, float)) and not option.is_flag and option.show_default:
        text += f" (default `{default}`)"
    return [names, text]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def main() -> None:
    """Write every page whose tables are not those of the code."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := generated(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.name}")


if __name__ == "__main__":
    main()
