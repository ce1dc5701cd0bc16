"""Slots of a GGUF file with all steps: the mean of the markers seen so far is a slot of the open step."""

from importlib import resources

import pytest

from mote.core.scheme import Chain, load_scheme
from mote.tuner.gguf.slots import MOST_SLOTS, slot_plan

SCHEMES = [file.name.removesuffix(".yaml") for file in (resources.files("mote.core") / "schemes").iterdir()]
NESTED = [tuple("abcde"[:length]) + ("answer",) for length in range(6)]
CHAINS: dict[str, list[Chain]] = {
    **{name: list(load_scheme(name).depths.values()) for name in SCHEMES},
    "check": [*load_scheme("safety").depths.values(), ("response", "check")],
    "check-behind-every-chain": [(*chain, "check") for chain in load_scheme("safety").depths.values()],
    "five-nested": NESTED[:5],
    "six-nested": NESTED,
}


@pytest.mark.parametrize("name", CHAINS)
def test_mean_of_the_markers_is_a_slot_of_the_open_step(name: str) -> None:
    plan = slot_plan(CHAINS[name])
    assert plan is not None
    for chain in CHAINS[name]:
        for length in range(1, len(chain) + 1):
            mean = sum(plan.markers[step] for step in chain[:length]) / length
            assert plan.steps[int(mean)] == chain[length - 1] and mean == int(mean)
    used = [*plan.steps, *plan.markers.values()]
    assert plan.base not in [0, *used]
    assert max(plan.base, *used) <= plan.count <= MOST_SLOTS
    assert len(set(plan.markers.values())) == len(plan.markers)


def test_plan_with_fewest_slots_is_found() -> None:
    safety = list(load_scheme("safety").depths.values())
    plan = slot_plan(safety)
    assert plan is not None and plan.count == 5
    assert slot_plan(safety, most=4) is None


def test_chains_without_a_plan_are_found_quickly() -> None:
    assert slot_plan([*NESTED, ("a", "b", "c", "d", "e", "f", "answer")]) is None
