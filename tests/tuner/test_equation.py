"""Every adapted layer against the paper's equation written out token by token, wherever the steps begin and end."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted, some_ids
from support.one_layer import OneLayer
from support.reference import slow_layer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import DataCollatorWithFlattening

from mote.models import linear as linear_module
from mote.models.linear import fast_matmul
from mote.tokens.routing import Markers, step_ids
from mote.tuner import MoteConfig, MoteModel, expert_weights
from mote.tuner.layer import MoteLinear


@pytest.fixture(params=["plain", "sped up", "run by run"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with PyTorch's matmul, with the fast one, and with the short runs of these rows one by one."""
    monkeypatch.setattr(linear_module, "ONEDNN_IS_FASTER", linear_module.HAS_ONEDNN)
    matmul = fast_matmul if request.param == "sped up" else linear
    for module in ("models.linear", "tuner.layer"):
        monkeypatch.setattr(f"mote.{module}.matmul_of", lambda _: matmul)
    if request.param == "run by run":
        monkeypatch.setattr(expert_weights, "_RUN_COST", 0)


def slow_steps(ids_B_T: list[list[int]], markers: Markers, documents_B_T: list[list[int]] | None = None) -> Tensor:
    """The step of each token, read one after the other."""
    rows = []
    for row, ids in enumerate(ids_B_T):
        step = 0
        steps = []
        for position, id_ in enumerate(ids):
            if documents_B_T and position and documents_B_T[row][position] != documents_B_T[row][position - 1]:
                step = 0
            if id_ in markers.turns:
                step = 0
            if id_ in markers.starts:
                step = markers.starts.index(id_) + 1
            steps.append(step)
        rows.append(steps)
    return torch.tensor(rows)


def check_layers(model: nn.Module, conf: MoteConfig, steps: Tensor, **call: Any) -> None:
    """Run the model, and compare each adapted layer's output with the loop over its tokens."""
    seen: list[tuple[MoteLinear, Tensor, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, MoteLinear)]
    handles = [
        layer.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0].clone(), out.clone())))
        for layer in layers
    ]
    with torch.no_grad():
        model(**call)
        for handle in handles:
            handle.remove()
        assert len(seen) == len(layers)
        for layer, x, out in seen:
            torch.testing.assert_close(out, slow_layer(layer, conf, x, steps), atol=1e-5, rtol=1e-5)


MIXED = [
    [5, 6, 64, 7, 8, 65, 66, 9, 67, 68, 10, 11],  # all steps
    [5, 68, 7, 69, 2, 9, 10, 64, 8, 65, 68, 12],  # a second turn
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],  # the question alone
]
CASES: dict[str, tuple[list[list[int]], list[list[int]] | None]] = {
    "mixed steps": (MIXED, None),
    "empty steps": ([[64, 66, 68, 64, 64, 5, 66, 68, 68, 7], [5, 64, 65, 66, 67, 68, 69, 2, 64, 68]], None),
    "a marker first and last": ([[68, 5, 6, 64], [64, 2, 2, 68]], None),
    "left-padded": ([[0] * 4 + row[:8] if i == 1 else row for i, row in enumerate(MIXED)], None),
    "right-padded": ([row[:8] + [0] * 4 if i == 0 else row for i, row in enumerate(MIXED)], None),
    "packed": (MIXED, [[0] * 4 + [1] * 3 + [2] * 5, [0] * 12, [3] * 6 + [7] * 6]),
    "one token a document": (MIXED, [list(range(12))] * 3),
}


@pytest.mark.parametrize("changes", [{}, {"mix": 1.0}, {"question_expert": "guidance"}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_layer_equals_the_equation(case: str, changes: dict[str, Any]) -> None:
    rows, documents = CASES[case]
    model = adapted(**changes)
    conf = model.peft_config["default"]
    ids = torch.tensor(rows)
    steps = slow_steps(rows, conf.routing, documents)
    packed = {} if documents is None else {"document_ids": torch.tensor(documents)}
    check_layers(model, conf, steps, input_ids=ids, attention_mask=(ids != 0).long(), **packed)
    if case == "packed":  # a negative control
        with pytest.raises(AssertionError, match="not close"):
            check_layers(model, conf, steps, input_ids=ids)


@pytest.mark.parametrize("how", ["context_ids", "step_ids"])
@pytest.mark.parametrize("cut", [1, 4, 11])
def test_every_layer_equals_the_equation_behind_a_cache(cut: int, how: str) -> None:
    """The tokens behind a cache; their own ids hold no start marker."""
    model = adapted()
    ids = torch.tensor(MIXED)
    conf = model.peft_config["default"]
    steps = slow_steps(MIXED, conf.routing)[:, cut:]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :cut], use_cache=True).past_key_values
    known = {"context_ids": ids} if how == "context_ids" else {"step_ids": steps}
    check_layers(model, conf, steps, input_ids=ids[:, cut:], past_key_values=cache, **known)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model = adapted()
    ids = some_ids()[:2]
    pad = torch.zeros(2, 5, dtype=torch.long)
    none = torch.ones_like(ids)
    order = [pad, ids] if side == "left" else [ids, pad]
    mask = torch.cat([pad, none] if side == "left" else [none, pad], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(input_ids=torch.cat(order, dim=1), attention_mask=mask, position_ids=positions).logits
    kept = out[:, 5:] if side == "left" else out[:, :-5]
    torch.testing.assert_close(kept, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


PACKED = [[5, 64, 6, 7], [8, 9, 68], [10, 11, 12, 2, 66]]
IDS = torch.tensor([[id_ for row in PACKED for id_ in row]])
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
CALLS: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": POSITIONS},
    "documents": {"document_ids": DOCUMENTS},
    "both": {"document_ids": DOCUMENTS, "position_ids": POSITIONS},
    "a mask of ones": {"document_ids": DOCUMENTS, "attention_mask": torch.ones_like(IDS)},
    "a cache asked for": {"document_ids": DOCUMENTS, "use_cache": True},
}


@pytest.mark.parametrize("call", CALLS)
def test_packed_documents_are_isolated_in_every_call(call: str) -> None:
    model = adapted()
    with torch.no_grad():
        separate = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in PACKED])
        packed = model(input_ids=IDS, **CALLS[call]).logits[0]
        together = model(input_ids=IDS).logits[0]
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)
    assert (together - separate).abs().max() > 0.1  # the negative control


def test_padding_beside_documents_is_a_document() -> None:
    model = adapted()
    pad = torch.zeros(1, 2, dtype=torch.long)
    ids = torch.cat([pad, IDS, pad], dim=1)
    documents = torch.cat([pad, DOCUMENTS, pad + 2], dim=1)
    mask = torch.cat([pad, torch.ones_like(IDS), pad], dim=1)
    with torch.no_grad():
        separate = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in PACKED])
        packed = model(input_ids=ids, document_ids=documents, attention_mask=mask).logits[0, 2:-2]
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)


def test_positions_that_run_on_between_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="position_ids: they run on from one document"):
        adapted()(input_ids=IDS, document_ids=DOCUMENTS, position_ids=torch.arange(IDS.shape[1])[None])


def test_padding_free_rows_of_transformers_are_packed_documents() -> None:
    rows = [[5, 64, 6, 7], [8, 9, 68], [10, 11, 12, 2, 66]]
    collated = DataCollatorWithFlattening(return_seq_idx=True)([{"input_ids": row} for row in rows])
    ids, positions = collated["input_ids"], collated["position_ids"]
    documents = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5])
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]]
    model = adapted()
    conf = model.peft_config["default"]
    steps = slow_steps(ids.tolist(), conf.routing, documents.tolist())
    check_layers(model, conf, steps, input_ids=ids, position_ids=positions, use_cache=False)
    separate = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(separate), atol=1e-5, rtol=1e-5)
    # With a mask the caller sets the positions: a step that does not see another one starts at a lower position.
    check_layers(
        model, conf, slow_steps(ids.tolist(), conf.routing), input_ids=ids, position_ids=positions,
        attention_mask=torch.ones_like(ids),
    )  # fmt: skip


@st.composite
def schemes(draw: st.DrawFn) -> tuple[MoteConfig, list[list[int]], list[list[int]] | None]:
    """A scheme of steps, and rows of ids with documents or without."""
    names = [f"step{i}" for i in range(draw(st.integers(1, 5)))]
    ids = draw(st.permutations(range(16)))
    conf = MoteConfig(
        r=draw(st.integers(1, 4)),
        lora_alpha=draw(st.sampled_from([1, 4, 8])),
        target_modules=["linear"],
        experts=tuple(names),
        mix=draw(st.sampled_from([0.1, 0.5, 1.0])),
        question_expert=draw(st.sampled_from(["mean", *names])),
        markers={name: [ids[2 * i], ids[2 * i + 1]] for i, name in enumerate(names)},
        turn_ids=ids[10 : 10 + draw(st.integers(0, 2))],
        init_weights=False,
    )
    length = draw(st.integers(1, 14))
    row = st.lists(st.integers(0, 15), min_size=length, max_size=length)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    if not draw(st.booleans()):
        return conf, rows, None
    begins = st.lists(st.booleans(), min_size=length, max_size=length)
    documents = [torch.tensor(draw(begins)).cumsum(0).tolist() for _ in rows]
    return conf, rows, documents


@settings(deadline=None, max_examples=150)
@given(schemes())
def test_any_scheme_equals_the_equation(
    drawn: tuple[MoteConfig, list[list[int]], list[list[int]] | None],
) -> None:
    conf, rows, documents = drawn
    markers = conf.routing
    assert markers is not None
    steps = slow_steps(rows, markers, documents)
    packed = {} if documents is None else {"document_ids": torch.tensor(documents)}
    assert torch.equal(step_ids(torch.tensor(rows), markers, packed.get("document_ids")), steps)
    model = MoteModel(OneLayer(16), conf, "default").eval()
    check_layers(model, conf, steps, input_ids=torch.tensor(rows), **packed)
