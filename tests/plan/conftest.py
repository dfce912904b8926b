from __future__ import annotations

import pytest
from transformers import LlamaConfig

from tests.plan.forecasts import LLAMA_70B, saved


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> str:
    """A folder with the config of Llama-2-70B."""
    return saved(tmp_path_factory.mktemp("large"), LlamaConfig(**LLAMA_70B))
