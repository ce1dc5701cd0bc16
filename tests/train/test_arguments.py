"""Training settings: trackers, early stopping, the best checkpoint, loss weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import SCHEME, recipe, rows_of, trained, weights_of

from mote.core.errors import UserError
from mote.train import check_settings, training_arguments
from mote.train.arguments import check_gpu, step_weights


def test_tensorboard_gets_the_losses(tiny: Path, tmp_path: Path) -> None:
    """Real event files, kept when the checkpoints are deleted."""
    folder = trained(tiny, tmp_path, report_to=["tensorboard"], num_train_epochs=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = (folder / "tensorboard").glob("events.*")
    found = EventAccumulator(str(events)).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows_of(folder, "loss")]
    held = [event.value for event in found.Scalars("eval/loss_response")]
    assert held == [pytest.approx(row["eval_loss_response"]) for row in rows_of(folder, "eval_loss")]
    assert not (folder / "checkpoints").exists()


def test_missing_trackers_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mote.train.arguments.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=r"train\.report_to=wandb: it is not installed; `pip install wandb`"):
        check_settings(recipe(tiny, report_to=["tensorboard", "wandb"]), SCHEME, tmp_path)
    with pytest.raises(UserError, match=r"train\.report_to=paper: use none, tensorboard, trackio or wandb"):
        check_settings(recipe(tiny, report_to="paper"), SCHEME, tmp_path)


def evaluated(tiny: Path, folder: Path, **changes: Any) -> tuple[list[float], Path]:
    """Held-out losses of a training that diverges: the learning rate is far too high."""
    settings: dict[str, Any] = {"learning_rate": 3.0, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    settings |= {"num_train_epochs": 3, **changes}
    trained(tiny, folder, count=24, per_device_train_batch_size=4, **settings)
    return [row["eval_loss"] for row in rows_of(folder, "eval_loss")], folder


def test_training_stops_when_the_held_out_loss_does_not_improve(tiny: Path, tmp_path: Path) -> None:
    losses, folder = evaluated(tiny, tmp_path / "stopped", early_stopping_patience=1, num_train_epochs=8)
    assert 2 <= len(losses) < 8 and losses[:-1] == sorted(losses[:-1], reverse=True) and losses[-1] > losses[-2]
    assert f"{min(losses):.4f}" in (folder / "adapter" / "README.md").read_text()
    best = len(losses) - 1
    only, until = evaluated(
        tiny, tmp_path / "until", max_steps=best * rows_of(folder, "loss")[-1]["step"] // len(losses)
    )
    assert only[-1] == pytest.approx(min(losses))
    for name, weight in weights_of(until).items():
        assert torch.equal(weights_of(folder)[name], weight), name


def test_best_checkpoint_is_kept_when_evaluating_by_steps(tiny: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    losses, folder = evaluated(tiny, tmp_path, **changes)
    assert [row["step"] for row in rows_of(folder, "eval_loss")][:3] == [2, 4, 6]
    assert losses[-1] > min(losses)
    assert f"{min(losses):.4f}" in (folder / "adapter" / "README.md").read_text()


def test_best_checkpoint_needs_held_out_chains(tiny: Path, tmp_path: Path) -> None:
    for changes in ({"early_stopping_patience": 2}, {"load_best_model_at_end": True}):
        with pytest.raises(UserError, match=r"train\.held_out=0\.0: the best checkpoint is that of the lowest"):
            check_settings(recipe(tiny, held_out=0.0, **changes), SCHEME, tmp_path)


def test_response_loss_equals_zero_weights_on_other_steps(tiny: Path, tmp_path: Path) -> None:
    whole = trained(tiny, tmp_path / "a", loss="response")
    weighed = trained(tiny, tmp_path / "b", step_weights={"analysis": 0, "guidance": 0})
    assert rows_of(whole, "loss")[0]["loss"] == rows_of(weighed, "loss")[0]["loss"]
    for name, weight in weights_of(weighed).items():
        assert torch.equal(weights_of(whole)[name], weight), name
    assert step_weights(recipe(tiny, loss="response").train, ("plan", "answer"), "answer") is not None
    with pytest.raises(UserError, match=r"train\.loss=response does not go with train\.step_weights"):
        check_settings(recipe(tiny, loss="response", step_weights={"response": 2}), SCHEME, tmp_path)


def test_push_to_hub_needs_a_repository(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.push_to_hub=true: give the repository too"):
        training_arguments(recipe(tiny, push_to_hub=True), tmp_path)


@pytest.mark.parametrize(
    ("device", "count", "launched", "complaint"),
    [
        ("cuda", 1, False, None),
        ("cuda:0", 1, False, None),
        ("cuda", 4, True, None),
        ("cpu", 4, False, None),
        ("cuda", 4, False, "CUDA_VISIBLE_DEVICES=0 and device=cuda"),
        ("cuda:1", 2, False, "'cuda:1' is one of 2 GPUs, .* CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_gpus_that_the_trainer_would_ignore_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, count: int, launched: bool, complaint: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "1")
    if complaint is None:
        check_gpu(device)
    else:
        with pytest.raises(UserError, match=complaint):
            check_gpu(device)


def test_a_second_gpu_is_refused_before_work_begins(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    given = recipe(tiny).model_copy(update={"device": "cuda:1"})
    with pytest.raises(UserError, match="accelerate launch"):
        check_settings(given, SCHEME, tmp_path)
