"""Trained marker rows of the embedding and the output head: a few rows of an otherwise frozen matrix.

PEFT's trainable tokens hold, save and tie the rows, but copy the whole matrix in every forward pass and compute the
gradient of all of it. Here the frozen matrix is used as it is, and only the markers' rows are replaced.
Shapes: B row, T token, D model, V vocabulary, M markers.
"""

from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from typing_extensions import override


class MarkerRows(TrainableTokensLayer):
    """PEFT's layer with a forward pass that never copies the matrix."""

    @override
    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Embeddings (B, T, D) of ids x (B, T), or logits (..., V) of hidden states x (..., D)."""
        if self.disable_adapters or self.merged or not active_adapters:
            out: Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)
            return out
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in active_adapters:
            rows = _loaded(self.trainable_tokens_delta, name).to(result.device, result.dtype)
            ids = self.get_buffer(_row_ids(name)).to(result.device)
            if isinstance(self.base_layer, nn.Embedding):
                scale = self._get_embed_scale()
                result = put_embeddings(result, x, rows if scale is None else rows * scale.to(rows.dtype), ids)
            elif torch.compiler.is_compiling():
                result = put_logits(result, x, rows, self._bias(ids), ids)
            else:
                original = self.trainable_tokens_original[name].to(rows)
                result = PutLogits.apply(  # type: ignore[no-untyped-call]
                    result, x, rows, original, self._bias(ids), ids
                )
        return result

    def _bias(self, ids: Tensor) -> Tensor | None:
        if getattr(self.base_layer, "bias", None) is None:
            return None
        return _loaded(self.base_layer, "bias").to(ids.device)[ids]


def _loaded(module: Any, name: str) -> Tensor:
    """A module's parameter; if accelerate has offloaded it, which only a call of the module would undo, a copy."""
    parameter: Tensor = getattr(module, name)
    if not parameter.is_meta or not hasattr(module, "_hf_hook"):
        return parameter
    module._hf_hook.pre_forward(module)
    try:
        return getattr(module, name).detach().clone()  # type: ignore[no-any-return]
    finally:
        module._hf_hook.post_forward(module, None)


def put_embeddings(result: Tensor, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Embeddings (B, T, D) of token ids x (B, T), with `rows` (M, D) in place of those of `ids` (M)."""
    is_row = x[..., None] == ids
    return torch.where(is_row.any(-1, keepdim=True), is_row.to(rows.dtype) @ rows, result)


def put_logits(result: Tensor, x: Tensor, rows: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """Logits (..., V) of hidden states x (..., D), with those of `ids` (M) computed from `rows` (M, D).

    The reference of `PutLogits`.
    """
    return result.index_copy(-1, ids, linear(x.to(rows.dtype), rows, bias).to(result.dtype))


class PutLogits(torch.autograd.Function):
    """`put_logits` in place, without a copy of the logits or of their gradient.

    The frozen head's backward pass multiplies the gradient of all logits with its rows, `original` among them; the
    difference to the trained rows is added here.
    """

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, rows: Tensor, original: Tensor, bias: Tensor | None, ids: Tensor
    ) -> Tensor:
        """result (..., V), x (..., D), rows and original (M, D), bias (M), ids (M)."""
        result.index_copy_(-1, ids, linear(x.to(rows.dtype), rows, bias))
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, rows, original, ids)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """drows = (dlogits at ids)^T x; dx = (dlogits at ids) (rows - original), on top of the head's own."""
        x, rows, original, ids = ctx.saved_tensors
        own = grad.index_select(-1, ids).to(rows.dtype)
        own_N = own.reshape(-1, own.shape[-1])
        x_N = x.reshape(-1, x.shape[-1])
        return grad, (own @ (rows - original)).to(x.dtype), own_N.t() @ x_N.to(rows.dtype), None, None, None


def _row_ids(adapter: str) -> str:
    return f"row_ids_{adapter}"


def train_rows(model: nn.Module) -> None:
    """Give the model's trainable tokens this forward pass; to be called after each new adapter.

    PEFT makes the layers deep inside its injection, so they can only change class afterwards.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.__class__ = MarkerRows
            for name, ids in module.token_indices.items():  # as a buffer, which moves with the model
                on_device = torch.tensor(ids, device=module.base_layer.weight.device)
                module.register_buffer(_row_ids(name), on_device, persistent=False)
        elif isinstance(module, TrainableTokensWrapper) and getattr(module.original_module, "bias", None) is None:
            # PEFT's wrapper exposes the head's weight but not that its bias is None, which TRL's loss reads.
            module.register_parameter("bias", None)
