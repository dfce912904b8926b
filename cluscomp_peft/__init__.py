"""ClusComp for Hugging Face: compress a model to codes and codebooks, finetune the codebooks, merge exactly.

Importing this package registers the PEFT method "CLUSCOMP" and the checkpoint format "cluscomp". PEFT and transformers
have no discovery of plug-ins, so a script that loads such an adapter or checkpoint must import it first (or run under
`python -m cluscomp_peft.run SCRIPT`).
"""

from .registration import register

register()

from ._version import __version__  # noqa: E402
from .clustering import kmeans  # noqa: E402
from .codes import ClusterSpec  # noqa: E402
from .hf.config import ClusCompQuantizationConfig  # noqa: E402
from .linear import ClusteredLinear  # noqa: E402
from .tuner.config import ClusCompConfig  # noqa: E402
from .tuner.layer import ClusCompLayer  # noqa: E402
from .tuner.model import ClusCompModel  # noqa: E402

__all__ = [
    "ClusCompConfig",
    "ClusCompLayer",
    "ClusCompModel",
    "ClusCompQuantizationConfig",
    "ClusterSpec",
    "ClusteredLinear",
    "__version__",
    "kmeans",
    "register",
]
