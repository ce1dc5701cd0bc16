"""What is not the same in two runs: settings, judges, systems, versions, machine, files."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from mote.reporting.summary import Report


class Differing(BaseModel):
    """A setting, version, hash or fact that is not the same in both; empty where one has none."""

    model_config = ConfigDict(frozen=True)

    what: str
    first: str
    second: str


def differing(first: Report, second: Report) -> Iterator[Differing]:
    """All facts that are not the same in both, by dotted names."""
    a, b = _facts(first), _facts(second)
    for what in dict.fromkeys([*a, *b]):
        if a.get(what) != b.get(what):
            yield Differing(what=what, first=a.get(what, ""), second=b.get(what, ""))


def _facts(report: Report) -> dict[str, str]:
    """All that should be the same where only one thing was changed, by dotted names."""
    tree: dict[str, Any] = {"model": report.model, "scheme": report.scheme, "seed": report.seed}
    tree |= {"recipe": report.settings, "environment": report.environment, "files": report.files}
    if report.evaluation:
        its = report.evaluation
        tree["judge"] = {f"{card.name} ({card.measures})": card.model_dump(exclude={"measures"}) for card in its.judges}
        tree["system"] = {system.name: system.model_dump(exclude={"name"}) for system in its.systems}
        tree["evaluation"] = {"suite": its.settings or its.suite, "seed": its.seed, "limit": its.limit, "k": its.k}
        tree["evaluation"]["environment"] = its.environment
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif value is not None:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
