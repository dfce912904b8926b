"""From a weight [out, in] to the vectors that K-means clusters.

    scales        s_in, s_out = RMS of columns and rows, in the codebook's dtype: outlier channels become small
    vectors       V = W / (s_out · s_in), cut into groups of g outputs of one input channel
    weights       of each vector, in the sum of squares that K-means minimises: s_in[i]² · Σ s_out[o]² · E[x_i²]

A vector holds outputs o of one input channel i. The error that its activation causes is E[x_i²] Σ_o error_o², so
without scale_out there is one scalar weight per vector: weighted K-means minimises the diagonal-Hessian error exactly
and the assignment is unchanged. With scale_out the outputs of a vector count alike: by the sum of squared scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...codes import ClusterSpec, group

__all__ = ["Vectors", "check_finite", "check_range", "cut_into_vectors"]


class Vectors(NamedTuple):
    """A weight as K-means takes it.

    vectors: [in · groups, g] fp32, those of an input channel after each other. weights: [in · groups] fp32, or None if
    all count alike. scale_in: [in], and scale_out: [out], in the codebook's dtype, or None. in_features: in.
    """

    vectors: torch.Tensor
    weights: torch.Tensor | None
    scale_in: torch.Tensor | None
    scale_out: torch.Tensor | None
    in_features: int


def cut_into_vectors(
    weight: torch.Tensor,
    spec: ClusterSpec,
    codebook_dtype: torch.dtype,
    importance: torch.Tensor | None,
    name: str,
) -> Vectors:
    """Scales a weight and cuts it into vectors.

    Args:
        weight (`torch.Tensor`): [out, in], floating point.
        spec ([`ClusterSpec`]): How it will be stored; `num_blocks` must be 1.
        codebook_dtype (`torch.dtype`): Of codebook and scales.
        importance (`torch.Tensor`, *optional*): [in], E[x_i²] of the layer's inputs.
        name (`str`): What errors call the layer.

    Raises:
        ValueError: If the weight has NaN or infinite values, or values that `codebook_dtype` cannot hold, or
            `importance` says nothing of its inputs.
    """
    if spec.num_blocks != 1:
        raise ValueError(f"{name}: a weight is clustered into one codebook, got num_blocks={spec.num_blocks}.")
    weight = weight.detach()  # codes have no gradient
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
        # A channel that calibration never excited still needs its weights: text beyond the sample may excite it. As
        # much is added to the Hessian of error feedback.
        importance = importance + 1e-2 * importance.mean()
        channel = importance if channel is None else channel * importance
    in_features, groups = vectors.shape[:2]
    weights = None if channel is None else channel[:, None].expand(-1, groups)
    if scale_out is not None:
        of_group = group(scale_out.float().square()[:, None], spec.group_size).sum(2)
        weights = (of_group if weights is None else weights * of_group).expand(in_features, -1)
    return Vectors(
        vectors.reshape(-1, spec.group_size),
        None if weights is None else weights.reshape(-1),
        scale_in,
        scale_out,
        in_features,
    )


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
    limit, largest = torch.finfo(codebook_dtype).max, float(weight.detach().abs().max())
    if largest > limit:
        raise ValueError(
            f"{name} has values up to {largest:.3g}, but {codebook_dtype} holds at most {limit:.3g}; choose "
            "codebook_dtype='bfloat16' or 'float32'."
        )


def _rms(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Root mean square along `dim`, 1 where it vanishes in half precision."""
    rms = weight.square().mean(dim).sqrt()
    return torch.where(rms > 1e-6, rms, torch.ones_like(rms))
