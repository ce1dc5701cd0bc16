"""`MoteModel`: puts step experts on a base model, as PEFT's own methods put theirs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from typing_extensions import override

from mote.models.embeddings import grow_embeddings, rows_to_train
from mote.tuner.config import MoteConfig
from mote.tuner.layer import MoteLinear
from mote.tuner.marker_rows import train_rows
from mote.tuner.router import Router
from mote.tuner.supported import check_base

_NO_PAGED_CACHE = (
    "mote: transformers' continuous batching (`generate_batch`, cache_implementation='paged', TRL's "
    "use_transformers_paged) does not tell the experts which ids came before, so that steps would be unknown; use "
    "`generate`, or `mote.load(...).answer`, which batches continuously"
)


class MoteModel(BaseTuner):
    """A base model with step experts. Use it through `peft.get_peft_model` or `PeftModel.from_pretrained`."""

    prefix = "mote_"
    tuner_layer_cls: type[BaseTunerLayer] = MoteLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own attribute)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter's experts and marker rows to the model.

        Raises:
            ValueError: The base model cannot hold them.
        """
        config = self.peft_config[adapter_name]
        check_base(model, config)
        if config.markers:
            ids = sorted(id_ for pair in config.markers.values() for id_ in pair)
            grow_embeddings(model, ids, config.vocab_size)
            if config.trainable_token_indices is None:
                config.trainable_token_indices = rows_to_train(model, ids)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        train_rows(model)

    def _router(self, model: nn.Module) -> Router:
        """The model's router, created and attached with the first adapter."""
        router = getattr(model, "mote_router", None)
        if router is None:
            router = Router()
            router.attach(model)
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
        if isinstance(child, AuxiliaryTrainingWrapper):  # marker rows on unloading: nothing to move to the base layer
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around each forward pass and `generate`; `adapter_names` asks for one adapter per row."""
        names = set(kwargs.get("adapter_names") or ())
        if names - set(self.active_adapters) or (names and len(self.active_adapters) > 1):
            raise ValueError(
                f"adapter_names={sorted(names)}: all rows of a call are read by the active adapter "
                f"({', '.join(self.active_adapters)}); call `set_adapter` and the model for the rows of each adapter, "
                "with `disable_adapter()` for those of the base model"
            )
        yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, which would hand a paged cache to its continuous batching.

        Raises:
            NotImplementedError: The cache is a paged one.
        """
        caches = [getattr(given, "cache_implementation", None) for given in (*args, *kwargs.values())]
        if "paged" in (kwargs.get("cache_implementation"), *caches):
            raise NotImplementedError(_NO_PAGED_CACHE)
        return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a forward pass over a paged cache has no ids from which steps follow.

        Raises:
            NotImplementedError: Always; transformers would log the error of each request and return empty texts.
        """
        raise NotImplementedError(_NO_PAGED_CACHE)

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch

    @override
    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._router(self.model).remove(adapter_name)

    @override
    def unload(self) -> nn.Module:
        base: nn.Module = super().unload()
        self._router(self.model).detach(base)
        return base

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "mote: experts are chosen per token, so they cannot be merged into the base weights; one step alone can: "
            "`mote export` writes it as a plain LoRA or merged"
        )
