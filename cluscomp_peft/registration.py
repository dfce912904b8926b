"""Makes PEFT and transformers know ClusComp, from outside. The only file that depends on how their versions do it.

PEFT looks its methods up by members of the enum `PeftType`, which a package outside PEFT has to extend: a member is a
`str` whose name equals its value, entered into the enum's three tables. transformers has two registries.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

__all__ = ["register"]

_NAME = "CLUSCOMP"
_METHOD = "cluscomp"


def register() -> None:
    """Registers the PEFT method and the checkpoint format; calling it again does nothing."""
    if _NAME not in PeftType.__members__:
        _extend_enum(PeftType, _NAME)
    # The classes read PeftType.CLUSCOMP, so they come after it.
    from .hf.config import ClusCompQuantizationConfig
    from .hf.quantizer import ClusCompHfQuantizer
    from .tuner.config import ClusCompConfig
    from .tuner.model import ClusCompModel

    if getattr(PeftType, _NAME) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=_METHOD, config_cls=ClusCompConfig, model_cls=ClusCompModel)
    if _METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(_METHOD)(ClusCompQuantizationConfig)
        register_quantizer(_METHOD)(ClusCompHfQuantizer)


def _extend_enum(enum: Any, name: str) -> None:
    """Adds a member to a `str` enum, in every table that the standard library keeps (CPython 3.10 to 3.14)."""
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum
    member._sort_order_ = len(enum.__members__)
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    if hasattr(enum, "_hashable_values_"):  # Python 3.13
        enum._hashable_values_.append(name)
