"""ClusComp for Hugging Face: compress a model to codes and codebooks, finetune the codebooks, merge exactly.

Importing this package registers the PEFT method "CLUSCOMP" and the checkpoint format "cluscomp". Where it is
installed, that happens by itself when PEFT or transformers are imported (`cluscomp_peft_plugin.py`). A Python that
reads no .pth files, or finds the package by PYTHONPATH alone, must import it first, or run
`python -m cluscomp_peft.run SCRIPT`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .registration import register, register_on_import

register_on_import()

if TYPE_CHECKING:
    from .clustering import kmeans
    from .codes import ClusterSpec
    from .compress.checkpoint import compress_checkpoint
    from .hf.config import ClusCompQuantizationConfig
    from .linear import ClusteredLinear
    from .tuner.config import ClusCompConfig
    from .tuner.layer import ClusCompLayer
    from .tuner.model import ClusCompModel

__all__ = [
    "ClusCompConfig",
    "ClusCompLayer",
    "ClusCompModel",
    "ClusCompQuantizationConfig",
    "ClusterSpec",
    "ClusteredLinear",
    "__version__",
    "compress_checkpoint",
    "kmeans",
    "register",
]

# Imported when they are first used: they bring in torch, PEFT, or the models of transformers.
_LATER = {
    "ClusterSpec": ".codes",
    "ClusteredLinear": ".linear",
    "kmeans": ".clustering",
    "ClusCompConfig": ".tuner.config",
    "ClusCompLayer": ".tuner.layer",
    "ClusCompModel": ".tuner.model",
    "ClusCompQuantizationConfig": ".hf.config",
    "compress_checkpoint": ".compress.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_LATER[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
