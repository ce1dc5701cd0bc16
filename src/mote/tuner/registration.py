"""Makes `MOTE` a PEFT method. PEFT's list of methods is a closed enum; all that this needs of its inside is here."""

import functools
from typing import Any

from peft import PeftModel
from peft.utils import peft_types
from peft.utils.peft_types import PeftType

NAME = "MOTE"


def mote_peft_type() -> PeftType:
    """The enum member `PeftType.MOTE`, made on the first call.

    `register_peft_method` refuses a name outside the enum, and loading an adapter reads `.value` of it, so a plain
    string will not do: a real member is added as the enum's own machinery would.
    """
    existing = PeftType.__members__.get(NAME)
    if existing is not None:
        return existing
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member


def register(config_class: type, model_class: type) -> None:
    """Register the method, and keep `save_pretrained` from writing whole embeddings.

    The markers may need a larger embedding, which PEFT takes as a reason to save all of it (228 MB for a 135M model)
    although only the markers' rows were trained and are saved by themselves.
    """
    mote_peft_type()
    peft_types.register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix="mote_")
    save = PeftModel.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        chosen = kwargs.get("selected_adapters") or list(self.peft_config)
        if len(args) < 3 and all(isinstance(self.peft_config.get(name), config_class) for name in chosen):
            kwargs.setdefault("save_embedding_layers", False)
        return save(self, save_directory, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained
