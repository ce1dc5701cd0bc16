"""`MoteTrainer`: transformers' `Trainer` with our attention masks, loss weights and held-out losses.

It knows about batches, not about chains or recipes.
Shapes: B row, T token, S step.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from typing_extensions import override

from mote.tokens.encode import IGNORED
from mote.tokens.masks import PADDING, Layout, MakeMask
from mote.tokens.packing import ChainDataset
from mote.tokens.routing import QUESTION, Markers
from mote.train.loss import Head, plain_head, tiled_losses, token_losses
from mote.tuner.token_gated import gate_loss


class MoteTrainer(Trainer):
    """`Trainer` that builds masks, weights the loss per step, counts real tokens and reports held-out loss per step."""

    control: Any

    def __init__(
        self,
        *,
        markers: Markers,
        expert_names: tuple[str, ...],
        make_mask: MakeMask | None,
        marker_learning_rate: float | None = None,
        step_weights: Tensor | None = None,
        gated: bool = False,
        **trainer_arguments: Any,
    ) -> None:
        """Set up training; progress lines are left to our own callback and TensorBoard writes into the run folder.

        Args:
            markers: Marker ids of the trained steps.
            expert_names: The steps, in the order of their ids.
            make_mask: Makes the attention masks of a batch, `mote.tokens.masks.masks_for` of the base model;
                None for rows of one chain, all of it visible.
            marker_learning_rate: Learning rate of the marker embeddings; None uses the common one.
            step_weights: Loss weight of each step (S), from `mote.train.arguments.step_weights`; None weights every
                token alike.
            gated: Whether the model has token gates with an auxiliary loss.
            trainer_arguments: The arguments of `Trainer`.
        """
        self.markers = markers
        self.expert_names = expert_names
        self.marker_learning_rate = marker_learning_rate
        self.make_mask = make_mask
        self.step_weights = step_weights
        self.gated = gated
        self.tokens_seen = 0  # by this process
        super().__init__(**trainer_arguments)
        if step_weights is not None:
            self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the weight of the whole update
        self.remove_callback(PrinterCallback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # Its default folder is inside the checkpoint folder, which is deleted when training ends.
                callback.logging_dir = str(Path(self.args.output_dir).parent / "tensorboard")

    @override
    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # Marker embeddings get a separate parameter group if they have their own learning rate.
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.marker_learning_rate is not None and len(optimizer.param_groups) < 3:
            rows = [p for name, p in self.model.named_parameters() if p.requires_grad and "trainable_tokens" in name]
            ids = {id(parameter) for parameter in rows}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            optimizer.add_param_group({"params": rows, "lr": self.marker_learning_rate, "weight_decay": 0.0})
        return optimizer

    @override
    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.tokens_seen += int((inputs["document_ids"] != PADDING).sum())
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def tokens_of_all(self) -> int:
        """Non-padding tokens trained on so far, summed over processes; a collective call."""
        seen: Tensor = self.accelerator.reduce(torch.tensor(self.tokens_seen, device=self.args.device))
        return int(seen)

    @override
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._prepare_inputs(inputs)
        if self.step_weights is None:
            del batch["weights"]
        if self.make_mask is None:  # one chain a row, all of it visible: transformers' own mask and positions
            batch["attention_mask"] = (batch.pop("document_ids") != PADDING).long()
            return {name: batch[name] for name in batch if name not in ("segment_ids", "visibility", "position_ids")}
        # The mask is built on the device, so that no (T, T) matrix has to be copied there.
        batch["attention_mask"] = self.make_mask(Layout.of(batch))
        return {name: batch[name] for name in batch if name not in ("segment_ids", "visibility")}

    @override
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The batches of one update and the divisor of their loss: the number of labelled tokens, or their weight."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.step_weights is not None and batches:
            totals = [token_weights(batch, self.step_weights).sum() for batch in batches]
            count = self.accelerator.gather(torch.stack(totals).to(self.args.device)).sum()
        return batches, count

    @override
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of `Trainer`; with step weights, sum(weight * cross-entropy) / sum(weight) over the update's tokens.

        A gate loss is averaged over the batches and processes of the update.
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
        labels = inputs["labels"]
        given = {name: inputs[name] for name in inputs if name not in ("labels", "weights")}
        head = self._head()
        if head is None:
            return token_losses(model(**given).logits, labels)
        return tiled_losses(model, given, labels, head)

    def _head(self) -> Head | None:
        """`plain_head` of the model; None under torch.compile and mixed precision."""
        if self.args.torch_compile or self.accelerator.mixed_precision != "no":
            return None
        return plain_head(self.accelerator.unwrap_model(self.model))

    @override
    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, **_: Any) -> dict[str, float]:
        """Mean cross-entropy of held-out chains: overall, per step (markers excluded) and on the markers."""
        self.model.eval()
        groups = ("", "_markers", *(f"_{name}" for name in self.expert_names))
        sums = torch.zeros(len(groups), 2, dtype=torch.float64, device=self.args.device)  # loss, tokens
        for batch in self.get_eval_dataloader(eval_dataset):
            batch = self._prepare_inputs(batch)
            labels = batch["labels"]
            steps = batch["step_ids"][:, 1:]
            batch.pop("question_experts")  # as at inference, the mean of the experts reads the question
            loss = self._losses(self.model, batch)
            trained = labels[:, 1:] != IGNORED
            marker = torch.isin(labels[:, 1:], labels.new_tensor(self.markers.starts + self.markers.ends))
            parts = [trained, trained & marker]
            parts += [trained & ~marker & (steps == s) for s in range(QUESTION + 1, len(groups) - 1)]
            rows = torch.stack([torch.stack([(loss * part).sum(1), part.sum(1)], dim=1) for part in parts], dim=1)
            sums += self.accelerator.gather_for_metrics(rows.double()).sum(0)  # drops the rows that pad the last batch
        found = zip(groups, sums.tolist(), strict=True)
        metrics = {f"eval_loss{name}": total / count for name, (total, count) in found if count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Epochs(TrainerCallback):
    """Tells the dataset which epoch begins; accelerate does so with one process only."""

    def __init__(self, chains: ChainDataset) -> None:
        self.chains = chains

    @override
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.chains.set_epoch(int(state.epoch + 1e-6))  # fractional where training resumes inside an epoch


def token_weights(batch: dict[str, Any], step_weights_S: Tensor) -> Tensor:
    """Loss weight of each token but the first (B, T-1): the step's weight times the token's; 0 without a label."""
    steps = batch["step_ids"][:, 1:]
    labels = batch["labels"][:, 1:]
    own = batch["weights"][:, 1:]
    weights: Tensor = step_weights_S.to(steps.device)[steps] * own * (labels != IGNORED)
    return weights
