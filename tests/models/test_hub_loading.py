"""An adapter goes to a hub and comes back the same: huggingface_hub against a server that speaks its protocol."""

import json
import subprocess
import sys
from pathlib import Path

from support.hub_server import Hub, environment

PROGRAM = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM
import mote

tiny = sys.argv[1]
base, tokenizer = LlamaForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
config = mote.MoteConfig(r=4, init_weights=False)
mote.add_markers(tokenizer, config, base)
model = get_peft_model(base, config).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            parameter.add_(torch.randn_like(parameter))
model.push_to_hub("user/name", token="secret")
tokenizer.push_to_hub("user/name", token="secret")

text = "how do I<|analysis|>safe<|/analysis|><|response|>go"
ids = AutoTokenizer.from_pretrained("user/name")(text, return_tensors="pt")["input_ids"]
assert torch.equal(ids, tokenizer(text, return_tensors="pt")["input_ids"])
assert isinstance(PeftConfig.from_pretrained("user/name"), mote.MoteConfig)
loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny), "user/name").eval()
auto = AutoPeftModelForCausalLM.from_pretrained("user/name").eval()
with torch.no_grad():
    expected = model(input_ids=ids).logits
    for other in (loaded, auto):
        print("difference", (other(input_ids=ids).logits - expected).abs().max().item())
"""


def test_an_adapter_survives_a_round_trip_over_the_hub(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny)],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if "difference" in line] == ["difference 0.0"] * 2
    names = {name.removeprefix("user/name/") for name in hub.files}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert hub.large == {"adapter_model.safetensors"} and hub.commits == 2
    assert json.loads(hub.files["user/name/adapter_config.json"])["peft_type"] == "MOTE"
    assert len(hub.files["user/name/adapter_model.safetensors"]) < 200_000  # no whole embedding
    assert not [request for request in hub.refused if not request.startswith(("HEAD", "GET"))]
