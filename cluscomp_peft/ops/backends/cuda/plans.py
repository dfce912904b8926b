"""Which kernels of `kernels/*.cu` serve a case, with what tiles, and in how many parts.

Everything follows from shapes, dtypes and the device, as in `triton_tuning.py`: a case always adds up in one order.
A plan is made once and remembered, with its compiled kernels; None where the kernels do not take the case.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ....codes import code_bits, num_groups
from ...packed_weight import PackedWeight
from . import nvrtc

__all__ = [
    "DTYPES",
    "MAX_TOKENS",
    "WARPS",
    "Case",
    "LinearPlan",
    "ScatterPlan",
    "Strip",
    "arguments",
    "function",
    "kind",
    "plan_linear",
    "plan_scatter",
    "planned",
    "pointer",
]

MAX_TOKENS = 64
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WARPS = 8
_STAGES = 4  # units of codes that are on their way from memory at once
_MAX_WORDS = 8  # of an entry of the table
_COPIES_BYTES = 64 << 10  # that copies of a table may take
_STRIP_BYTES = 24 << 20  # of G, which L2 should hold
_ACCUMULATORS = 96  # registers of a thread for sums that leave room for the rest
_MOST_UNITS = 2**31
_SCRATCH = 128  # bytes of scatter.cu for sums over warps

_P, _I = ctypes.c_void_p, ctypes.c_int
_Plan = TypeVar("_Plan")


def arguments(pointers: str, numbers: str) -> type[ctypes.Structure]:
    return nvrtc.launch_fields({**dict.fromkeys(pointers.split(), _P), **dict.fromkeys(numbers.split(), _I)})


_LINEAR = arguments(
    "x packed codebook scale_in y",
    "tokens in_features width clusters blocks tiles units codebook_dtype scale_dtype",
)
_FINISH = arguments("sums scale_out bias y", "tokens out_features blocks tiles units parts scale_dtype bias_dtype")
_SCATTER = arguments(
    "gradient packed codebook scale_in scale_out partial sums_in sums_out",
    "first_row rows share pieces first_block in_features out_features groups width clusters codebook_dtype "
    "scale_in_dtype scale_out_dtype blocks add",
)


class Case(NamedTuple):
    """What the choice of a kernel depends on.

    Args:
        device (`int`): Index of the CUDA device.
        dtype (`torch.dtype`): Of x.
        scales: Whether there are scales of the inputs, of the outputs.
        aligned (`bool`): Whether rows of codes begin at multiples of 16 bytes.
    """

    device: int
    dtype: torch.dtype
    in_features: int
    out_features: int
    num_blocks: int
    num_clusters: int
    group_size: int
    codebook_dtype: torch.dtype
    scales: tuple[bool, bool]
    aligned: bool

    @classmethod
    def of(cls, weight: PackedWeight, dtype: torch.dtype) -> Case:
        """For a weight on a CUDA device and x in `dtype`."""
        codes, codebook, out_features, scale_in, scale_out, _ = weight
        aligned = codes.shape[1] % 16 == 0 and codes.data_ptr() % 16 == 0
        scales = (scale_in is not None, scale_out is not None)
        blocks, clusters, group_size = codebook.shape
        return cls(
            codes.device.index, dtype, codes.shape[0], out_features, blocks, clusters, group_size, codebook.dtype,
            scales, aligned,
        )  # fmt: skip

    @property
    def code_bits(self) -> int:
        return code_bits(self.num_clusters)

    @property
    def num_groups(self) -> int:
        return num_groups(self.out_features, self.group_size)

    @property
    def channels(self) -> int:
        """Input channels that share a codebook, at most."""
        return -(-self.in_features // self.num_blocks)

    def table(self, kind: torch.dtype, copies: int, codes_per_lane: int) -> dict[str, int]:
        """The macros of table.cuh."""
        return {
            "G": self.group_size,
            "B": self.code_bits,
            "TABLE": DTYPES[kind],
            "COPIES": copies,
            "CLAMP": int(self.num_clusters < 2**self.code_bits),
            "CPL": codes_per_lane,
            "ALIGNED": int(self.aligned and codes_per_lane * self.code_bits % 32 == 0),
        }


class LinearPlan(NamedTuple):
    multiply: nvrtc.Function
    finish: nvrtc.Function
    tiles: int
    units: int
    parts: int
    slots: int
    outputs: int
    shared: int


class _Shared(NamedTuple):
    """Bytes of shared memory of `table_linear`, for `per_lane` codes of a lane: see linear.cu."""

    per_lane: int
    stages: int
    copies: int
    total: int


def plan_linear(case: Case, tokens: int) -> LinearPlan | None:
    """The plan for x [tokens, in]; None if the table does not fit beside the sums, however small these are made."""
    wide = 1 << (-(-tokens // 8) - 1).bit_length()
    shared = _share_memory(case, tokens, wide)
    if shared is None:
        return None
    per_lane, unit = shared.per_lane, WARPS * 16
    macros = case.table(case.dtype, shared.copies, per_lane) | {
        "NT": wide,
        "WK": WARPS,
        "STAGES": shared.stages,
        "SCALED": int(case.scales[0]),
        "ONE": int(tokens == 1),
    }
    multiply = function("linear", "table_linear", macros, _LINEAR, case.device, _shared_memory(case.device))
    finish = function("linear", "finish", macros, _FINISH, case.device, 0)
    tiles, units = -(-case.num_groups // (8 * per_lane)), -(-case.channels // unit)
    total = case.num_blocks * tiles * units
    parts = min(total, _processors(case.device) * min(2, multiply.occupancy(32 * WARPS, shared.total)))
    if max(total * (parts + 1), case.in_features * case.num_groups * case.code_bits // 8) >= _MOST_UNITS - (1 << 20):
        return None
    outputs = 8 * per_lane * case.group_size
    return LinearPlan(multiply, finish, tiles, units, parts, parts + case.num_blocks * tiles, outputs, shared.total)


def _share_memory(case: Case, tokens: int, wide: int) -> _Shared | None:
    """The most codes for a lane whose sums fit into registers, and the most stages that fit into shared memory beside
    the table; fewer codes where no two stages fit. None if nothing fits."""
    words = -(-case.group_size // 2)
    if words > _MAX_WORDS:
        return None
    for per_lane in (8, 4, 2):
        if 2 * per_lane * case.group_size * wide > (_ACCUMULATORS if per_lane > 2 else _ACCUMULATORS * 4 // 3):
            continue
        aligned = case.table(case.dtype, 1, per_lane)["ALIGNED"]
        pieces = -(-per_lane * case.code_bits // 16) if aligned else (per_lane * case.code_bits + 30) // 16
        stage = 4 * WARPS * (16 * (4 * pieces + (0 if pieces % 2 else 4)) + tokens * 12 + 16 * case.scales[0])
        sums = 4 * WARPS * min(tokens, 8) * (per_lane * case.group_size * 8 + 4)
        room = _shared_memory(case.device) - sums - 16
        for stages in range(_STAGES, 1, -1):
            if copies := _copies(words, case, room - stages * stage):
                table = -(-_table_bytes(words, case.num_clusters, copies) // 16) * 16
                return _Shared(per_lane, stages, copies, table + stages * stage + sums)
    return None


class Strip(NamedTuple):
    """Input channels [row, row + rows): whole codebooks from `block` on, or a part of one; each cut into pieces.

    `add`: sums go to those of the strip before. `last`: of its codebooks.
    """

    row: int
    rows: int
    block: int
    blocks: int
    pieces: int
    share: int
    add: bool
    last: bool


class ScatterPlan(NamedTuple):
    scatter: nvrtc.Function
    strips: tuple[Strip, ...]
    columns: int
    threads: int
    shared: int


def plan_scatter(case: Case) -> ScatterPlan | None:
    if case.group_size > 16:
        return None
    scaled = any(case.scales)
    entry = 4 * case.group_size
    table = _table_bytes(case.group_size, case.num_clusters, 1) if scaled else 0
    shared = -(-(_SCRATCH + case.num_clusters * entry) // 16) * 16 + table
    if shared > _shared_memory(case.device):
        return None
    threads = 1024 if case.num_groups > 768 else 512 if case.num_groups > 256 else 256
    columns = -(-case.num_groups // threads)
    macros = case.table(torch.float32, 1, 1) | {"ALIGNED": 0, "THREADS": threads, "SCALED": int(scaled)}
    scatter = function("scatter", "scatter", macros, _SCATTER, case.device, _shared_memory(case.device))
    room = _processors(case.device) * min(2048 // threads, scatter.occupancy(threads, shared))
    most = max(1, _STRIP_BYTES // (4 * case.out_features))
    starts = [-(-block * case.in_features // case.num_blocks) for block in range(case.num_blocks + 1)]
    together = max(1, min(case.num_blocks, most // case.channels))
    strips = []
    for block in range(0, case.num_blocks, together):
        count = min(together, case.num_blocks - block)
        start, stop = starts[block], starts[block + count]
        size = stop - start
        if case.channels > most:  # a codebook at a time, in parts that differ little
            size = -(-size // -(-size // most))
            size = -(-size // 64) * 64
        # As many pieces in all strips of a codebook, for their sums go to the same places.
        rows = min(size, case.channels)
        pieces = max(1, min(rows // 16, room // (columns * count)))
        for row in range(start, stop, size):
            end = min(row + size, stop)
            strips.append(Strip(row, end - row, block, count, pieces, -(-rows // pieces), row > start, end == stop))
    return ScatterPlan(scatter, tuple(strips), columns, threads, shared)


def _copies(words: int, case: Case, room: int) -> int:
    """Copies of a table of `words` words an entry; 0 if it does not fit into `room` bytes at all."""
    together = 32 if words == 1 else 16 if words <= 3 else 8  # lanes that shared memory serves at once
    room = min(room, max(_table_bytes(words, case.num_clusters, 1), _COPIES_BYTES if case.num_blocks == 1 else 0))
    copies = together
    while copies and _table_bytes(words, case.num_clusters, copies) > room:
        copies //= 2
    return copies


def _table_bytes(words: int, clusters: int, copies: int) -> int:
    """As table.cuh lays it out."""
    stride = words if words <= 4 else 6 if words <= 6 else -(-words // 4) * 4
    return 4 * stride * clusters * copies


@functools.lru_cache(maxsize=4096)
def planned(planner: Callable[..., _Plan | None], *key: Any) -> _Plan | None:
    """The plan that `planner(*key)` makes, remembered; None if the kernels do not take the case. What it raises is not
    remembered."""
    return planner(*key)


@functools.cache
def _source(name: str) -> str:
    folder = Path(__file__).parent / "kernels"
    files = (f"{name}.cu",) if name == "effective" else ("table.cuh", f"{name}.cu")
    return "\n".join((folder / file).read_text(encoding="utf-8") for file in files)


def function(
    file: str, name: str, macros: dict[str, int], arguments: type[ctypes.Structure], device: int, shared: int
) -> nvrtc.Function:
    return _loaded(file, name, tuple(sorted(macros.items())), arguments, device, shared)


@functools.cache
def _loaded(
    file: str, name: str, macros: tuple, arguments: type[ctypes.Structure], device: int, shared: int
) -> nvrtc.Function:
    properties = torch.cuda.get_device_properties(device)
    code = nvrtc.compile_source(_source(file), dict(macros), (properties.major, properties.minor))
    return nvrtc.Function(code, name, arguments, torch.device("cuda", device), shared)


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes that a block of threads may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def kind(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else DTYPES[tensor.dtype]
