"""The chunked loss equals the plain cross-entropy in value and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.tiny import make_tiny_model
from torch import Tensor, nn

import mote
from mote.models.load import load_base
from mote.tokens.encode import IGNORED, add_markers
from mote.train import loss as loss_module
from mote.train.loss import TiledLoss, plain_head, tiled_losses, token_losses

STEPS = ("analysis", "response")


def trained(folder: Path, with_markers: bool = True) -> Any:
    """A model with random experts and changed marker rows."""
    base = load_base(str(folder), "cpu", "float32")
    config = mote.MoteConfig(r=4, experts=STEPS, draw_question_expert=False)
    if with_markers:
        add_markers(base.tokenizer, config, base.model)
    model = get_peft_model(base.model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Two rows with every marker, and labels on some tokens."""
    torch.manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 40))
    ids[0, 10:14] = torch.arange(model.config.vocab_size - 4, model.config.vocab_size)
    steps = torch.zeros_like(ids)
    steps[:, 8:], steps[:, 20:] = 1, 2
    labels = torch.where(torch.rand(ids.shape) < 0.6, ids, IGNORED)
    labels[0, 10:14] = ids[0, 10:14]
    return {"input_ids": ids, "step_ids": steps}, labels


def gradients(model: Any, losses: Tensor, weights: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("markers", [True, False])
def test_tiled_loss_and_gradients_equal_full_logits(
    tied: bool, markers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "TILE", 7)
    model = trained(make_tiny_model(tmp_path, tied=tied), markers)
    inputs, labels = batch(model)
    weights = torch.rand(2, 39)
    wanted = token_losses(model(**inputs).logits, labels)
    wanted_grads = gradients(model, wanted, weights)
    head = plain_head(model)
    assert head is not None and (head[1] is not None) == markers
    found = tiled_losses(model, inputs, labels, head)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    found_grads = gradients(model, found, weights)
    assert wanted_grads.keys() == found_grads.keys()
    assert any("trainable_tokens" in name for name in found_grads) == markers
    for name, grad in wanted_grads.items():
        largest = max(1.0, grad.abs().max().item())  # sums are rounded as their largest terms are
        torch.testing.assert_close(found_grads[name], grad, atol=1e-5 * largest, rtol=1e-4, msg=name)


def test_gradients_equal_numeric_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, rows = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (9, 11, 2))
    labels = torch.randint(11, (9,), generator=generator)
    labels[:2] = torch.tensor([3, 10])

    def sums(x: Tensor, rows: Tensor) -> Tensor:  # in float32 inside: a loose tolerance
        return TiledLoss.apply(x, labels, weight, rows, torch.tensor([3, 10])).double()  # type: ignore[no-untyped-call, no-any-return]

    assert torch.autograd.gradcheck(sums, (x.requires_grad_(), rows.requires_grad_()), eps=1e-2, atol=2e-3)


def test_batch_without_labels_has_zero_loss_and_a_gradient(tiny: Path) -> None:
    model = trained(tiny)
    inputs, labels = batch(model)
    head = plain_head(model)
    assert head is not None
    losses = tiled_losses(model, inputs, torch.full_like(labels, IGNORED), head)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert not losses.any()
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_no_gradients_are_computed_under_no_grad(tiny: Path) -> None:
    model = trained(tiny)
    inputs, labels = batch(model)
    head = plain_head(model)
    assert head is not None
    with torch.no_grad():
        found = tiled_losses(model, inputs, labels, head)
        wanted = token_losses(model(**inputs).logits, labels)
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_the_skipped_head_reads_no_strided_slice(tiny: Path) -> None:
    """PyTorch copies a frozen bfloat16 head on a CPU for one (findings/logits_to_keep_copies_the_head.sh)."""
    model = trained(tiny)
    inputs, labels = batch(model)
    head = plain_head(model)
    assert head is not None
    seen: list[Tensor] = []
    model.get_base_model().get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tiled_losses(model, inputs, labels, head)
    assert [(tuple(x.shape[:2]), x.is_contiguous()) for x in seen] == [((2, 1), True)]


def test_full_logits_are_never_materialised(tiny: Path) -> None:
    model = trained(tiny)
    inputs, labels = batch(model)
    head = plain_head(model)
    assert head is not None
    kept: list[int] = []  # elements of what is kept for the gradients, in what is as wide as the vocabulary

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and model.config.vocab_size in tensor.shape:
            kept.append(tensor.numel())
        return tensor

    all_logits = labels[:, 1:].numel() * model.config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tiled_losses(model, inputs, labels, head)
    assert max(kept, default=0) < all_logits
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_losses(model(**inputs).logits, labels)
    assert max(kept) >= all_logits


def test_trained_or_unknown_heads_use_the_plain_loss(tiny: Path) -> None:
    model = trained(tiny)
    model.get_base_model().get_output_embeddings().original_module.weight.requires_grad_(True)
    assert plain_head(model) is None
    other = trained(tiny)
    other.config.model_type = "gemma2"  # caps its logits behind the head
    assert plain_head(other) is None
    assert plain_head(nn.Linear(2, 2)) is None
