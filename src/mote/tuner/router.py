"""Carries the step of each token to the adapted layers, which see hidden states only.

A hook on the model turns ids into gates before every forward pass; the layers read the gates of their own thread.
Shapes: B row, T token, E expert, R rank.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from mote.tokens.routing import NO_STEP, QUESTION, step_ids
from mote.tuner.checkpointing import bind_checkpoints, unbind_checkpoints
from mote.tuner.config import MoteConfig
from mote.tuner.cpu_decode import FEW, Kept, Texts, Writing
from mote.tuner.expert_weights import Route, Table, _with_question_experts, active_columns, expert_weight_table
from mote.tuner.forward_args import cache_length, goes_on, packed_documents

Routes = dict[tuple[str, int], Route]  # (adapter, rank) -> route
Calls = tuple[tuple[Routes, Writing | None], ...]  # the forward passes that run in a thread, the innermost last


class _Running:
    def __init__(self) -> None:
        self.calls: Calls = ()


class _Thread(threading.local):
    """Holds an object of each thread's own, since torch.compile loses what is set on this one at a graph break."""

    def __init__(self) -> None:
        self.running = _Running()


class Router:
    """The gates of the forward pass that runs in this thread, for the MoTE adapters of one model.

    Attributes:
        layer: One of the adapted layers; the same adapters are active in all of them.
    """

    layer: BaseTunerLayer | None = None

    def __init__(self) -> None:
        self._configs: dict[str, MoteConfig] = {}
        self._ranks: dict[str, set[int]] = {}
        self._arguments: tuple[str, ...] = ()  # names of the model's arguments
        self._hooks: list[RemovableHandle] = []
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_tables", "_texts", "_thread")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tables: dict[tuple[str, int, torch.device, torch.dtype], Table] = {}
        self._texts: WeakKeyDictionary[Cache, Texts] = WeakKeyDictionary()  # what is kept for those in a cache
        self._thread = _Thread()

    def attach(self, model: nn.Module) -> None:
        """Make gates before each forward pass of the model, and let its `generate` give the steps of new tokens."""
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
        """Prepare gates for an adapter's layers of this rank; the scaling is folded into them."""
        if self._configs.get(adapter) is not config:
            self.remove(adapter)
        self._configs[adapter] = config
        self._ranks.setdefault(adapter, set()).add(rank)

    def remove(self, adapter: str) -> None:
        """Forget a deleted adapter."""
        self._configs.pop(adapter, None)
        self._ranks.pop(adapter, None)
        self._tables = {key: table for key, table in self._tables.items() if key[0] != adapter}
        self._texts.clear()

    def _active(self) -> dict[str, MoteConfig]:
        """The adapters that read the tokens."""
        if self.layer is None or self.layer.disable_adapters:
            return {}
        return {name: self._configs[name] for name in self.layer.active_adapters if name in self._configs}

    def _table(self, adapter: str, rank: int, device: torch.device, dtype: torch.dtype) -> Table:
        """The weights of all columns of an adapter's layers for every step, and on a CPU those that count."""
        key, config = (adapter, rank, device, dtype), self._configs[adapter]
        if torch.compiler.is_compiling() or key not in self._tables:
            table = (
                expert_weight_table(config, device).mul(config.scaling(rank)).repeat_interleave(rank, dim=1).to(dtype)
            )
            table = torch.cat([table, table.new_zeros(1, table.shape[1])])  # the last row is that of NO_STEP
            if torch.compiler.is_compiling():  # a graph that looked here would be made again when this has changed
                return table, ()
            self._tables[key] = table, active_columns(table) if device.type == "cpu" else ()
        return self._tables[key]

    def route(self, adapter: str, rank: int) -> Route:
        """What the layers of an adapter and a rank need to know of the running forward pass.

        Raises:
            RuntimeError: The model was not called through the module the adapter was put on, or the tokens' steps do
                not follow from what it was called with.
        """
        calls = self._thread.running.calls
        if not calls or (adapter, rank) not in calls[-1][0]:
            raise RuntimeError(
                "mote: the step of each token is unknown: call the model with `input_ids` (its tokenizer has the step "
                "markers and MoteConfig.markers their ids) or give `step_ids` of shape (rows, tokens); behind a cache "
                "give it `context_ids` too, all ids of the rows so far, and give those as `generate`'s `input_ids`, "
                "without `prefill_chunk_size`"
            )
        return calls[-1][0][adapter, rank]

    def writing(self) -> Writing | None:
        """The running forward pass, where it goes on with texts by a few tokens on a CPU; not in a compiled block."""
        if torch.compiler.is_compiling():  # what is kept for a text would be compiled anew for each
            return None
        calls = self._thread.running.calls
        return calls[-1][1] if calls else None

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: build the routes from `step_ids` if given, else from the ids.

        Takes out of the call, since the model itself does not know them: `step_ids` (B, T), or one such tensor for
        each adapter; `context_ids` (B, any), all ids of the rows so far, where `input_ids` are only the last of them;
        `document_ids` of their shape, for packed rows; `question_experts` (B,) or (B, T), step ids 1...S to read the
        questions with.

        Raises:
            RuntimeError: The model is a copy that `nn.DataParallel` made.
            ValueError: There are fewer `context_ids` than `input_ids`.
        """
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "mote: nn.DataParallel is not supported: start one process per GPU (`accelerate launch`, `torchrun`) "
                "or let this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        steps = kwargs.pop("step_ids", None)
        context = kwargs.pop("context_ids", None)
        documents = kwargs.pop("document_ids", None)
        drawn = kwargs.pop("question_experts", None)
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        if documents is None and context is None:
            documents = packed_documents(given)
        if steps is None:
            steps = self._steps_of_call(given, context, documents)
        routes = self._routes(model, steps, drawn, documents)
        writing = (
            None if torch.compiler.is_compiling() else self._writing_of_call(model, given, steps, documents, routes)
        )
        self._thread.running.calls += ((routes, writing),)
        if model.training:
            bind_checkpoints(model, self)
        return args, kwargs

    def after_forward(self, *_: Any) -> None:
        """Forward hook: a later call without ids must fail, not use these routes."""
        running = self._thread.running
        running.calls = running.calls[:-1]

    def steps(self, ids_B_T: Tensor, last: int, documents_B_T: Tensor | None = None) -> dict[str, Tensor]:
        """Step ids (B, last) of the last tokens of each row, for every active adapter that has markers."""
        return {
            adapter: step_ids(ids_B_T, markers, documents_B_T)[:, ids_B_T.shape[1] - last :].contiguous()
            for adapter, config in self._active().items()
            if (markers := config.routing) is not None
        }

    def _steps_of_call(
        self, given: Mapping[str, Any], context: Tensor | None, documents: Tensor | None
    ) -> dict[str, Tensor]:
        """`steps` of the tokens of a forward pass; of no adapter where they do not follow from what is given."""
        ids = given.get("input_ids")
        if ids is None or (context is None and goes_on(given)):
            return {}
        if context is not None and context.shape[1] < ids.shape[1]:
            raise ValueError(
                f"context_ids of shape {tuple(context.shape)}: give all ids of the rows so far, with the input_ids of "
                f"shape {tuple(ids.shape)} at their end"
            )
        return self.steps(ids if context is None else context, ids.shape[1], documents)

    def _writing_of_call(
        self,
        model: nn.Module,
        given: Mapping[str, Any],
        steps: Tensor | Mapping[str, Tensor],
        documents: Tensor | None,
        routes: Routes,
    ) -> Writing | None:
        """The pass as one that writes a token of each row or document on a CPU; None where it is another one.

        What is kept for it lasts as long as the cache of the text, and from one text to the next in it as long as the
        weights are the same: new weights come with a new text.
        """
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        if ids is None or not isinstance(cache, Cache):
            return None
        if ids.shape[1] > 1 and (documents is None or bool((documents.diff(dim=1) == 0).any())):
            self._end_text(cache)
            return None
        if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or len(self._active()) != 1:
            return None
        (adapter,) = self._active()
        own = steps.get(adapter) if isinstance(steps, Mapping) else steps
        if own is None or own.device.type != "cpu" or own.numel() > FEW:
            return None
        found = set(own.flatten().tolist())
        if QUESTION in found:
            return None
        step = found.pop() if len(found) == 1 else None
        dtype = next(iter(routes.values())).gate.dtype
        kept = self._texts.setdefault(cache, {}).setdefault((adapter, dtype), Kept())
        if not kept.holds:
            kept.begin_text(adapter)
        line = ids.shape[0] == 1
        return Writing(adapter, step, own.numel(), line, routes, kept.writes.setdefault((step, line), {}), kept)

    def _end_text(self, cache: Cache) -> None:
        """A prompt comes in this cache: the next text may have other weights than the last one."""
        for kept in self._texts.get(cache, {}).values():
            kept.holds = False

    def _routes(
        self,
        model: nn.Module,
        given: Tensor | Mapping[str, Tensor],
        drawn: Tensor | None,
        documents: Tensor | None,
    ) -> Routes:
        dtype = _compute_dtype(model)
        routes: Routes = {}
        for adapter, config in self._active().items():
            steps = given.get(adapter) if isinstance(given, Mapping) else given
            if steps is None:
                continue
            if drawn is not None or (model.training and config.draw_question_expert):
                steps = _with_question_experts(steps, drawn, documents, len(config.experts))
            if config.mix == 0:  # every step is read alike
                steps = torch.where(steps == NO_STEP, steps, 1)
            idle = not torch.compiler.is_compiling() and _is_idle(steps)
            for rank in self._ranks[adapter]:
                table, columns = self._table(adapter, rank, steps.device, dtype)
                routes[adapter, rank] = Route(table[steps], columns, idle)
        return routes

    def prepare_inputs(
        self, prepare: Callable[..., dict[str, Any]], input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """`prepare_inputs_for_generation` that gives the steps of the new tokens, all that the model sees of the text.

        Args:
            prepare: The model's own.
            input_ids: All ids of the rows so far; where a cache goes on from others, the steps stay unknown.
            args: What else is for `prepare`.
            kwargs: Likewise.

        Returns:
            The arguments of the next forward pass.
        """
        inputs = prepare(input_ids, *args, **kwargs)
        tokens = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
        if tokens is None:
            return inputs
        cache, new, begins = inputs.get("past_key_values"), tokens.shape[1], bool(kwargs.get("is_first_iteration"))
        if begins and isinstance(cache, Cache):
            self._end_text(cache)
        # A static cache's length lies on the device: it is read for prompts and guesses, not for every token written.
        if (new == 1 and not begins) or cache_length(cache) + new == input_ids.shape[1]:
            inputs["step_ids"] = {name: steps.to(tokens.device) for name, steps in self.steps(input_ids, new).items()}
        return inputs

    def calls(self) -> Calls:
        """The routes of the forward passes that run in this thread, the innermost last."""
        return self._thread.running.calls

    def run_with(self, calls: Calls, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block with the routes of these passes."""
        running = self._thread.running
        before = running.calls
        if before is calls:  # the forward pass itself; here a compiler takes no side effects
            return block(*args, **kwargs)
        running.calls = calls
        try:
            return block(*args, **kwargs)
        finally:
            running.calls = before


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that linear layers compute in."""
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _is_idle(steps: Tensor) -> bool:
    """Whether no token (B, T) has a step, on a CPU; reading it from another device would wait for that."""
    return steps.device.type == "cpu" and bool((steps == NO_STEP).all())
