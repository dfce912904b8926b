"""Kernels for codebooks that fit into a multiprocessor's shared memory, in CUDA C++: `kernels/*.cu`.

A gather from shared memory takes a fraction of one through L1, and few tokens are multiplied by tensor cores while
the weights are in registers. Each function says by None that it does not take a case; `cuda.py` then asks Triton's.

    linear     up to 64 tokens in bf16 or fp16. Scales of the inputs are multiplied into x, which is rounded again, and
               those of the outputs into the sums; so few tokens of a scaled matrix see weights that are not rounded.
    decode     the reference's weight in bf16 or fp16, bit for bit.
    scatter    from G = dyᵀ x, which cuBLAS makes in strips that L2 holds, to the gradients of codebook and scales.

What tiles and copies a case gets follows from shapes and the device alone, as in `triton_tuning.py`.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..codes import code_bits, num_groups
from . import nvrtc

__all__ = ["MAX_TOKENS", "codebook_grad", "decode", "effective", "effective_backward", "linear"]

MAX_TOKENS = 64
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_WARPS = 8
_STAGES = 4  # units of codes that are on their way from memory at once
_MAX_WORDS = 8  # of an entry of the table
_COPIES_BYTES = 64 << 10  # that copies of a table may take
_STRIP_BYTES = 24 << 20  # of G, which L2 should hold
_ACCUMULATORS = 96  # registers of a thread for sums that leave room for the rest
_MOST_UNITS = 2**31
_SCRATCH = 128  # bytes of scatter.cu for sums over warps

_P, _I = ctypes.c_void_p, ctypes.c_int
_Plan = TypeVar("_Plan")


def _arguments(pointers: str, numbers: str) -> type[ctypes.Structure]:
    return nvrtc.launch_fields({**dict.fromkeys(pointers.split(), _P), **dict.fromkeys(numbers.split(), _I)})


_LINEAR = _arguments(
    "x packed codebook scale_in y",
    "tokens in_features width clusters blocks tiles units codebook_dtype scale_dtype",
)
_FINISH = _arguments("sums scale_out bias y", "tokens out_features blocks tiles units parts scale_dtype bias_dtype")
_DECODE = _arguments(
    "packed codebook scale_in scale_out weight",
    "in_features out_features groups width clusters blocks tiles units codebook_dtype scale_in_dtype scale_out_dtype",
)
_EFFECTIVE = _arguments(
    "codebook scale_in scale_out numbers numbers_in numbers_out units result result_in result_out",
    "size block finer inputs outputs",
)
_EFFECTIVE_BACKWARD = _arguments("grad grad_in grad_out scale_in scale_out units", "size inputs outputs")
_SCATTER = _arguments(
    "gradient packed codebook scale_in scale_out partial sums_in sums_out",
    "first_row rows share pieces rows_of_block in_features out_features groups width clusters codebook_dtype "
    "scale_in_dtype scale_out_dtype blocks add",
)


class _Case(NamedTuple):
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
            "TABLE": _DTYPES[kind],
            "COPIES": copies,
            "CLAMP": int(self.clusters < 2**self.bits),
            "CPL": codes_per_lane,
            "ALIGNED": int(self.aligned and codes_per_lane * self.bits % 32 == 0),
        }


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor | None:
    """y [tokens, out] for x [tokens, in], both contiguous; the arguments of `cluscomp_peft.ops.linear`."""
    tokens = x.shape[0]
    if tokens > MAX_TOKENS or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    if x.dtype == torch.float16 and scale_in is not None:  # x times a scale may leave fp16's range
        return None
    case = _case(x.dtype, codes, codebook, scale_in, scale_out, out_features)
    plan = _planned(_plan_linear, case, tokens)
    if plan is None:
        return None
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    sums = torch.empty(plan.slots, tokens, plan.outputs, dtype=torch.float32, device=x.device)
    at = sums.data_ptr()
    plan.multiply(
        (plan.parts, 1), 32 * _WARPS, plan.shared,
        x.data_ptr(), codes.data_ptr(), codebook.data_ptr(), _pointer(scale_in), at,
        tokens, case.in_features, codes.shape[1], case.clusters, case.blocks, plan.tiles, plan.units,
        _DTYPES[codebook.dtype], _kind(scale_in),
    )  # fmt: skip
    plan.finish(
        (-(-tokens * out_features // 256), 1), 256, 0,
        at, _pointer(scale_out), _pointer(bias), y.data_ptr(),
        tokens, out_features, case.blocks, plan.tiles, plan.units, plan.parts, _kind(scale_out), _kind(bias),
    )  # fmt: skip
    return y


class _LinearPlan(NamedTuple):
    multiply: nvrtc.Function
    finish: nvrtc.Function
    tiles: int
    units: int
    parts: int
    slots: int
    outputs: int
    shared: int


def _plan_linear(case: _Case, tokens: int) -> _LinearPlan | None:
    group_size, wide = case.group_size, 1 << (-(-tokens // 8) - 1).bit_length()
    each = [k for k in (8, 4, 2) if 2 * k * group_size * wide <= (_ACCUMULATORS if k > 2 else _ACCUMULATORS * 4 // 3)]
    words = -(-group_size // 2)
    if not each or words > _MAX_WORDS:
        return None
    per_lane, scaled = each[0], case.scales[0]
    macros = case.table(case.dtype, 1, per_lane)
    unit = _WARPS * 16
    pieces = -(-per_lane * case.bits // 16) if macros["ALIGNED"] else (per_lane * case.bits + 30) // 16
    stage = 4 * _WARPS * (16 * (4 * pieces + (0 if pieces % 2 else 4)) + tokens * 12 + 16 * scaled)
    sums = 4 * _WARPS * min(tokens, 8) * (per_lane * group_size * 8 + 4)
    room = _shared_memory(case.device) - sums - 16
    copies = _copies(words, case, room - _STAGES * stage)
    if copies == 0:
        return None
    shared = -(-_table_bytes(words, case.clusters, copies) // 16) * 16 + _STAGES * stage + sums
    macros |= {
        "COPIES": copies, "NT": wide, "WK": _WARPS, "STAGES": _STAGES, "SCALED": int(scaled), "ONE": int(tokens == 1)
    }  # fmt: skip
    multiply = _function("linear", "table_linear", macros, _LINEAR, case.device, _shared_memory(case.device))
    finish = _function("linear", "finish", macros, _FINISH, case.device, 0)
    tiles, units = -(-case.groups // (8 * per_lane)), -(-case.channels // unit)
    total = case.blocks * tiles * units
    parts = min(total, _processors(case.device) * min(2, multiply.occupancy(32 * _WARPS, shared)))
    if max(total * (parts + 1), case.in_features * case.groups * case.bits // 8) >= _MOST_UNITS - (1 << 20):
        return None
    outputs = 8 * per_lane * group_size
    return _LinearPlan(multiply, finish, tiles, units, parts, parts + case.blocks * tiles, outputs, shared)


def decode(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The weight [out, in] in `dtype`; the arguments of `cluscomp_peft.ops.decode`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    case = _case(dtype, codes, codebook, scale_in, scale_out, out_features)
    plan = _planned(_plan_decode, case)
    if plan is None:
        return None
    weight = torch.empty(out_features, case.in_features, dtype=dtype, device=codes.device)
    plan.write(
        (plan.parts, 1), 32 * _WARPS, plan.shared,
        codes.data_ptr(), codebook.data_ptr(), _pointer(scale_in), _pointer(scale_out), weight.data_ptr(),
        case.in_features, out_features, plan.groups, codes.shape[1], case.clusters, case.blocks, plan.tiles,
        plan.units, _DTYPES[codebook.dtype], _kind(scale_in), _kind(scale_out),
    )  # fmt: skip
    return weight


class _DecodePlan(NamedTuple):
    write: nvrtc.Function
    groups: int
    tiles: int
    units: int
    parts: int
    shared: int


def _plan_decode(case: _Case) -> _DecodePlan | None:
    scaled = any(case.scales)
    kind = case.codebook_dtype if scaled else case.dtype
    words = case.group_size if kind == torch.float32 else -(-case.group_size // 2)
    if words > _MAX_WORDS or case.in_features % (4 * case.blocks):
        return None
    per_lane = 8 if case.group_size <= 4 else 4
    steps = 4 if case.channels >= 2048 else 1
    room = _shared_memory(case.device) - 16
    # Several blocks of threads on a processor hide latency better than copies avoid collisions.
    copies = _copies(words, case, min(room, max(_table_bytes(words, case.clusters, 1), room // 4)))
    if copies == 0:
        return None
    shared = _table_bytes(words, case.clusters, copies)
    tiles, units = -(-case.groups // (8 * per_lane)), -(-case.channels // (_WARPS * steps * 16))
    macros = case.table(kind, copies, per_lane) | {
        "WEIGHT": _DTYPES[case.dtype], "WK": _WARPS, "STEPS": steps, "SCALED": int(scaled)
    }  # fmt: skip
    write = _function("decode", "table_decode", macros, _DECODE, case.device, _shared_memory(case.device))
    total = case.blocks * tiles * units
    parts = min(total, _processors(case.device) * min(4, write.occupancy(32 * _WARPS, shared)))
    if total * (parts + 1) >= _MOST_UNITS:
        return None
    return _DecodePlan(write, case.groups, tiles, units, parts, shared)


def codebook_grad(
    x: torch.Tensor,
    grad_output: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Gradients as `cluscomp_peft.ops.codebook_grad` gives them, for x and grad_output of one dtype."""
    case = _case(x.dtype, codes, codebook, scale_in, scale_out, grad_output.shape[1])
    plan = _planned(_plan_scatter, case)
    if plan is None:
        return None
    device, out_features, columns, threads = x.device, case.out_features, plan.columns, plan.threads
    lanes = columns * threads // 32 if scale_in is not None else 0
    sums_in = torch.empty(case.in_features, lanes, device=device)
    total = torch.empty(case.blocks, case.group_size, case.clusters, device=device)
    total_out = torch.zeros(out_features if scale_out is not None else 0, device=device)
    for strip in plan.strips:
        gradient = _product(x[:, strip.row : strip.row + strip.rows].t(), grad_output)
        if not strip.add:
            shape = (strip.blocks, strip.pieces * columns, case.group_size, case.clusters)
            partial = torch.empty(shape, device=device)
            sums_out = torch.empty(strip.blocks * strip.pieces, len(total_out), device=device)
        plan.scatter(
            (columns, strip.blocks * strip.pieces), threads, plan.shared,
            gradient.data_ptr(), codes.data_ptr(), codebook.data_ptr(), _pointer(scale_in), _pointer(scale_out),
            partial.data_ptr(), sums_in.data_ptr(), sums_out.data_ptr(),
            strip.row, strip.rows, strip.share, strip.pieces, strip.rows // strip.blocks, case.in_features,
            out_features, case.groups, codes.shape[1], case.clusters, _DTYPES[codebook.dtype], _kind(scale_in),
            _kind(scale_out), case.blocks, strip.add,
        )  # fmt: skip
        if strip.last:
            torch.sum(partial, 1, out=total[strip.block : strip.block + strip.blocks])
            if scale_out is not None:
                total_out += sums_out.sum(0)
    grad_codebook = total.transpose(1, 2).contiguous()
    return grad_codebook, sums_in.sum(1) if scale_in is not None else sums_in.view(0), total_out


class _Strip(NamedTuple):
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


class _ScatterPlan(NamedTuple):
    scatter: nvrtc.Function
    strips: tuple[_Strip, ...]
    columns: int
    threads: int
    shared: int


def _plan_scatter(case: _Case) -> _ScatterPlan | None:
    if case.in_features % case.blocks or case.group_size > 16:
        return None
    scaled = any(case.scales)
    entry = 4 * case.group_size
    table = _table_bytes(case.group_size, case.clusters, 1) if scaled else 0
    shared = -(-(_SCRATCH + case.clusters * entry) // 16) * 16 + table
    if shared > _shared_memory(case.device):
        return None
    threads = 1024 if case.groups > 768 else 512 if case.groups > 256 else 256
    columns = -(-case.groups // threads)
    most = max(1, _STRIP_BYTES // (4 * case.out_features))
    together = min(case.blocks, most // case.channels)
    ranges: list[tuple[int, int, int, int]] = []  # row, rows, block, blocks
    if together > 0:
        for block in range(0, case.blocks, together):
            count = min(together, case.blocks - block)
            ranges.append((block * case.channels, count * case.channels, block, count))
    else:
        size = -(-case.channels // -(-case.channels // most))
        size = -(-size // 64) * 64
        for block in range(case.blocks):
            for row in range(0, case.channels, size):
                ranges.append((block * case.channels + row, min(size, case.channels - row), block, 1))
    macros = case.table(torch.float32, 1, 1) | {"ALIGNED": 0, "THREADS": threads, "SCALED": int(scaled)}
    scatter = _function("scatter", "scatter", macros, _SCATTER, case.device, _shared_memory(case.device))
    room = _processors(case.device) * min(2048 // threads, scatter.occupancy(threads, shared))
    strips = []
    for row, rows, block, count in ranges:
        first = row % case.channels == 0
        if first:  # as many pieces in all strips of a codebook, for their sums go to the same places
            pieces = max(1, min(rows // count // 16, room // (columns * count)))
        share = -(-(rows // count) // pieces)
        last = row + rows == (block + count) * case.channels
        strips.append(_Strip(row, rows, block, count, pieces, share, not first, last))
    return _ScatterPlan(scatter, tuple(strips), columns, threads, shared)


def effective(
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    numbers: torch.Tensor,
    numbers_in: torch.Tensor | None,
    numbers_out: torch.Tensor | None,
    units: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """Codebook and scales with an adapter, as `direct.py` says, in one launch."""
    if not _alike(torch.float32, numbers, numbers_in, numbers_out, units) or not _alike(
        codebook.dtype, codebook, scale_in, scale_out
    ):
        return None
    plan = _planned(_plan_effective, codebook.device.index, codebook.dtype)
    if plan is None:
        return None
    present, clusters, group_size = codebook.shape
    size, block = numbers.numel(), clusters * group_size
    result = codebook.new_empty(size // block, clusters, group_size)
    results = [scale if change is None else torch.empty_like(change, dtype=codebook.dtype)
               for scale, change in ((scale_in, numbers_in), (scale_out, numbers_out))]  # fmt: skip
    inputs, outputs = (0 if part is None else len(part) for part in (numbers_in, numbers_out))
    plan[0](
        (-(-(size + inputs + outputs) // 256), 1), 256, 0,
        codebook.data_ptr(), _pointer(scale_in), _pointer(scale_out), numbers.data_ptr(), _pointer(numbers_in),
        _pointer(numbers_out), units.data_ptr(), result.data_ptr(), _pointer(results[0]), _pointer(results[1]),
        size, block, size // block // present, inputs, outputs,
    )  # fmt: skip
    return result, results[0], results[1]


def effective_backward(
    grads: Sequence[torch.Tensor],
    codebook_dtype: torch.dtype,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    units: torch.Tensor,
    trained: tuple[bool, bool],
) -> bool:
    """Turns gradients of the sum into those of the numbers, in place; False if nothing was done.

    `trained`: whether there are numbers for the scales of inputs, of outputs.
    """
    if not _alike(torch.float32, *grads, units) or not _alike(codebook_dtype, scale_in, scale_out):
        return False
    plan = _planned(_plan_effective, units.device.index, codebook_dtype)
    if plan is None:
        return False
    size = grads[0].numel()
    inputs, outputs = (len(grad) if wanted else 0 for grad, wanted in zip(grads[1:], trained, strict=True))
    plan[1](
        (-(-(size + inputs + outputs) // 256), 1), 256, 0,
        *(grad.data_ptr() for grad in grads), _pointer(scale_in), _pointer(scale_out), units.data_ptr(),
        size, inputs, outputs,
    )  # fmt: skip
    return True


def _plan_effective(device: int, dtype: torch.dtype) -> tuple[nvrtc.Function, nvrtc.Function]:
    macros = {"DTYPE": _DTYPES[dtype]}
    return (
        _function("effective", "effective", macros, _EFFECTIVE, device, 0),
        _function("effective", "effective_backward", macros, _EFFECTIVE_BACKWARD, device, 0),
    )


def _alike(dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether all are contiguous and of a dtype that the kernels read."""
    given = [tensor for tensor in tensors if tensor is not None]
    return dtype in _DTYPES and all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in given)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in fp32, whatever their dtype."""
    with torch.autocast("cuda", enabled=False):
        if left.dtype == torch.float32:
            return left @ right
        return torch.mm(left, right, out_dtype=torch.float32)


def _case(
    dtype: torch.dtype,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale_in: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    out_features: int,
) -> _Case:
    blocks, clusters, group_size = codebook.shape
    aligned = codes.shape[1] % 16 == 0 and codes.data_ptr() % 16 == 0
    return _Case(
        codes.device.index, dtype, codes.shape[0], out_features, blocks, clusters, group_size, codebook.dtype,
        (scale_in is not None, scale_out is not None), aligned,
    )  # fmt: skip


def _copies(words: int, case: _Case, room: int) -> int:
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


def _planned(planner: Callable[..., _Plan | None], *key: Any) -> _Plan | None:
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


def _function(
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


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _kind(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else _DTYPES[tensor.dtype]
