"""How our set-up differs from the paper's, as sentences generated from the settings."""

from collections.abc import Sequence
from pathlib import Path

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.experiments.ablations.ablation_recipe import Ablations
from mote.experiments.ablations.ablation_results import Measured
from mote.experiments.ablations.figures import PaperTable, paper_setup
from mote.experiments.ablations.judged import OWN_QUESTIONS, RATED, rates
from mote.models.shapes import count_parameters, find_shape


def differences(
    wanted: Ablations, table: PaperTable, rows: Sequence[Measured], judge: str, data: Path | None
) -> list[str]:
    """One sentence per difference.

    Args:
        wanted: The ablations.
        table: The paper's table.
        rows: The results.
        judge: The judge.
        data: Folder of the upstream files; None if the package's own questions were asked.
    """
    setup = paper_setup()
    settings = {**setup.settings, "batch": setup.batch}
    recipe = wanted.recipe
    limit = "all" if recipe.limit is None else f"at most {recipe.limit:,}"
    notes = [f"Model: {recipe.model} ({_size(recipe)}); the paper's: {table.model or setup.model}."]
    if any(row.chains for row in rows):
        notes.append(
            f"Chains: for {limit} questions of {recipe.questions}{_counted(rows)}; the paper's: {setup.questions}."
        )
    if wanted.tasks:
        most = "all" if recipe.answer.limit is None else f"at most {recipe.answer.limit:,}"
        prompts = f"the files of {data.name}" if data else f"the package's own questions ({OWN_QUESTIONS})"
        notes.append(f"Asked: {most} questions a task of {prompts}; the paper's: {table.prompts}.")
        notes.append(f"Judge: {_cards(rows) or judge}; the paper's: {setup.judge}.")
        if any(card.measures == "refusal" for row in rows for card in row.judges):
            notes.append(
                "Refusal is not harm: the offline rule's `refusal` does not measure the paper's Harm or goodness and "
                "has separate columns."
            )
        left = [task for task in wanted.tasks if task in RATED and not rates(judge)]
        if left:
            notes.append(f"Not judged: {', '.join(left)}; they are ratings, give --judge llm:MODEL or inspect:MODEL.")
    if any(row.trained_parameters for row in rows):
        changed = [
            f"{name} {value:g} (the paper's: {settings[name]:g})"
            for name, value in _settings(recipe).items()
            if value != settings[name]
        ]
        notes.append(
            f"Training: {', '.join(changed)}." if changed else "Training: the paper's rank, epochs, rate, batch."
        )
        notes.append(f"Seeds: {', '.join(map(str, wanted.seeds))}; the paper gives no interval.")
    return notes


def _size(recipe: Recipe) -> str:
    """The model's number of parameters, from its shape."""
    try:
        shape, _ = find_shape(recipe, [])
    except UserError:
        return "its size is not known here"
    count = count_parameters(shape)
    return f"{count / 1e9:.1f}B parameters" if count >= 1e9 else f"{count / 1e6:.1f}M parameters"


def _counted(rows: Sequence[Measured]) -> str:
    counts = sorted({row.chains for row in rows if row.chains})
    return f", {'to '.join(f'{count:,} ' for count in dict.fromkeys((counts[0], counts[-1])))}of them accepted"


def _cards(rows: Sequence[Measured]) -> str:
    """Every judge with what it measures and the first digits of its prompt hash."""
    cards = {(card.name, card.measures): card for row in rows for card in row.judges}
    return ", ".join(
        f"{name} ({measures}{f', prompt {card.prompts[:8]}' if card.prompts else ''})"
        for (name, measures), card in sorted(cards.items())
    )


def _settings(recipe: Recipe) -> dict[str, float]:
    train = recipe.train
    return {
        "experts.r": recipe.experts.r,
        "train.num_train_epochs": train.num_train_epochs,
        "train.learning_rate": train.learning_rate,
        "batch": train.per_device_train_batch_size * train.gradient_accumulation_steps,
    }
