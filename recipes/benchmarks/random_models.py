"""Random models of any shape, made on the device as they are trained and served; for time and memory, not for loss.

    method           linear layers of the blocks                                                     trains
    dense            bf16                                                                            everything
    lora             bf16                                                                            LoRA r 16, all
    nf4              bitsandbytes `Linear4bit`: NF4, blocks of 64, scales in fp32, computes in bf16    LoRA r 16, all
    cluscomp-BITS    `ClusteredLinear` with random codes, stored as `choose_spec` would at BITS      codebooks, scales

Embeddings, norms and the head are bf16 in all of them. No matrix is ever clustered and, but for `dense` and `lora`,
none is dense for longer than it takes to quantise it, so that a model of 70B parameters is made in seconds where only
its codes fit. LoRA's matrices are bf16, to which TRL's trainers cast them on 4-bit models; deltas of codebooks are
fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig, ClusteredLinear
from cluscomp_peft.compress.budget.allocation import choose_spec
from cluscomp_peft.compress.budget.targets import dense_linears
from cluscomp_peft.hf.quantizer import ClusCompHfQuantizer
from cluscomp_peft.plan import Settings, plan
from cluscomp_peft.plan.speed import random_layer

NAMES = {"dense": "dense bf16", "lora": "bf16 + LoRA r 16", "nf4": "NF4 + LoRA r 16"}
_STD = 0.02
_FRAMEWORK = ("Python", "CUDA", "fragmentation")  # what such parts of a plan are called


@dataclass(frozen=True)
class Shape:
    """Of a Llama, as its config has it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def scaled(self, factor: float) -> Shape:
        """About `factor` times as wide and deep, in multiples of 64, which bitsandbytes needs; for tries."""
        if factor == 1:
            return self
        hidden = _multiple(self.hidden * factor)
        heads = max(2, hidden // (self.hidden // self.heads))
        return Shape(
            hidden=hidden,
            intermediate=_multiple(self.intermediate * factor),
            layers=max(1, round(self.layers * factor)),
            heads=heads,
            kv_heads=max(1, heads * self.kv_heads // self.heads),
            vocab=_multiple(self.vocab * factor),
        )

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            dtype=torch.bfloat16,
        )

    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of a block."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = [(self.hidden, self.hidden), (self.hidden, kv), (self.hidden, kv), (self.hidden, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]


def add_shape(parser: argparse.ArgumentParser, default: Shape) -> None:
    """A flag for every number of a shape."""
    for field in fields(default):
        value = getattr(default, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=value, help="of the random model")


def shape_of(options: argparse.Namespace) -> Shape:
    """The shape that the flags of [`add_shape`] say."""
    return Shape(*(getattr(options, field.name) for field in fields(Shape)))


SHAPES = {
    "Llama-3-8B": Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
    "Llama-2-70B": Shape(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocab=32000),
}


def available(methods: list[str]) -> list[str]:
    """Those of the methods whose packages are installed; says which are left out."""
    if "nf4" in methods and importlib.util.find_spec("bitsandbytes") is None:
        print("bitsandbytes is not installed: without NF4")
        return [method for method in methods if method != "nf4"]
    return methods


def bits_of(method: str) -> float | None:
    """The true bits of a clustered method, None for others.

    Raises:
        ValueError: If there is no such method.
    """
    if method in NAMES:
        return None
    kind, _, bits = method.partition("-")
    try:
        if kind == "cluscomp":
            return float(bits)
    except ValueError:
        pass
    raise ValueError(f"method must be dense, lora, nf4 or cluscomp-BITS (as cluscomp-3), got {method!r}.")


def name_of(method: str) -> str:
    """What tables call it."""
    bits = bits_of(method)
    return NAMES[method] if bits is None else f"ClusComp {bits:g} bits"


def build(shape: Shape, method: str, device: str | torch.device, seed: int = 0) -> LlamaForCausalLM:
    """The model as it is served, in evaluation mode."""
    bits = bits_of(method)
    torch.manual_seed(seed)
    config = shape.config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, layer in list(dense_linears(model)) if method not in ("dense", "lora") else []:
        if bits is None:
            layer = nf4_layer(random_weight(tuple(layer.weight.shape), device))
        else:
            layer = clustered_layer(layer, bits, device, name)
        model.set_submodule(name, layer)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = random_weight(parameter.shape, device)
                module._parameters[name] = nn.Parameter(value if value.ndim > 1 else torch.ones_like(value))
    # Its table of frequencies is a buffer that no checkpoint holds.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.is_loaded_in_4bit = method == "nf4"  # PEFT asks the model, not the layers
    return model.eval()


def prepare(
    model: LlamaForCausalLM, method: str, checkpointing: bool, rank: int = ClusCompConfig.rank
) -> tuple[Any, Any]:
    """The model as it is trained, and AdamW over what it trains."""
    if checkpointing:
        settings = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its newer name
            model.activation_checkpointing_enable(settings)
        else:
            model.gradient_checkpointing_enable(settings)
    if method != "dense":
        from peft import LoraConfig, get_peft_model

        adapter = ClusCompConfig(task_type="CAUSAL_LM", rank=rank)
        if method in ("lora", "nf4"):
            adapter = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
        model = get_peft_model(model, adapter)
        if method in ("lora", "nf4"):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, fused=True)


def train_step(model: Any, optimizer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """One step on tokens [batch, length]; without an optimizer, forward and backward alone. Returns the loss."""
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def save_checkpoint(model: LlamaForCausalLM, method: str, folder: str | os.PathLike) -> None:
    """Writes a clustered model as `cluscomp compress` would leave it, for `from_pretrained`."""
    quantizer = ClusCompHfQuantizer(ClusCompQuantizationConfig(bits=bits_of(method)), pre_quantized=False)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.save_pretrained(folder)


def forecast_training(
    shape: Shape,
    method: str,
    length: int,
    *,
    device: str | torch.device,
    checkpointing: bool,
    batch: int = 1,
    rank: int = ClusCompConfig.rank,
) -> int | None:
    """Bytes that `cluscomp_peft.plan` foretells for training a clustered method, None for others: model, deltas and
    activations, without what it allows for the framework (imports, CUDA's context, fragmentation), which the peaks
    here do not count either.
    """
    bits = bits_of(method)
    if bits is None:
        return None
    settings = Settings(
        bits=bits,
        seqlen=length,
        batch=batch,
        rank=rank,
        gradient_checkpointing=checkpointing,
        device=torch.device(device).type,
    )
    with tempfile.TemporaryDirectory() as folder:
        shape.config().save_pretrained(folder)
        job = plan(folder, settings).jobs["finetune"]
    return job.total - sum(part.bytes for part in job.parts if part.name.startswith(_FRAMEWORK))


def random_tokens(shape: Shape, batch: int, length: int, device: str | torch.device) -> torch.Tensor:
    return torch.randint(0, shape.vocab, (batch, length), device=device)


def random_weight(size: tuple[int, ...], device: str | torch.device) -> torch.Tensor:
    return torch.randn(size, dtype=torch.bfloat16, device=device) * _STD


def clustered_layer(layer: nn.Module, bits: float, device: str | torch.device, name: str) -> ClusteredLinear:
    """Random codes and codebooks in the place of a linear layer without bias."""
    out_features, in_features = layer.weight.shape
    spec = choose_spec(in_features, out_features, bits=bits, name=name)
    return random_layer(spec, in_features, out_features, std=_STD, device=device)


def nf4_layer(weight: torch.Tensor, compute_dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The NF4 layer of a weight [out, in] without bias, blocks of 64, as `load_in_4bit` leaves it."""
    import bitsandbytes

    out_features, in_features = weight.shape
    if in_features % 64:
        raise ValueError(
            f"rows of {in_features} weights: bitsandbytes on a CPU gives back wrong weights where a row is no "
            "multiple of the block of 64. Choose widths that are."
        )
    settings = {"compress_statistics": False, "quant_type": "nf4"}
    with torch.device("meta"):
        new = bitsandbytes.nn.Linear4bit(
            in_features, out_features, bias=False, compute_dtype=compute_dtype, **settings
        )
    new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=new, **settings).to(weight.device)
    return new


def small(shape: Shape) -> Shape:
    """One block of the same matrices and hardly a vocabulary: what compiles kernels before memory counts."""
    return replace(shape, layers=1, vocab=64)


def _multiple(value: float) -> int:
    return max(64, round(value / 64) * 64)
