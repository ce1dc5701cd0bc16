"""Throughput of vLLM with step experts against vLLM with the base model: 32 concurrent requests on a CPU.

    make .venv-vllm/.installed
    .venv-vllm/bin/python benchmarks/vllm_experts.py    # 12 minutes on an idle core; writes vllm_experts.json
    .venv-vllm/bin/python benchmarks/vllm_experts.py --shape wide --out benchmarks/vllm_wide.json  # 16 GB

A random adapter of rank 16 on SmolLM2-135M-Instruct (`small`), on a local model, or on a random model as wide as
Llama-3.2-1B (`wide`) with 6 layers, which share the cost of the output head as its 16 do: the relative cost of the
experts falls with the width. Three engines in one process with one thread alternate step by step, in another order each
round: base, base again (A/A), experts; first eager, then compiled. Every answer has the same number of tokens. CPU time
is reported beside wall time, because other load affects it less.

Memory placement changes an engine's speed by some percent for as long as it runs, and glibc maps and unmaps large
tensors in every step. With GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=17179869184 in the environment weights lie in huge pages and memory is kept; the JSON records it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0"
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version

from mote.core.machine import environment
from mote.models.embedded import EMBEDDED
from mote.models.load import fingerprint, load_base, model_folder
from mote.serve.vllm.export_folder import EXPERTS, export_vllm
from mote.tokens.encode import add_markers
from mote.tuner import MoteConfig

RANK = 16
NEW = 64  # tokens per answer
MODES = {"direct": 62, "analysis": 30, "full": 20}  # step budgets with which the steps fill an answer


def base_folder(shape: str, folder: Path) -> str:
    """The base model: the embedded one, a wider random one with its tokenizer, or a local one."""
    embedded = model_folder(EMBEDDED)
    if shape != "wide":
        return embedded if shape == "small" else shape
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=6,
                    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
                    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


def serve_random_experts(base_name: str, folder: Path) -> Path:
    """A served folder with random experts on every linear layer."""
    base = load_base(base_name, device="cpu")
    config = MoteConfig(r=RANK, lora_alpha=2 * RANK, init_weights=False, base_fingerprint=fingerprint(base.model))
    add_markers(base.tokenizer, config, base.model)
    torch.manual_seed(0)
    get_peft_model(base.model, config).save_pretrained(folder / "adapter")
    base.tokenizer.save_pretrained(folder / "adapter")
    return export_vllm(str(folder / "adapter"), folder / "served", model=base_name)


def share(served: Path) -> float:
    """Multiplications of all experts over those of their layers."""
    tensors = load_file(served / EXPERTS)
    pairs = [(first, tensors[name.replace("mote_A", "mote_B")]) for name, first in tensors.items() if "mote_A" in name]
    return sum(a.numel() + b.numel() for a, b in pairs) / sum(a.shape[1] * b.shape[0] for a, b in pairs)


def engine(folder: Path | str, eager: bool, rows: int) -> LLM:
    return LLM(str(folder), dtype="float32", enforce_eager=eager, max_model_len=512, block_size=32, max_num_seqs=rows,
               enable_prefix_caching=False, distributed_executor_backend="uni")  # fmt: skip


def seconds(engines: Sequence[LLM], prompts: Sequence[Any], experts: int) -> list[tuple[float, float]]:
    """Wall and CPU seconds of each engine for all answers, prefill included.

    The engines alternate step by step, so that other load on the machine slows all of them down.

    Args:
        engines: In the order of their turns.
        prompts: The same for each.
        experts: Index of the engine with the experts.
    """
    modes = [list(MODES)[i % len(MODES)] for i in range(len(prompts))]
    for index, llm in enumerate(engines):
        for number, (prompt, mode) in enumerate(zip(prompts, modes, strict=True)):
            extra = {"mode": mode, "max_step_tokens": MODES[mode]} if index == experts else None
            params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args=extra)
            llm.llm_engine.add_request(str(number), prompt, params)
    taken = [(0.0, 0.0)] * len(engines)
    generated = 0
    while any(llm.llm_engine.has_unfinished_requests() for llm in engines):
        for index, llm in enumerate(engines):
            clock = time.perf_counter()
            processor = time.process_time()
            for answer in llm.llm_engine.step():
                generated += len(answer.outputs[0].token_ids) if answer.finished else 0
            before = taken[index]
            taken[index] = before[0] + time.perf_counter() - clock, before[1] + time.process_time() - processor
    assert generated == NEW * len(prompts) * len(engines)
    return taken


def measure(base: str, served: Path, eager: bool, given: argparse.Namespace) -> dict[str, Any]:
    engines = {name: engine(folder, eager, given.rows) for name, folder in
               {"base": base, "again": base, "experts": served}.items()}  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 4000, (given.rows, given.prompt), generator=draw).tolist()
    prompts = [{"prompt_token_ids": row} for row in ids]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for turn in range(given.rounds + 1):
        order = list(engines)
        names = order[turn % 3 :] + order[: turn % 3]
        spent = seconds([engines[name] for name in names], prompts, names.index("experts"))
        for name, of_engine in zip(names, spent, strict=True):
            if turn:  # the first turn warms up
                taken[name].append(of_engine)
    for llm in engines.values():
        llm.llm_engine.engine_core.shutdown()
    clock = statistics.median(spent for spent, _ in taken["base"])
    return {"base_tokens_per_second": round(given.rows * NEW / clock, 1)} | {
        kind: {label: ratio(taken["base"], taken[name], which)
               for label, name in (("A/A", "again"), ("experts", "experts"))}
        for which, kind in enumerate(("tokens_per_second_over_base", "tokens_per_cpu_second_over_base"))
    }  # fmt: skip


def ratio(base: list[tuple[float, float]], own: list[tuple[float, float]], which: int) -> dict[str, float]:
    values = [b[which] / o[which] for b, o in zip(base, own, strict=True)]
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--only", choices=["eager", "compiled"])
    parser.add_argument("--shape", default="small", help="small, wide, or a model's folder")
    given = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = base_folder(given.shape, Path(folder) / "base")
        served = serve_random_experts(base, Path(folder))
        added = round(share(served), 3)
        for name in [given.only] if given.only else ["eager", "compiled"]:
            result[name] = measure(base, served, name == "eager", given)
            print(name, json.dumps(result[name]), flush=True)
    result |= {
        "what": "tokens per second of vLLM with step experts over its base model's, medians of paired rounds",
        "shape": {"model": Path(given.shape).name, "rank": RANK, "rows": given.rows, "prompt_tokens": given.prompt,
                  "new_tokens": NEW, "rounds": given.rounds, "threads": 1, "dtype": "float32",
                  "experts_over_layers_multiplications": added},
    }  # fmt: skip
    result |= environment()
    result["versions"]["vllm"] = vllm_version
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
