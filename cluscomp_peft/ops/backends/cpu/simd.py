# mypy: ignore-errors
# Compiled functions: numba types them, and refuses what does not fit.
"""The inner loops of the CPU backend, as LLVM instructions: numba's own vectoriser neither sees that rows of a table
have a constant length nor keeps sums in registers.

One primitive serves all: walk along a packed row, a chunk of eight codes (b bytes) at a time, and read or write the
table row of each code. Table rows are padded to a power of two, so that one vector instruction moves a row; the next
row overwrites the padding that it wrote.

    packed row   |   b bytes: 8 codes   |   b bytes: 8 codes   | …       two 64-bit words hold a chunk of any b ≤ 16
                     c0   c1   c2  …
    table row     [ w w w · ]                                            g = 3, lanes = 4
    written       [ w w w ·
                          w w w ·  …                                     step g

Addresses are int64 throughout.
"""

from __future__ import annotations

import functools

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .ir import FLOAT, LANES, LONG, WIDTH, WORD, broadcast, load, loop_phi, multiply_add, pointer, rows_begin

__all__ = ["ROW_BYTES", "TOKENS", "claim", "gather", "multiply", "scatter", "transpose2", "transpose4"]

ROW_BYTES = (2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = 4  # whose sums fit into registers beside each other


@intrinsic
def claim(context, address):
    """Adds 1 to the int64 at an address and returns what it was, for one thread at a time."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], LONG), ir.Constant(LONG, 1), "monotonic")

    return types.int64(types.int64), codegen


def _emit_walk(builder: ir.IRBuilder, add: bool, size, codes, chunks, bits, step, table, place) -> None:
    """One loop over chunks of eight codes for each size of a table row, and the switch that picks it."""
    long = functools.partial(ir.Constant, LONG)
    mask = builder.sub(builder.shl(long(1), bits), long(1))
    quarter = builder.shl(bits, long(2))
    second, shift = builder.lshr(quarter, long(3)), builder.and_(quarter, long(7))
    done, some = builder.append_basic_block("done"), builder.append_basic_block("some")
    builder.cbranch(builder.icmp_signed(">", chunks, long(0)), some, done)
    builder.position_at_end(some)
    switch = builder.switch(size, done)
    for row in ROW_BYTES[add:]:
        kind = ir.VectorType(FLOAT, row // 4) if add else ir.VectorType(ir.IntType(min(32, 8 * row)), max(1, row // 4))
        loop = builder.append_basic_block(f"row{row}")
        switch.add_case(long(row), loop)
        builder.position_at_end(loop)
        left, where, target = (loop_phi(builder, value, some) for value in (chunks, codes, place))
        to = target
        for half in range(2):
            if half == 0:
                word = load(builder, where, LONG, align=1)
            else:
                word = builder.lshr(load(builder, builder.add(where, second), LONG, align=1), shift)
            for k in range(4):
                entry = builder.mul(builder.and_(word, mask), long(row))
                source = pointer(builder, builder.add(table, entry), kind)
                if add:
                    value = builder.fadd(builder.load(source, align=4), load(builder, to, kind))
                    builder.store(value, source, align=4)
                else:
                    builder.store(builder.load(source, align=2), pointer(builder, to, kind), align=2)
                to = builder.add(to, step)
                if k < 3:
                    word = builder.lshr(word, bits)
        fewer = builder.sub(left, long(1))
        for phi, value in ((left, fewer), (where, builder.add(where, bits)), (target, to)):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed(">", fewer, long(0)), loop, done)
    builder.position_at_end(done)


@intrinsic
def gather(context, size, codes, chunks, bits, step, table, place):
    """Copies the table rows of 8 · chunks codes to `place` and every `step` bytes from there."""

    def codegen(context, builder, signature, args):
        _emit_walk(builder, False, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def scatter(context, size, codes, chunks, bits, step, table, place):
    """Adds the floats at `place` and every `step` bytes from there to the table rows of 8 · chunks codes."""

    def codegen(context, builder, signature, args):
        _emit_walk(builder, True, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _transposer(size: int):
    """Transposes a matrix of items of `size` bytes, 8 × 8 in registers and what is left at the edges one by one."""
    item = ir.IntType(8 * size)
    kind = ir.VectorType(item, 8)

    @intrinsic
    def transpose_square(context, source, step, target, jump):
        def codegen(context, builder, signature, args):
            source, step, target, jump = args
            rows = []
            for _ in range(8):
                rows.append(load(builder, source, kind, align=2))
                source = builder.add(source, step)
            # Three times the perfect shuffle of rows r and r + 4 is the transpose.
            low, high = (
                ir.Constant(ir.VectorType(WORD, 8), [k // 2 + half + 8 * (k % 2) for k in range(8)]) for half in (0, 4)
            )
            for _ in range(3):
                pairs = [(rows[r], rows[r + 4]) for r in range(4)]
                rows = [builder.shuffle_vector(*pair, mask) for pair in pairs for mask in (low, high)]
            for row in rows:
                builder.store(row, pointer(builder, target, kind), align=2)
                target = builder.add(target, jump)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    @intrinsic
    def move(context, source, target):
        def codegen(context, builder, signature, args):
            value = load(builder, args[0], item, align=2)
            builder.store(value, pointer(builder, args[1], item), align=2)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @njit(nogil=True, error_model="numpy")
    def transpose(source, step, rows, columns, target, jump):
        whole_rows, whole_columns = rows & -8, columns & -8
        for c in range(0, whole_columns, 8):
            for r in range(0, whole_rows, 8):
                transpose_square(source + r * step + c * size, step, target + c * jump + r * size, jump)
        for c in range(columns):
            for r in range(whole_rows if c < whole_columns else 0, rows):
                move(source + r * step + c * size, target + c * jump + r * size)

    return transpose


transpose2, transpose4 = _transposer(2), _transposer(4)


def _multiplier(tokens: int):
    """sums[t, :] += Σ_r x[t, r] · tile[r, :] for 32 columns, all fp32; the sums stay in registers."""

    @intrinsic
    def multiply(context, tile, step, rows, x, x_step, sums, sums_step):
        def codegen(context, builder, signature, args):
            tile, step, rows, x, x_step, sums, sums_step = args
            fused = multiply_add(builder.module, LANES)
            places, xs = [sums], [x]
            for _ in range(1, tokens):
                places.append(builder.add(places[-1], sums_step))
                xs.append(builder.add(xs[-1], x_step))
            start = [load(builder, place, LANES, offset) for place in places for offset in (0, 4 * WIDTH)]
            count, where, kept, end = rows_begin(builder, tile, start)
            values = [load(builder, where, LANES, offset) for offset in (0, 4 * WIDTH)]
            offset = builder.shl(count, ir.Constant(LONG, 2))
            new = []
            for t in range(tokens):
                factor = broadcast(builder, load(builder, builder.add(xs[t], offset), FLOAT), WIDTH)
                new += [builder.call(fused, [factor, values[k], kept[2 * t + k]]) for k in range(2)]
            end(step, rows, new)
            for t, place in enumerate(places):
                for k in range(2):
                    builder.store(new[2 * t + k], pointer(builder, place, LANES, 4 * WIDTH * k), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return multiply


_multiply1, _multiply2, _multiply3, _multiply4 = (_multiplier(tokens) for tokens in range(1, TOKENS + 1))


@njit(nogil=True, error_model="numpy")
def multiply(tokens, tile, step, rows, columns, x, x_step, sums, sums_step):
    """sums[t, :] += Σ_r x[t, r] · tile[r, :] for up to four tokens, all fp32; columns rounded up to 32."""
    for c in range(0, 4 * columns, 128):
        if tokens == 1:
            _multiply1(tile + c, step, rows, x, x_step, sums + c, sums_step)
        elif tokens == 2:
            _multiply2(tile + c, step, rows, x, x_step, sums + c, sums_step)
        elif tokens == 3:
            _multiply3(tile + c, step, rows, x, x_step, sums + c, sums_step)
        else:
            _multiply4(tile + c, step, rows, x, x_step, sums + c, sums_step)
