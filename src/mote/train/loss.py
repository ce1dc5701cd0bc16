"""Chunked cross-entropy over labelled tokens; never materialises the full logits, only one tile at a time.

The output head is frozen, so the forward pass can compute the gradient of the hidden states along with the loss: two
matmuls a tile, and no logits are kept for the backward pass.
Shapes: B row, T token, N labelled token, D model, V vocabulary, M trained row of the head.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from mote.models.linear import fast_matmul, is_linear
from mote.models.memory_estimate import TILE
from mote.models.shapes import LLAMA_LIKE
from mote.tokens.encode import IGNORED
from mote.tuner.experts import is_whole

Head = tuple[Tensor, Tensor | None, Tensor | None]  # weight (V, D), trained rows (M, D), their ids (M)


def token_losses(logits_B_T_V: Tensor, labels_B_T: Tensor) -> Tensor:
    """Cross-entropy of each token but the first (B, T-1); 0 where the label is `IGNORED`.

    The plain reference for `tiled_losses`.
    """
    logits = logits_B_T_V[:, :-1].transpose(1, 2).float()
    return cross_entropy(logits, labels_B_T[:, 1:], ignore_index=IGNORED, reduction="none")


def tiled_losses(model: nn.Module, inputs: dict[str, Any], labels_B_T: Tensor, head: Head) -> Tensor:
    """`token_losses` (B, T-1) of a model, one tile of logits at a time.

    Args:
        model: The PEFT model, or a distributed wrapper around it.
        inputs: Arguments of the forward pass.
        labels_B_T: Labels.
        head: `plain_head` of the model.
    """
    found: list[Tensor] = []
    decoder = next(module for module in model.modules() if isinstance(module, PeftModel)).get_base_model().get_decoder()
    hook = decoder.register_forward_hook(lambda *call: found.append(call[2].last_hidden_state))
    # The model's own head need not run. Given a number instead of positions, it would get a slice that is not
    # contiguous, for which PyTorch copies a frozen bfloat16 head on a CPU: seconds with a vocabulary of 150,000.
    first = torch.zeros(1, dtype=torch.long, device=labels_B_T.device)
    try:
        model(**inputs, logits_to_keep=first)
    finally:
        hook.remove()
    labels = labels_B_T[:, 1:]
    trained = labels != IGNORED
    losses_N: Tensor = TiledLoss.apply(found[0][:, :-1][trained], labels[trained], *head)  # type: ignore[no-untyped-call]
    return losses_N.new_zeros(labels.shape).masked_scatter(trained, losses_N)


def plain_head(model: nn.Module) -> Head | None:
    """The output head if it is one frozen matrix (some rows may be trained) and nothing follows it.

    None for other models, and for a head that is quantised, sharded or fully trained.
    """
    if not isinstance(model, PeftModel) or getattr(model.config, "model_type", None) not in LLAMA_LIKE:
        return None
    layer = model.get_base_model().get_output_embeddings()
    rows = ids = None
    if isinstance(layer, TrainableTokensWrapper):
        tokens = layer.token_adapter
        if tokens.disable_adapters or tokens.merged or len(tokens.active_adapters) != 1:
            return None
        name = tokens.active_adapters[0]
        layer = tokens.base_layer
        rows = tokens.trainable_tokens_delta[name]
        ids = torch.tensor(tokens.token_indices[name], device=rows.device)
    if not is_linear(layer) or layer.bias is not None:
        return None
    weight = layer.weight
    whole = is_whole(weight, weight.device) and (rows is None or is_whole(rows, weight.device))
    return (weight, rows, ids) if whole and not weight.requires_grad else None


class TiledLoss(torch.autograd.Function):
    """Cross-entropy of hidden states through a frozen head, some rows of which may be trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, weight: Tensor, rows: Tensor | None, ids: Tensor | None) -> Tensor:
        """x (N, D), labels (N), weight (V, D), rows (M, D), ids (M) -> losses (N) in float32."""
        wants_x = ctx.needs_input_grad[0]
        wants_rows = ctx.needs_input_grad[3]
        losses = x.new_empty(len(x), dtype=torch.float32)
        grad_x = torch.empty_like(x) if wants_x else None
        grad_logits = x.new_empty(len(x), 0 if ids is None else len(ids), dtype=torch.float32)  # of the trained rows
        given = None if rows is None else rows.to(x.dtype)
        change = None if given is None or ids is None else given - weight[ids]
        for begin in range(0, len(x), TILE):
            tile = slice(begin, begin + TILE)
            logits = fast_matmul(x[tile], weight)
            if given is not None and ids is not None:
                logits.index_copy_(-1, ids, x[tile] @ given.t())
            logits = logits.float()
            label = labels[tile, None]
            total = logits.logsumexp(-1, keepdim=True)
            losses[tile] = (total - logits.gather(-1, label)).squeeze(-1)
            if not (wants_x or wants_rows):
                continue
            # In place: from here on `logits` is its own gradient, the probability minus 1 at the label.
            logits.sub_(total).exp_().scatter_add_(-1, label, logits.new_full(label.shape, -1.0))
            if ids is not None:
                grad_logits[tile] = logits[:, ids]
            if grad_x is not None:
                grad_x[tile] = fast_matmul(logits.to(x.dtype), weight.t())
                if change is not None:
                    grad_x[tile] += grad_logits[tile].to(x.dtype) @ change
        ctx.save_for_backward(x if wants_rows else None, grad_x, grad_logits)
        ctx.rows_dtype = None if rows is None else rows.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass saved by the gradient of each token's loss."""
        x, grad_x, grad_logits = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x * grad[:, None].to(grad_x.dtype)
        grad_rows = None
        if x is not None:
            grad_rows = ((grad_logits * grad[:, None]).t().to(x.dtype) @ x).to(ctx.rows_dtype)
        return grad_x, None, None, grad_rows, None
