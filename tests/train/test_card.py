"""The model card, and pushing an adapter folder to the Hub."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from support.checked_chains import checked
from support.hub_server import Hub, environment
from support.training import chains, recipe, rows_of, trained

from mote.core.records import rewrite_rows


def test_model_card_states_what_was_trained(tiny: Path, tmp_path: Path) -> None:
    folder = trained(tiny, tmp_path, count=24, held_out=0.25)
    card = (folder / "adapter" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == str(tiny)
    accepted = [chain for chain in chains(24) if chain.accepted]
    held = round(0.25 * len(accepted))
    assert f"{len(accepted)} of 24 chains accepted; {len(accepted) - held} rows trained on, {held} held out" in text
    for key, value in rows_of(folder, "eval_loss")[-1].items():
        if key.startswith("eval_loss"):
            assert f"| {key.removeprefix('eval_loss').lstrip('_') or 'all'} | {value:.4f} |" in text
    import peft
    import torch

    assert f"torch {torch.__version__.partition('+')[0]}" in text and f"peft {peft.__version__}" in text
    assert f'mote.load("{tiny}", adapter=' in text and "an expert a step" in text


def push(hub: Hub, tiny: Path, folder: Path, token: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    rewrite_rows(folder / "chains.jsonl", checked())
    settings = recipe(tiny, push_to_hub=True, hub_model_id="user/name").model_dump(mode="json")
    (folder / "recipe.yml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "mote.cli", "train", "--recipe", str(folder / "recipe.yml"), "--out", str(folder)]
    given = {**environment(hub, folder), "HF_TOKEN": token}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=100, check=False)


def test_adapter_is_pushed_and_kept_if_the_hub_refuses(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    done = push(hub, tiny, tmp_path / "run", "secret")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"pushed to {hub.address}/user/name/commit/1" in done.stderr
    adapter = tmp_path / "run" / "adapter"
    names = {path.name for path in adapter.iterdir()}
    assert {name.removeprefix("user/name/") for name in hub.files} == names and hub.commits == 1
    assert hub.files["user/name/adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["user/name/adapter_config.json"])["peft_type"] == "MOTE"

    refused = push(hub, tiny, tmp_path / "refused", "wrong")
    assert refused.returncode == 1
    assert "adapter is complete, but pushing it to user/name failed" in refused.stderr.splitlines()[-1]
    assert (tmp_path / "refused" / "adapter" / "adapter_model.safetensors").exists() and hub.commits == 1
