"""Carries the step of each token to the adapted layers, which see hidden states only.

A hook on the model turns ids into gates before every forward pass; the layers read the gates of their own thread.
Shapes: B row, T token, E expert, R rank.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mote.routing import QUESTION, Markers, document_starts, step_ids
from mote.tuner.config import MoteConfig

Gates = dict[tuple[str, int], Tensor]  # (adapter, rank) -> (B, T, E*R)


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
        self._tables: dict[tuple[str, int], Tensor] = {}
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Router":
        copy = Router()
        copy._configs, copy._tables = dict(self._configs), dict(self._tables)
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"_configs": self._configs, "_tables": self._tables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def add(self, adapter: str, config: MoteConfig, rank: int) -> None:
        """Prepare gates for an adapter's layers of this rank; the scaling is folded into them."""
        scaling = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
        self._configs[adapter] = config
        self._tables[adapter, rank] = gate_table(config).mul(scaling).repeat_interleave(rank, dim=1)

    def remove(self, adapter: str) -> None:
        """Forget a deleted adapter."""
        self._configs.pop(adapter, None)
        self._tables = {key: table for key, table in self._tables.items() if key[0] != adapter}

    def gate(self, adapter: str, rank: int) -> Tensor:
        """The gate (B, T, E*R) of the running forward pass.

        Raises:
            RuntimeError: The model was not called through the module the adapter was put on, or without ids.
        """
        gates: Gates | None = getattr(self._local, "gates", None)
        if gates is None or (adapter, rank) not in gates:
            raise RuntimeError(
                "mote: the step of each token is unknown: call the model with `input_ids` (its tokenizer has the step "
                "markers and MoteConfig.markers their ids) or give `step_ids` of shape (rows, tokens)"
            )
        return gates[adapter, rank]

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: build the gates from `step_ids` if given, else from `input_ids`.

        Takes `step_ids` (B, T), `document_ids` (B, T; packed rows) and `question_experts` (B,; step ids 1...S to read
        the questions with) out of the call, since the model itself does not know them.
        """
        given = kwargs.pop("step_ids", None)
        documents = kwargs.pop("document_ids", None)
        drawn = kwargs.pop("question_experts", None)
        ids = kwargs.get("input_ids")
        if ids is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            ids = args[0]
        steps_of: dict[
            str, Tensor
        ] = {}  # once an adapter: layers of another rank read the question with the same expert
        for adapter, config in self._configs.items():
            markers = config.routing
            if given is not None:
                steps = given
            elif ids is not None and markers is not None:
                steps = step_ids(ids, markers, documents)
            else:
                continue
            if drawn is not None or (model.training and config.draw_question_expert):
                steps = _with_question_experts(steps, drawn, documents, len(config.experts))
            steps_of[adapter] = steps
        gates: Gates = {}
        for (adapter, rank), table in self._tables.items():
            if adapter not in steps_of:
                continue
            steps = steps_of[adapter]
            if table.device != steps.device:
                table = self._tables[adapter, rank] = table.to(steps.device)
            gates[adapter, rank] = table[steps]
        self._local.gates = gates or None
        _wrap_checkpointing(model, self)
        return args, kwargs

    def after_forward(self, *_: Any) -> None:
        """Forward hook: a later call without ids must fail, not use these gates."""
        self._local.gates = None

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs with today's gates whenever and in whatever thread it is called.

        Gradient checkpointing runs a block again in the backward pass, when other forward passes may have run.
        """
        gates = getattr(self._local, "gates", None)

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Any:
            before = getattr(self._local, "gates", None)
            self._local.gates = gates
            try:
                return function(*args, **kwargs)
            finally:
                self._local.gates = before

        return bound

    def route_generation(self, model: nn.Module) -> None:
        """Let `generate` give the steps of the new tokens: with a cache the model sees only those, not the markers."""
        prepare = getattr(model, "prepare_inputs_for_generation", None)
        if prepare is None:
            return

        @functools.wraps(prepare)
        def with_steps(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs = prepare(input_ids, *args, **kwargs)
            markers = self._shared_markers()
            if markers is not None and "step_ids" not in inputs and inputs.get("input_ids") is not None:
                inputs["step_ids"] = step_ids(input_ids, markers)[:, -inputs["input_ids"].shape[1] :]
            return inputs

        model.prepare_inputs_for_generation = with_steps  # type: ignore[assignment]

    def _shared_markers(self) -> Markers | None:
        """The markers of the adapters, which all sit in the same tokenizer."""
        return next((m for config in self._configs.values() if (m := config.routing) is not None), None)


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
