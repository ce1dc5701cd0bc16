"""One epoch of `MoteTrainer` against one of TRL's `SFTTrainer` with plain LoRA, on the same chains.

Run as a module with settings and an arm's name, it prints that arm's peak memory.
"""

import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback
from typing_extensions import override

from mote.core.errors import UserError
from mote.core.machine import peak_memory_mb
from mote.core.recipe import Recipe
from mote.experiments.bench.measurements import synchronize
from mote.experiments.bench.variants import share
from mote.experiments.bench.workload import STEPS, Workload, prepare
from mote.models.linear import speed_up
from mote.tokens.encode import IGNORED
from mote.tokens.masks import mask_form, masks_for, skip_probabilities
from mote.tokens.packing import ChainDataset, collate
from mote.train import MoteTrainer, training_arguments
from mote.tuner import MoteConfig

PADDED = "mote, padded"
PACKED = "mote, packed"
SFT_PADDED = "SFTTrainer, padded"
SFT_PACKED = "SFTTrainer, packed"
SFT_AGAIN = "SFTTrainer, padded again"
ARMS = (SFT_PADDED, SFT_AGAIN, SFT_PACKED, PADDED, PACKED)


@dataclass(frozen=True)
class TrainerSettings:
    """What the speed of an epoch depends on.

    Attributes:
        batch: Chains per update.
        length: Tokens of a packed row.
        skip_p: Probability that a later step does not see an earlier one.
        device: Where it runs.
        checkpointing: Whether gradient checkpointing is on.
    """

    batch: int
    length: int
    skip_p: float
    device: str
    checkpointing: bool

    def rows_per_batch(self, workload: Workload, packed: bool) -> int:
        """Rows per update: `batch`, or as many packed rows as hold about the same number of tokens."""
        if not packed:
            return self.batch
        mean = sum(len(row.ids) for row in workload.rows) / len(workload.rows)
        return max(1, round(self.batch * mean / self.length))

    def settings(self, folder: str, rows: int) -> dict[str, Any]:
        """The training arguments that both trainers share."""
        return {
            "num_train_epochs": 1,
            "per_device_train_batch_size": rows,
            "learning_rate": 1e-5,
            "gradient_checkpointing": self.checkpointing,
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
        }


class Epoch:
    """Trains one epoch per call."""

    def __init__(self, trainer: Any, tokens: int) -> None:
        self.trainer = trainer
        self.tokens = tokens
        self.clock = _Clock()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.clock)

    def __call__(self) -> float:
        """Train an epoch; returns non-padding tokens per second from the first batch to the last update."""
        self.trainer.train()
        return self.tokens / self.clock.seconds


class _Clock(TrainerCallback):
    began = 0.0
    seconds = 0.0

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize()
        self.began = time.perf_counter()

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self.began


def build(name: str, workload: Workload, given: TrainerSettings) -> Epoch:
    """The trainer of an arm (one of `ARMS`) on the workload's chains."""
    packed = name in (PACKED, SFT_PACKED)
    made = (_mote if name in (PADDED, PACKED) else _sft)(workload, given, packed)
    return Epoch(made, sum(len(row.ids) for row in workload.rows))


def with_experts(workload: Workload, config: MoteConfig, flex: bool) -> Any:
    """The base model with step experts and trained marker embeddings."""
    torch.manual_seed(0)
    base = share(workload.model, PADDED)
    speed_up(base)
    model = get_peft_model(base, config)
    if flex:
        model.get_base_model().set_attn_implementation("flex_attention")
    return model


def _mote(workload: Workload, given: TrainerSettings, packed: bool) -> MoteTrainer:
    flex = given.device.startswith("cuda")
    folder = tempfile.mkdtemp()
    settings = given.settings(folder, given.rows_per_batch(workload, packed))
    arguments = training_arguments(Recipe.model_validate({"train": settings}), Path(folder), False, given.device)
    assert workload.config.routing is not None
    model = with_experts(workload, workload.config, flex)
    return MoteTrainer(
        model=model,
        args=arguments,
        train_dataset=ChainDataset(
            workload.rows, skip_probabilities(given.skip_p, {}, STEPS), 0, given.length if packed else None
        ),
        data_collator=lambda batch: collate(batch, workload.tokenizer.pad_token_id),
        markers=workload.config.routing,
        expert_names=STEPS,
        make_mask=masks_for(model.config, mask_form(model.config._attn_implementation)),
    )


def _sft(workload: Workload, given: TrainerSettings, packed: bool) -> Any:
    """TRL's trainer with its own loss and packing, on the model as transformers loads it.

    On a GPU it uses bfloat16 autocast, its default, because PEFT keeps adapters in float32.
    """
    try:
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer
    except ImportError as error:
        raise UserError(
            "only: TRL is not installed; `pip install trl`, or leave 'trainers' and 'memory' out"
        ) from error
    logging.getLogger("trl").setLevel(logging.ERROR)
    folder = tempfile.mkdtemp()
    on_gpu = given.device.startswith("cuda")
    arguments = SFTConfig(
        **given.settings(folder, given.rows_per_batch(workload, packed)),
        output_dir=folder,
        report_to="none",
        max_length=given.length,
        packing=packed,
        completion_only_loss=True,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
    )
    torch.manual_seed(0)
    rows = [
        {"input_ids": row.ids, "completion_mask": [int(label != IGNORED) for label in row.labels]}
        for row in workload.rows
    ]
    return SFTTrainer(
        model=share(workload.model, SFT_PADDED),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=workload.tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def main() -> None:
    """Train one epoch and print the peak memory in MB."""
    settings = json.loads(sys.argv[1])
    name = sys.argv[2]
    torch.set_num_threads(settings["threads"])
    chains = settings["chains"] and Path(settings["chains"])
    workload = prepare(
        settings["model"], settings["shape"], settings["device"], settings["dtype"], chains, settings["count"]
    )
    build(name, workload, TrainerSettings(**settings["training"]))()
    print(peak_memory_mb())


if __name__ == "__main__":
    main()
