"""Makes PEFT and transformers know ClusComp, from outside: the method "CLUSCOMP" and the checkpoint format "cluscomp".

Each is registered as soon as PEFT, or the part of transformers that knows formats, is imported, and not before: they
take seconds and 300 MB, which neither a process that only clusters nor `cluscomp --help` has any use for. How their
tables work is in `upstream`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .upstream.peft import extend_peft_type, register_method, teach_lora, watch_reading
from .upstream.transformers import FORMATS, register_format

__all__ = ["register", "register_on_import"]

_METHOD = "cluscomp"


def register() -> None:
    """Registers the PEFT method and the checkpoint format; calling it again does nothing."""
    _register_format()
    _register_method()


def register_on_import() -> None:
    """Registers with PEFT and transformers at once where they are imported already, else as soon as they are."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for name in _REGISTER:
        if name in sys.modules:
            _after_import(name)


def _register_method() -> None:
    extend_peft_type(_METHOD.upper())
    # These read PeftType.CLUSCOMP, so they are imported after it exists.
    from .linear import ClusteredLinear
    from .tuner.config import ClusCompConfig
    from .tuner.lora import LoraClusteredLinear, clustered_names
    from .tuner.model import ClusCompModel

    register_method(_METHOD, ClusCompConfig, ClusCompModel)
    watch_reading(ClusCompConfig)
    teach_lora(ClusteredLinear, LoraClusteredLinear, clustered_names)


def _register_format() -> None:
    from .hf.config import ClusCompQuantizationConfig
    from .hf.quantizer import ClusCompHfQuantizer

    register_format(_METHOD, ClusCompQuantizationConfig, ClusCompHfQuantizer)


# What is called once a module has been imported.
_REGISTER: dict[str, Callable[[], object]] = {"peft": _register_method, FORMATS: _register_format}
# Our packages, and the module that has to be registered with before any module inside of them is imported.
_OURS = {f"{__package__}.tuner": "peft", f"{__package__}.hf": FORMATS}
_failed: dict[str, Exception] = {}


def _after_import(name: str) -> None:
    """Registers with a module that has just been imported; for a package of ours, first imports what it needs.

    A failure must not break the import of PEFT or transformers for those who want something else of them: it is
    warned of, and only the package of ours refuses to be imported.
    """
    if name in _OURS:
        needed = _OURS[name]
        import_module(needed)
        if needed in _failed:
            raise ImportError(_why(needed)) from _failed[needed]
        return
    try:
        _REGISTER[name]()
    except Exception as error:
        _failed[name] = error
        ours = next(package for package, needed in _OURS.items() if needed == name)
        # Modules that were imported before the failure: the next import of them has to fail with the reason.
        for module in [module for module in sys.modules if f"{module}.".startswith(f"{ours}.")]:
            del sys.modules[module]
        warnings.warn(f"{_why(name)}. Everything else works.", stacklevel=2)


def _why(name: str) -> str:
    package, error = name.partition(".")[0], _failed[name]
    return (
        f"cluscomp_peft cannot register with the {package} that is installed ({type(error).__name__}: {error}); "
        f"install versions of {package} and cluscomp_peft that belong together"
    )


class _Watcher:
    """Lets the other finders find the modules of `_REGISTER` and `_OURS`, and calls [`_after_import`] when one of them
    has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _REGISTER and name not in _OURS:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _after_import(name)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
