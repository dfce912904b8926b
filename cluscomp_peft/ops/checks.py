"""The checks of the ops' arguments, made once before a backend is called: kernels read addresses and would not notice.

    devices     all tensors are where the codes are; if one is on `meta`, all are
    dtypes      codes are uint8, everything else is floating point
    shapes      as `PackedWeight` gives them

Every layer is checked in every call. To cost little, dtypes and shapes that passed are remembered and not checked
again; devices are compared each time.
"""

from __future__ import annotations

import functools

import torch

from ..codes import MAX_CODE_BITS, MAX_GROUP_SIZE, code_bits, num_groups, packed_width
from .packed_weight import PackedWeight

__all__ = ["check", "check_gradient"]

_Kind = tuple[torch.dtype, torch.Size] | None  # dtype and shape of a tensor, where there is one


def check(weight: PackedWeight, x: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> None:
    """Refuses a weight, x [..., in] and a bias [out] that do not belong together.

    Raises:
        TypeError: If the codes are not uint8, or something else is not floating point.
        ValueError: If tensors are on several devices, or shapes do not belong together.
    """
    codes, codebook, out_features, scale_in, scale_out, residual = weight
    device = codes.device
    if not (
        codebook.device == device
        and (x is None or x.device == device)
        and (scale_in is None or scale_in.device == device)
        and (scale_out is None or scale_out.device == device)
        and (residual is None or residual.device == device)
        and (bias is None or bias.device == device)
    ):
        _refuse_devices(device, x, codebook, scale_in, scale_out, residual, bias)
    # torch.compile traces the function itself: its symbolic sizes have no hash.
    check_kinds = _check_kinds.__wrapped__ if torch.compiler.is_compiling() else _check_kinds
    check_kinds(
        None if x is None else (x.dtype, x.shape[-1:]),
        codes.dtype,
        codes.shape,
        codebook.dtype,
        codebook.shape,
        None if scale_in is None else (scale_in.dtype, scale_in.shape),
        None if scale_out is None else (scale_out.dtype, scale_out.shape),
        None if residual is None else (residual.dtype, residual.shape),
        None if bias is None else (bias.dtype, bias.shape),
        out_features,
    )


def check_gradient(x: torch.Tensor, grad_output: torch.Tensor, weight: PackedWeight) -> None:
    """Refuses x [tokens, in] and dL/dy [tokens, out] that do not belong together, beside what [`check`] sees."""
    if grad_output.ndim != 2 or grad_output.shape[1] != weight.out_features:
        raise ValueError(
            f"grad_output must have shape [tokens, {weight.out_features}], got {tuple(grad_output.shape)}."
        )
    if x.ndim != 2 or len(x) != len(grad_output):
        raise ValueError(f"x must have shape [{len(grad_output)}, in], got {tuple(x.shape)}.")
    if not grad_output.dtype.is_floating_point:
        raise TypeError(f"grad_output must be floating point, got {grad_output.dtype}.")
    if grad_output.device != weight.device:
        raise ValueError(
            f"the codes of this layer are on {weight.device}, but grad_output is on {grad_output.device}."
        )


def _refuse_devices(device: torch.device, *tensors: torch.Tensor | None) -> None:
    names = ("the input", "the codebook", "scale_in", "scale_out", "the residual", "the bias")
    name, other = next(
        (name, tensor.device)
        for name, tensor in zip(names, tensors, strict=True)
        if tensor is not None and tensor.device != device
    )
    cure = "move the layer and its input to one device"
    if "meta" in (device.type, other.type):
        cure = "what is on meta has no numbers: load the weights first, or offload by a hook that brings them"
    raise ValueError(f"the codes of this layer are on {device}, but {name} is on {other}; {cure}.")


@functools.lru_cache(maxsize=1024)
def _check_kinds(
    x: _Kind,
    codes_dtype: torch.dtype,
    codes: torch.Size,
    codebook_dtype: torch.dtype,
    codebook: torch.Size,
    scale_in: _Kind,
    scale_out: _Kind,
    residual: _Kind,
    bias: _Kind,
    out_features: int,
) -> None:
    if codes_dtype != torch.uint8:
        raise TypeError(
            f"the codes of a clustered weight must stay uint8, got {codes_dtype}: something cast every parameter of "
            "the model (peft.prepare_model_for_kbit_training and cast_mixed_precision_params do). Load the model "
            "again and leave such calls out; a clustered model needs none of them."
        )
    if len(codebook) != 3:
        raise ValueError(f"a codebook has shape [blocks, clusters, group_size], got {tuple(codebook)}.")
    blocks, clusters, group_size = codebook
    if blocks < 1 or not 1 <= clusters <= 2**MAX_CODE_BITS or not 1 <= group_size <= MAX_GROUP_SIZE:
        raise ValueError(
            f"a codebook has at least one block, 1 to {2**MAX_CODE_BITS} clusters and a group_size of 1 to "
            f"{MAX_GROUP_SIZE}, got a shape of {tuple(codebook)}."
        )
    width = packed_width(num_groups(out_features, group_size), code_bits(clusters))
    if out_features < 0 or len(codes) != 2 or codes[1] != width:
        raise ValueError(
            f"codes of shape {tuple(codes)} do not belong to {out_features} output features and a codebook of "
            f"shape {tuple(codebook)}, which take {width} bytes for each input channel."
        )
    in_features = codes[0]
    if x is not None and x[1] != (in_features,):
        raise ValueError(f"the layer takes {in_features} input features, got an x whose last dimension is {x[1]}.")
    wanted = (
        ("scale_in", scale_in, (in_features,)),
        ("scale_out", scale_out, (out_features,)),
        ("residual", residual, (out_features, in_features)),
        ("bias", bias, (out_features,)),
    )
    for name, given, shape in wanted:
        if given is not None and given[1] != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(given[1])}.")
    for name, given, _ in (("codebook", (codebook_dtype, codebook), None), ("x", x, None), *wanted):
        if given is not None and not given[0].is_floating_point:
            raise TypeError(f"{name} must be floating point, got {given[0]}.")
