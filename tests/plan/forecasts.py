"""Configs to plan for, and what a plan says of them."""

from __future__ import annotations

import json

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from cluscomp_peft import ClusCompConfig
from cluscomp_peft.cli import main

GIB = 1 << 30
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# So small that clustering and ops need no compiled code.
SMALL = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)
LLAMA_70B = dict(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=4096,
)


def saved(folder, config: PreTrainedConfig) -> str:
    """A folder with a config and nothing else."""
    config.save_pretrained(folder)
    return str(folder)


def forecast(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def parts(report: dict, job: str) -> dict[str, int]:
    return {part["name"]: part["bytes"] for part in report["jobs"][job]["parts"]}


def part(report: dict, job: str, start: str) -> int:
    (found,) = [size for name, size in parts(report, job).items() if name.startswith(start)]
    return found


def trainable(config: PreTrainedConfig, dtype: torch.dtype, **settings) -> torch.nn.Module:
    """A random model with codes and an adapter."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return get_peft_model(model, ClusCompConfig(task_type="CAUSAL_LM", quality="fast", **settings)).train()
