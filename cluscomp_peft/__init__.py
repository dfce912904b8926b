"""ClusComp for Hugging Face: compress a model to codes and codebooks, finetune the codebooks, merge exactly.

Importing this package registers the PEFT method "CLUSCOMP" and the checkpoint format "cluscomp". PEFT and transformers
have no discovery of plug-ins, so a script that loads such an adapter or checkpoint must import it first (or run under
`python -m cluscomp_peft.run SCRIPT`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register, register_on_import

register_on_import()

from ._version import __version__  # noqa: E402
from .clustering import kmeans  # noqa: E402
from .codes import ClusterSpec  # noqa: E402
from .linear import ClusteredLinear  # noqa: E402

if TYPE_CHECKING:
    from .compress.checkpoint import compress_checkpoint
    from .hf.config import ClusCompQuantizationConfig
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

# Imported when they are first used: they bring in PEFT, or the models of transformers.
_LATER = {
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
