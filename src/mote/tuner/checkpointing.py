"""Gradient checkpointing: a recomputed block uses the steps of its original forward pass.

The recomputation may run in another thread, after other forward passes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# Where transformers' blocks and torch's CheckpointWrapper keep the function that runs a block checkpointed.
_NAMES = ("_gradient_checkpointing_func", "checkpoint_fn")


class Forwards(Protocol):
    """The forward passes in progress in this thread, which can be put back in place later."""

    def forwards(self) -> Any:
        """The forward passes in progress."""

    def run_with(self, forwards: Any, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block as a part of these forward passes."""


class _Bound:
    """A checkpointing function that binds the forward passes in progress to each block it runs."""

    def __init__(self, run: Callable[..., Any], source: Forwards) -> None:
        self.run = run
        self.source = source

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.run(partial(self.source.run_with, self.source.forwards(), block), *args, **kwargs)


def bind_checkpoints(model: nn.Module, source: Forwards) -> None:
    """Bind the forward passes into every block's checkpointing, whichever form of it the user switched on."""
    for module, name, run in _functions(model):
        if not isinstance(run, _Bound) or run.source is not source:
            setattr(module, name, _Bound(run, source))


def unbind_checkpoints(model: nn.Module, source: Forwards) -> None:
    """Undo `bind_checkpoints`."""
    for module, name, run in _functions(model):
        if isinstance(run, _Bound) and run.source is source:
            setattr(module, name, run.run)


def _functions(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Every function that runs a block checkpointed: its module, its attribute name and itself."""
    modules = [model]
    while modules:
        module = modules.pop()
        for name in _NAMES:
            if name in module.__dict__:
                yield module, name, module.__dict__[name]
        modules += [child for child in module.children() if not isinstance(child, BaseTunerLayer)]
