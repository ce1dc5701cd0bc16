"""Embedding rows for the markers: growing the embedding, and which rows to train."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# PEFT's `low_cpu_mem_usage` replaces it while it injects adapters; this module is imported before that.
_REGISTER_PARAMETER = nn.Module.register_parameter


def grow_embeddings(model: nn.Module, ids: Sequence[int], vocab_size: int | None) -> None:
    """Add embedding rows for the markers if there are too few.

    Markers on existing ids, reserved ones or the embedding's padding, change nothing. New rows start at the mean of the
    old ones plus noise that depends on the row's id only: they differ from each other and are unlikely anywhere. Marker
    rows are trained and saved separately, so growing again on loading restores the trained model.

    Args:
        model: The base model; one without an embedding is left alone.
        ids: The markers' ids.
        vocab_size: Rows that the tokenizer needs, None if unknown.

    Raises:
        ValueError: There are too few rows, and another adapter trains some of them.
    """
    embedding = _embedding(model)
    if embedding is None:
        return
    needed = max(vocab_size or 0, max(ids) + 1)
    rows = embedding.weight.shape[0]
    if rows >= needed:
        return
    if embedding is not _unwrapped(embedding):
        raise ValueError(
            f"markers={sorted(ids)}: they need {needed} embedding rows, and another adapter trains some of the "
            f"{rows}; call base.resize_token_embeddings({needed}) before the first adapter"
        )
    _resize(model, needed)
    for weight in {id(m.weight): m.weight for m in _matrices(model)}.values():
        fill_new_rows(weight, rows)


@torch.no_grad()
def fill_new_rows(weight: Tensor, rows: int) -> None:
    """Initialise the rows of an embedding or head from index `rows` on, by the old ones and each row's index."""
    mean = weight[:rows].float().mean(0)
    spread = weight[:rows].float().std()
    for row in range(rows, len(weight)):
        noise = torch.randn(len(mean), generator=torch.Generator().manual_seed(row)).to(mean.device)
        weight[row] = mean + 0.1 * spread * noise


def rows_to_train(model: nn.Module, ids: Sequence[int]) -> list[int] | dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` for the markers' rows, in the embedding and in an untied head.

    Returns:
        The ids if the head is tied to the embedding, else the ids by name of each matrix; None without an embedding.
    """
    if _embedding(model) is None:
        return None
    matrices = _matrices(model)
    weights = [_unwrapped(matrix).weight for matrix in matrices]
    if all(weight is weights[0] for weight in weights):
        return sorted(ids)
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return {names[matrix]: sorted(ids) for matrix in matrices}


def _unwrapped(matrix: Any) -> Any:
    """The matrix inside PEFT's wrapper, if an adapter trains some of its rows."""
    from peft.utils.other import (
        AuxiliaryTrainingWrapper,  # importing PEFT imports mote.tuner, which imports this module
    )

    return matrix.original_module if isinstance(matrix, AuxiliaryTrainingWrapper) else matrix


def _embedding(model: nn.Module) -> Any:
    get: Any = getattr(model, "get_input_embeddings", None)
    return get() if get else None


def _matrices(model: nn.Module) -> list[Any]:
    """The embedding, and the head if there is one."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return [matrix for matrix in (_embedding(model), head) if matrix is not None]


def _resize(model: nn.Module, rows: int) -> None:
    """Resize the embedding, even while PEFT's `low_cpu_mem_usage` puts all new parameters on the meta device."""
    patched = nn.Module.register_parameter
    nn.Module.register_parameter = _REGISTER_PARAMETER  # type: ignore[method-assign]
    try:
        model.resize_token_embeddings(rows, mean_resizing=False)  # type: ignore[operator]
    finally:
        nn.Module.register_parameter = patched  # type: ignore[method-assign]
