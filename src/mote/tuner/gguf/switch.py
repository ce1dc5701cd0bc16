"""One GGUF file with all steps and the base model, for llama.cpp's architecture `graniteswitch` (b10603 and later).

Slot 0 holds the question's experts, the others those of a step; `slots` says how start markers choose a slot. A twin of
the token that every prompt starts with activates the base model's slot, which is zero.
Shapes: R rank, D model (in, out).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mote.core.errors import UserError
from mote.core.scheme import CHECK, Chain, Scheme
from mote.tokens.encode import opening_id
from mote.tuner.gguf.architectures import (
    ATTENTION,
    LINEAR,
    SWITCH,
    add_shape,
    base_entries,
    check_layers,
    gguf_name,
    refusals,
    rotary_rows,
)
from mote.tuner.gguf.file import FILE_TYPES, Entry, Type, gguf_file, stored_type
from mote.tuner.gguf.slots import SlotPlan, slot_plan
from mote.tuner.gguf.source import EMBEDDING, HEAD, Adapter, BaseWeights, Experts, matrix, vocabulary_rows
from mote.tuner.gguf.vocabulary import add_vocabulary, check_vocabulary

BASE_TOKEN = "mote.base_token"  # metadata: id that opens a prompt in place of its first token, for the mode `base`
_GAIN = 15.0  # gain of start markers over other tokens in the attention head that selects the slot
_NO_TOKEN = 2**31 - 1  # minus the slot: ids that never occur, for slots without a marker


def base_tokens(adapter: Adapter, base: BaseWeights, trained: Experts) -> tuple[int, int]:
    """The token that opens every prompt, and its twin (the last id), which opens prompts for the base model."""
    return opening_id(adapter.tokenizer), vocabulary_rows(base, trained)


def write_switch(path: Path, adapter: Adapter, base: BaseWeights, wanted: Type = "q8_0", experts: Type = "f16") -> None:
    """Write a base model with all experts of an adapter to one file.

    Args:
        path: The file.
        adapter: A trained adapter.
        base: Its base model.
        wanted: Type of the base model's matrices.
        experts: Type of the experts.

    Raises:
        UserError: The file could not compute what the adapter does; nothing is written.
        MoteError: The file cannot be written.
    """
    trained, plan = check_switch(adapter, base)
    rows = vocabulary_rows(base, trained)
    opening, twin = base_tokens(adapter, base, trained)
    rank = max(trained.lora_rank(module, step) for module in trained.modules for step in range(len(trained.weights)))
    entries = [
        *_matrices(base, trained, rows + 1, wanted),
        *base_entries(base, wanted, [name for name in base.parameters if name.split(".")[-2] in ATTENTION]),
        *_attention(base, wanted),
        *_experts(base, trained, plan, rank, experts),
    ]
    with gguf_file(path, SWITCH, entries) as writer:
        writer.add_file_type(FILE_TYPES[wanted])
        writer.add_name(path.stem)
        add_shape(writer, base.config, rows + 1)
        writer.add_expert_count(0)
        writer.add_expert_used_count(0)
        _add_slots(writer, adapter, plan, rank, twin, opening)
        add_vocabulary(writer, adapter.tokenizer, rows + 1, trained)
        writer.add_uint32(BASE_TOKEN, twin)


def check_switch(adapter: Adapter, base: BaseWeights) -> tuple[Experts, SlotPlan]:
    """The experts of an adapter and their slots, if they can be written as one file.

    Raises:
        UserError: The base model or the adapter cannot be expressed.
    """
    remedy = "use --format gguf-steps"
    found = refusals(base.config)
    if (reason := found["gguf"]) is not None:
        remedy = remedy if found["gguf-steps"] is None else "use `mote answer` or `mote serve`"
        raise UserError(f"model: '{base.name}' cannot be written as one GGUF file: {reason}; {remedy}")
    trained = Experts(adapter, base)
    check_layers(base, trained.modules)
    check_vocabulary(adapter.tokenizer, trained)
    plan = slot_plan(chains(adapter.scheme, adapter.config.experts))
    if plan is None:
        raise UserError(
            f"scheme: '{adapter.scheme.name}' has chains for which no slots are found, so one GGUF file cannot hold "
            f"its steps; {remedy}"
        )
    return trained, plan


def chains(scheme: Scheme, experts: Chain) -> list[Chain]:
    """Every chain of steps that follows a question; a check follows the response alone, as in training."""
    return [*scheme.only(experts).depths.values(), *([(scheme.answer, CHECK)] if CHECK in experts else [])]


def _add_slots(writer: Any, adapter: Adapter, plan: SlotPlan, rank: int, twin: int, opening: int) -> None:
    config = adapter.config
    own = {slot: config.markers[step][0] for step, slot in plan.markers.items()}
    slots = range(1, plan.count + 1)
    activate = [twin if slot == plan.base else own.get(slot, _NO_TOKEN - slot) for slot in slots]
    looked_up = [own.get(slot, opening) for slot in slots]
    key = f"{SWITCH}.adapters"
    writer.add_uint32(f"{key}.count", plan.count)
    writer.add_uint32(f"{key}.lora_rank", rank)
    writer.add_float32(f"{key}.router_gain", _GAIN)
    writer.add_array(f"{key}.token_ids_activate", activate)
    writer.add_array(f"{key}.token_ids_substitute", looked_up)


def _matrices(base: BaseWeights, experts: Experts, rows: int, wanted: Type) -> Iterator[Entry]:
    """The embedding and an untied head, with the twin's row behind the others."""
    for name, stored in ((EMBEDDING, "token_embd.weight"), (HEAD, "output.weight")):
        if f"{name}.weight" in base.parameters:
            shape = (rows, base.config.hidden_size)
            yield Entry(stored, shape, stored_type(wanted, shape), partial(_with_twin, base, experts, name, rows))


def _with_twin(base: BaseWeights, experts: Experts, name: str, rows: int) -> Tensor:
    """A matrix (rows, D) whose last row is the mean of the others: its logit is the mean logit, never the highest."""
    weight = matrix(base, experts, name, rows)
    weight[-1] = weight[:-1].mean(0)
    return weight


def _attention(base: BaseWeights, wanted: Type) -> Iterator[Entry]:
    """The q, k and v matrices of each block as one."""
    config = base.config
    for block in range(config.num_hidden_layers):
        modules = [f"model.layers.{block}.self_attn.{name}" for name in ATTENTION]
        shape = (sum(base.parameters[f"{module}.weight"][0] for module in modules), config.hidden_size)
        yield Entry(f"blk.{block}.attn_qkv.weight", shape, stored_type(wanted, shape), partial(_fused, base, modules))


def _fused(base: BaseWeights, modules: list[str]) -> Tensor:
    return torch.cat([rotary_rows(base.config, module, base.read(f"{module}.weight")) for module in modules])


def _experts(base: BaseWeights, experts: Experts, plan: SlotPlan, rank: int, wanted: Type) -> Iterator[Entry]:
    """A and B of every layer for every slot, padded to one rank."""
    slots = {0: 0} | {slot: 1 + experts.config.experts.index(step) for slot, step in plan.steps.items()}
    for block in range(base.config.num_hidden_layers):
        for layer in LINEAR:
            module = f"model.layers.{block}.{layer}"
            outputs, inputs = base.parameters[f"{module}.weight"]
            name = gguf_name(base.config, module)
            shapes = {"lora_a": (plan.count + 1, rank, inputs), "lora_b": (plan.count + 1, outputs, rank)}
            for index, (suffix, shape) in enumerate(shapes.items()):
                read = partial(_stacked, base, experts, slots, module, index, shape)
                yield Entry(f"{name}.{suffix}", shape, stored_type(wanted, shape), read)


def _stacked(
    base: BaseWeights, experts: Experts, slots: dict[int, int], module: str, index: int, shape: tuple[int, ...]
) -> Tensor:
    """A (slots, R, in) or B (slots, out, R) of a layer; zeros where a slot has no experts, or a smaller rank."""
    stacked = torch.zeros(shape)
    if module in experts.modules:
        for slot, step in slots.items():
            a_or_b = experts.lora(module, step)[index]
            part = rotary_rows(base.config, module, a_or_b) if index else a_or_b
            stacked[slot, : part.shape[0], : part.shape[1]] = part
    return stacked
