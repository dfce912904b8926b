"""What users do, on a device. Every test runs twice: here on the CPU, which checks the test, and on CUDA with -m gpu.

    python -m pytest -o addopts= -m gpu -n 12 --dist load tests

Models are small but not tiny: each matrix takes several programs of every kernel, and none is a multiple of a tile.
"""

from __future__ import annotations

import os

# Before a process makes its first handle of cuBLAS: with it the same run gives the same bytes.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompQuantizationConfig
from tests.conftest import BORN, tiny_llama

LENGTHS = (1, 5, 40, 100)  # one token, several in the kernels of few, and so many that the weight is decoded
BOTH = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="session", params=BOTH)
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return request.param


@dataclass
class Models:
    """A dense and a compressed model on disk, which were made on the device."""

    device: str
    dense: str
    compressed: str

    def load(self, kind: str = "compressed", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
        folder = self.compressed if kind == "compressed" else self.dense
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **{"device_map": self.device, **settings})


@pytest.fixture(scope="session")
def models(device, tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp(device)
    wide = dict(hidden_size=136, intermediate_size=300, num_attention_heads=4, num_key_value_heads=2)
    wide["max_position_embeddings"] = 256
    tiny_llama(**wide).save_pretrained(folder / "dense")
    config = ClusCompQuantizationConfig(**BORN)
    AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=config, device_map=device
    ).save_pretrained(folder / "compressed")
    return Models(device, str(folder / "dense"), str(folder / "compressed"))


@pytest.fixture
def text(device) -> Callable[..., torch.Tensor]:
    """Random tokens [batch, length] on the device; a seed gives the same everywhere."""

    def make(length: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
        return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)

    return make
