"""Tiny mixtures of experts of many families, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conftest import WORDS

__all__ = ["FAMILIES", "tiny_mixture"]

_COMMON = dict(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
    num_experts_per_tok=2,
)
_DEEPSEEK = dict(n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=24, first_k_dense_replace=1)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    ),
    "qwen3_moe": ("Qwen3MoeConfig", dict(num_experts=4, moe_intermediate_size=24, head_dim=8)),
    "olmoe": ("OlmoeConfig", dict(num_experts=4)),
    "deepseek_v3": (
        "DeepseekV3Config",
        dict(
            **_DEEPSEEK, num_key_value_heads=4, n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        ),
    ),
    "glm4_moe": ("Glm4MoeConfig", dict(**_DEEPSEEK, n_group=1, topk_group=1, head_dim=8)),
    "llama4": (
        "Llama4TextConfig",
        dict(
            num_local_experts=4, intermediate_size_mlp=40, interleave_moe_layer_step=1, head_dim=8,
            num_experts_per_tok=1,
        ),
    ),
    "gpt_oss": ("GptOssConfig", dict(num_local_experts=4, head_dim=8)),
    "jamba": (
        "JambaConfig",
        dict(
            num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0,
            mamba_d_state=8, mamba_dt_rank=4,
        ),
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        dict(
            num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24, head_dim=8,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        dict(
            n_routed_experts=4, moe_intermediate_size=24, layers_block_type=["attention", "moe"], head_dim=8,
            mamba_num_heads=4, mamba_head_dim=16, n_groups=2,
        ),
    ),
    "jetmoe": ("JetMoeConfig", dict(num_local_experts=4, kv_channels=8, num_attention_heads=None)),
    "granitemoe": ("GraniteMoeConfig", dict(num_local_experts=4)),
}  # fmt: skip


def tiny_mixture(family: str, **changes: Any) -> PreTrainedModel:
    """A model of 2 layers with 4 experts each, of which a token goes to 2; its weights are large enough to matter."""
    kind, settings = FAMILIES[family]
    settings = {**_COMMON, **settings, **changes}
    config = getattr(transformers, kind)(**{key: value for key, value in settings.items() if value is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            parameter.data.mul_(3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model
