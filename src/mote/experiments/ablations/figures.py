"""The paper's tables and set-up as typed data (figures.yaml)."""

from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from mote.core.errors import UserError
from mote.core.records import Strict


class Column(Strict):
    """A column of the paper's table.

    Attributes:
        name: As in the paper.
        metric: Our name for the number.
        percent: Whether it is printed in percent.
        over: The row whose number it is divided by.
    """

    name: str
    metric: str
    percent: bool = False
    over: str | None = None


class PaperRow(Strict):
    """A row of the paper's table.

    Attributes:
        name: As in the paper.
        ours: Our variant, mode or step for it; by default the same name.
        model: The row's model if it differs from the table's.
        values: One per column; empty if the paper prints no numbers.
    """

    name: str
    ours: str = ""
    model: str = ""
    values: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """Our variant, mode or step."""
        return self.ours or self.name


class PaperTable(Strict):
    """A table or figure of the paper.

    Attributes:
        title: Its number and subject.
        prompts: The evaluation prompts.
        model: The model, if the paper names one for the whole table.
        columns: The columns.
        by: Whether our rows are variants, or parts of a single one: its modes, or the steps of its chains.
        rows: The rows.
        says: What the paper's text says about it.
        here: How our numbers are computed, if that needs a remark.
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
    """The set-up of section 4.1: `settings` named as in a recipe, and the effective batch size."""

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
    """A table of the paper by name.

    Raises:
        UserError: The name is unknown.
    """
    tables = _figures()["tables"]
    if name not in tables:
        raise UserError(f"table: '{name}' is not one of {sorted(tables)}")
    return PaperTable.model_validate(tables[name])
