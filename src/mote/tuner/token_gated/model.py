"""`TokenGatedModel`: puts token-gated experts on a base model, with the markers as in `MoteModel`."""

from torch import nn

from mote.tuner.model import MoteModel
from mote.tuner.token_gated.config import TokenGatedConfig
from mote.tuner.token_gated.layer import TokenGatedLinear


class TokenGatedModel(MoteModel):
    """A base model with token-gated experts. Use it through `peft.get_peft_model` or `PeftModel.from_pretrained`."""

    prefix = "token_gated_"
    tuner_layer_cls = TokenGatedLinear

    def _create_and_replace(
        self,
        peft_config: TokenGatedConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        router = self._router(self.model)  # takes the steps out of the call, and knows the base model's rows
        router.add(adapter_name, peft_config, peft_config.r)
        if isinstance(target, TokenGatedLinear):
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            return
        layer = TokenGatedLinear(target, router)
        layer.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
