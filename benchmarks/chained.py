"""Answering with one request per step to plain LoRAs against the MoTE model: agreement of logits, and prompt tokens.

    .venv/bin/python benchmarks/chained.py --adapter runs/quickstart/adapter    # 3 minutes; writes chained.json

An engine would serve the LoRAs of `mote export --format engine-steps`; here `peft-steps` computes the same. Each
request prefills everything before its step with that step's own LoRA. Both score the MoTE model's answers in `full`
mode, and the tokens of the steps are compared.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM

import mote
from mote.core.generation import Limits
from mote.core.machine import environment
from mote.inference.inputs import as_question
from mote.models.embedded import EMBEDDED
from mote.questions.load import load_questions
from mote.serve.export import export_steps
from mote.tokens.encode import encode_prompt


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    model = mote.load(given.model, given.adapter, device="cpu")
    scratch = tempfile.TemporaryDirectory()
    folders = export_steps(given.adapter, Path(scratch.name) / "steps", given.model)
    loras = {folder.name: AutoPeftModelForCausalLM.from_pretrained(folder).eval() for folder in folders}
    same = 0
    difference = 0.0
    tokens = 0
    read_whole = 0
    read_chained = 0
    for question in load_questions("mote:test", given.questions):
        prompt = encode_prompt(model.tokenizer, as_question(question).messages)
        ids = prompt + model.submit(question, "full", Limits(max_step_tokens=32)).result()
        row = torch.tensor([ids])
        logits = model.model(input_ids=row).logits[0]
        read_whole += len(ids)
        for step, lora in loras.items():
            start, end = (ids.index(id_) for id_ in model.config.markers[step])
            own = slice(start, end)  # each of these predicts a token of the step
            chained = lora(input_ids=row[:, : end + 1]).logits[0, own]
            same += int((chained.argmax(-1) == logits[own].argmax(-1)).sum())
            difference += float((chained - logits[own]).abs().amax(-1).sum())
            tokens += end - start
            read_chained += end + 1
    result = {
        "what": "one request a step to plain LoRAs, beside the model itself, on the tokens of its answers' steps",
        "model": given.model,
        "questions": given.questions,
        "tokens": tokens,
        "same_next_token": round(same / tokens, 3),
        "largest_difference_of_logits": round(difference / tokens, 2),
        "tokens_read_over_the_models": round(read_chained / read_whole, 2),
        **environment(),
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
