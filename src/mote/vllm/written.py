"""A second weight for batches that only write: the answer's experts are in it, and other steps get what differs.

On top of the weight that has the question's experts in it (`mote.vllm.merged`), a token of a step needs the columns of
all steps. Most batches have no question among them: these take a weight with what a token of the answer is given, the
step that most tokens are of. These need nothing more, and a token of another step needs its own columns and the
answer's. The other batches take the merged form.
Shapes: T token, N token with columns, E expert, R rank, S step, K kind (the steps, then the base model).
"""

import ctypes
from collections.abc import Mapping, MutableMapping
from typing import Any

import psutil
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from mote.tokens.routing import QUESTION
from mote.vllm import merged
from mote.vllm.experts import OnTop, Pair, parts_of
from mote.vllm.kernel import OwnColumns, compiled
from mote.vllm.merged import MergedExperts

SPARE = 0.5  # of the memory that is available once the model is loaded, second weights take no more
logger = init_logger("vllm.mote")


class WrittenGates(merged.MergedGates):
    """What the tokens of the running batch have to be given, and on top of which weight.

    Args:
        table: Gates of the question, of each step and of the base model's tokens (1 + S + 1, E*R).
        answer: The step that the user reads.
        kernel: See `mote.vllm.kernel.compiled`.

    Attributes:
        kernel: The same.
        answer: Gates of the answer (E*R,), which are in the second weight.
        own: What each kind of token differs from them by (K, E*R).
        writes: Whether the batch has no question.
        order: If so, the tokens (N,) of kinds that differ, kind by kind, and where each kind begins among them
            (K + 1,); None where there are none.
    """

    def __init__(self, table: Tensor, answer: int, kernel: ctypes.CDLL) -> None:
        super().__init__(table)
        self.kernel, self.answer = kernel, table[answer]
        self.own = table[QUESTION + 1 :] - self.answer
        self._needed = self.own.any(1)
        self.writes = False
        self.order: tuple[Tensor, Tensor] | None = None

    def set(self, steps: Tensor) -> None:
        """Take the gates of a batch whose tokens are in these steps (T,)."""
        self.writes, self.order = not bool((steps == QUESTION).any()), None
        if not self.writes:
            super().set(steps)
            return
        kinds, rows = (steps.long() - QUESTION - 1).sort(stable=True)
        needed = self._needed[kinds]
        kinds, rows = kinds[needed], rows[needed]
        if len(rows):
            self.order = rows, torch.searchsorted(kinds, torch.arange(len(self.own) + 1))


class WrittenExperts(OnTop):
    """The merged form and, for batches without a question, a second weight with the columns of each kind on top.

    Args:
        mixed: The merged form.
        gates: Of the running batch.
        written: The second weight (out, in).
        own: The columns.
    """

    def __init__(self, mixed: MergedExperts, gates: WrittenGates, written: Tensor, own: OwnColumns) -> None:
        super().__init__(mixed)
        self.name, self.mixed, self.gates, self.own = mixed.name, mixed, gates, own
        self.width = len(written)
        self.handlers = {True: _handler(written)}  # by whether a batch writes
        self.product = torch.ops._C.onednn_mm.default  # looked up once: this runs for every layer of every batch

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Lay the layer's weight out as vLLM does, but for outputs that the caller provides."""
        weight: Any = layer.weight
        self.handlers[False] = _handler(weight)
        layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs (T, out) of inputs x (T, in)."""
        out = x.new_empty(x.shape[0], self.width)  # here, where a compiled graph plans the memory
        if torch.compiler.is_compiling():
            torch.ops.vllm.mote_fill(out, x, bias, self.name)
        else:
            self.fill(out, x, bias)
        return out

    def fill(self, out: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """Write the outputs (T, out) of inputs x (T, in)."""
        gates = self.gates
        self.product(out, x, bias, self.handlers[gates.writes].handler_tensor)
        if not gates.writes:
            self.mixed.add(out, x)
        elif gates.order is not None:
            self.own.add(out, x, *gates.order)


def add_experts(
    layer: LinearBase, name: str, pairs: Mapping[int, Pair], gates: WrittenGates, layers: MutableMapping[str, Any]
) -> None:
    """Put experts on a layer as `mote.vllm.merged.add_experts` does, and a second weight beside its own."""
    parts = parts_of(layer, pairs, gates.answer)
    written = layer.weight.detach().clone()
    merged.merge(written, parts, gates.answer)
    merged.add_experts(layer, name, pairs, gates, layers)
    method = WrittenExperts(layer.quant_method, gates, written, OwnColumns(gates.kernel, parts, gates.own))
    layers[method.name] = layer.quant_method = method


def kernel_for(layers: int) -> ctypes.CDLL | None:
    """The kernel, where second weights of so many bytes can be had; where not, the log says why."""
    available = psutil.virtual_memory().available
    if not ops._supports_onednn or current_platform.is_zen_cpu():
        why = "vLLM multiplies with another library than oneDNN here"
    elif layers > SPARE * available:
        why = f"second weights of {layers / 1e9:.1f} GB are more than half of the {available / 1e9:.1f} GB available"
    else:
        try:
            return compiled()
        except RuntimeError as error:
            why = str(error)
    logger.warning("step experts: answers are written in the slower form: %s", why)
    return None


def _handler(weight: Tensor) -> Any:
    """A product of oneDNN with a weight (out, in), with as many kept forms as vLLM's own; it ends with this object."""
    return ops.create_onednn_mm(weight.t(), 32)


def _fill(out: Tensor, x: Tensor, bias: Tensor | None, name: str) -> None:
    get_forward_context().no_compile_layers[name].fill(out, x, bias)


def _fill_nothing(out: Tensor, x: Tensor, bias: Tensor | None, name: str) -> None:
    """What a graph is told of it: only that `out` changes."""


direct_register_custom_op(op_name="mote_fill", op_func=_fill, mutates_args=["out"], fake_impl=_fill_nothing)
