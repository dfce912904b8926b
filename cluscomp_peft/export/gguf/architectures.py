"""Which models have a form in GGUF here: their metadata, and the name and order of each tensor there.

Two orders of the channels of a head exist for rotary embeddings. transformers turns channel i with i + d/2; so do
llama.cpp's `qwen2` and `qwen3`. Its `llama` turns neighbours, so rows of queries and keys are put in that order:

    transformers     0 … d/2-1 │ d/2 … d-1            llama     0, d/2, 1, d/2+1, …
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import gguf
import torch

from ...upstream.transformers import tied_weights
from ..source import Opened

__all__ = [
    "Tensor",
    "architecture_of",
    "check_architecture",
    "list_tensors",
    "rope_factors",
    "write_metadata",
]

# Class of transformers → architecture of llama.cpp.
_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
_TURNS_NEIGHBOURS = (gguf.MODEL_ARCH.LLAMA,)


class Tensor(NamedTuple):
    """A tensor of the file: its name there, its key in the checkpoint, its shape, and how many heads of it are put in
    llama.cpp's order, 0 for none."""

    name: str
    key: str
    shape: tuple[int, ...]
    heads: int = 0

    def read(self, opened: Opened) -> torch.Tensor:
        """The tensor in fp32, in llama.cpp's order."""
        values = opened.checkpoint.read(self.key, torch.float32)
        if not self.heads:
            return values
        return values.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def check_architecture(opened: Opened) -> None:
    """Raises a ValueError for a model that llama.cpp would not compute as transformers does."""
    config, name = opened.config, type(opened.model).__name__
    known = ", ".join(_ARCHITECTURES)
    other = "Export it --to dense, and convert that with llama.cpp's convert_hf_to_gguf.py."
    if name not in _ARCHITECTURES:
        raise ValueError(f"{name} has no form in GGUF here, only {known}. {other}")
    rope = config.rope_parameters
    unlike = {
        "hidden_act": config.hidden_act != "silu",
        "rope_type": rope["rope_type"] not in ("default", "linear", "llama3"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "use_sliding_window": bool(getattr(config, "use_sliding_window", False)),
    }
    found = [key for key, is_unlike in unlike.items() if is_unlike]
    if found:
        value = rope.get(found[0], getattr(config, found[0], None))
        raise ValueError(f"{name} with {found[0]}={value!r} has no form in GGUF here. {other}")


def write_metadata(writer: gguf.GGUFWriter, opened: Opened) -> None:
    """The sizes and constants that llama.cpp builds the model from.

    llama.cpp's `llama` has no sliding window: where a model has one, the context ends with it.
    """
    config = opened.config
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(_head_size(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def architecture_of(opened: Opened) -> gguf.MODEL_ARCH:
    """llama.cpp's architecture of a model that [`check_architecture`] lets pass."""
    return _ARCHITECTURES[type(opened.model).__name__]


def list_tensors(opened: Opened) -> list[Tensor]:
    """The tensors of a checkpoint as the file has them, in the order of the model. A head that is tied is left out:
    llama.cpp then takes the embedding.

    Raises:
        ValueError: If the checkpoint lacks a tensor, or has one for which llama.cpp has no name.
    """
    config, architecture = opened.config, architecture_of(opened)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    twins = {owner: target for target, owner in tied_weights(opened.model).items()}  # a file has either
    found = []
    for name in _parameters(opened.model, config):
        key = opened.checkpoint.find(name) or opened.checkpoint.find(twins.get(name, name))
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if key is None:
            raise ValueError(f"{opened.folder} lacks {name}; it is incomplete, download or compress it again.")
        if theirs is None:
            raise ValueError(f"llama.cpp's {architecture.name.lower()} has no tensor for {name}; export --to dense.")
        heads = 0
        if architecture in _TURNS_NEIGHBOURS and ".q_proj." in name:
            heads = config.num_attention_heads
        elif architecture in _TURNS_NEIGHBOURS and ".k_proj." in name:
            heads = config.num_key_value_heads
        found.append(Tensor(theirs, key, opened.checkpoint.shapes[key], heads))
    return found


def rope_factors(opened: Opened) -> torch.Tensor | None:
    """By what Llama 3.1 divides each frequency, [head size / 2] fp32: read off the model, whose frequencies have been
    divided already. None for other models."""
    rope = opened.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    size = _head_size(opened.config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / opened.model.model.rotary_emb.inv_freq.double()).float()


def _parameters(model: Any, config: Any) -> Iterator[str]:
    for name in model.state_dict():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            yield name


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
