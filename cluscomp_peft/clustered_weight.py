"""`ClusteredWeight`: a module whose weight [out, in] is codes, a codebook and scales; the base of [`ClusteredLinear`]
and [`ClusteredEmbedding`].

All of its tensors are frozen parameters. It says how they are stored, what they decode to and which they are; what is
computed with them is up to the subclass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from . import ops
from .codes import ClusterSpec, checksum, fingerprint, num_groups, value_fingerprint
from .deltas import Delta, apply_deltas
from .lazy_weight import LazyWeight
from .offloading import store, store_all, stored
from .placement import is_whole
from .upstream.accelerate import kept_weights, offload_hook

__all__ = ["BASE_TENSORS", "VALUES", "ClusteredWeight", "CodesDigest", "clustered_weights"]

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


class ClusteredWeight(nn.Module):
    """A frozen weight in codes.

    Args:
        in_features (`int`): in.
        out_features (`int`): out.
        spec ([`ClusterSpec`]): How the weight is stored.
        codebook_dtype (`torch.dtype`): Of codebook and scales.
        dtype (`torch.dtype`, *optional*): What `weight` answers, by default that of the codebook.
        device (`torch.device`, *optional*): Of everything. Nothing is initialised: codes are 0, floats NaN, so that a
            layer that was never loaded cannot pass for one that was.

    Parameters: `codes` [in, width] uint8, `codebook` [m, n, g], `scale_in` [in] or None, `scale_out` [out] or None.

    Attributes:
        is_tied (`bool`): Its parameters are those of another layer, which counts, checks and saves them.
    """

    codes: nn.Parameter
    codebook: nn.Parameter
    scale_in: nn.Parameter | None
    scale_out: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: ClusterSpec,
        *,
        codebook_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.is_tied = in_features, out_features, False

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.full(size, math.nan, dtype=codebook_dtype, device=device), requires_grad=False)

        codes = torch.zeros(in_features, spec.code_bytes(out_features), dtype=torch.uint8, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.codebook = empty(spec.num_blocks, spec.num_clusters, spec.group_size)
        self.register_parameter("scale_in", empty(in_features) if spec.scale_in else None)
        self.register_parameter("scale_out", empty(out_features) if spec.scale_out else None)
        self.weight_dtype = dtype or codebook_dtype  # of the weight that this layer stands for; casts follow it
        self._digest = CodesDigest()
        self._digest_of_map: tuple[Any, str | None] | None = None

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
        return 8 * self.stored_bytes() / (self.in_features * self.out_features)

    def stored_bytes(self) -> int:
        """Bytes of codes, codebooks and scales."""
        return self.spec.num_bytes(self.in_features, self.out_features, self.codebook.element_size())

    @property
    def weight(self) -> torch.Tensor:
        """The weight that this layer stands for, in the model's dtype, as the dense layer has it: [out, in], of a
        Conv1D [in, out].

        For model code that asks for its dtype or device, which costs nothing. Whoever computes with it decodes the
        whole matrix each time; writing into it changes nothing.
        """
        if torch.compiler.is_compiling():  # a compiler drops the product where only its dtype is used
            return self._orient(self.decode(self.weight_dtype))
        shape = self._orient(torch.empty(self.out_features, self.in_features, device="meta")).shape
        make = lambda: self._orient(self.decode(self.weight_dtype))  # noqa: E731
        return LazyWeight(shape, self.weight_dtype, self.codes.device, make)

    def _orient(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] as the dense layer has it, a view."""
        return weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ClusteredWeight:
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

    def _values(self) -> tuple[torch.Tensor | None, ...]:
        """Codebook [m, n, g] and scales, wherever they are."""
        if not self.codebook.is_meta:  # in a call they always are in place; compilers need not look further
            return self.codebook, self.scale_in, self.scale_out
        return stored(self, "codebook"), stored(self, "scale_in"), stored(self, "scale_out")


def clustered_weights(model: nn.Module) -> list[tuple[str, ClusteredWeight]]:
    """(name, layer) of every layer in codes, in the order of the model; of those that share them the first."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ClusteredWeight) and not module.is_tied
    ]
