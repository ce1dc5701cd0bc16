"""The folder of a trained adapter: weights, tokenizer, and a card that says what it is; and its way to a hub."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from mote.core.errors import MoteError, first_line
from mote.core.files import atomic_folder, disk_errors
from mote.core.machine import environment
from mote.core.methods import METHODS
from mote.core.recipe import Recipe
from mote.core.scheme import Chain, Scheme

GO_ON = "run the same command again: training goes on from its last whole checkpoint"


class Facts(BaseModel):
    """What a card says of a training, beside its recipe.

    Attributes:
        steps: The steps that were trained.
        accepted: Chains that were accepted, of `chains`.
        rows: Rows that were trained on; `held_out` were not.
        updates: Updates that were made.
        losses: Held-out losses after the last of them, by their names in `metrics.jsonl`.
        trainable: Parameters that were trained, of `parameters`.
    """

    model_config = ConfigDict(frozen=True)

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
    """The card in Markdown, with the front matter that hubs read.

    Args:
        recipe: With what its method fixes put in.
        facts: What was trained, and how it went.
    """
    versions = environment()["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("mote-align", "torch", "transformers", "peft"))
    losses = "\n".join(f"| {name.removeprefix('eval_loss').lstrip('_') or 'all'} | {value:.4f} |"
                       for name, value in facts.losses.items())  # fmt: skip
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
    """Write adapter, tokenizer, scheme and card, so that the folder is there as a whole or not at all.

    Args:
        model: The PEFT model.
        tokenizer: With the markers.
        scheme: What the adapter was trained with; its file may be gone by the time the adapter is loaded.
        folder: The adapter's folder.
        card: Its README.
        state_dict: The model's whole weights, where those in the model are only a part.
    """
    with disk_errors("train", folder, GO_ON), atomic_folder(folder) as scratch:
        model.save_pretrained(scratch, **({} if state_dict is None else {"state_dict": state_dict}))
        tokenizer.save_pretrained(scratch)
        own = yaml.safe_dump(scheme.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (scratch / "scheme.yaml").write_text(own, encoding="utf-8")
        (scratch / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)


def push(folder: Path, arguments: Any) -> str:
    """Upload an adapter's folder to the hub's repository of the arguments; gives its address.

    Raises:
        MoteError: The hub refused it; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, name = HfApi(token=arguments.hub_token), arguments.hub_model_id
    try:
        api.create_repo(name, private=arguments.hub_private_repo, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, revision=arguments.hub_revision).commit_url)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise MoteError(
            f"train: {folder} is whole, but {name} took none of it ({first_line(error)}); log in with `hf auth login` "
            f"and push it: `hf upload {name} {folder}`"
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
