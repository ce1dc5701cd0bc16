"""What the paper prints, as typed data (figures.yaml)."""

from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from mote.core.errors import UserError
from mote.core.records import Strict


class Column(Strict):
    """A column of the paper's table.

    Attributes:
        name: As the paper has it.
        metric: Our name of the number.
        percent: Whether it is printed in percent.
        over: Row whose number is the unit.
    """

    name: str
    metric: str
    percent: bool = False
    over: str | None = None


class PaperRow(Strict):
    """A row of the paper's table.

    Attributes:
        name: As the paper has it.
        ours: What stands for it here; its name where none is given.
        model: The row's model, where it is not that of the table.
        values: One a column; none where the paper prints no numbers.
    """

    name: str
    ours: str = ""
    model: str = ""
    values: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """Variant, mode or step of ours."""
        return self.ours or self.name


class PaperTable(Strict):
    """A table or figure of the paper.

    Attributes:
        title: Its number and what it is about.
        prompts: What was asked.
        model: The model, where the paper names one for the whole table.
        columns: The columns.
        by: Whether our rows are variants, or parts of the only one: its modes, or the steps of its chains.
        rows: The rows.
        says: What the text says of it.
        here: How the numbers of ours are made, where that needs a word.
    """

    title: str
    prompts: str
    model: str = ""
    columns: tuple[Column, ...]
    by: Literal["variant", "part"] = "variant"
    rows: tuple[PaperRow, ...]
    says: str = ""
    here: str = ""


class PaperSetup(Strict):
    """The set-up of section 4.1: `settings` by their names in a recipe, and the batch of an update."""

    model: str
    questions: str
    judge: str
    settings: dict[str, float]
    batch: int


@cache
def _figures() -> dict[str, Any]:
    text = (resources.files("mote.experiments.ablations") / "figures.yaml").read_text(encoding="utf-8")
    figures: dict[str, Any] = yaml.safe_load(text)
    return figures


def paper_setup() -> PaperSetup:
    """The paper's set-up."""
    return PaperSetup.model_validate(_figures()["setup"])


def paper_table(name: str) -> PaperTable:
    """A table of the paper by its name.

    Raises:
        UserError: It is not one of those that are known.
    """
    tables = _figures()["tables"]
    if name not in tables:
        raise UserError(f"table: '{name}' is none of {sorted(tables)}")
    return PaperTable.model_validate(tables[name])
