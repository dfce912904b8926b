"""`ClusteredLinear`: a linear layer that stores codes, a codebook and scales, and no weight.

All of its tensors are frozen parameters. Training changes it through a [`Delta`] (`deltas.py`), which is added to the
codebook and the scales on the way into the op; merging writes the very same sum into the parameters.

The class is deliberately no `nn.Linear`: tools that merge into `nn.Linear.weight` would write into a temporary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import ops
from .codes import ClusterSpec, checksum, fingerprint, num_groups, value_fingerprint
from .deltas import Delta, apply_deltas, in_absolute_units
from .dense import is_dense_linear
from .lazy_weight import LazyWeight
from .offloading import offload_on_error, store, store_all, stored
from .placement import is_whole
from .upstream.accelerate import kept_weights, offload_hook
from .upstream.peft import original_of

__all__ = [
    "BASE_TENSORS",
    "VALUES",
    "ClusteredLinear",
    "CodesDigest",
    "count_parameters",
    "dense_bits",
]

# Names of the parameters that stand for a weight: what adapters change, and with the codes all of them.
VALUES = ("codebook", "scale_in", "scale_out")
BASE_TENSORS = ("codes", *VALUES)


class CodesDigest:
    """The digest of a layer's codes, made again only if they have changed.

    A checksum of the codes says whether they have: memory addresses are reused, and torch's version counter misses
    writes through `.data` or by a kernel.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[object, ...], str] | None = None

    def of(self, codes: torch.Tensor, out_features: int, spec: ClusterSpec) -> str | None:
        """The digest of codes [in, width]; if they are not whole in this process, the last one, or None."""
        if is_whole(codes):
            key = (codes.shape, out_features, spec.group_size, spec.num_clusters, checksum(codes))
            if self._known is None or self._known[0] != key:
                self._known = (key, fingerprint(codes, out_features, spec))
        return None if self._known is None else self._known[1]


class ClusteredLinear(nn.Module):
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
        super().__init__()
        self.in_features, self.out_features, self.conv1d = in_features, out_features, conv1d
        shape = (spec.num_blocks, spec.num_clusters, spec.group_size)

        def empty(*size: int, dtype: torch.dtype | None = codebook_dtype) -> nn.Parameter:
            return nn.Parameter(torch.full(size, math.nan, dtype=dtype, device=device), requires_grad=False)

        codes = torch.zeros(in_features, spec.code_bytes(out_features), dtype=torch.uint8, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.codebook = empty(*shape)
        self.register_parameter("scale_in", empty(in_features) if spec.scale_in else None)
        self.register_parameter("scale_out", empty(out_features) if spec.scale_out else None)
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)
        self.weight_dtype = dtype or codebook_dtype  # of the weight that this layer stands for; casts follow it
        self._digest = CodesDigest()
        self._digest_of_map: tuple[Any, str | None] | None = None

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

    def set_parameter(self, name: str, value: torch.Tensor | None) -> None:
        """Replaces a parameter by `value`, frozen unless it is a trained bias, wherever it is kept."""
        store(self, name, value)

    @property
    def spec(self) -> ClusterSpec:
        """How the weight is stored now; merging may raise `num_blocks` or add scales."""
        return ClusterSpec.of(self.codebook, self.scale_in, self.scale_out)

    @property
    def true_bits(self) -> float:
        """Bits per weight with codes, codebooks and scales counted."""
        return self.spec.true_bits(self.in_features, self.out_features, self.codebook.element_size())

    def stored_bytes(self) -> int:
        """Bytes of codes, codebooks and scales."""
        return self.spec.num_bytes(self.in_features, self.out_features, self.codebook.element_size())

    @property
    def weight(self) -> torch.Tensor:
        """The weight that this layer stands for, in the model's dtype, [out, in] (Conv1D: [in, out]).

        For model code that asks for its dtype or device, which costs nothing. Whoever computes with it decodes the
        whole matrix each time; writing into it changes nothing.
        """
        if torch.compiler.is_compiling():  # a compiler drops the product where only its dtype is used
            return self._orient(self.decode(self.weight_dtype))
        shape = (self.in_features, self.out_features) if self.conv1d else (self.out_features, self.in_features)
        make = lambda: self._orient(self.decode(self.weight_dtype))  # noqa: E731
        return LazyWeight(shape, self.weight_dtype, self.codes.device, make)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ClusteredLinear:
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def decode(self, dtype: torch.dtype | None = None, deltas: Sequence[Delta] = ()) -> torch.Tensor:
        """The weight [out, in] with `deltas` applied, in `dtype` (by default the codebook's)."""
        with torch.no_grad():
            codebook, scale_in, scale_out = self.effective(deltas)
            codes = stored(self, "codes")
            assert codes is not None
            weight = ops.PackedWeight(codes, codebook, self.out_features, scale_in, scale_out)
            return ops.decode(weight, dtype or self.codebook.dtype)

    def effective(self, deltas: Sequence[Delta]) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Codebook and scales with `deltas` applied: what the op sees and what merging stores, differentiable."""
        codebook, scale_in, scale_out = self._values()
        assert codebook is not None
        return apply_deltas(codebook, scale_in, scale_out, deltas, self.in_features)

    def merge(self, deltas: Sequence[Delta]) -> None:
        """Writes `deltas` into codebook and scales, exactly; an error leaves the layer as it was."""
        dtype = self.codebook.dtype
        with torch.no_grad():
            values = self.effective(deltas)
        pairs = zip(VALUES, values, strict=True)
        store_all(self, {name: value.to(dtype) for name, value in pairs if value is not None})

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

    def fingerprint(self) -> str | None:
        """Digest of the codes as they are now, offloaded or not. Where they are spread over processes it is the last
        one that this process has seen; None if it has seen none.
        """
        hook = offload_hook(self) if self.codes.is_meta else None
        if hook is None:
            return self._digest.of(self.codes, self.out_features, self.spec)
        # Offloaded codes are read once: whoever changes them also gives the hook another map.
        if self._digest_of_map is None or self._digest_of_map[0] is not kept_weights(hook):
            codes = stored(self, "codes")
            assert codes is not None
            digest = self._digest.of(codes, self.out_features, self.spec)
            if codes.is_meta:
                return digest
            self._digest_of_map = (kept_weights(hook), digest)
        return self._digest_of_map[1]

    def has_stray_codes(self) -> bool:
        """Whether codes name centroids that the codebook lacks, as those of a damaged or hostile file may."""
        codes = stored(self, "codes")
        if codes is None or not is_whole(codes):
            return False
        spec = self.spec
        return ops.has_stray_codes(codes, spec.num_clusters, num_groups(self.out_features, spec.group_size))

    def codebook_fingerprint(self) -> str:
        """Digest of codebook and scales, which training and merging change while the codes stay."""
        return value_fingerprint(self._values())

    def extra_repr(self) -> str:
        spec = ", ".join(f"{key}={value}" for key, value in self.spec.to_dict().items())
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {spec}"

    def _values(self) -> tuple[torch.Tensor | None, ...]:
        """Codebook [m, n, g] and scales, wherever they are."""
        if not self.codebook.is_meta:  # in a call they always are in place; compilers need not look further
            return self.codebook, self.scale_in, self.scale_out
        return stored(self, "codebook"), stored(self, "scale_in"), stored(self, "scale_out")

    def _orient(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.conv1d else weight


def dense_bits(model: nn.Module) -> tuple[int, int]:
    """(bytes, weights) of the linear layers of a model: clustered ones as they are stored, dense ones at their dtype.

    The output head counts only where it is clustered: published bits per weight leave it out where it stays dense.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = original_of(head) or head
    total_bytes = weights = 0
    pending = [model]
    while pending:
        module = pending.pop()
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


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, a clustered layer counting the weights that it stands for.

    PEFT's `print_trainable_parameters` counts the bytes of the codes instead.
    """
    trainable = total = 0
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, ClusteredLinear):
            total += module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
            inside.update(id(parameter) for parameter in module.parameters())
        elif getattr(module, "weighs_nothing", False):
            inside.update(id(parameter) for parameter in module.parameters())
    for parameter in model.parameters():
        trainable += parameter.numel() * parameter.requires_grad
        # The codes of a dense base are bytes too, and no parameters.
        total += parameter.numel() * (id(parameter) not in inside and parameter.dtype != torch.uint8)
    return trainable, total
