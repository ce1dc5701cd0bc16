"""Size and exactness of the GGUF files of an adapter: each form and type against PEFT in float32, without a cache.

    .venv/bin/python benchmarks/gguf_files.py                        # SmolLM2, 3 minutes; writes gguf_files.json
    .venv/bin/python benchmarks/gguf_files.py --model FOLDER --forms gguf-steps --types q8_0

Every token of some dialogues is compared. Without --adapter it is a random one whose every part is random, rank 16. The
base model's own files are the yardstick for what a type loses. The KV cache is in float32.
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

import mote
from mote.core.files import write_json
from mote.core.machine import LLAMACPP_VERSION, environment
from mote.core.records import Message
from mote.inference.engines.llama_library import BATCH, LlamaModel
from mote.inference.load import read_adapter
from mote.inference.model import Model
from mote.models.embedded import EMBEDDED
from mote.models.load import fingerprint, load_base
from mote.questions.load import load_questions
from mote.tokens.encode import add_markers, encode_prompt, encode_text
from mote.tokens.routing import step_ids
from mote.tuner.gguf.file import Type
from mote.tuner.gguf.source import BaseWeights, vocabulary_rows
from mote.tuner.gguf.steps import write_base, write_steps
from mote.tuner.gguf.switch import write_switch

STEPS = {
    "analysis": "The person asks about something on a computer, and it is not plain whether it would hurt anyone.",
    "guidance": "Say what is safe to do, name the risk in one sentence, and offer help with the harmless part.",
    "response": "I can help with the safe part of this: look at the settings first, and ask the owner before a change.",
}
CHAINS = (("response",), ("analysis", "response"), ("analysis", "guidance", "response"))
TYPES: dict[str, tuple[Type, Type]] = {"f32": ("f32", "f32"), "q8_0": ("q8_0", "f16"), "q8_0-experts": ("q8_0", "q8_0")}


def random_adapter(name: str, folder: Path) -> Path:
    """An adapter on this base of which every part is random."""
    base = load_base(name, "cpu", "float32")
    config = mote.MoteConfig(r=16, lora_alpha=32, init_weights=False, base_fingerprint=fingerprint(base.model))
    add_markers(base.tokenizer, config, base.model)
    config.base_model_name_or_path = name
    model = get_peft_model(base.model, config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, part in model.named_parameters():
            if "mote_A" in key:
                part.copy_(torch.randn(part.shape, generator=draw) / part.shape[1] ** 0.5)
            elif "mote_B" in key:
                part.copy_(torch.randn(part.shape, generator=draw) * 0.006)
            elif "trainable_tokens" in key:
                part.add_(torch.randn(part.shape, generator=draw) * 0.05)
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def dialogues(model: Model, count: int) -> list[list[int]]:
    """Questions with a chain of each depth in turn; every second one after an earlier exchange."""
    found = []
    for index, question in enumerate(load_questions("mote:test", count)):
        earlier = (Message(role="user", content="Hello."), Message(role="assistant", content="How can I help?"))
        ids = encode_prompt(model.tokenizer, (*(earlier if index % 2 else ()), *question.messages))
        for step in CHAINS[index % len(CHAINS)]:
            start, end = model.config.markers[step]  # type: ignore[union-attr]
            ids += [start, *encode_text(model.tokenizer, STEPS[step]), end]
        found.append(ids)
    return found


def compute(llama: LlamaModel, ids: Sequence[int], steps: Sequence[int] | None) -> Tensor:
    """Logits (T, V) by llama.cpp; with `steps`, the LoRA of each token's step is used."""
    llama.remove(0)
    rows = []
    start = 0
    while start < len(ids):
        stop = start + 1
        while stop < min(len(ids), start + BATCH) and (steps is None or steps[stop] == steps[start]):
            stop += 1
        llama.use(None if steps is None else steps[start])
        places = range(start, stop)
        rows.append(llama.decode(ids[start:stop], places, [0] * len(places), range(len(places))))
        start = stop
    return torch.cat(rows)


def compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Differences over all tokens, of the logits that both have."""
    largest = 0.0
    divergence = 0.0
    same = 0
    tokens = 0
    for ours, theirs in zip(found, expected, strict=True):
        ours = ours[:, : theirs.shape[1]]
        largest = max(largest, float((ours - theirs).abs().max()))
        log_p = theirs.log_softmax(-1)
        log_q = ours.log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(theirs)
    return {
        "largest_difference_of_logits": float(f"{largest:.2g}"),
        "kl": float(f"{divergence / tokens:.2g}"),
        "same_likeliest_token": round(same / tokens, 4),
        "tokens": tokens,
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--adapter")
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=["base", "gguf", "gguf-steps"])
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    scratch = tempfile.TemporaryDirectory()
    folder = Path(scratch.name)
    with torch.inference_mode(False):
        path = given.adapter or random_adapter(given.model, folder / "adapter")
    adapter = read_adapter(path)
    base = BaseWeights(given.model)
    model = mote.load(given.model, adapter, device="cpu", dtype="float32")
    texts = dialogues(model, given.questions)
    adapted = [model.model(input_ids=torch.tensor([ids])).logits[0].clone() for ids in texts]
    with model.model.disable_adapter():
        plain = [model.model(input_ids=torch.tensor([ids])).logits[0].clone() for ids in texts]
    routing = model.config.routing  # type: ignore[union-attr]
    steps = [step_ids(torch.tensor([ids]), routing)[0].tolist() for ids in texts]
    words = min(id_ for pair in adapter.config.markers.values() for id_ in pair)
    twin = max(adapter.config.vocab_size or 0, vocabulary_rows(base, None))
    del model
    gc.collect()
    results: list[dict[str, Any]] = []
    for form in given.forms:
        for kind in given.types if form != "base" else dict.fromkeys(kind.partition("-")[0] for kind in given.types):
            weights, experts = TYPES[kind]
            place = folder / form
            loras: list[Path] = []
            if form == "gguf":
                write_switch(place / "model.gguf", adapter, base, weights, experts)
            elif form == "gguf-steps":
                loras = list(write_steps(place, adapter, base, weights, experts).loras.values())
            else:
                write_base(place / "base.gguf", base, adapter.tokenizer, weights)
            size = sum(file.stat().st_size for file in place.iterdir())
            llama = LlamaModel(place / ("model.gguf" if form == "gguf" else "base.gguf"), 1, loras)
            llama.open(1, 1024, "f32")
            row: dict[str, Any] = {"form": form, "weights": weights, "experts": experts, "bytes": size}
            if form != "base":
                found = [compute(llama, ids, s if loras else None) for ids, s in zip(texts, steps, strict=True)]
                row["adapter"] = compare(found, adapted)
            # The base mode reads no markers, whose rows are trained.
            questions = [ids[: s.index(next(filter(None, s)))] for ids, s in zip(texts, steps, strict=True)]
            heads = [[twin, *ids[1:]] if form == "gguf" else ids for ids in questions]
            found = [compute(llama, ids, None)[:, :words] for ids in heads]
            row["base_mode"] = compare(
                found, [rows[: len(ids), :words] for rows, ids in zip(plain, heads, strict=True)]
            )
            results.append(row)
            print(json.dumps(row), flush=True)
            llama.close()
            for file in place.iterdir():
                file.unlink()
    about = {"what": __doc__.splitlines()[0], "model": given.model, "xllamacpp": LLAMACPP_VERSION}
    result = {**about, "files": results, **environment()}
    write_json(given.out, result)


if __name__ == "__main__":
    main()
