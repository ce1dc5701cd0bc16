"""Training in two processes: gradients, update and saved adapter equal those of one process with both batches."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from support.adapters import adapted, tiny_llama
from support.processes import ENVIRONMENT, MODULES
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mote.tuner.layer import MoteLinear

WORLD = 2
LONGEST = 60  # seconds


def batch() -> dict[str, Tensor]:
    """Two rows per process; no row has the second step, and the first process has no step at all."""
    ids = torch.randint(3, 60, (2 * WORLD, 12), generator=torch.Generator().manual_seed(3))
    ids[2, 3], ids[2, 8], ids[3, 5] = 64, 68, 64
    return {"input_ids": ids, "labels": ids, "question_experts": torch.tensor([3, 1, 1, 3])}


def part(rank: int) -> dict[str, Tensor]:
    return {name: value[2 * rank : 2 * rank + 2] for name, value in batch().items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model: Any, call: Any, given: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Gradients of one batch, and the weights after one step of AdamW."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    call(**given).loss.backward()
    gradients = {name: whole(p.grad).detach().clone() for name, p in weights.items()}
    torch.optim.AdamW(weights.values(), lr=1e-2).step()
    return {"gradients": gradients, "weights": {name: whole(p).detach().clone() for name, p in weights.items()}}


def with_ddp(rank: int, folder: Path) -> Any:
    model = adapted().train()
    found = train(model, DistributedDataParallel(model), part(rank))
    if rank == 0:
        model.save_pretrained(folder / "adapter")
    return found


def with_ddp_checkpointed(rank: int, folder: Path) -> Any:
    model = adapted().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    return train(model, DistributedDataParallel(model), part(rank))


def sharded(leaves: bool) -> Any:
    """FSDP2 as torchtitan and accelerate apply it: each block, then the rest."""
    model = adapted().train()
    mesh = init_device_mesh("cpu", (WORLD,))
    base = model.get_base_model()
    if leaves:
        for layer in [module for module in model.modules() if isinstance(module, MoteLinear)]:
            fully_shard(layer.mote_A["default"], mesh=mesh)
            fully_shard(layer.mote_B["default"], mesh=mesh)
    for block in base.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def with_fsdp(rank: int, folder: Path, leaves: bool = False, checkpointed: bool = False) -> Any:
    model = sharded(leaves)
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    found = train(model, model, part(rank))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "adapter", state_dict=state)
    return found


def with_fsdp_leaves(rank: int, folder: Path) -> Any:
    return with_fsdp(rank, folder, leaves=True)


def with_fsdp_checkpointed(rank: int, folder: Path) -> Any:
    return with_fsdp(rank, folder, checkpointed=True)


def _process(scenario: Callable[[int, Path], Any], rank: int, folder: Path) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
        torch.save(scenario(rank, folder), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.failed").write_text(traceback.format_exc())
        raise


def on_two_processes(scenario: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    before = dict(os.environ)
    context.set_forkserver_preload(MODULES)
    try:
        os.environ.update(ENVIRONMENT)
        processes = [
            context.Process(target=_process, args=(scenario, rank, folder), daemon=True) for rank in range(WORLD)
        ]
        for process in processes:
            process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    for process in processes:
        process.join(LONGEST)
    for process in processes:
        process.kill()
        process.join()
    failed = [path.read_text() for path in folder.glob("*.failed")]
    assert not failed, failed[0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> Any:
    """One process with the whole batch: its results and its logits afterwards."""
    model = adapted().train()
    found = train(model, model, batch())
    with torch.no_grad():
        return found, model.eval()(input_ids=batch()["input_ids"]).logits


@pytest.mark.parametrize(
    "scenario", [with_ddp, with_ddp_checkpointed, with_fsdp, with_fsdp_leaves, with_fsdp_checkpointed]
)
def test_two_processes_train_as_one(scenario: Callable[[int, Path], Any], alone: Any, tmp_path: Path) -> None:
    expected, logits = alone
    for found in on_two_processes(scenario, tmp_path):
        for kind in ("gradients", "weights"):
            names = {name.replace("_checkpoint_wrapped_module.", ""): name for name in found[kind]}
            assert set(names) == set(expected[kind])
            for name, theirs in names.items():
                torch.testing.assert_close(found[kind][theirs], expected[kind][name], atol=1e-5, rtol=0)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected["gradients"].values())
    if (tmp_path / "adapter").exists():
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=batch()["input_ids"]).logits, logits, atol=1e-4, rtol=1e-4)


def test_expert_without_tokens_gets_a_zero_gradient(alone: Any) -> None:
    """So DDP does not wait, with the default `find_unused_parameters`."""
    gradients = alone[0]["gradients"]
    first = {name: gradient for name, gradient in gradients.items() if "mote_A" in name}
    assert first
    for gradient in first.values():
        shared, analysis, guidance, response = gradient.split(4)
        assert shared.any() and analysis.any() and response.any() and not guidance.any()
