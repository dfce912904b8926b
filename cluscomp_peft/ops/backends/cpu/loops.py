# mypy: ignore-errors
# Builders of LLVM instructions are typed by what they build, which mypy does not see.
"""Loops of the CPU backend that are made at run time, for the b and g of a matrix: one token needs every instruction.

How long a row of the table is decides how it is read:

    bf16, g = 3     [ w w w · ]  8 bytes: eight of them in one instruction where the machine gathers
    fp32, g = 3     [ w w w · ]  16 bytes: one by one, as an operand of the multiplication
"""

from __future__ import annotations

import functools

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir import FLOAT, LANES, LONG, VOID, WIDTH, WORD, broadcast, load, loop_phi, multiply_add, pointer, rows_begin

__all__ = ["call_token_loop", "table_loop", "takes_bf16", "token_loop"]


@intrinsic
def call_token_loop(context, function, codes, step, rows, x, x_step, table, sums):
    """Calls what [`token_loop`] made."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(VOID, [LONG] * 7)
        builder.call(pointer(builder, args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


def _gather_rows(builder: ir.IRBuilder, codes: ir.Value, table: ir.Value, bits: int, row_bytes: int) -> ir.Value:
    """The table rows of a chunk of eight codes, 4 or 8 bytes each, side by side in one register."""
    longs = ir.VectorType(LONG, 8)
    item = FLOAT if row_bytes == 4 else ir.DoubleType()
    items, mask = ir.VectorType(item, 8), ir.VectorType(ir.IntType(1), 8)
    skipped, shift = divmod(4 * bits, 8) if bits > 8 else (0, 4 * bits)
    word = broadcast(builder, load(builder, codes, LONG, align=1), 8)
    if bits > 8:
        other = broadcast(builder, load(builder, codes, LONG, skipped, align=1), 8)
        word = builder.shuffle_vector(word, other, ir.Constant(ir.VectorType(WORD, 8), [0, 1, 2, 3, 12, 13, 14, 15]))
    shifts = ir.Constant(longs, [k * bits for k in range(4)] + [shift + k * bits for k in range(4)])
    entries = builder.and_(builder.lshr(word, shifts), ir.Constant(longs, [2**bits - 1] * 8))
    name = f"llvm.x86.avx512.mask.gather.q{'ps' if row_bytes == 4 else 'pd'}.512"
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(items, [items, byte, longs, mask, WORD]), name
    )
    start, every = ir.Constant(items, [0.0] * 8), ir.Constant(mask, [1] * 8)
    return builder.call(function, [start, builder.inttoptr(table, byte), entries, every, ir.Constant(WORD, row_bytes)])


def _widened(builder: ir.IRBuilder, rows: ir.Value) -> list[ir.Value]:
    """The even and the odd of 32 bf16 numbers as floats."""
    words = ir.VectorType(WORD, WIDTH)
    rows = builder.bitcast(rows, words)
    even = builder.shl(rows, ir.Constant(words, [16] * WIDTH))
    odd = builder.and_(rows, ir.Constant(words, [0xFFFF0000] * WIDTH))
    return [builder.bitcast(part, LANES) for part in (even, odd)]


def _shuffled(builder: ir.IRBuilder, values: list[ir.Value], tokens: int, masks: list) -> list[ir.Value]:
    """Two registers of each token, all first ones before all second ones, with their elements in another order."""
    pairs = list(zip(values[:tokens], values[tokens:], strict=True))
    kind = ir.VectorType(WORD, WIDTH)
    return [builder.shuffle_vector(*pair, ir.Constant(kind, list(mask))) for mask in masks for pair in pairs]


def _permute_rows(builder: ir.IRBuilder, codes: ir.Value, halves: list[ir.Value], bits: int) -> ir.Value:
    """The floats of a chunk of eight codes of up to four bits, from a table in two registers."""
    words = ir.VectorType(WORD, 8)
    word = broadcast(builder, load(builder, codes, WORD, align=1), 8)
    entries = builder.lshr(word, ir.Constant(words, [k * bits for k in range(8)]))
    entries = builder.and_(entries, ir.Constant(words, [2**bits - 1] * 8))
    kind = halves[0].type
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind, words, kind]), "llvm.x86.avx512.vpermi2var.ps.256"
    )
    return builder.call(function, [halves[0], entries, halves[1]])


@functools.cache
def takes_bf16(group: int) -> bool:
    """Whether [`token_loop`] reads tables in bf16: one instruction gathers eight rows of them, and of fp32 not."""
    return group in (3, 4) and binding.get_host_cpu_features().get("avx512f", False)


@functools.cache
def token_loop(bits: int, lanes: int, tokens: int, bf16: bool = False) -> tuple[int, int, object]:
    """The loop of up to four tokens over the input channels of one chunk of eight codes, made for b and padded g.

        f(codes, step, rows, x, x_step, table, sums):   sums[t, k, :] += Σ_r x[t, r] · table[code(r, k), :]   k = 0 … 7

    With b a constant, a code costs a shift, a mask and for each token a multiplication, the first of which reads the
    table; the sums of all eight codes, or of as many as fit, stay in registers. It compiles in some hundredths of a
    second, too little to keep it on disk.

    Args:
        bf16 (`bool`): Dtype of the table, otherwise fp32. For a g that [`takes_bf16`].

    Returns:
        The address, the floats between one sum and the next, and what keeps the code alive.
    """
    features = binding.get_host_cpu_features()
    gathers = bf16 or (lanes <= 2 and features.get("avx512f", False))
    permutes = lanes == 1 and bits <= 4 and gathers and features.get("avx512vl", False)
    # One instruction gathers eight short rows, or permutes a small table. Without it two lanes are read as four.
    width = lanes if gathers or lanes == 1 else max(4, lanes)
    vector = ir.VectorType(FLOAT, min(WIDTH, 8 * width) if gathers else width)
    module = ir.Module("cluscomp_token_loop")
    module.triple = binding.get_process_triple()
    function = ir.Function(module, ir.FunctionType(VOID, [LONG] * 7), "token_loop")
    codes, step, rows, x, x_step, table, sums = function.args
    fused = multiply_add(module, vector)
    builder = ir.IRBuilder(function.append_basic_block("head"))
    scale = (4 * lanes).bit_length() - 1
    mask = ir.Constant(LONG, (2**bits - 1) << scale)
    size = 8 if gathers else min(8, 16 * WIDTH // max(width, WIDTH) // (1 << (tokens - 1).bit_length()))
    parts = 8 * width // vector.count  # registers of all sums of a token
    xs = [x]
    for _ in range(1, tokens):
        xs.append(builder.add(xs[-1], x_step))
    halves = [load(builder, table, ir.VectorType(FLOAT, 8), offset) for offset in (0, 32)] if permutes else []
    # The hardware does not follow so many rows at once: fetch the channels that come after these.
    kind_of_fetch = ir.FunctionType(VOID, [ir.IntType(8).as_pointer(), WORD, WORD, WORD])
    fetch = cgutils.get_or_insert_function(module, kind_of_fetch, "llvm.prefetch.p0")
    stride = builder.mul(step, rows)
    for first in range(0, parts, parts * size // 8):
        places = [
            4 * vector.count * (parts * t + k) for k in range(first, first + parts * size // 8) for t in range(tokens)
        ]
        start = [load(builder, sums, vector, place) for place in places]
        if bf16:
            start = _shuffled(builder, start, tokens, [range(0, 32, 2), range(1, 32, 2)])
        count, where, kept, end = rows_begin(builder, codes, start)
        offset = builder.shl(count, ir.Constant(LONG, 2))
        factors = [broadcast(builder, load(builder, builder.add(x, offset), FLOAT), vector.count) for x in xs]
        words: dict[int, ir.Value] = {}
        values = []
        if permutes:
            values = [_permute_rows(builder, where, halves, bits)]
        elif gathers:
            rows_of_eight = _gather_rows(builder, where, table, bits, 4 if lanes == 1 else 8)
            values = _widened(builder, rows_of_eight) if bf16 else [builder.bitcast(rows_of_eight, vector)]
        for k in range(0 if gathers else size):
            # A word holds eight codes of up to 8 bits, or four of more.
            part = (first + k) // 4 if bits > 8 else 0
            skipped, shift = divmod(part * 4 * bits, 8)
            if part not in words:
                words[part] = load(builder, where, LONG, skipped, align=1)
            shift += (first + k - 4 * part) * bits - scale
            move = builder.lshr if shift >= 0 else builder.shl
            entry = builder.and_(move(words[part], ir.Constant(LONG, abs(shift))), mask)
            values.append(load(builder, builder.add(table, entry), vector))
        pairs = [(factor, value) for value in values for factor in factors]
        new = [builder.call(fused, [*pair, old]) for pair, old in zip(pairs, kept, strict=True)]
        if first == 0:
            ahead = builder.inttoptr(builder.add(where, stride), ir.IntType(8).as_pointer())
            builder.call(fetch, [ahead, *(ir.Constant(WORD, value) for value in (0, 2, 1))])
        end(step, rows, new)
        if bf16:
            new = _shuffled(
                builder, new, tokens, [[k // 2 + k % 2 * 16 for k in part] for part in (range(16), range(16, 32))]
            )
        for value, place in zip(new, places, strict=True):
            builder.store(value, pointer(builder, sums, vector, place), align=4)
    builder.ret_void()

    address, engine = _compiled(module, "token_loop")
    return address, width, engine


@functools.cache
def table_loop(group: int, lanes: int, source: str, bf16: bool) -> tuple[int, object]:
    """The loop that makes tables of blocks: rows of `group` numbers in one dtype to rows of `lanes` in another.

        f(codebook, blocks, clusters, table, jump):   table[m · jump bytes + (r, k)] = codebook[m, r, k]   k < g

    Args:
        source (`str`): Dtype of the codebook, "float32", "float16" or "bfloat16".
        bf16 (`bool`): Dtype of the table, otherwise fp32. Rounds as torch does.

    Returns:
        The address, and what keeps the code alive.
    """
    module = ir.Module("cluscomp_table_loop")
    module.triple = binding.get_process_triple()
    function = ir.Function(module, ir.FunctionType(VOID, [LONG] * 5), "table_loop")
    codebook, blocks, clusters, table, jump = function.args
    item = {"float32": FLOAT, "float16": ir.HalfType(), "bfloat16": ir.IntType(16)}[source]
    size, long = 4 if source == "float32" else 2, functools.partial(ir.Constant, LONG)
    kind = ir.VectorType(item, lanes)

    def move(where: ir.Value, to: ir.Value, shift: int = 0) -> None:
        """A row, read from `shift` numbers before its start."""
        row = load(builder, where, kind, -size * shift, align=2)
        order = ir.Constant(ir.VectorType(WORD, lanes), [(k + shift) % lanes for k in range(lanes)])
        row = _converted(builder, builder.shuffle_vector(row, row, order), source, bf16)
        builder.store(row, pointer(builder, to, row.type), align=2)

    builder = ir.IRBuilder(function.append_basic_block("head"))
    outer, inner, last = (function.append_basic_block(name) for name in ("codebooks", "rows", "last"))
    done, head = function.append_basic_block("done"), builder.block
    builder.branch(outer)
    builder.position_at_end(outer)
    left, start, place = (loop_phi(builder, value, head) for value in (blocks, codebook, table))
    builder.branch(inner)
    builder.position_at_end(inner)
    rows, where, to = (loop_phi(builder, value, outer) for value in (clusters, start, place))
    move(where, to)
    fewer, following = builder.sub(rows, long(1)), builder.add(where, long(group * size))
    target = builder.add(to, long(lanes * (2 if bf16 else 4)))
    for phi, value in ((rows, fewer), (where, following), (to, target)):
        phi.add_incoming(value, inner)
    builder.cbranch(builder.icmp_signed(">", fewer, long(1)), inner, last)
    builder.position_at_end(last)
    move(following, target, lanes - group)  # or it would read beyond the codebook's end
    ended = builder.sub(left, long(1))
    after, beside = builder.add(following, long(group * size)), builder.add(place, jump)
    for phi, value in ((left, ended), (start, after), (place, beside)):
        phi.add_incoming(value, last)
    builder.cbranch(builder.icmp_signed(">", ended, long(0)), outer, done)
    builder.position_at_end(done)
    builder.ret_void()
    return _compiled(module, "table_loop")


def _converted(builder: ir.IRBuilder, row: ir.Value, source: str, bf16: bool) -> ir.Value:
    """Numbers of a dtype as bf16, int16 here, or as floats."""
    if source == "bfloat16" and bf16:
        return row
    words, floats = (ir.VectorType(kind, row.type.count) for kind in (WORD, FLOAT))
    constant = lambda value: ir.Constant(words, [value] * words.count)  # noqa: E731
    if source == "bfloat16":
        return builder.bitcast(builder.shl(builder.zext(row, words), constant(16)), floats)
    if source == "float16":
        row = builder.fpext(row, floats)
    if not bf16:
        return row
    bits = builder.bitcast(row, words)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(builder.add(bits, constant(0x7FFF)), odd)
    rounded = builder.select(builder.fcmp_unordered("uno", row, row), constant(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, constant(16)), ir.VectorType(ir.IntType(16), words.count))


def _compiled(module: ir.Module, name: str) -> tuple[int, object]:
    """The address of a module's function on this machine, and what keeps it alive."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine.get_function_address(name), engine
