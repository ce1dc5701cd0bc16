"""Carries the step of each token to the adapted layers, which see hidden states only.

A hook on the model turns ids into gates before every forward pass; the layers read the gates of their own thread.
Shapes: B row, T token, E expert, R rank.
"""

import functools
import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from mote.routing import QUESTION, document_starts, step_ids
from mote.tuner.config import MoteConfig
from mote.tuner.experts import Route

Routes = dict[tuple[str, int], Route]  # (adapter, rank) -> route


def gate_table(config: MoteConfig) -> Tensor:
    """Weight of every expert for a token of every step (the equation of section 3.2).

    Returns:
        (1 + steps, E): row 0 is the question at inference, row s is step s. Column 0 is the shared expert where
        there is one. Rows sum to 1.
    """
    steps = len(config.experts)
    own = torch.eye(steps)
    if config.question_expert == "mean":
        question = torch.full((1, steps), 1 / steps)
    else:
        question = own[[config.experts.index(config.question_expert)]]
    weights = config.mix * torch.cat([question, own])
    if config.shared:
        weights = torch.cat([torch.full((steps + 1, 1), 1 - config.mix), weights], dim=1)
    return weights


class Router:
    """The gates of the forward pass that runs in this thread, for every MoTE adapter of one model."""

    def __init__(self) -> None:
        self._configs: dict[str, MoteConfig] = {}
        self._ranks: dict[str, set[int]] = {}
        self._tables: dict[tuple[str, int, torch.device, torch.dtype], Tensor] = {}
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Router":
        copy = Router()
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"_configs": self._configs, "_ranks": self._ranks, "_tables": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def add(self, adapter: str, config: MoteConfig, rank: int) -> None:
        """Prepare gates for an adapter's layers of this rank; the scaling is folded into them."""
        self._configs[adapter] = config
        self._ranks.setdefault(adapter, set()).add(rank)

    def remove(self, adapter: str) -> None:
        """Forget a deleted adapter."""
        self._configs.pop(adapter, None)
        self._ranks.pop(adapter, None)
        self._tables = {key: table for key, table in self._tables.items() if key[0] != adapter}

    def _table(self, adapter: str, rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weights of all columns of an adapter's layers (1 + steps, E*R)."""
        key = adapter, rank, device, dtype
        if key not in self._tables:
            config = self._configs[adapter]
            scaling = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
            table = gate_table(config).mul(scaling).repeat_interleave(rank, dim=1)
            self._tables[key] = table.to(device, dtype)
        return self._tables[key]

    def route(self, adapter: str, rank: int) -> Route:
        """What the layers of an adapter and a rank need to know of the running forward pass.

        Raises:
            RuntimeError: The model was not called through the module the adapter was put on, or without ids.
        """
        routes: Routes | None = getattr(self._local, "routes", None)
        if routes is None or (adapter, rank) not in routes:
            raise RuntimeError(
                "mote: the step of each token is unknown: call the model with `input_ids` (its tokenizer has the step "
                "markers and MoteConfig.markers their ids) or give `step_ids` of shape (rows, tokens)"
            )
        return routes[adapter, rank]

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: build the routes from `step_ids` if given, else from the ids.

        Takes out of the call, since the model itself does not know them: `step_ids` (B, T); `context_ids` (B, any), all
        ids of the rows so far, where `input_ids` are only the last of them; `document_ids` (B, T; packed rows);
        `question_experts` (B,; step ids 1...S to read the questions with).
        """
        given = kwargs.pop("step_ids", None)
        context = kwargs.pop("context_ids", None)
        documents = kwargs.pop("document_ids", None)
        drawn = kwargs.pop("question_experts", None)
        ids = kwargs.get("input_ids")
        if ids is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            ids = args[0]
        if given is None and context is None and _has_content(kwargs.get("past_key_values")):
            raise RuntimeError(
                "mote: behind a cache the step of the new tokens is unknown: give `context_ids`, all ids of the rows "
                "so far, or `step_ids` of the new tokens (`generate` does so by itself)"
            )
        device, dtype = _device_and_dtype(model)
        writes = ids is not None and ids.shape[1] == 1 and device == "cpu" and not torch.is_grad_enabled()
        folds = getattr(self._local, "folds", {}) if writes else {}
        routes: Routes = {}
        for adapter, config in self._configs.items():
            if given is not None:
                steps = given
            elif ids is not None and config.routing is not None:
                steps = step_ids(ids if context is None else context, config.routing, documents)[:, -ids.shape[1] :]
            else:
                continue
            if drawn is not None or (model.training and config.draw_question_expert):
                steps = _with_question_experts(steps, drawn, documents, len(config.experts))
            only = _only_step(steps) if writes and not torch.compiler.is_compiling() else None
            if only is None:
                folds = {}  # a new text may follow new weights
            for rank in self._ranks[adapter]:
                table = self._table(adapter, rank, steps.device, dtype)
                routes[adapter, rank] = Route(table[steps], only, table[only] if only else None, folds)
        self._local.folds = folds
        self._local.routes = routes or None
        _wrap_checkpointing(model, self)
        return args, kwargs

    def after_forward(self, *_: Any) -> None:
        """Forward hook: a later call without ids must fail, not use these routes."""
        self._local.routes = None

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs with today's gates whenever and in whatever thread it is called.

        Gradient checkpointing runs a block again in the backward pass, when other forward passes may have run.
        """
        routes = getattr(self._local, "routes", None)

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Any:
            before = getattr(self._local, "routes", None)
            self._local.routes = routes
            try:
                return function(*args, **kwargs)
            finally:
                self._local.routes = before

        return bound

    def route_generation(self, model: nn.Module) -> None:
        """Let `generate` give the steps of the new tokens: with a cache the model sees only those, not the markers."""
        prepare = getattr(model, "prepare_inputs_for_generation", None)
        if prepare is None:
            return

        @functools.wraps(prepare)
        def with_context(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs = prepare(input_ids, *args, **kwargs)
            if inputs.get("input_ids") is not None:
                inputs.setdefault("context_ids", input_ids)
            return inputs

        model.prepare_inputs_for_generation = with_context  # type: ignore[assignment]


def _has_content(cache: Any) -> bool:
    """Whether a cache holds tokens that this forward pass goes on from."""
    return hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0


def _device_and_dtype(model: nn.Module) -> tuple[str, torch.dtype]:
    """Kind of device, and the dtype that linear layers compute in."""
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    device = weight.device.type
    return device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _only_step(steps: Tensor) -> int | None:
    """The reasoning step that all tokens are in, if there is one."""
    step = int(steps[0, 0])
    return step if step != QUESTION and bool((steps == step).all()) else None


def _with_question_experts(steps: Tensor, drawn: Tensor | None, documents: Tensor | None, experts: int) -> Tensor:
    """Replace the question's step 0 by one expert a sequence, as given or drawn at random ("processed by anyone")."""
    if drawn is not None:
        expert = drawn.to(steps.device)[:, None]
    elif documents is not None:
        draws = torch.randint(1, experts + 1, steps.shape, device=steps.device)
        expert = draws.gather(1, document_starts(documents))
    else:
        expert = torch.randint(1, experts + 1, (steps.shape[0], 1), device=steps.device)
    return torch.where(steps == QUESTION, expert, steps)


def _wrap_checkpointing(model: nn.Module, router: Router) -> None:
    """Bind the gates into each block's gradient checkpointing, whichever form the user switched on."""
    if not (model.training and getattr(model, "is_gradient_checkpointing", False)):
        return
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not getattr(checkpoint, "binds_gates", False):

            def bound(function: Callable[..., Any], *args: Any, _run: Any = checkpoint, **kwargs: Any) -> Any:
                return _run(router.bind(function), *args, **kwargs)

            bound.binds_gates = True  # type: ignore[attr-defined]
            module._gradient_checkpointing_func = bound  # type: ignore[assignment]
