"""Registers our methods with PEFT, whose list of methods is a closed enum; only this file touches PEFT's internals."""

import functools
from typing import Any

from peft import PeftModel
from peft.utils import peft_types
from peft.utils.peft_types import PeftType

NAME = "MOTE"


def peft_type(name: str) -> PeftType:
    """The member of PEFT's enum with this name, added on the first call.

    `register_peft_method` refuses names outside the enum, and loading an adapter reads `.value`, so a plain string is
    not enough: a real member is added as the enum's own machinery would.
    """
    existing = PeftType.__members__.get(name)
    if existing is not None:
        return existing
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(name: str, config_class: type, model_class: type) -> None:
    """Register a method under its name (in capitals)."""
    peft_type(name)
    lower = name.lower()
    peft_types.register_peft_method(name=lower, config_cls=config_class, model_cls=model_class, prefix=f"{lower}_")


def keep_embeddings_out(config_class: type) -> None:
    """Keep `save_pretrained` from writing whole embeddings for adapters with this configuration class.

    The markers may need a larger embedding, which makes PEFT save all of it (228 MB for a 135M model), although only
    the marker rows were trained, and they are saved separately.
    """
    save = PeftModel.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        chosen = kwargs.get("selected_adapters") or list(self.peft_config)
        if len(args) < 3 and all(isinstance(self.peft_config.get(name), config_class) for name in chosen):
            kwargs.setdefault("save_embedding_layers", False)
        return save(self, save_directory, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained
