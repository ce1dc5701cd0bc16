"""Writes the adapter folder (weights, tokenizer, scheme, model card) and pushes it to the Hugging Face Hub."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mote.core.errors import MoteError, first_line
from mote.core.files import atomic_folder, disk_errors
from mote.core.machine import environment
from mote.core.methods import METHODS
from mote.core.recipe import Recipe
from mote.core.records import Frozen
from mote.core.scheme import Chain, Scheme

GO_ON = "run the same command again: training resumes from its last complete checkpoint"


class Facts(Frozen):
    """The facts about a training run that a model card states beside the recipe.

    Attributes:
        steps: The trained steps.
        chains: All chains given.
        accepted: The accepted ones among them.
        rows: Training rows.
        held_out: Held-out rows.
        updates: Optimizer updates.
        losses: Held-out losses of the final weights, named as in `metrics.jsonl`.
        trainable: Trained parameters.
        parameters: All parameters of the model, the trained ones included.
    """

    steps: Chain
    chains: int
    accepted: int
    rows: int
    held_out: int
    updates: int
    losses: dict[str, float]
    trainable: int
    parameters: int


def model_card(recipe: Recipe, facts: Facts) -> str:
    """The model card in Markdown with the Hub's YAML front matter.

    Args:
        recipe: With its method's overrides applied.
        facts: What was trained, and the result.
    """
    versions = environment()["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("mote-align", "torch", "transformers", "peft"))
    rows = [(name.removeprefix("eval_loss").lstrip("_") or "all", value) for name, value in facts.losses.items()]
    losses = "\n".join(f"| {name} | {value:.4f} |" for name, value in rows)
    return _CARD.format(
        model=recipe.model,
        name=recipe.name,
        method=recipe.train.method,
        note=METHODS[recipe.train.method].note,
        steps=", ".join(facts.steps),
        chains=facts.chains,
        accepted=facts.accepted,
        rows=facts.rows,
        held_out=facts.held_out,
        updates=facts.updates,
        epochs=recipe.train.num_train_epochs,
        rate=recipe.train.learning_rate,
        r=recipe.experts.r,
        alpha=recipe.experts.lora_alpha,
        seed=recipe.seed,
        trainable=f"{facts.trainable:,}",
        share=f"{facts.trainable / facts.parameters:.2%}",
        losses=f"| tokens of | held-out loss |\n|---|---|\n{losses}" if losses else "Nothing was held out.",
        used=used,
    )


def save_adapter(
    model: Any,
    tokenizer: Any,
    scheme: Scheme,
    folder: Path,
    card: str,
    state_dict: Mapping[str, Any] | None = None,
) -> None:
    """Write adapter, tokenizer, scheme and card atomically.

    Args:
        model: The PEFT model.
        tokenizer: With the markers.
        scheme: The training scheme; saved too, because its file may be gone when the adapter is loaded.
        folder: The adapter folder.
        card: Text of its README.
        state_dict: The gathered weights if the model holds only a shard (FSDP).
    """
    with disk_errors("train", folder, GO_ON), atomic_folder(folder) as scratch:
        model.save_pretrained(scratch, **({} if state_dict is None else {"state_dict": state_dict}))
        tokenizer.save_pretrained(scratch)
        own = yaml.safe_dump(scheme.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (scratch / "scheme.yaml").write_text(own, encoding="utf-8")
        (scratch / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)


def push(folder: Path, arguments: Any) -> str:
    """Upload an adapter folder to the Hub repository that the training arguments name; returns the commit's URL.

    Raises:
        MoteError: The Hub refused it; the local folder is complete.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=arguments.hub_token)
    name = arguments.hub_model_id
    try:
        api.create_repo(name, private=arguments.hub_private_repo, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, revision=arguments.hub_revision).commit_url)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise MoteError(
            f"train: {folder} is complete, but pushing it to {name} failed ({first_line(error)}); log in with "
            f"`hf auth login` and push it: `hf upload {name} {folder}`"
        ) from error


_CARD = """---
library_name: peft
base_model: {model}
tags: [mote, safety, lora, mixture-of-experts]
---
# `{method}` adapter for `{model}`

Trained by `mote` (Mixture of insighTful Experts, arXiv 2405.00557) as the method `{method}`: {note}. Steps: {steps}.

| | |
|---|---|
| base model | `{model}` |
| recipe | `{name}`, seed {seed} |
| data | {accepted} of {chains} chains accepted; {rows} rows trained on, {held_out} held out |
| training | {updates} updates in {epochs:g} epochs, learning rate {rate:g} |
| rank of an expert, lora_alpha | {r}, {alpha:g} |
| trained parameters | {trainable} ({share}) |
| made with | {used} |

{losses}

The losses are mean cross-entropies of held-out chains; they say nothing about how safe the answers are.

```python
import mote  # pip install mote-align; makes PEFT know the method
model = mote.load("{model}", adapter="path/to/this/folder")
print(model.answer("How do I ...?", mode="direct").answer)
```
"""
