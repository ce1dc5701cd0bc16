"""`MoteTrainer`: transformers' `Trainer` with our masks, weights and held-out losses.

It knows of batches, not of chains or recipes.
Shapes: B row, T token, S step, V vocabulary, G group of tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from mote.tokens.encode import IGNORED
from mote.tokens.masks import PADDING, sdpa_mask
from mote.tokens.packing import ChainDataset
from mote.tokens.routing import QUESTION, Markers
from mote.train.loss import Head, plain_head, tiled_losses, token_losses
from mote.tuner.token_gated import gate_loss


class MoteTrainer(Trainer):
    """`Trainer` that masks, weighs the steps, counts real tokens and gives the held-out loss per step."""

    markers: Markers
    expert_names: tuple[str, ...]
    marker_learning_rate: float | None
    make_mask: Callable[[Tensor, Tensor, Tensor], Any] = staticmethod(sdpa_mask)
    step_weights: Tensor | None = None  # (S), as `mote.train.arguments.step_weights` gives them
    gated = False  # whether the model has gates with a loss of their own
    tokens_seen = 0  # by this process
    control: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As `Trainer`, with the markers' rows in a group of their own where they have a learning rate of their own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.marker_learning_rate is not None and len(optimizer.param_groups) < 3:
            rows = [p for name, p in self.model.named_parameters() if p.requires_grad and "trainable_tokens" in name]
            ids = {id(parameter) for parameter in rows}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            optimizer.add_param_group({"params": rows, "lr": self.marker_learning_rate, "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass; padding does not count as tokens."""
        self.tokens_seen += int((inputs["document_ids"] != PADDING).sum())
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def tokens_of_all(self) -> int:
        """Real tokens that all processes have trained on; every process must ask."""
        seen: Tensor = self.accelerator.reduce(torch.tensor(self.tokens_seen, device=self.args.device))
        return int(seen)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As `Trainer`, then the mask: made on the device, where only its rule and no (T, T) matrix need go."""
        batch: dict[str, Any] = super()._prepare_inputs(inputs)
        batch["attention_mask"] = self.make_mask(
            batch.pop("segment_ids"), batch.pop("visibility"), batch["document_ids"]
        )
        if self.step_weights is None:
            del batch["weights"]
        return batch

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The batches of one update and what their loss is divided by: the tokens with a loss, or their weights."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.step_weights is not None and batches:
            totals = [token_weights(batch, self.step_weights).sum() for batch in batches]
            count = self.accelerator.gather(torch.stack(totals).to(self.args.device)).sum()
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As `Trainer`; with step weights, sum(weight * cross-entropy) / sum(weight) over the update's tokens.

        The gates' loss, where there is one, is averaged over the batches and processes of the update.
        """
        outputs = None
        averaged = num_items_in_batch is not None and self.args.average_tokens_across_devices
        if self.step_weights is None and (self._head() is None or self.label_smoother or not averaged):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            losses = self._losses(model, inputs)
            if self.step_weights is not None:
                losses = losses * token_weights(inputs, self.step_weights)
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes  # whose gradients are averaged
        if self.gated:
            loss = loss + gate_loss(model) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _losses(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Cross-entropy of each token but the first (B, T-1), 0 where there is no label."""
        given, labels = {name: inputs[name] for name in inputs if name not in ("labels", "weights")}, inputs["labels"]
        head = self._head()
        if head is None:
            return token_losses(model(**given).logits, labels)
        return tiled_losses(model, given, labels, head)

    def _head(self) -> Head | None:
        """`plain_head` of the model, where it is computed as it stands: not compiled, and in its own dtype."""
        if self.args.torch_compile or self.accelerator.mixed_precision != "no":
            return None
        return plain_head(self.accelerator.unwrap_model(self.model))

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, **_: Any) -> dict[str, float]:
        """Mean cross-entropy of held-out chains: in all, per step (text only) and on the markers."""
        self.model.eval()
        groups = ("", "_markers", *(f"_{name}" for name in self.expert_names))
        sums_G = torch.zeros(len(groups), 2, dtype=torch.float64, device=self.args.device)
        for batch in self.get_eval_dataloader(eval_dataset):
            batch = self._prepare_inputs(batch)
            labels, steps = batch["labels"], batch["step_ids"][:, 1:]
            batch.pop("question_experts")  # held-out loss reads the question as inference does
            loss = self._losses(self.model, batch)
            trained = labels[:, 1:] != IGNORED
            marker = torch.isin(labels[:, 1:], labels.new_tensor(self.markers.starts + self.markers.ends))
            parts = [trained, trained & marker]
            parts += [trained & ~marker & (steps == s) for s in range(QUESTION + 1, len(groups) - 1)]
            rows = torch.stack([torch.stack([(loss * part).sum(1), part.sum(1)], dim=1) for part in parts], dim=1)
            sums_G += self.accelerator.gather_for_metrics(rows.double()).sum(0)  # drops rows that fill a last batch
        found = zip(groups, sums_G.tolist(), strict=True)
        metrics = {f"eval_loss{name}": total / count for name, (total, count) in found if count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Epochs(TrainerCallback):
    """Tells the chains which epoch begins: accelerate does so in one process, and leaves it out in several."""

    def __init__(self, chains: ChainDataset) -> None:
        self.chains = chains

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the epoch's first batch, and where a run that was cut goes on in the middle of one."""
        self.chains.set_epoch(int(state.epoch + 1e-6))


def token_weights(batch: dict[str, Any], weights_S: Tensor) -> Tensor:
    """Weight of the loss of each token but the first (B, T-1): its step's, times its own; 0 where it has no loss."""
    steps, labels, own = (batch[name][:, 1:] for name in ("step_ids", "labels", "weights"))
    weights: Tensor = weights_S.to(steps.device)[steps] * own * (labels != IGNORED)
    return weights
