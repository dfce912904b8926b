"""`ClusteredLinear`: a linear layer that stores codes, a codebook and scales, and no weight.

All of its tensors are frozen parameters. Training changes it through a [`Delta`] (`deltas.py`), which is added to the
codebook and the scales on the way into the op; merging writes the very same sum into the parameters.

The class is deliberately no `nn.Linear`: tools that merge into `nn.Linear.weight` would write into a temporary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import ops
from .clustered_weight import ClusteredWeight
from .codes import ClusterSpec
from .deltas import Delta, in_absolute_units
from .dense import is_dense_linear
from .experts import fused_stacks
from .offloading import offload_on_error, stored
from .upstream.accelerate import offload_hook
from .upstream.peft import original_of

__all__ = ["ClusteredLinear", "all_bits", "count_parameters", "dense_bits"]


class ClusteredLinear(ClusteredWeight):
    """A frozen linear layer in codes.

    Args:
        in_features (`int`): in.
        out_features (`int`): out.
        spec ([`ClusterSpec`]): How the weight is stored.
        bias (`bool`): Whether there is a bias [out].
        codebook_dtype (`torch.dtype`): Of codebook and scales.
        dtype (`torch.dtype`, *optional*): Of the bias, and what `weight` answers, by default of the codebook.
        device (`torch.device`, *optional*): Of everything. Nothing is initialised: codes are 0, floats NaN, so that a
            layer that was never loaded cannot pass for one that was.
        conv1d (`bool`): The dense layer was a `transformers` Conv1D, whose weight is [in, out]; [`to_dense`] gives
            one back.

    Parameters: `codes` [in, width] uint8, `codebook` [m, n, g], `scale_in` [in] or None, `scale_out` [out] or None,
    `bias` [out] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: ClusterSpec,
        *,
        bias: bool = False,
        codebook_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        conv1d: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, spec, codebook_dtype=codebook_dtype, dtype=dtype, device=device)
        self.conv1d = conv1d
        own = torch.full((out_features,), math.nan, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if own is None else nn.Parameter(own, requires_grad=False))

    @classmethod
    def from_parts(
        cls,
        codes: torch.Tensor,
        codebook: torch.Tensor,
        scale_in: torch.Tensor | None,
        scale_out: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_features: int,
        conv1d: bool = False,
        dtype: torch.dtype | None = None,
    ) -> ClusteredLinear:
        """A layer of existing tensors, none of which is copied; shapes and `dtype` as in the class."""
        spec = ClusterSpec.of(codebook, scale_in, scale_out)
        layer = cls(codes.shape[0], out_features, spec, bias=bias is not None, device="meta", conv1d=conv1d)
        layer.weight_dtype = dtype or codebook.dtype
        parts = {"codes": codes, "codebook": codebook, "scale_in": scale_in, "scale_out": scale_out, "bias": bias}
        for name, value in parts.items():
            if value is not None:
                layer.set_parameter(name, value)
        return layer

    def forward(self, x: torch.Tensor, deltas: Sequence[Delta | ops.Numbers] = ()) -> torch.Tensor:
        """`x Wᵀ + bias` for x [..., in], with `deltas` applied to W."""
        if offload_hook(self) is None:
            return self._forward(x, deltas)
        with offload_on_error(self):
            return self._forward(x, deltas)

    def _forward(self, x: torch.Tensor, deltas: Sequence[Delta | ops.Numbers]) -> torch.Tensor:
        if len(deltas) == 1 and isinstance(deltas[0], ops.Numbers):
            weight = ops.PackedWeight(self.codes, self.codebook, self.out_features, self.scale_in, self.scale_out)
            y = ops.adapted_linear(x, weight, self.bias, deltas[0])
            if y is not None:
                return y
        clusters = self.codebook.shape[1]
        absolute = [
            in_absolute_units(delta, clusters) if isinstance(delta, ops.Numbers) else delta for delta in deltas
        ]
        codebook, scale_in, scale_out = self.effective(absolute)
        weight = ops.PackedWeight(self.codes, codebook, self.out_features, scale_in, scale_out)
        return ops.linear(x, weight, self.bias)

    def to_dense(self, dtype: torch.dtype) -> nn.Linear | Conv1D:
        """The `nn.Linear` or `Conv1D` with the decoded weight in `dtype`; the bias is shared.

        It computes what this layer does, to the last bit with more than 16 tokens in a call on a CPU, 64 on a GPU.
        Fewer are multiplied here straight from the codes (see `ops/backends`) and there by `F.linear`,
        which adds the same products in another order; so does a Conv1D, with any number of tokens.
        """
        with torch.device("meta"):
            dense: nn.Linear | Conv1D
            if self.conv1d:
                dense = Conv1D(self.out_features, self.in_features)
            else:
                dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        dense._parameters["weight"] = nn.Parameter(self._orient(self.decode(dtype)).contiguous(), requires_grad=False)
        bias = stored(self, "bias")
        dense._parameters["bias"] = bias if bias is self.bias else nn.Parameter(bias, requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        spec = ", ".join(f"{key}={value}" for key, value in self.spec.to_dict().items())
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {spec}"

    def _orient(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.conv1d else weight


def dense_bits(model: nn.Module) -> tuple[int, int]:
    """(bytes, weights) of the linear layers and experts of a model: clustered ones as they are stored, dense ones at
    their dtype.

    Published bits per weight leave out embeddings and the output head. A head counts here only where it is clustered
    and the embeddings are dense.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = original_of(head) or head
    embeddings = any(map(_is_embedding, model.modules()))
    fused = [stack.module._parameters[stack.key] for stack in fused_stacks(model)]
    weights = sum(parameter.numel() for parameter in fused)  # type: ignore[union-attr]
    total_bytes = sum(parameter.nbytes for parameter in fused)  # type: ignore[union-attr]
    pending = [model]
    while pending:
        module = pending.pop()
        if _is_embedding(module) or (embeddings and module is head):
            continue
        if hasattr(module, "stored_bytes"):
            # A clustered layer, or a tuner layer around one, whose bytes are those after merging.
            total_bytes += module.stored_bytes()
            weights += module.in_features * module.out_features
        elif (original := original_of(module)) is not None:
            # PEFT's modules_to_save keeps the original beside copies of the same shape.
            pending.append(original)
        elif is_dense_linear(module) and module is not head:
            total_bytes += module.weight.numel() * module.weight.element_size()
            weights += module.weight.numel()
        else:
            pending.extend(module.children())
    return total_bytes, weights


def all_bits(model: nn.Module) -> tuple[int, int]:
    """(bytes, weights) of a whole model: as [`dense_bits`] with embeddings, head, norms and biases; what layers share
    counts once, and buffers do not count."""
    total_bytes = weights = 0
    seen: set[int] = set()
    pending = [model]
    while pending:
        module = pending.pop()
        own = list(module._parameters.values())
        if hasattr(module, "stored_bytes"):
            layer = getattr(module, "base_layer", module)
            own = [layer._parameters.get("bias")]
            if not getattr(layer, "is_tied", False):
                total_bytes += module.stored_bytes()
                weights += module.in_features * module.out_features
        elif (original := original_of(module)) is not None:
            pending.append(original)
            continue
        else:
            pending.extend(module.children())
        for parameter in own:
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                total_bytes += parameter.numel() * parameter.element_size()
                weights += parameter.numel()
    return total_bytes, weights


def _is_embedding(module: nn.Module) -> bool:
    """Whether it is a clustered embedding, or a head that shares its tensors."""
    return isinstance(module, ClusteredWeight) and (module.is_tied or not isinstance(module, ClusteredLinear))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, a clustered layer counting the weights that it stands for.

    PEFT's `print_trainable_parameters` counts the bytes of the codes instead.
    """
    trainable = total = 0
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, ClusteredWeight):
            bias = module._parameters.get("bias")
            own = 0 if module.is_tied else module.in_features * module.out_features
            total += own + (0 if bias is None else bias.numel())
            inside.update(id(parameter) for parameter in module.parameters())
        elif getattr(module, "weighs_nothing", False):
            inside.update(id(parameter) for parameter in module.parameters())
    for parameter in model.parameters():
        trainable += parameter.numel() * parameter.requires_grad
        # The codes of a dense base are bytes too, and no parameters.
        total += parameter.numel() * (id(parameter) not in inside and parameter.dtype != torch.uint8)
    return trainable, total
