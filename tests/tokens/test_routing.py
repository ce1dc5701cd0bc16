import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mote.tokens.routing import Markers, step_ids

MARKERS = Markers(starts=(10, 12, 14), ends=(11, 13, 15), turns=(1,))
token = st.integers(0, 16)


def by_hand(ids: list[int], documents: list[int] | None = None) -> list[int]:
    """The definition, read token by token."""
    steps = []
    step = 0
    for position, id_ in enumerate(ids):
        if documents and position and documents[position] != documents[position - 1]:
            step = 0
        if id_ in MARKERS.starts:
            step = MARKERS.starts.index(id_) + 1
        elif id_ in MARKERS.turns:
            step = 0
        steps.append(step)
    return steps


@settings(deadline=None, max_examples=200)
@given(st.lists(token, min_size=1, max_size=30))
def test_steps_are_those_of_the_last_marker(ids: list[int]) -> None:
    assert step_ids(torch.tensor([ids]), MARKERS)[0].tolist() == by_hand(ids)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=30))
def test_steps_restart_with_each_document(pairs: list[tuple[int, bool]]) -> None:
    ids = []
    documents = []
    number = 0
    for id_, new in pairs:
        number += new
        ids.append(id_)
        documents.append(number)
    found = step_ids(torch.tensor([ids]), MARKERS, torch.tensor([documents]))
    assert found[0].tolist() == by_hand(ids, documents)


@settings(deadline=None, max_examples=100)
@given(st.lists(token, min_size=2, max_size=20), st.data())
def test_steps_of_a_prefix_do_not_depend_on_the_rest(ids: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(ids)))
    whole = step_ids(torch.tensor([ids]), MARKERS)[0, :cut]
    assert torch.equal(whole, step_ids(torch.tensor([ids[:cut]]), MARKERS)[0])


def test_a_turn_marker_leads_back_to_the_question() -> None:
    ids = [3, 10, 4, 11, 14, 5, 15, 1, 6, 10, 7]
    assert step_ids(torch.tensor([ids]), MARKERS)[0].tolist() == [0, 1, 1, 1, 3, 3, 3, 0, 0, 1, 1]
