"""`MoteModel`: puts the experts on a base model, as PEFT's own methods do."""

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mote.tuner.config import MoteConfig
from mote.tuner.layer import MoteLinear
from mote.tuner.router import Router
from mote.tuner.rows import train_rows

_UNSUPPORTED = ("awq", "aqlm", "eetq", "vptq", "fp_quant")  # their kernels do not take an adapter beside them


class MoteModel(BaseTuner):
    """A base model with step experts. Use it through `peft.get_peft_model` or `PeftModel.from_pretrained`."""

    prefix = "mote_"
    tuner_layer_cls = MoteLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own attribute)

    def _pre_injection_hook(self, model: nn.Module, config: MoteConfig, adapter_name: str) -> None:
        method = getattr(getattr(model, "config", None), "quantization_config", None)
        name = str(getattr(method, "quant_method", "")).lower()
        if any(unsupported in name for unsupported in _UNSUPPORTED):
            raise ValueError(f"mote: a base model quantised with {name} is not supported; use bitsandbytes or none")
        if config.markers:
            grow_embeddings(model, config)
        self._router(model)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Put an adapter's experts and marker rows on the model."""
        super().inject_adapter(model, *args, **kwargs)
        train_rows(model)

    def _router(self, model: nn.Module) -> Router:
        """The model's one router, made and hooked up for its first adapter."""
        router = getattr(model, "mote_router", None)
        if router is None:
            router = Router()
            model.mote_router = router  # type: ignore[assignment]
            model.register_forward_pre_hook(router.before_forward, with_kwargs=True)
            model.register_forward_hook(router.after_forward, always_call=True)
            router.route_generation(model)
        assert isinstance(router, Router)
        return router

    def _create_and_replace(
        self,
        peft_config: MoteConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank = next(
            (rank for key, rank in peft_config.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", current_key)),
            peft_config.r,
        )
        router = self._router(self.model)
        router.add(adapter_name, peft_config, rank)
        if isinstance(target, MoteLinear):
            target.update_layer(adapter_name, peft_config, rank, inference_mode=peft_config.inference_mode)
            return
        layer = MoteLinear(target, router)
        layer.update_layer(adapter_name, peft_config, rank, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # the markers' rows at unloading: the base layer is whole
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its routing."""
        super().delete_adapter(adapter_name)
        self._router(self.model).remove(adapter_name)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "mote: experts are chosen per token, so they cannot be merged into the base weights; one step alone is a "
            "plain LoRA, see docs/decisions/0003"
        )


def grow_embeddings(model: nn.Module, config: MoteConfig) -> None:
    """Give the embedding rows for the markers, where it has too few, and set the rows to train.

    New rows start at the mean of the old ones plus noise that depends on the row alone: unlike each other, likely
    nowhere. They are trained and saved by themselves, so growing again at loading gives the trained model back.
    """
    get: Any = getattr(model, "get_input_embeddings", None)
    embedding = get() if get else None
    if embedding is None or config.vocab_size is None:
        return
    rows = embedding.weight.shape[0]
    if rows < config.vocab_size:
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)  # type: ignore[operator]
        matrices = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
        for weight in {id(m.weight): m.weight for m in matrices if m is not None}.values():
            with torch.no_grad():
                mean, spread = weight[:rows].float().mean(0), weight[:rows].float().std()
                for row in range(rows, config.vocab_size):
                    noise = torch.randn(len(mean), generator=torch.Generator().manual_seed(row)).to(mean.device)
                    weight[row] = mean + 0.1 * spread * noise
    if config.trainable_token_indices is None:
        ids = sorted(id_ for pair in config.markers.values() for id_ in pair)
        output = model.get_output_embeddings()  # type: ignore[operator]
        tied = output is None or output.weight is model.get_input_embeddings().weight  # type: ignore[operator]
        names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
        inner = names[model.get_input_embeddings()]  # type: ignore[operator]
        config.trainable_token_indices = ids if tied else {inner: ids, names[output]: ids}
