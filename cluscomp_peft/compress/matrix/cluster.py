"""One dense layer in, one `ClusteredLinear` out.

    scales        s_in, s_out = RMS of columns and rows, rounded to 16 bits         outlier channels come down to size
    K-means       on V = W / (s_out · s_in), each vector weighted by s_in[i]² · E[x_i²]
    packing       codes to b bits, codebook to its dtype

A vector holds outputs of one input channel, so the error that its activation causes, E[x_i²] · |error|², is one scalar
weight per vector: weighted K-means minimises the diagonal-Hessian error exactly, and the assignment is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...clustering import kmeans
from ...codes import ClusterSpec, group, pack
from ...linear import ClusteredLinear, weight_of

__all__ = ["check_finite", "check_range", "cluster_codes", "cluster_linear"]


def cluster_linear(module: nn.Module, spec: ClusterSpec, **settings: Any) -> ClusteredLinear:
    """Clusters an `nn.Linear` or `Conv1D`, which is left as it is; its bias is shared with the result.

    `settings` and errors are those of [`cluster_codes`].
    """
    weight = weight_of(module).detach()
    packed, codebook, scale_in, scale_out = cluster_codes(weight, spec, **settings)
    return ClusteredLinear.from_parts(
        packed,
        codebook,
        scale_in,
        scale_out,
        module.bias,
        weight.shape[0],
        conv1d=isinstance(module, Conv1D),
        dtype=weight.dtype,
    )


def cluster_codes(
    weight: torch.Tensor,
    spec: ClusterSpec,
    *,
    codebook_dtype: torch.dtype = torch.float16,
    importance: torch.Tensor | None = None,
    quality: str = "default",
    seed: int = 0,
    threads: int | None = None,
    name: str = "weight",
    progress: Callable[[int, float], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Clusters a weight [out, in].

    Args:
        weight (`torch.Tensor`): [out, in], floating point.
        spec ([`ClusterSpec`]): How to store it; `num_blocks` must be 1.
        codebook_dtype (`torch.dtype`): Of codebook and scales.
        importance (`torch.Tensor`, *optional*): [in], E[x_i²] of the layer's inputs.
        quality, seed, threads, progress: See `cluscomp_peft.clustering.kmeans`.
        name (`str`): What errors call the layer.

    Returns:
        Packed codes [in, width], codebook [1, n, g], scale_in [in] and scale_out [out] (None without scales).

    Raises:
        ValueError: If the weight has NaN or infinite values, or values that `codebook_dtype` cannot hold.
    """
    if spec.num_blocks != 1:
        raise ValueError(f"{name}: a weight is clustered into one codebook, got num_blocks={spec.num_blocks}.")
    check_finite(weight, name)
    check_range(weight, codebook_dtype, name)
    weight = weight.float()
    scale_in = _rms(weight, 0).to(codebook_dtype) if spec.scale_in else None
    if scale_in is not None:
        weight = weight / scale_in.float()
    scale_out = _rms(weight, 1).to(codebook_dtype) if spec.scale_out else None
    if scale_out is not None:
        weight = weight / scale_out.float()[:, None]

    vectors = group(weight, spec.group_size)
    channel = None if scale_in is None else scale_in.float() ** 2
    if importance is not None:
        importance = importance.to(weight.device, torch.float32)
        if importance.shape != (weight.shape[1],) or not bool((importance > 0).any()):
            raise ValueError(
                f"{name}: importance must hold E[x²] of its {weight.shape[1]} inputs, not all 0, got shape "
                f"{tuple(importance.shape)} and a maximum of {float(importance.max()):.3g}; calibrate on other text."
            )
        # A channel that calibration never excited still needs its weights: text beyond the sample may excite it.
        importance = importance.clamp_min(1e-4 * float(importance.mean()))
        channel = importance if channel is None else channel * importance
    in_features, groups = vectors.shape[:2]
    del weight  # K-means is where memory peaks
    codebook, codes, _ = kmeans(
        vectors.reshape(-1, spec.group_size),
        spec.num_clusters,
        weights=None if channel is None else channel.repeat_interleave(groups),
        quality=quality,
        seed=seed,
        threads=threads,
        progress=progress,
    )
    packed = pack(codes.view(in_features, groups), spec.code_bits)
    return packed, codebook.to(codebook_dtype)[None], scale_in, scale_out


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Raises a ValueError that names the layer if the weight has NaN or infinite values."""
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"{name} has {bad} NaN or infinite values of {weight.numel()}; the checkpoint is damaged or was trained "
            "to divergence. Load a sound one, or leave the layer out with exclude_modules."
        )


def check_range(weight: torch.Tensor, codebook_dtype: torch.dtype, name: str) -> None:
    """Raises a ValueError that names the layer if the weight has values that `codebook_dtype` cannot hold."""
    limit, largest = torch.finfo(codebook_dtype).max, float(weight.abs().max())
    if largest > limit:
        raise ValueError(
            f"{name} has values up to {largest:.3g}, but {codebook_dtype} holds at most {limit:.3g}; choose "
            "codebook_dtype='bfloat16' or 'float32'."
        )


def _rms(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Root mean square along `dim`, 1 where it vanishes in half precision."""
    rms = weight.square().mean(dim).sqrt()
    return torch.where(rms > 1e-6, rms, torch.ones_like(rms))
