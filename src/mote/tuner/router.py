"""Carries the step of each token to the adapted layers, which see only hidden states.

A hook on the model turns ids into step ids before every forward pass. Expert weights and the CPU fast path
(`expert_weights`, `cpu_decode`) are derived from them once per forward pass; layers read those of the innermost forward
pass in their thread.
Shapes: B row, T token.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from mote.models.kv_cache import given_cache, returned_cache
from mote.tokens.routing import QUESTION, document_starts, step_ids
from mote.tuner.cached_steps import CachedSteps
from mote.tuner.checkpointing import bind_checkpoints, unbind_checkpoints
from mote.tuner.config import MoteConfig
from mote.tuner.cpu_decode import CpuDecoder, DecodeStep
from mote.tuner.expert_weights import ExpertWeights, Route, Routes
from mote.tuner.forward_args import cache_length, has_past, kept_positions, packed_documents, separate_documents


class Forward(NamedTuple):
    """A forward pass in progress: what its layers read, and the steps of its last tokens.

    Attributes:
        routes: Expert weights of every token.
        decode: The CPU fast path, if it applies.
        last_steps: Adapter -> step of each row's last token (B, 1), if it may be remembered with the cache.
    """

    routes: Routes
    decode: DecodeStep | None
    last_steps: dict[str, Tensor]


class _InProgress:
    def __init__(self) -> None:
        self.forwards: tuple[Forward, ...] = ()  # the innermost last


class _Thread(threading.local):
    """Holds an object for each thread, since torch.compile loses what is set on this one at a graph break."""

    def __init__(self) -> None:
        self.in_progress = _InProgress()

    def __reduce__(self) -> tuple[type["_Thread"], tuple[()]]:
        return _Thread, ()  # a copied or pickled model has no forward pass in progress


class Router:
    """The step of each token in the forward pass of this thread, for the MoTE adapters of one model.

    Attributes:
        layer: One of the adapted layers; the same adapters are active in all of them.
    """

    layer: BaseTunerLayer | None = None

    def __init__(self) -> None:
        self._configs: dict[str, MoteConfig] = {}
        self._ranks: dict[str, set[int]] = {}
        self._arguments: tuple[str, ...] = ()  # names of the model's arguments
        self._hooks: list[RemovableHandle] = []
        self._expert_weights = ExpertWeights()
        self._cpu_decoder = CpuDecoder()
        self._cached_steps = CachedSteps()
        self._thread = _Thread()

    def attach(self, model: nn.Module) -> None:
        """Hook into the model's forward pass, and let its `generate` pass the steps of new tokens."""
        model.mote_router = self  # type: ignore[assignment]
        self._arguments = tuple(inspect.signature(model.forward).parameters)
        self._hooks = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, always_call=True),
        ]
        prepare = getattr(model, "prepare_inputs_for_generation", None)
        if prepare is not None:  # `generate` reads its signature, which must stay visible
            with_steps = functools.update_wrapper(functools.partial(self.prepare_inputs, prepare), prepare)
            model.prepare_inputs_for_generation = with_steps  # type: ignore[assignment]

    def detach(self, model: nn.Module) -> None:
        """Leave the model as it was before `attach`."""
        for hook in self._hooks:
            hook.remove()
        prepare = vars(model).get("prepare_inputs_for_generation")
        if isinstance(prepare, functools.partial) and prepare.func == self.prepare_inputs:
            del model.prepare_inputs_for_generation
        unbind_checkpoints(model, self)
        del model.mote_router

    def add(self, adapter: str, config: MoteConfig, rank: int) -> None:
        """Route for an adapter's layers of this rank."""
        if self._configs.get(adapter) is not config:
            self.remove(adapter)
        self._configs[adapter] = config
        self._ranks.setdefault(adapter, set()).add(rank)

    def remove(self, adapter: str) -> None:
        """Forget a deleted adapter."""
        self._configs.pop(adapter, None)
        self._ranks.pop(adapter, None)
        self._expert_weights.forget(adapter)
        self._cpu_decoder.clear()

    def _active(self) -> dict[str, MoteConfig]:
        """The active adapters."""
        if self.layer is None or self.layer.disable_adapters:
            return {}
        return {name: self._configs[name] for name in self.layer.active_adapters if name in self._configs}

    def route(self, adapter: str, rank: int) -> Route:
        """Expert weights of this thread's forward pass, for the layers of an adapter and a rank.

        Raises:
            RuntimeError: The model was not called through the module that holds the adapter, or the steps of its tokens
                do not follow from the arguments.
        """
        route = self.known_route(adapter, rank)
        if route is None:
            raise RuntimeError(
                "mote: the step of each token is unknown: call the model with `input_ids` (its tokenizer has the step "
                "markers and MoteConfig.markers their ids) or give `step_ids` of shape (rows, tokens); behind a cache "
                "that was changed or filled elsewhere add `context_ids=ids`, all ids of the rows so far (to `generate` "
                "give them as `input_ids`, without `prefill_chunk_size`)"
            )
        return route

    def known_route(self, adapter: str, rank: int) -> Route | None:
        """`route`, or None if the steps are unknown."""
        forwards = self._thread.in_progress.forwards
        return forwards[-1].routes.get((adapter, rank)) if forwards else None

    def decode_step(self) -> DecodeStep | None:
        """This thread's forward pass if it decodes a few tokens on a CPU; None in a compiled block."""
        if torch.compiler.is_compiling():  # the graph would be recompiled for every sequence
            return None
        forwards = self._thread.in_progress.forwards
        return forwards[-1].decode if forwards else None

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: take the steps from `step_ids` if given, else from the ids.

        Removes from the call what the model itself does not know: `step_ids` (B, T), or one such tensor for each
        adapter; `context_ids` (B, any), all ids of the rows so far, if `input_ids` are only the last of them;
        `document_ids` of the same shape, for packed rows; `question_experts` (B,) or (B, T), the step ids 1...S whose
        experts read the question.

        Raises:
            RuntimeError: The model is a copy made by `nn.DataParallel`.
            ValueError: There are fewer `context_ids` than `input_ids`.
        """
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "mote: nn.DataParallel is not supported: start one process per GPU (`accelerate launch`, `torchrun`) "
                "or let this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        given = kwargs.pop("step_ids", None)
        context = kwargs.pop("context_ids", None)
        documents = kwargs.pop("document_ids", None)
        question_experts = kwargs.pop("question_experts", None)
        call = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        args, kwargs = self._replaced(args, kwargs, kept_positions(call, getattr(model, "config", None)))
        packed = documents is not None
        if documents is None and context is None:
            documents = packed_documents(call)
        if documents is not None:
            separating = separate_documents(call, documents, self._arguments, getattr(model, "config", None))
            packed = packed or bool(separating)
            args, kwargs = self._replaced(args, kwargs, separating)
        if given is None:
            given = self._steps_of_call(call, context, documents)
        active = self._active()
        steps: dict[str, Tensor] = {}
        last_steps: dict[str, Tensor] = {}
        routes: Routes = {}
        for adapter, config in active.items():
            steps_B_T = given.get(adapter) if isinstance(given, Mapping) else given
            if steps_B_T is None:
                continue
            if not (packed or config.whole_rows):
                last_steps[adapter] = steps_B_T[:, -1:]
            if question_experts is not None or (model.training and config.draw_question_expert):
                steps_B_T = _with_question_experts(steps_B_T, question_experts, documents, len(config.experts))
            steps[adapter] = steps_B_T
            dtype = _compute_dtype(model, steps_B_T.device)
            routes |= self._expert_weights.routes(adapter, config, self._ranks[adapter], steps_B_T, dtype)
        decode = None
        if not torch.compiler.is_compiling():
            decode = self._cpu_decoder.decode_step(call, active, steps, documents, routes, model.training)
        self._thread.in_progress.forwards += (Forward(routes, decode, last_steps),)
        if model.training:
            self._cpu_decoder.clear()  # the weights are about to change, and training needs the memory
            bind_checkpoints(model, self)
        return args, kwargs

    def _replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], changed: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call with some changed."""
        positional = dict(zip(self._arguments, args, strict=False))
        args = tuple(changed.get(name, value) for name, value in positional.items()) + args[len(positional) :]
        return args, {**kwargs, **{name: value for name, value in changed.items() if name not in positional}}

    def after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: a later call without ids must fail, not use the steps of this one."""
        in_progress = self._thread.in_progress
        forward = in_progress.forwards[-1] if in_progress.forwards else None
        in_progress.forwards = in_progress.forwards[:-1]
        if forward is not None and not torch.compiler.is_compiling():
            self._cached_steps.remember(returned_cache(output), forward.last_steps)

    def steps(self, ids_B_T: Tensor, last: int, documents_B_T: Tensor | None = None) -> dict[str, Tensor]:
        """Step ids (B, last) of the last tokens of each row, for every active adapter that has markers."""
        return {
            adapter: step_ids(ids_B_T, markers, documents_B_T)[:, ids_B_T.shape[1] - last :].contiguous()
            for adapter, config in self._active().items()
            if (markers := config.routing) is not None
        }

    def _steps_of_call(
        self, call: Mapping[str, Any], context: Tensor | None, documents: Tensor | None
    ) -> dict[str, Tensor]:
        """`steps` of the tokens of a forward pass; for no adapter if they do not follow from the arguments."""
        ids = call.get("input_ids")
        if ids is None:
            return {}
        if context is None and has_past(call):
            known = self._cached_steps.recall(given_cache(call), len(ids))
            return {
                adapter: step_ids(ids, markers, None, known[adapter].to(ids.device))
                for adapter, config in self._active().items()
                if adapter in known and (markers := config.routing) is not None
            }
        if context is not None and context.shape[1] < ids.shape[1]:
            raise ValueError(
                f"context_ids of shape {tuple(context.shape)}: give all ids of the rows so far, with the input_ids of "
                f"shape {tuple(ids.shape)} at their end"
            )
        return self.steps(ids if context is None else context, ids.shape[1], documents)

    def prepare_inputs(
        self, prepare: Callable[..., dict[str, Any]], input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """`prepare_inputs_for_generation` that adds the steps of the new tokens; all ids are available only here.

        Args:
            prepare: The model's own.
            input_ids: All ids of the rows so far; if the cache holds more, its last steps decide, if they are known.
            args: Further arguments of `prepare`.
            kwargs: Further arguments of `prepare`.

        Returns:
            The arguments of the next forward pass.
        """
        inputs = prepare(input_ids, *args, **kwargs)
        tokens = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
        if tokens is None:
            return inputs
        cache = given_cache(inputs)
        new = tokens.shape[1]
        begins = bool(kwargs.get("is_first_iteration"))
        if begins and isinstance(cache, Cache):
            self._cpu_decoder.begin_sequence(cache)
        length = cache_length(cache)
        if isinstance(cache, Cache) and isinstance(length, int):
            whole = length + new == input_ids.shape[1]
        else:  # a static cache's length is on the device, so it is not read for every token; recurrent layers have none
            whole = (new == 1 and not begins) or bool((0 if length is None else length) + new == input_ids.shape[1])
        if whole:
            inputs["step_ids"] = {name: steps.to(tokens.device) for name, steps in self.steps(input_ids, new).items()}
        return inputs

    def forwards(self) -> tuple[Forward, ...]:
        """The forward passes in progress in this thread, the innermost last."""
        return self._thread.in_progress.forwards

    def run_with(self, forwards: tuple[Forward, ...], block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block as a part of these forward passes."""
        in_progress = self._thread.in_progress
        before = in_progress.forwards
        if before is forwards:  # the forward pass itself, where torch.compile allows no side effects
            return block(*args, **kwargs)
        in_progress.forwards = forwards
        try:
            return block(*args, **kwargs)
        finally:
            in_progress.forwards = before


def _with_question_experts(
    steps_B_T: Tensor, question_experts: Tensor | None, documents_B_T: Tensor | None, experts: int
) -> Tensor:
    """Replace the question's step 0 by one step per sequence, as given or drawn at random ("processed by anyone")."""
    if question_experts is not None:
        expert = question_experts.to(steps_B_T.device).reshape(len(steps_B_T), -1)
    elif documents_B_T is not None:
        draws = torch.randint(1, experts + 1, steps_B_T.shape, device=steps_B_T.device)
        expert = draws.gather(1, document_starts(documents_B_T))
    else:
        expert = torch.randint(1, experts + 1, (steps_B_T.shape[0], 1), device=steps_B_T.device)
    return torch.where(steps_B_T == QUESTION, expert, steps_B_T)


def _compute_dtype(model: nn.Module, input_device: torch.device) -> torch.dtype:
    """The dtype that linear layers compute in; offloaded weights (on `meta`) come to the inputs' device."""
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    device = (input_device if weight.is_meta else weight.device).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
