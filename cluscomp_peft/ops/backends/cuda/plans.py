"""Which kernels of `kernels/*.cu` serve a case, with what tiles, and in how many parts.

Everything follows from shapes, dtypes and the device, as in `triton_tuning.py`: a case always adds up in one order.
A plan is made once and remembered, with its compiled kernels. What cannot be compiled or does not fit has none.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ....codes import code_bits, num_groups
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
    """What the choice of a kernel depends on. `scales`: of inputs, of outputs."""

    device: int
    dtype: torch.dtype
    in_features: int
    out_features: int
    blocks: int
    clusters: int
    group_size: int
    codebook_dtype: torch.dtype
    scales: tuple[bool, bool]
    aligned: bool

    @property
    def bits(self) -> int:
        return code_bits(self.clusters)

    @property
    def groups(self) -> int:
        return num_groups(self.out_features, self.group_size)

    @property
    def channels(self) -> int:
        """Of a codebook, at most."""
        return -(-self.in_features // self.blocks)

    def table(self, kind: torch.dtype, copies: int, codes_per_lane: int) -> dict[str, int]:
        """The macros of table.cuh."""
        return {
            "G": self.group_size,
            "B": self.bits,
            "TABLE": DTYPES[kind],
            "COPIES": copies,
            "CLAMP": int(self.clusters < 2**self.bits),
            "CPL": codes_per_lane,
            "ALIGNED": int(self.aligned and codes_per_lane * self.bits % 32 == 0),
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


def plan_linear(case: Case, tokens: int) -> LinearPlan | None:
    group_size, wide = case.group_size, 1 << (-(-tokens // 8) - 1).bit_length()
    each = [k for k in (8, 4, 2) if 2 * k * group_size * wide <= (_ACCUMULATORS if k > 2 else _ACCUMULATORS * 4 // 3)]
    words = -(-group_size // 2)
    if not each or words > _MAX_WORDS:
        return None
    per_lane, scaled = each[0], case.scales[0]
    macros = case.table(case.dtype, 1, per_lane)
    unit = WARPS * 16
    pieces = -(-per_lane * case.bits // 16) if macros["ALIGNED"] else (per_lane * case.bits + 30) // 16
    stage = 4 * WARPS * (16 * (4 * pieces + (0 if pieces % 2 else 4)) + tokens * 12 + 16 * scaled)
    sums = 4 * WARPS * min(tokens, 8) * (per_lane * group_size * 8 + 4)
    room = _shared_memory(case.device) - sums - 16
    for stages in range(_STAGES, 1, -1):  # a large table leaves room for fewer
        copies = _copies(words, case, room - stages * stage)
        if copies:
            break
    else:
        return None
    shared = -(-_table_bytes(words, case.clusters, copies) // 16) * 16 + stages * stage + sums
    macros |= {
        "COPIES": copies, "NT": wide, "WK": WARPS, "STAGES": stages, "SCALED": int(scaled), "ONE": int(tokens == 1)
    }  # fmt: skip
    multiply = function("linear", "table_linear", macros, _LINEAR, case.device, _shared_memory(case.device))
    finish = function("linear", "finish", macros, _FINISH, case.device, 0)
    tiles, units = -(-case.groups // (8 * per_lane)), -(-case.channels // unit)
    total = case.blocks * tiles * units
    parts = min(total, _processors(case.device) * min(2, multiply.occupancy(32 * WARPS, shared)))
    if max(total * (parts + 1), case.in_features * case.groups * case.bits // 8) >= _MOST_UNITS - (1 << 20):
        return None
    outputs = 8 * per_lane * group_size
    return LinearPlan(multiply, finish, tiles, units, parts, parts + case.blocks * tiles, outputs, shared)


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
    table = _table_bytes(case.group_size, case.clusters, 1) if scaled else 0
    shared = -(-(_SCRATCH + case.clusters * entry) // 16) * 16 + table
    if shared > _shared_memory(case.device):
        return None
    threads = 1024 if case.groups > 768 else 512 if case.groups > 256 else 256
    columns = -(-case.groups // threads)
    macros = case.table(torch.float32, 1, 1) | {"ALIGNED": 0, "THREADS": threads, "SCALED": int(scaled)}
    scatter = function("scatter", "scatter", macros, _SCATTER, case.device, _shared_memory(case.device))
    room = _processors(case.device) * min(2048 // threads, scatter.occupancy(threads, shared))
    most = max(1, _STRIP_BYTES // (4 * case.out_features))
    starts = [-(-block * case.in_features // case.blocks) for block in range(case.blocks + 1)]
    together = max(1, min(case.blocks, most // case.channels))
    strips = []
    for block in range(0, case.blocks, together):
        count = min(together, case.blocks - block)
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
    room = min(room, max(_table_bytes(words, case.clusters, 1), _COPIES_BYTES if case.blocks == 1 else 0))
    copies = together
    while copies and _table_bytes(words, case.clusters, copies) > room:
        copies //= 2
    return copies


def _table_bytes(words: int, clusters: int, copies: int) -> int:
    """As table.cuh lays it out."""
    stride = words if words <= 4 else 6 if words <= 6 else -(-words // 4) * 4
    return 4 * stride * clusters * copies


_failed: set[tuple] = set()


def planned(planner: Callable[..., _Plan | None], *key: Any) -> _Plan | None:
    """The plan of a case, remembered; None if it has none or cannot be compiled, which is said once."""
    try:
        return _remembered(planner, key)
    except Exception as error:
        # Memory may be free another time, and outside of a capture loading works.
        if not isinstance(error, nvrtc.TransientError):
            _failed.add((planner, key))
            _remembered.cache_clear()
        _warn(str(error))
        return None


@functools.lru_cache(maxsize=4096)
def _remembered(planner: Callable[..., _Plan | None], key: tuple) -> _Plan | None:
    return None if (planner, key) in _failed else planner(*key)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"the CUDA kernels for small codebooks cannot be had ({reason:.300}); Triton's serve instead, slower.",
        stacklevel=2,
    )


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
