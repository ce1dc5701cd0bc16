"""Gradient checkpointing: a block that runs again in the backward pass reads the gates of its own forward pass.

It runs again maybe in another thread, and when other forward passes have run since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

if TYPE_CHECKING:
    from mote.tuner.router import Router

# Where transformers' blocks and torch's CheckpointWrapper keep the function that runs them checkpointed.
_NAMES = ("_gradient_checkpointing_func", "checkpoint_fn")


class _Bound:
    """A function that runs blocks checkpointed, with the gates of the moment bound to them."""

    def __init__(self, run: Callable[..., Any], router: Router) -> None:
        self.run, self.router = run, router

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.run(partial(self.router.run_with, self.router.calls(), block), *args, **kwargs)


def bind_checkpoints(model: nn.Module, router: Router) -> None:
    """Bind the gates into each block's checkpointing, whichever form the user switched on."""
    for module, name, run in _functions(model):
        if not isinstance(run, _Bound) or run.router is not router:
            setattr(module, name, _Bound(run, router))


def unbind_checkpoints(model: nn.Module, router: Router) -> None:
    """Take back what `bind_checkpoints` did."""
    for module, name, run in _functions(model):
        if isinstance(run, _Bound) and run.router is router:
            setattr(module, name, run.run)


def _functions(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Every function that runs a block checkpointed: its module, its name there and itself."""
    modules = [model]
    while modules:
        module = modules.pop()
        for name in _NAMES:
            if name in module.__dict__:
                yield module, name, module.__dict__[name]
        modules += [child for child in module.children() if not isinstance(child, BaseTunerLayer)]
