"""Step ids computed chunk by chunk."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mote.serve.vllm.chunk_steps import chunk_steps, event_table
from mote.tokens.routing import Markers, step_ids

MARKERS = Markers(starts=(10, 12, 14), ends=(11, 13, 15), turns=(1,))
EVENTS = event_table(MARKERS, 17)


def in_chunks(texts: list[list[int]], cuts: list[int]) -> list[list[int]]:
    """Step ids of several texts, each cut at `cuts`; a batch holds one chunk of each."""
    written: list[list[int]] = [[] for _ in texts]
    for begin, end in zip([0, *cuts], [*cuts, max(map(len, texts))], strict=True):
        rows = [row for row, text in enumerate(texts) if text[begin:end]]
        chunks = [texts[row][begin:end] for row in rows]
        lengths = torch.tensor([len(chunk) for chunk in chunks], dtype=torch.long)
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        before = torch.tensor([written[row][-1] if begin else 0 for row in rows], dtype=torch.int8)
        ids = torch.tensor([id_ for chunk in chunks for id_ in chunk], dtype=torch.long)
        steps = chunk_steps(ids, first, before.repeat_interleave(lengths), EVENTS)
        for row, part in zip(rows, steps.split(lengths.tolist()), strict=True):
            written[row] += part.tolist()
    return written


text = st.lists(st.integers(0, 16), min_size=1, max_size=30)


@settings(deadline=None, max_examples=300)
@given(st.lists(text, min_size=1, max_size=4), st.sets(st.integers(1, 29)))
def test_chunking_does_not_change_step_ids(texts: list[list[int]], cuts: set[int]) -> None:
    longest = max(map(len, texts))
    found = in_chunks(texts, sorted(cut for cut in cuts if cut < longest))
    assert found == [step_ids(torch.tensor([ids]), MARKERS)[0].tolist() for ids in texts]


def test_event_table_maps_markers_to_steps() -> None:
    assert EVENTS[[10, 12, 14]].tolist() == [1, 2, 3] and EVENTS[1] == 0
    assert set(EVENTS[[0, 2, 11, 13, 15, 16]].tolist()) == {-1}
