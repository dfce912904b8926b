"""Tensor parallelism is refused, and before weights are read: without that, the first forward pass fails."""

from __future__ import annotations

import os
import socket
import subprocess
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.hf.quantizer import ClusCompHfQuantizer
from tests import warm
from tests.conftest import logits_of, tiny_llama

CODE = """
import sys
import torch, transformers
import cluscomp_peft
from transformers.distributed import DistributedConfig
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto"))
"""


def quantizer(**settings) -> ClusCompHfQuantizer:
    return ClusCompHfQuantizer(ClusCompQuantizationConfig(group_size=3, num_clusters=12), **settings)


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_the_refusal_names_the_size_and_the_cure(pre_quantized):
    model = tiny_llama()
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match=r"tp_size=2.*device_map=\"auto\".*FSDP2"):
        quantizer(pre_quantized=pre_quantized)._process_model_before_weight_loading(model)


@pytest.mark.parametrize("config", [None, SimpleNamespace(tp_size=1, fsdp_size=4), {"tp_size": 2}])
def test_nothing_else_is_refused(config):
    """A plan for one process, sharding of data alone, and a plan that config.json remembers of another run."""
    model = tiny_llama()
    model.config.distributed_config = config
    quantizer(pre_quantized=False)._process_model_before_weight_loading(model)


def test_a_plan_for_one_process_is_no_plan(compressed_dir, tokens, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    model = AutoModelForCausalLM.from_pretrained(compressed_dir, distributed_config=DistributedConfig(tp_plan="auto"))
    expected = logits_of(AutoModelForCausalLM.from_pretrained(compressed_dir), tokens)
    assert torch.equal(logits_of(model, tokens), expected)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_are_refused(compressed_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    runs = [
        subprocess.Popen(
            [warm.python(), "-c", CODE, compressed_dir],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode != 0
        assert "cannot be cut for tensor parallelism (tp_size=2)" in errors
