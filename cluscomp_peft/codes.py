"""The representation: how a weight matrix becomes codes and a codebook, as pure functions.

A weight `W` [out, in] is cut, input channel by input channel, into groups of `g` consecutive outputs. Each group is a
vector; K-means replaces it by the index (code) of one of `n` centroids (the codebook). The codes are packed to
`b = ceil(log2 n)` bits, least significant bit first, each input channel starting at a whole byte, so that a tile of
input channels can be unpacked alone and a checkpoint can be cut along dimension 0.

      W [out, in]                         vectors [in, groups, g]            codes [in, groups]      packed, uint8
      ┌ w00 w01 … ┐   column 0 ──►   [ (w00 w10 … w_g-1,0) (…) (…0) ]  ──►   [ 17   4   2 ]    ──►   [in, ⌈groups·b/8⌉]
      │ w10 w11 … │   column 1 ──►   [ (w01 w11 … w_g-1,1) (…) (…0) ]        [  9  17   0 ]
      └ …         ┘                      the last group is padded with 0

Source: ClusComp (arXiv 2503.13089, section 3.1); there the codes are stored as 16- or 32-bit integers, here in exactly
`b` bits. Nothing in this file knows about modules, devices or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from .placement import shape_of

__all__ = [
    "MAX_CODE_BITS",
    "MAX_GROUP_SIZE",
    "ClusterSpec",
    "block_offsets",
    "checksum",
    "code_bits",
    "combine_fingerprints",
    "fingerprint",
    "group",
    "num_groups",
    "pack",
    "packed_width",
    "ungroup",
    "unpack",
    "value_fingerprint",
]

MAX_CODE_BITS = 16  # a code spans at most three bytes, which unpack() and every kernel rely on
MAX_GROUP_SIZE = 64
_WORDS = (2**22, 2**16)  # of a block of a checksum: what is fast on an accelerator, and in a CPU's cache
_CODES_PER_BLOCK = 8  # eight codes of b bits fill exactly b bytes


@dataclass(frozen=True)
class ClusterSpec:
    """How one matrix is stored.

    Args:
        group_size (`int`): g, weights that share one code, consecutive along the output dimension.
        num_clusters (`int`): n, centroids of a codebook.
        num_blocks (`int`): codebooks of the matrix. Input channel i uses codebook `i * num_blocks // in_features`.
        scale_in (`bool`): a scale for each input channel is stored.
        scale_out (`bool`): a scale for each output channel is stored.

    Raises:
        ValueError: If a number is outside its range.
    """

    group_size: int
    num_clusters: int
    num_blocks: int = 1
    scale_in: bool = False
    scale_out: bool = False

    def __post_init__(self) -> None:
        for name in ("group_size", "num_clusters", "num_blocks"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}.")
        if not 1 <= self.group_size <= MAX_GROUP_SIZE:
            raise ValueError(f"group_size must be between 1 and {MAX_GROUP_SIZE}, got {self.group_size}.")
        if not 2 <= self.num_clusters <= 2**MAX_CODE_BITS:
            raise ValueError(f"num_clusters must be between 2 and {2**MAX_CODE_BITS}, got {self.num_clusters}.")
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {self.num_blocks}.")

    @classmethod
    def of(cls, codebook: torch.Tensor, scale_in: torch.Tensor | None, scale_out: torch.Tensor | None) -> ClusterSpec:
        """The spec of a matrix stored with these tensors, codebook [m, n, g]."""
        blocks, clusters, group_size = shape_of(codebook)
        return cls(group_size, clusters, blocks, scale_in is not None, scale_out is not None)

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return code_bits(self.num_clusters)

    def code_bytes(self, out_features: int) -> int:
        """Bytes of the codes of one input channel."""
        return packed_width(num_groups(out_features, self.group_size), self.code_bits)

    def num_bytes(self, in_features: int, out_features: int, codebook_itemsize: int = 2) -> int:
        """Bytes that a matrix of this shape stores: codes, codebooks and scales."""
        codes = in_features * self.code_bytes(out_features)
        values = self.num_blocks * self.num_clusters * self.group_size
        values += in_features * self.scale_in + out_features * self.scale_out
        return codes + values * codebook_itemsize

    def true_bits(self, in_features: int, out_features: int, codebook_itemsize: int = 2) -> float:
        """Bits per weight with everything counted: 8 · bytes(codes + codebooks + scales) / (in · out)."""
        return 8 * self.num_bytes(in_features, out_features, codebook_itemsize) / (in_features * out_features)

    def to_dict(self) -> dict[str, int | bool]:
        """The fields that differ from their default, as JSON takes them."""
        optional = {"num_blocks": 1, "scale_in": False, "scale_out": False}
        return {key: value for key, value in asdict(self).items() if optional.get(key) != value}


def code_bits(num_clusters: int) -> int:
    """Bits of a code for `num_clusters` centroids: ceil(log2 n), at least 1."""
    return max(1, (num_clusters - 1).bit_length())


def num_groups(out_features: int, group_size: int) -> int:
    """Groups of an input channel: ceil(out / g)."""
    return -(-out_features // group_size)


def packed_width(groups: int, bits: int) -> int:
    """Bytes of one packed row of `groups` codes."""
    return -(-groups * bits // 8)


def group(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Cuts a weight [out, in] into vectors [in, ceil(out / g), g]; the last group is padded with zeros."""
    out_features, in_features = weight.shape
    groups = num_groups(out_features, group_size)
    transposed = F.pad(weight.t(), (0, groups * group_size - out_features))
    return transposed.reshape(in_features, groups, group_size)


def ungroup(vectors: torch.Tensor, out_features: int) -> torch.Tensor:
    """The inverse of [`group`]: vectors [in, groups, g] to a contiguous weight [out, in], padding cut off."""
    return vectors.reshape(vectors.shape[0], -1)[:, :out_features].t().contiguous()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes to `bits` bits each.

    Args:
        codes (`torch.Tensor`): [rows, groups], any integer dtype, values in [0, 2**bits).
        bits (`int`): 1 … 16.

    Returns:
        `torch.Tensor`: [rows, ceil(groups · bits / 8)], uint8, least significant bit first.

    Raises:
        ValueError: If `bits` or a code is out of range.
    """
    _check_bits(bits)
    codes = codes.to(torch.int32)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(
            f"codes must lie in [0, {2**bits}) to be packed to {bits} bits, got a range of "
            f"[{int(codes.min())}, {int(codes.max())}]."
        )
    rows, groups = codes.shape
    blocks = -(-groups // _CODES_PER_BLOCK)
    padded = F.pad(codes, (0, blocks * _CODES_PER_BLOCK - groups))
    padded = padded.view(rows, blocks, _CODES_PER_BLOCK)
    packed = torch.zeros(rows, blocks, bits, dtype=torch.int32, device=codes.device)
    for k in range(_CODES_PER_BLOCK):
        first, shift = divmod(k * bits, 8)
        shifted = padded[..., k] << shift
        for j in range(first, (k * bits + bits - 1) // 8 + 1):
            packed[..., j] |= (shifted >> (8 * (j - first))) & 0xFF
    return packed.to(torch.uint8).view(rows, blocks * bits)[:, : packed_width(groups, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """The inverse of [`pack`]: [rows, width] uint8 to codes [rows, groups], int32.

    Raises:
        ValueError: If `bits` is out of range or the width does not belong to `groups` codes of `bits` bits.
    """
    _check_bits(bits)
    rows, width = packed.shape
    if width != packed_width(groups, bits):
        raise ValueError(
            f"{groups} codes of {bits} bits take {packed_width(groups, bits)} bytes a row, but the packed codes have "
            f"{width}; they belong to another group_size or num_clusters."
        )
    if bits == 8:
        return packed.to(torch.int32)
    blocks = -(-groups // _CODES_PER_BLOCK)
    padded = F.pad(packed, (0, blocks * bits - width)).view(rows, blocks, bits)
    codes = torch.empty(rows, blocks, _CODES_PER_BLOCK, dtype=torch.int32, device=packed.device)
    mask = 2**bits - 1
    for k in range(_CODES_PER_BLOCK):
        first, shift = divmod(k * bits, 8)
        value = padded[..., first].to(torch.int32)
        for j in range(first + 1, (k * bits + bits - 1) // 8 + 1):
            value |= padded[..., j].to(torch.int32) << (8 * (j - first))
        torch.bitwise_and(value >> shift, mask, out=codes[..., k])
    return codes.view(rows, blocks * _CODES_PER_BLOCK)[:, :groups]


def block_offsets(in_features: int, num_blocks: int, num_clusters: int, device: torch.device) -> torch.Tensor:
    """What to add to the codes of each input channel to index codebooks laid end to end: [in], int32."""
    channels = torch.arange(in_features, device=device, dtype=torch.int64)
    return ((channels * num_blocks) // in_features * num_clusters).to(torch.int32)


def fingerprint(packed: torch.Tensor, out_features: int, spec: ClusterSpec) -> str:
    """Digest of the codes [in, width] of one matrix, 32 hexadecimal digits; codebook and scales do not enter."""
    digest = hashlib.sha256(repr((packed.shape[0], out_features, spec.group_size, spec.num_clusters)).encode())
    digest.update(memoryview(packed.detach().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()[:32]


def checksum(packed: torch.Tensor) -> tuple[int, ...]:
    """Numbers that any change of the codes changes, made where they are and faster than [`fingerprint`].

    A weighted sum of all words of eight bytes, modulo 2**64, and the bytes that are left. The weights are odd, so that
    no flipped bit goes unnoticed, and rise, so that no exchange of two words of a block does.
    """
    flat = packed.detach().contiguous().view(-1)
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    whole = flat.numel() // 8 * 8
    words, block = flat[:whole].view(torch.int64), _WORDS[packed.device.type == "cpu"]
    weights = 2 * torch.arange(min(block, words.numel()), device=packed.device) + 1
    sums = [(part * weights[: part.numel()]).sum() for part in words.split(block)]
    total = 0
    for value in torch.stack(sums).tolist() if sums else ():
        total = (total * 1_000_003 + value) % 2**64
    return total, *flat[whole:].tolist()


def value_fingerprint(tensors: Iterable[torch.Tensor | None]) -> str:
    """Digest of floating-point tensors, in order, whatever their dtype; None are passed over."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            continue
        digest.update(memoryview(tensor.detach().cpu().float().contiguous().numpy()).cast("B"))
    return digest.hexdigest()[:32]


def combine_fingerprints(fingerprints: Iterable[str | None]) -> str | None:
    """Digest of the digests of several matrices, in order; None if one of them is not known."""
    known = list(fingerprints)
    return None if None in known else hashlib.sha256(" ".join(map(str, known)).encode()).hexdigest()[:32]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_CODE_BITS:
        raise ValueError(f"a code has 1 to {MAX_CODE_BITS} bits, got {bits}.")
