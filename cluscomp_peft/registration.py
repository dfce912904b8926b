"""Makes PEFT and transformers know ClusComp, from outside. The only file that depends on how their versions do it.

PEFT looks its methods up by members of the enum `PeftType`, which a package outside PEFT has to extend: a member is a
`str` whose name equals its value, entered into the enum's three tables. transformers has two registries.

Either is told as soon as it is imported, and not before: PEFT and the models of transformers take seconds and 300 MB,
which neither a process that only clusters nor `cluscomp --help` has any use for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import Any

__all__ = ["register", "register_on_import"]

_NAME = "CLUSCOMP"
_METHOD = "cluscomp"


def register() -> None:
    """Registers the PEFT method and the checkpoint format; calling it again does nothing."""
    _register_format()
    _register_method()


def register_on_import() -> None:
    """Registers with PEFT and transformers where they are imported already, else as soon as they are."""
    if not any(isinstance(finder, _Afterwards) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Afterwards())
    for name in _AFTER:
        if name in sys.modules:
            _tell(name)


def _register_method() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    if _NAME not in PeftType.__members__:
        _extend_enum(PeftType, _NAME)
    # The classes read PeftType.CLUSCOMP, so they come after it.
    from .tuner.config import ClusCompConfig
    from .tuner.model import ClusCompModel

    if getattr(PeftType, _NAME) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=_METHOD, config_cls=ClusCompConfig, model_cls=ClusCompModel)


def _register_format() -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    from .hf.config import ClusCompQuantizationConfig
    from .hf.quantizer import ClusCompHfQuantizer

    if _METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(_METHOD)(ClusCompQuantizationConfig)
        register_quantizer(_METHOD)(ClusCompHfQuantizer)


_AFTER: dict[str, Callable[[], object]] = {"peft": _register_method, "transformers.quantizers.auto": _register_format}
# Our own packages bring in what they register with before any of their modules is begun.
_OURS = {f"{__package__}.tuner": "peft", f"{__package__}.hf": "transformers.quantizers.auto"}
_failed: dict[str, Exception] = {}


def _tell(name: str) -> None:
    """Registers with a package that has just been imported. If that fails, those who import it for something else must
    not suffer: they are warned, and only what is ours refuses to work."""
    if name in _OURS:
        import_module(_OURS[name])
        if _OURS[name] in _failed:
            raise ImportError(_why(_OURS[name])) from _failed[_OURS[name]]
        return
    try:
        _AFTER[name]()
    except Exception as error:
        _failed[name] = error
        ours = next(package for package, needed in _OURS.items() if needed == name)
        for module in [module for module in sys.modules if f"{module}.".startswith(f"{ours}.")]:
            del sys.modules[module]  # some began to work; whoever asks for them again is told why they cannot
        warnings.warn(f"{_why(name)}. Everything else works.", stacklevel=2)


def _why(name: str) -> str:
    package, error = name.partition(".")[0], _failed[name]
    return (
        f"cluscomp_peft cannot register with the {package} that is installed ({type(error).__name__}: {error}); "
        f"install versions of {package} and cluscomp_peft that belong together"
    )


class _Afterwards(MetaPathFinder):
    """Finds the modules of `_AFTER` and `_OURS` as others do, and tells when one has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _AFTER and name not in _OURS:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: Any) -> None:
                execute(module)
                _tell(name)

            spec.loader.exec_module = execute_and_tell
        return spec


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
