# mypy: ignore-errors
# Compiled functions: numba types them, and refuses what does not fit.
"""The inner loops of the CPU backend, as LLVM instructions: numba's own vectoriser neither sees that rows of a table
have a constant length nor keeps sums in registers.

One primitive serves all: walk along a packed row, eight codes (b bytes) at a time, and do something with the table row
of each code. Table rows are padded to a power of two, so that one vector instruction moves a row; what it writes too
much is overwritten by the next.

    packed row   |   b bytes: 8 codes   |   b bytes: 8 codes   | …       two 64-bit words hold a block of any b ≤ 16
                     c0   c1   c2  …
    table row     [ w w w · ]                                            g = 3, lanes = 4
    written       [ w w w ·
                          w w w ·  …                                     step g

Addresses are int64 throughout.
"""

from __future__ import annotations

import functools

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["ROW_BYTES", "TOKENS", "claim", "gather", "multiply", "scatter", "token_loop", "turn2", "turn4"]

ROW_BYTES = (2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = 4  # whose sums fit into registers beside each other
_WORD, _LONG, _FLOAT, _VOID = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
_WIDTH = 16
_LANES = ir.VectorType(_FLOAT, _WIDTH)


def _pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
    if offset:
        address = builder.add(address, ir.Constant(_LONG, offset))
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0, align: int = 4) -> ir.Value:
    return builder.load(_pointer(builder, address, kind, offset), align=align)


def _phi(builder: ir.IRBuilder, value: ir.Value, block: ir.Block) -> ir.Value:
    phi = builder.phi(value.type)
    phi.add_incoming(value, block)
    return phi


def _broadcast(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_WORD, count), [0] * count))


def _multiply_add(module: ir.Module, kind: ir.VectorType) -> ir.Function:
    # "muladd" is fused where the machine can; "fma" would call a library function where it cannot.
    return cgutils.get_or_insert_function(module, ir.FunctionType(kind, [kind] * 3), f"llvm.fmuladd.v{kind.count}f32")


@intrinsic
def claim(context, address):
    """Adds 1 to the int64 at an address and returns what it was, for one thread at a time."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], _LONG), ir.Constant(_LONG, 1), "monotonic")

    return types.int64(types.int64), codegen


def _emit_walk(builder: ir.IRBuilder, add: bool, size, codes, blocks, bits, step, table, place) -> None:
    """One loop over blocks of eight codes for each size of a table row, and the switch that picks it."""
    long = functools.partial(ir.Constant, _LONG)
    mask = builder.sub(builder.shl(long(1), bits), long(1))
    quarter = builder.shl(bits, long(2))
    second, shift = builder.lshr(quarter, long(3)), builder.and_(quarter, long(7))
    done, some = builder.append_basic_block("done"), builder.append_basic_block("some")
    builder.cbranch(builder.icmp_signed(">", blocks, long(0)), some, done)
    builder.position_at_end(some)
    switch = builder.switch(size, done)
    for row in ROW_BYTES[add:]:
        kind = (
            ir.VectorType(_FLOAT, row // 4) if add else ir.VectorType(ir.IntType(min(32, 8 * row)), max(1, row // 4))
        )
        loop = builder.append_basic_block(f"row{row}")
        switch.add_case(long(row), loop)
        builder.position_at_end(loop)
        left, where, target = (_phi(builder, value, some) for value in (blocks, codes, place))
        to = target
        for half in range(2):
            if half == 0:
                word = _load(builder, where, _LONG, align=1)
            else:
                word = builder.lshr(_load(builder, builder.add(where, second), _LONG, align=1), shift)
            for k in range(4):
                entry = builder.mul(builder.and_(word, mask), long(row))
                source = _pointer(builder, builder.add(table, entry), kind)
                if add:
                    value = builder.fadd(builder.load(source, align=4), _load(builder, to, kind))
                    builder.store(value, source, align=4)
                else:
                    builder.store(builder.load(source, align=2), _pointer(builder, to, kind), align=2)
                to = builder.add(to, step)
                if k < 3:
                    word = builder.lshr(word, bits)
        fewer = builder.sub(left, long(1))
        for phi, value in ((left, fewer), (where, builder.add(where, bits)), (target, to)):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed(">", fewer, long(0)), loop, done)
    builder.position_at_end(done)


@intrinsic
def gather(context, size, codes, blocks, bits, step, table, place):
    """Copies the table rows of 8 · blocks codes to `place` and every `step` bytes from there."""

    def codegen(context, builder, signature, args):
        _emit_walk(builder, False, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def scatter(context, size, codes, blocks, bits, step, table, place):
    """Adds the floats at `place` and every `step` bytes from there to the table rows of 8 · blocks codes."""

    def codegen(context, builder, signature, args):
        _emit_walk(builder, True, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _turner(size: int):
    """Transposes a matrix of items of `size` bytes, 8 × 8 in registers and what is left at the edges one by one."""
    item = ir.IntType(8 * size)
    kind = ir.VectorType(item, 8)

    @intrinsic
    def turn_block(context, source, step, target, jump):
        def codegen(context, builder, signature, args):
            source, step, target, jump = args
            rows = []
            for _ in range(8):
                rows.append(_load(builder, source, kind, align=2))
                source = builder.add(source, step)
            # Three times the perfect shuffle of rows r and r + 4 is the transpose.
            low, high = (
                ir.Constant(ir.VectorType(_WORD, 8), [k // 2 + half + 8 * (k % 2) for k in range(8)])
                for half in (0, 4)
            )
            for _ in range(3):
                pairs = [(rows[r], rows[r + 4]) for r in range(4)]
                rows = [builder.shuffle_vector(*pair, mask) for pair in pairs for mask in (low, high)]
            for row in rows:
                builder.store(row, _pointer(builder, target, kind), align=2)
                target = builder.add(target, jump)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    @intrinsic
    def move(context, source, target):
        def codegen(context, builder, signature, args):
            value = _load(builder, args[0], item, align=2)
            builder.store(value, _pointer(builder, args[1], item), align=2)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @njit(nogil=True, error_model="numpy")
    def turn(source, step, rows, columns, target, jump):
        whole_rows, whole_columns = rows & -8, columns & -8
        for c in range(0, whole_columns, 8):
            for r in range(0, whole_rows, 8):
                turn_block(source + r * step + c * size, step, target + c * jump + r * size, jump)
        for c in range(columns):
            for r in range(whole_rows if c < whole_columns else 0, rows):
                move(source + r * step + c * size, target + c * jump + r * size)

    return turn


turn2, turn4 = _turner(2), _turner(4)


def _multiplier(tokens: int):
    """sums[t, :] += Σ_r x[t, r] · tile[r, :] for 32 columns, all fp32; the sums stay in registers."""

    @intrinsic
    def multiply(context, tile, step, rows, x, x_step, sums, sums_step):
        def codegen(context, builder, signature, args):
            tile, step, rows, x, x_step, sums, sums_step = args
            multiply_add = _multiply_add(builder.module, _LANES)
            places, xs = [sums], [x]
            for _ in range(1, tokens):
                places.append(builder.add(places[-1], sums_step))
                xs.append(builder.add(xs[-1], x_step))
            start = [_load(builder, place, _LANES, offset) for place in places for offset in (0, 4 * _WIDTH)]
            head, loop = builder.block, builder.append_basic_block("rows")
            out = builder.append_basic_block("out")
            builder.branch(loop)

            builder.position_at_end(loop)
            count, where = _phi(builder, ir.Constant(_LONG, 0), head), _phi(builder, tile, head)
            kept = [_phi(builder, value, head) for value in start]
            values = [_load(builder, where, _LANES, offset) for offset in (0, 4 * _WIDTH)]
            offset = builder.shl(count, ir.Constant(_LONG, 2))
            new = []
            for t in range(tokens):
                factor = _broadcast(builder, _load(builder, builder.add(xs[t], offset), _FLOAT), _WIDTH)
                new += [builder.call(multiply_add, [factor, values[k], kept[2 * t + k]]) for k in range(2)]
            following = builder.add(count, ir.Constant(_LONG, 1))
            count.add_incoming(following, loop)
            where.add_incoming(builder.add(where, step), loop)
            for phi, value in zip(kept, new, strict=True):
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, rows), loop, out)

            builder.position_at_end(out)
            for t, place in enumerate(places):
                for k in range(2):
                    builder.store(new[2 * t + k], _pointer(builder, place, _LANES, 4 * _WIDTH * k), align=4)
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


@intrinsic
def call_token_loop(context, function, codes, step, rows, x, x_step, table, sums):
    """Calls what [`token_loop`] made."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_VOID, [_LONG] * 7)
        builder.call(_pointer(builder, args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


def _gather_rows(builder: ir.IRBuilder, codes: ir.Value, table: ir.Value, bits: int, lanes: int) -> ir.Value:
    """The table rows of a block of eight codes, one or two floats each, side by side in one register."""
    longs = ir.VectorType(_LONG, 8)
    item = _FLOAT if lanes == 1 else ir.DoubleType()
    items, mask = ir.VectorType(item, 8), ir.VectorType(ir.IntType(1), 8)
    skipped, shift = divmod(4 * bits, 8) if bits > 8 else (0, 4 * bits)
    word = _broadcast(builder, _load(builder, codes, _LONG, align=1), 8)
    if bits > 8:
        other = _broadcast(builder, _load(builder, codes, _LONG, skipped, align=1), 8)
        word = builder.shuffle_vector(word, other, ir.Constant(ir.VectorType(_WORD, 8), [0, 1, 2, 3, 12, 13, 14, 15]))
    shifts = ir.Constant(longs, [k * bits for k in range(4)] + [shift + k * bits for k in range(4)])
    entries = builder.and_(builder.lshr(word, shifts), ir.Constant(longs, [2**bits - 1] * 8))
    name = f"llvm.x86.avx512.mask.gather.q{'ps' if lanes == 1 else 'pd'}.512"
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(items, [items, byte, longs, mask, _WORD]), name
    )
    start, every = ir.Constant(items, [0.0] * 8), ir.Constant(mask, [1] * 8)
    rows = builder.call(
        function, [start, builder.inttoptr(table, byte), entries, every, ir.Constant(_WORD, 4 * lanes)]
    )
    return builder.bitcast(rows, ir.VectorType(_FLOAT, 8 * lanes))


def _permute_rows(builder: ir.IRBuilder, codes: ir.Value, halves: list[ir.Value], bits: int) -> ir.Value:
    """The floats of a block of eight codes of up to four bits, from a table in two registers."""
    words = ir.VectorType(_WORD, 8)
    word = _broadcast(builder, _load(builder, codes, _WORD, align=1), 8)
    entries = builder.lshr(word, ir.Constant(words, [k * bits for k in range(8)]))
    entries = builder.and_(entries, ir.Constant(words, [2**bits - 1] * 8))
    kind = halves[0].type
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind, words, kind]), "llvm.x86.avx512.vpermi2var.ps.256"
    )
    return builder.call(function, [halves[0], entries, halves[1]])


@functools.cache
def token_loop(bits: int, lanes: int, tokens: int) -> tuple[int, int, object]:
    """The loop of up to four tokens over the input channels of one block of eight codes, made for b and padded g.

        f(codes, step, rows, x, x_step, table, sums):   sums[t, k, :] += Σ_r x[t, r] · table[code(r, k), :]   k = 0 … 7

    With b a constant, a code costs a shift, a mask and for each token a multiplication, the first of which reads the
    table; the sums of all eight codes, or of as many as fit, stay in registers. It compiles in some hundredths of a
    second, too little to keep it on disk.

    Returns:
        The address, the floats between one sum and the next, and what keeps the code alive.
    """
    features = binding.get_host_cpu_features()
    gathers = lanes <= 2 and features.get("avx512f", False)
    permutes = lanes == 1 and bits <= 4 and gathers and features.get("avx512vl", False)
    # One instruction gathers eight short rows, or permutes a small table. Without it two lanes are read as four.
    width = lanes if gathers or lanes == 1 else max(4, lanes)
    kind = ir.VectorType(_FLOAT, 8 * width if gathers else width)
    module = ir.Module("cluscomp_token_loop")
    module.triple = binding.get_process_triple()
    function = ir.Function(module, ir.FunctionType(_VOID, [_LONG] * 7), "token_loop")
    codes, step, rows, x, x_step, table, sums = function.args
    multiply_add = _multiply_add(module, kind)
    head = function.append_basic_block("head")
    builder = ir.IRBuilder(head)
    scale = (4 * lanes).bit_length() - 1
    mask = ir.Constant(_LONG, (2**bits - 1) << scale)
    size = 8 if gathers else min(8, 16 * _WIDTH // max(width, _WIDTH) // (1 << (tokens - 1).bit_length()))
    xs = [x]
    for _ in range(1, tokens):
        xs.append(builder.add(xs[-1], x_step))
    halves = [_load(builder, table, ir.VectorType(_FLOAT, 8), offset) for offset in (0, 32)] if permutes else []
    # The hardware does not follow so many rows at once: fetch the channels that come after these.
    kind_of_fetch = ir.FunctionType(_VOID, [ir.IntType(8).as_pointer(), _WORD, _WORD, _WORD])
    fetch = cgutils.get_or_insert_function(module, kind_of_fetch, "llvm.prefetch.p0")
    stride = builder.mul(step, rows)
    for first in range(0, 8, size):
        before = builder.block
        places = [
            4 * width * (8 * t + k) for k in range(first, first + size, kind.count // width) for t in range(tokens)
        ]
        start = [_load(builder, sums, kind, place) for place in places]
        loop, out = builder.append_basic_block("rows"), builder.append_basic_block("out")
        builder.branch(loop)

        builder.position_at_end(loop)
        count, where = _phi(builder, ir.Constant(_LONG, 0), before), _phi(builder, codes, before)
        kept = [_phi(builder, value, before) for value in start]
        offset = builder.shl(count, ir.Constant(_LONG, 2))
        factors = [_broadcast(builder, _load(builder, builder.add(x, offset), _FLOAT), kind.count) for x in xs]
        words: dict[int, ir.Value] = {}
        new = []
        if gathers:
            row = (
                _permute_rows(builder, where, halves, bits)
                if permutes
                else _gather_rows(builder, where, table, bits, lanes)
            )
            new = [
                builder.call(multiply_add, [factor, row, value]) for factor, value in zip(factors, kept, strict=True)
            ]
        for k in range(0 if gathers else size):
            # A word holds eight codes of up to 8 bits, or four of more.
            part = (first + k) // 4 if bits > 8 else 0
            skipped, shift = divmod(part * 4 * bits, 8)
            if part not in words:
                words[part] = _load(builder, where, _LONG, skipped, align=1)
            shift += (first + k - 4 * part) * bits - scale
            move = builder.lshr if shift >= 0 else builder.shl
            entry = builder.and_(move(words[part], ir.Constant(_LONG, abs(shift))), mask)
            row = _load(builder, builder.add(table, entry), kind)
            for t, factor in enumerate(factors):
                new.append(builder.call(multiply_add, [factor, row, kept[k * tokens + t]]))
        if first == 0:
            ahead = builder.inttoptr(builder.add(where, stride), ir.IntType(8).as_pointer())
            builder.call(fetch, [ahead, *(ir.Constant(_WORD, value) for value in (0, 2, 1))])
        following = builder.add(count, ir.Constant(_LONG, 1))
        count.add_incoming(following, loop)
        where.add_incoming(builder.add(where, step), loop)
        for phi, value in zip(kept, new, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, rows), loop, out)

        builder.position_at_end(out)
        for value, place in zip(new, places, strict=True):
            builder.store(value, _pointer(builder, sums, kind, place), align=4)
    builder.ret_void()

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine.get_function_address("token_loop"), width, engine
