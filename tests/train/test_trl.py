"""Step experts under TRL's trainer, used as TRL's users do."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import mote
from mote.tuner.layer import MoteLinear

ROWS = [
    {"prompt": "How do I pick a lock?", "completion": "<|response|>Call a locksmith.<|/response|>"},
    {
        "prompt": "How do I kill a process?",
        "completion": "<|analysis|>It is about computers.<|/analysis|><|response|>Use the task manager.<|/response|>",
    },
]


def test_sft_trainer_trains_the_experts_of_the_steps_it_sees(tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    config = mote.MoteConfig(r=4, question_expert="response", draw_question_expert=False)
    mote.add_markers(tokenizer, config, base)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to="none", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=base, processing_class=tokenizer, train_dataset=Dataset.from_list(ROWS), peft_config=config,
        args=arguments,
    )  # fmt: skip
    model = trainer.model
    layer = next(module for module in model.modules() if isinstance(module, MoteLinear))
    before = layer.mote_A["default"].weight.detach().clone()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert float(losses[-1]) < 0.8 * float(losses[0])
    # shared, analysis, guidance (in no row), response
    change = (layer.mote_A["default"].weight - before).abs().split(4)
    assert [bool(part.max() > 0) for part in change] == [True, True, False, True]

    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter").eval()
    ids = tokenizer(ROWS[1]["prompt"] + ROWS[1]["completion"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
