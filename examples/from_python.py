"""Ten calls that a PEFT user makes: step experts on a base model, a training step, save, load, answer.

    python examples/from_python.py HuggingFaceTB/SmolLM2-135M-Instruct my-adapter

The adapter that comes out has seen one update and is good for nothing; `mote run` trains a real one.
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mote


def main(name: str, folder: str) -> None:
    """Make an adapter in `folder` for the base model `name`, and use it."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name)

    # 1. Three step experts and a shared one on every linear layer; r and lora_alpha are per expert.
    config = mote.MoteConfig(
        r=16, lora_alpha=32, target_modules="all-linear", experts=("analysis", "guidance", "response"), mix=0.5
    )
    # 2. Step markers for the tokenizer, their ids for the config, embedding rows for the model.
    mote.add_markers(tokenizer, config, base)
    # 3. As with every PEFT method.
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    # 4. A training step. The step of each token follows from input_ids: there is nothing to route by hand.
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I kill a process?"}], tokenize=False, add_generation_prompt=True
    )
    chain = (
        "<|analysis|>This is about computers and hurts nobody.<|/analysis|>"
        "<|response|>Use `kill` with the number of the process.<|/response|>"
    )
    prompt = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
    ids = torch.cat([prompt, tokenizer(chain, add_special_tokens=False, return_tensors="pt").input_ids], dim=1)
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = -100  # the loss is on the steps
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")

    # 5. `generate` routes the tokens it writes; here the step is opened by hand.
    model.eval()
    opened = torch.cat([prompt, torch.tensor([[config.markers["response"][0]]])], dim=1)
    written = model.generate(
        input_ids=opened, attention_mask=torch.ones_like(opened), max_new_tokens=8, do_sample=False
    )
    print(tokenizer.decode(written[0, opened.shape[1] :]))

    # 6. The base model's own answer.
    with model.disable_adapter():
        plain = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
    print(tokenizer.decode(plain[0, prompt.shape[1] :]))

    # 7. Safetensors, the tokenizer beside them.
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    # 8. Loaded by PEFT: after `import mote` it knows the method, without it the load fails loudly.
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), folder).eval()
    with torch.no_grad():
        same = torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    print(f"same logits after loading: {same}")

    # 9. Answers with as much reasoning as the question needs, or as much as you ask for.
    m = mote.load(name, adapter=folder)
    answer = m.answer("How do I kill a process?", mode="adaptive", max_step_tokens=16)
    print([step.name for step in answer.steps], answer.tokens.total)

    # 10. A batch, with dialogues in it; and the events of a single answer as it is decoded.
    dialogue = [{"role": "user", "content": "How do I kill a process?"}]
    for answer in m.answer([dialogue, "What is a safe password?"], mode="full", max_step_tokens=8):
        print(answer.mode, answer.finish, answer.answer)
    m.answer(
        "Is tea safe?", mode="direct", max_step_tokens=8, on_event=lambda event: print(type(event).__name__, end=" ")
    )
    print()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} MODEL ADAPTER_FOLDER")
    main(*sys.argv[1:])
