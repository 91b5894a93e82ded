"""Make a tuner of ours known to PEFT, under a name that its list of methods does not have."""

from typing import Any, cast

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

__all__ = ["register_tuner"]


def register_tuner(name: str, config_cls: type, model_cls: type) -> None:
    """Register a tuner as PEFT's own are, so that its functions find it; a second time does nothing.

    Args:
        name: In lower case; the prefix of its parameters is the name with an underscore.
        config_cls: The class of its configurations.
        model_cls: The class of its models.
    """
    _add_type(name.upper())
    if name.upper() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


def _add_type(name: str) -> None:
    """Add a member to PEFT's enumeration of methods, which `register_peft_method` looks the name up in.

    PEFT offers no way to do this. What an enumeration keeps of its members has the same names in Python 3.10 to 3.14.
    """
    kind = cast(Any, PeftType)
    if name in kind.__members__:
        return
    member = str.__new__(kind, name)
    member._name_ = name
    member._value_ = name
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[name] = member
    # An enumeration refuses to have its members set again, and so any attribute of such a name.
    type.__setattr__(kind, name, member)
