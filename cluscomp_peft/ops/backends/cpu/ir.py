# mypy: ignore-errors
# Builders of LLVM instructions are typed by what they build, which mypy does not see.
"""What the modules that write LLVM instructions share. Addresses are int64 throughout."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

__all__ = [
    "FLOAT",
    "LANES",
    "LONG",
    "VOID",
    "WIDTH",
    "WORD",
    "broadcast",
    "load",
    "loop_phi",
    "multiply_add",
    "pointer",
    "rows_begin",
]

WORD, LONG, FLOAT, VOID = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
WIDTH = 16  # floats in the widest register
LANES = ir.VectorType(FLOAT, WIDTH)


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
    if offset:
        address = builder.add(address, ir.Constant(LONG, offset))
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: int = 0, align: int = 4) -> ir.Value:
    return builder.load(pointer(builder, address, kind, offset), align=align)


def loop_phi(builder: ir.IRBuilder, value: ir.Value, block: ir.Block) -> ir.Value:
    """A variable of a loop that `value` enters from `block`."""
    phi = builder.phi(value.type)
    phi.add_incoming(value, block)
    return phi


def rows_begin(builder: ir.IRBuilder, first: ir.Value, start: list[ir.Value]) -> tuple:
    """Begins a loop over rows in memory, the first at an address, with variables that start at these values.

    Returns:
        The row's number, its address, the variables, and `end(step, rows, new)`, which ends the loop: rows lie `step`
        bytes apart, and the variables take their `new` values.
    """
    head, loop, out = builder.block, builder.append_basic_block("rows"), builder.append_basic_block("out")
    builder.branch(loop)
    builder.position_at_end(loop)
    count, where, *kept = (loop_phi(builder, value, head) for value in (ir.Constant(LONG, 0), first, *start))

    def end(step: ir.Value, rows: ir.Value, new: list[ir.Value]) -> None:
        following = builder.add(count, ir.Constant(LONG, 1))
        values = (following, builder.add(where, step), *new)
        for phi, value in zip((count, where, *kept), values, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, rows), loop, out)
        builder.position_at_end(out)

    return count, where, kept, end


def broadcast(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(WORD, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(WORD, count), [0] * count))


def multiply_add(module: ir.Module, kind: ir.VectorType) -> ir.Function:
    # "muladd" is fused where the machine can; "fma" would call a library function where it cannot.
    return cgutils.get_or_insert_function(module, ir.FunctionType(kind, [kind] * 3), f"llvm.fmuladd.v{kind.count}f32")
