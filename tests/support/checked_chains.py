"""Chains whose answers were checked."""

from mote.core.records import ChainRow
from support.training import SCHEME, chains


def checked(count: int = 8) -> list[ChainRow]:
    """Chains whose first answer was unsafe where there is a second one."""
    found = []
    for chain in chains(count):
        depths = list(SCHEME.depths)[: len(chain.steps)]
        checks = [
            {"depth": depth, "answer": f"{depth} answer {chain.id}", "score": 0.5, "safe": depth == depths[-1]}
            for depth in depths
        ]
        found.append(ChainRow.model_validate({**chain.model_dump(), "checks": checks}))
    return found
