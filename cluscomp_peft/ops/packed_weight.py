"""A weight in its packed form as one value, and the numbers that an adapter adds to it.

codes [in, ceil(groups · bits / 8)]   uint8, packed by `cluscomp_peft.codes.pack`; groups = ceil(out / g)
codebook [m, n, g]                    input channel i uses block i · m // in
scale_in [in], scale_out [out]        or None
residual [out, in]                    a dense weight that the decoded one is added to, or None

W = scale_out · (residual + codebook[codes]) · scale_in          [out, in]
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..codes import code_bits, num_groups

__all__ = ["Numbers", "PackedWeight"]


class PackedWeight(NamedTuple):
    """Codes, codebook and scales of one matrix; nothing is copied or checked.

    Args:
        codes (`torch.Tensor`): [in, ceil(ceil(out / g) · b / 8)], uint8.
        codebook (`torch.Tensor`): [m, n, g], floating point.
        out_features (`int`): out, which the codes alone do not tell when g does not divide it.
        scale_in (`torch.Tensor`, *optional*): [in].
        scale_out (`torch.Tensor`, *optional*): [out].
        residual (`torch.Tensor`, *optional*): [out, in].
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    out_features: int
    scale_in: torch.Tensor | None = None
    scale_out: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @property
    def tensors(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """In the order in which the ops of torch.library take them."""
        return self.codes, self.codebook, self.scale_in, self.scale_out, self.residual

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def in_features(self) -> int:
        return self.codes.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of the packed codes of an input channel."""
        return self.codes.shape[1]

    @property
    def num_blocks(self) -> int:
        """m, codebooks."""
        return self.codebook.shape[0]

    @property
    def num_clusters(self) -> int:
        """n, centroids of a codebook."""
        return self.codebook.shape[1]

    @property
    def group_size(self) -> int:
        """g, weights of a centroid."""
        return self.codebook.shape[2]

    @property
    def code_bits(self) -> int:
        """b, bits of a code."""
        return code_bits(self.codebook.shape[1])

    @property
    def num_groups(self) -> int:
        """Codes of an input channel."""
        return num_groups(self.out_features, self.codebook.shape[2])

    @property
    def is_scaled(self) -> bool:
        return self.scale_in is not None or self.scale_out is not None

    @property
    def is_plain(self) -> bool:
        """Whether the codebook is all that the weight is made of, so that its numbers may be rounded before the
        gather: there are no scales and no residual."""
        return self.scale_in is None and self.scale_out is None and self.residual is None


class Numbers(NamedTuple):
    """An adapter's trained numbers in one layer, as an optimiser sees them.

    Args:
        codebook (`torch.Tensor`): [k · n, g]; k, the adapter's codebooks, need not be the layer's m.
        scale_in (`torch.Tensor`, *optional*): [in].
        scale_out (`torch.Tensor`, *optional*): [out].
        units (`torch.Tensor`): [2], what 1 stands for in `codebook`, and in the scales.
    """

    codebook: torch.Tensor
    scale_in: torch.Tensor | None
    scale_out: torch.Tensor | None
    units: torch.Tensor
