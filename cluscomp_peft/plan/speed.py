"""How long finetuning takes: the products of a training step, over what a machine does in a second.

    linear layers    2 · weights · tokens      forward, again where blocks are computed again, gradients of inputs,
                                               gradients of codebooks: 6 or 8 times weights · tokens
    output head      2 · weights · tokens      forward and the gradient of its input
    attention        2 · tokens · seqlen · h   forward of each block, as its mask leaves half; twice and a half as much
                                               back

The rate is measured here, on one adapted layer with codes, where the device that was asked for is here; else it is
that of an H100 in the training step of `recipes/benchmarks/README.md`. Neither knows of the optimiser, of data that is
waited for, and of what devices say to each other. For TinyStories-656K on a core it said 0.4 s where a step took 0.3 s
of the core.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ..codes import ClusterSpec, num_groups, pack
from ..dense import weight_of
from ..expert_weights import Expert
from ..linear import ClusteredLinear
from ..tuner.clustered_layer import ClusCompLinear
from ..tuner.config import ClusCompConfig
from ..tuner.layer import NewAdapter
from .model import Model
from .settings import DTYPES, Settings

__all__ = ["H100", "Duration", "is_here", "measured_rate", "random_layer", "training_time"]

# FLOP/s, as counted here: 1024 tokens through Llama-3-8B at 4.03 bits, blocks computed again, in 0.70 s.
H100 = 86e12
_WIDEST, _MOST_TOKENS = 2048, 512  # of the run that measures
_SECONDS = 0.5


@dataclass(frozen=True)
class Duration:
    """Of finetuning.

    Args:
        tokens (`int`): Of the whole training.
        step (`float`): Seconds of a step of batch · seqlen tokens on each device.
        total (`float`): Seconds of all steps.
        step_flops (`float`): Of a step on one device.
        flops_per_second (`float`): That were counted with.
        source (`str`): Where these come from: "measured", "given", or "assumed".
        why (`str`): The same in words.
    """

    tokens: int
    step: float
    total: float
    step_flops: float
    flops_per_second: float
    source: str
    why: str


def training_time(model: Model, settings: Settings, measure: bool = False) -> Duration | None:
    """How long training on `settings.tokens` takes; None where the device is a CPU, and nothing is given or measured.

    Args:
        model ([`Model`]): Of the plan.
        settings ([`Settings`]): With `bits`; `flops` counts before anything else.
        measure (`bool`): Run a layer for a second, if the device is here.
    """
    assert settings.bits is not None
    if settings.flops is not None:
        rate, source, why = settings.flops, "given", "as given"
    elif measure and is_here(settings.device):
        rate, why = measured_rate(model, settings)
        source = "measured"
    elif settings.device == "cuda":
        rate, source, why = H100, "assumed", "what an H100 did with Llama-3-8B; --flops says yours"
    else:
        return None
    flops = _step_flops(model, settings)
    tokens = settings.batch * settings.seqlen
    step = flops / rate
    steps = math.ceil(settings.tokens / (tokens * settings.world_size))
    return Duration(settings.tokens, step, steps * step, flops, rate, source, why)


def is_here(device: str) -> bool:
    """Whether this machine has such a device."""
    return device == "cpu" or torch.cuda.is_available()


def _step_flops(model: Model, settings: Settings) -> float:
    tokens = settings.batch * settings.seqlen
    again = 2 if settings.gradient_checkpointing else 0
    linear = (6 + again) * _active_weights(model) * tokens
    head = 4 * model.vocabulary * model.hidden * tokens
    attention = (3.5 + again / 2) * 2 * tokens * settings.seqlen * model.hidden * len(model.blocks)
    return float(linear + head + attention)


def _active_weights(model: Model) -> float:
    """Weights of the linear layers that a token meets: of the experts of a mixture those that it is sent to."""
    owners = {name: module for name, module in model.model.named_modules() if isinstance(module, Expert)}
    counts: dict[str, int] = {}
    for name in owners:
        counts[name.rpartition(".")[0]] = counts.get(name.rpartition(".")[0], 0) + 1
    chosen = getattr(model.model.config.get_text_config(), "num_experts_per_tok", None)
    total = 0.0
    for name, layer in model.linears.items():
        owner = name.rpartition(".")[0]
        share = 1.0
        if owner in owners and chosen:
            share = min(1.0, chosen / counts[owner.rpartition(".")[0]])
        total += share * weight_of(layer).numel()
    return total


def measured_rate(model: Model, settings: Settings) -> tuple[float, str]:
    """FLOP/s here of a training step of the model's largest matrix, cut to 2048 x 2048, and that in words."""
    assert settings.bits is not None
    specs = model.stored(settings.bits).specs
    name = max(model.linears, key=lambda name: weight_of(model.linears[name]).numel())
    out_features, in_features = (min(size, _WIDEST) for size in weight_of(model.linears[name]).shape)
    tokens = min(settings.batch * settings.seqlen, _MOST_TOKENS)
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    config = ClusCompConfig(rank=settings.rank, num_blocks=settings.num_blocks)
    base = random_layer(specs[name], in_features, out_features, device=device, dtype=dtype)
    adapted = ClusCompLinear(base, NewAdapter("default", config), device)
    x = torch.randn(tokens, in_features, dtype=dtype, device=device, requires_grad=True)

    def step() -> None:
        adapted(x).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()  # compiles kernels
    steps, started = 0, time.perf_counter()
    while steps < 2 or time.perf_counter() - started < _SECONDS:
        step()
        steps += 1
    seconds = (time.perf_counter() - started) / steps
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    why = f"measured here with {tokens} tokens through {out_features} x {in_features}, {settings.dtype}{threads}"
    return 6 * out_features * in_features * tokens / seconds, why


def random_layer(
    spec: ClusterSpec,
    in_features: int,
    out_features: int,
    *,
    std: float = 1.0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> ClusteredLinear:
    """A layer of random codes, for time and memory: codebook and scales in fp16, no bias.

    Args:
        spec ([`ClusterSpec`]): How it is stored.
        in_features, out_features (`int`): Its shape.
        std (`float`): Of the numbers of the codebook; scales lie between 0.5 and 1.5.
        device, dtype (*optional*): Where it is made, and what it computes in; by default fp16.
    """
    size = (in_features, num_groups(out_features, spec.group_size))
    codes = pack(torch.randint(spec.num_clusters, size, dtype=torch.int32, device=device), spec.code_bits)
    codebook = torch.randn(1, spec.num_clusters, spec.group_size, device=device).mul_(std).half()
    scale_in, scale_out = (
        torch.rand(features, device=device).add_(0.5).half() if wanted else None
        for features, wanted in ((in_features, spec.scale_in), (out_features, spec.scale_out))
    )
    return ClusteredLinear.from_parts(codes, codebook, scale_in, scale_out, None, out_features, dtype=dtype)
