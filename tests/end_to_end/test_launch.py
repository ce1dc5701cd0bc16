"""`mote train` under launchers with two CPU processes: losses and adapter equal those of one process."""

import functools
import os
import socket
from pathlib import Path

import pytest
import torch
import yaml
from support import processes
from support.checked_chains import checked
from support.training import recipe, rows_of, weights_of

import mote
from mote.core.records import ChainRow, rewrite_rows

# What `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP
# --fsdp_state_dict_type FULL_STATE_DICT` puts into the environment.
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip


def set_up(environment: dict[str, str]) -> None:
    """Runs first in the subprocess."""
    torch.set_num_threads(1)
    os.environ.update(environment)


def folder_of(tiny: Path, folder: Path, batch: int, **changes: object) -> list[str]:
    """A chains file with 16 trainable chains, and the training command."""
    folder.mkdir()
    accepted = [row for row in checked(30) if row.accepted][:16]
    rewrite_rows(folder / "chains.jsonl", [ChainRow.model_validate(row.model_dump()) for row in accepted])
    # Plain steps: AdamW makes a whole step of a gradient that is nothing but rounding.
    given = {"optim": "sgd", "learning_rate": 0.1, "held_out": 0, "skip_p": 0.5, "save_steps": 3, **changes}
    settings = recipe(tiny, per_device_train_batch_size=batch, **given)
    (folder / "recipe.yml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return ["train", "--recipe", str(folder / "recipe.yml"), "--out", str(folder)]


def launched(command: list[str], where: Path, extra: dict[str, str]) -> list[str]:
    """Run a command in two processes; returns the output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    logs = []
    for rank in range(2):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **extra,
        }  # fmt: skip
        logs.append(where / f"{rank}.log")
        running.append(processes.start(command, logs[rank], functools.partial(set_up, environment)))
    try:
        for process in running:
            process.join(processes.LONGEST)
        assert [process.exitcode for process in running] == [0, 0], [log.read_text() for log in logs]
    finally:
        for process in running:
            process.kill()
            process.join()
    return [log.read_text() if log.exists() else "" for log in logs]


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    code, printed = processes.finish(folder_of(tiny, folder, 8), folder.with_name("log"))
    assert code == 0, printed
    return folder


@pytest.mark.parametrize("extra", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(extra: dict[str, str], alone: Path, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, second = launched(folder_of(tiny, folder, 4), tmp_path, extra)
    expected = rows_of(alone, "loss")
    found = rows_of(folder, "loss")
    assert len(expected) == 4 and [row["step"] for row in found] == [1, 2, 3, 4]
    for row, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], abs=1e-4)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
    weights = weights_of(folder)
    assert set(weights) == set(weights_of(alone))
    for name, weight in weights_of(alone).items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0)
    assert "mote trains" in first and first.count("train: step") == 4
    assert "train: " not in second  # the first process speaks for both
    assert mote.load(str(tiny), folder / "adapter", device="cpu").answer("how", "full", max_step_tokens=3).answer
    assert not (folder / "checkpoints").exists()


def test_other_stages_refuse_several_processes(tiny: Path, tmp_path: Path) -> None:
    prepare = functools.partial(set_up, {"WORLD_SIZE": "2", "RANK": "1"})
    code, printed = processes.finish(["answer", "--out", str(tmp_path)], tmp_path / "log", prepare)
    assert code == 2 and "WORLD_SIZE=2: only `mote train` runs in several processes" in printed


def test_training_on_quantised_weights_gives_an_adapter(tiny: Path, tmp_path: Path) -> None:
    """QLoRA: 4-bit frozen weights; the adapter has the same size and loads on the unquantised model."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for this system")
    folder = tmp_path / "run"
    command = folder_of(tiny, folder, 8, quantization="4bit")
    code, printed = processes.finish(command, tmp_path / "log")
    assert code == 0, printed
    losses = [row["loss"] for row in rows_of(folder, "loss")]
    assert all(torch.isfinite(torch.tensor(losses)))
    weights = weights_of(folder)
    assert any(weight.any() for name, weight in weights.items() if "mote_B" in name)
    assert all(weight.is_floating_point() for weight in weights.values())
    assert mote.load(str(tiny), folder / "adapter", device="cpu").answer("how", "direct", max_step_tokens=3).answer
