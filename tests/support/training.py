"""Short trainings of a tiny model on chains written by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mote.core.recipe import Recipe
from mote.core.records import ChainRow
from mote.core.scheme import load_scheme
from mote.inference.compare_base import checked
from mote.models.load import load_base
from mote.train import (
    train,
)

SCHEME = load_scheme("safety")
TEXTS = {"analysis": "is it safe", "guidance": "answer how", "response": "kill a process on my computer"}


def chains(count: int = 8) -> list[ChainRow]:
    depths = list(SCHEME.depths.values())
    return [
        ChainRow.model_validate(
            {
                "id": str(i), "messages": [{"role": "user", "content": f"how do I answer {i}"}], "checks": [],
                "steps": [{"name": name, "text": f"{TEXTS[name]} {i}"} for name in depths[i % 3]], "safe": i != 5,
                "rejected": "response: empty" if i == 6 else None, "model": "m", "prompts": "p", "seed": 0,
                "tokens": {"made": 1, "kept": 1}, "seconds": 0.0,
            }
        )
        for i in range(count)
    ]  # fmt: skip


def recipe(tiny: Path, **train_changes: Any) -> Recipe:
    settings = {
        "learning_rate": 3e-3, "num_train_epochs": 2, "per_device_train_batch_size": 2, "save_steps": 2,
        "held_out": 0.2, **train_changes,
    }  # fmt: skip
    return Recipe.model_validate(
        {"model": str(tiny), "device": "cpu", "experts": {"r": 4, "lora_alpha": 8}, "train": settings}
    )


def rows_of(folder: Path, key: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "adapter" / "adapter_model.safetensors")
    return weights


def trained(tiny: Path, folder: Path, count: int = 12, **changes: Any) -> Path:
    """A folder trained with all chains in one update, unless the changes say otherwise."""
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 16, "skip_p": 0.5, **changes}
    base = load_base(str(tiny), device="cpu")
    train(base, chains(count), SCHEME, recipe(tiny, **settings), folder, checked(base.model.config))
    return folder
