"""The inner loops of the CPU engine: the centroids near to a chunk of vectors, in SIMD registers.

A chunk of vectors lies dimension by dimension (structure of arrays), all coordinates relative to an origin near by, so
that fp32 keeps its digits. A candidate is a row (−2 δ, |δ|²) for a centroid at δ from the origin; its score for a
vector p is |δ|² − 2 p·δ, the squared distance without |p|². The chunk stays in registers while the candidates pass by.

            register 0        register 1
    p_0   [ v0 … v15 ]      [ v16 … v31 ]          best  ← min(best, score)
    p_1   [ v0 … v15 ]      [ v16 … v31 ]          index ← position in the list, where that lowered best
    …

The loops are written as LLVM instructions on vectors of 16 floats, which LLVM splits into the machine's registers.
numba's own vectoriser neither keeps the chunk in registers nor uses their full width, and is 2 to 3 times slower.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..jit import njit

__all__ = ["MAX_DIM", "collect", "lanes", "lowest_bit", "scan"]

MAX_DIM = 16
_WIDTH = 16


def _registers(dim: int) -> int:
    """Registers for each dimension of a chunk: as many as fit beside best and index into 32."""
    return 4 if dim <= 5 else 2 if dim <= 12 else 1


@njit(nogil=True)
def lanes(dim):
    """Vectors in a chunk of dimension `dim`."""
    return 64 if dim <= 5 else 32 if dim <= 12 else 16


@intrinsic
def _scan(typing_context, points, candidates, count, dim, best, index):
    signature = types.void(*[types.int64] * 6)

    def codegen(context, builder, signature, args):
        _Scan(builder, *args).emit()
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _collect(typing_context, points, candidates, count, dim, limits, hits, masks):
    signature = types.int64(*[types.int64] * 7)

    def codegen(context, builder, signature, args):
        return _Collect(builder, *args).emit()

    return signature, codegen


@intrinsic
def lowest_bit(typing_context, word):
    """Position of the lowest set bit of an int64 that is not 0."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


class _Loops:
    """Writes one loop over candidates for each dimension, and the switch that picks it."""

    def __init__(self, builder: ir.IRBuilder, points, candidates, count, dim) -> None:
        self.builder = builder
        self.points, self.candidates, self.count, self.dim = points, candidates, count, dim
        self.scalar, self.word, self.long = ir.FloatType(), ir.IntType(32), ir.IntType(64)
        self.floats, self.words = ir.VectorType(self.scalar, _WIDTH), ir.VectorType(self.word, _WIDTH)
        # "muladd" is fused where the machine can; "fma" would call a library function where it cannot.
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        self.multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{_WIDTH}f32")

    def emit(self) -> ir.Value | None:
        start, done = self.builder.block, self.builder.append_basic_block("done")
        switch = self.builder.switch(self.dim, done)
        ends = []
        for dim in range(1, MAX_DIM + 1):
            head = self.builder.append_basic_block(f"head{dim}")
            switch.add_case(ir.Constant(self.long, dim), head)
            self.builder.position_at_end(head)
            result = self._loop(dim, head)
            ends.append((result, self.builder.block))
            self.builder.branch(done)
        self.builder.position_at_end(done)
        if ends[0][0] is None:
            return None
        total = self._phi(self.long, ir.Constant(self.long, 0), start)
        for result, block in ends:
            total.add_incoming(result, block)
        return total

    def _loop(self, dim: int, head: ir.Block) -> ir.Value | None:
        """Emits the loop for `dim`, starting in `head`; leaves the builder after it, and returns the result if any."""
        raise NotImplementedError

    def _chunk(self, dim: int) -> list[list[ir.Value]]:
        size = _registers(dim)
        offsets = [[(j * size + r) * _WIDTH for r in range(size)] for j in range(dim)]
        return [[self._load(self.points, offset, self.floats) for offset in row] for row in offsets]

    def _scores(self, points: list[list[ir.Value]], step: ir.Value) -> list[ir.Value]:
        """|δ|² − 2 p·δ of candidate `step` for every register of the chunk."""
        dim = len(points)
        row = self.builder.mul(step, ir.Constant(self.long, dim + 1))
        scores = [self._broadcast(self._load(self.candidates, dim, self.scalar, row), self.floats)] * len(points[0])
        for j in range(dim):
            value = self._broadcast(self._load(self.candidates, j, self.scalar, row), self.floats)
            pairs = zip(points[j], scores, strict=True)
            scores = [self.builder.call(self.multiply_add, [point, value, score]) for point, score in pairs]
        return scores

    def _any_candidates(self) -> ir.Value:
        return self.builder.icmp_signed(">", self.count, ir.Constant(self.long, 0))

    def _address(self, base: ir.Value, offset: int, kind: ir.Type, row: ir.Value | None = None) -> ir.Value:
        """Pointer to `kind` at 4-byte element `row + offset` from an address given as an integer."""
        element = (
            ir.Constant(self.long, offset) if row is None else self.builder.add(row, ir.Constant(self.long, offset))
        )
        pointer = self.builder.inttoptr(base, self.word.as_pointer())
        return self.builder.bitcast(self.builder.gep(pointer, [element]), kind.as_pointer())

    def _load(self, base: ir.Value, offset: int, kind: ir.Type, row: ir.Value | None = None) -> ir.Value:
        return self.builder.load(self._address(base, offset, kind, row), align=4)

    def _store(self, value: ir.Value, base: ir.Value, offset: int) -> None:
        self.builder.store(value, self._address(base, offset, value.type), align=4)

    def _phi(self, kind: ir.Type, value: ir.Value, block: ir.Block) -> ir.Value:
        phi = self.builder.phi(kind)
        phi.add_incoming(value, block)
        return phi

    def _broadcast(self, value: ir.Value, kind: ir.VectorType) -> ir.Value:
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(self.word, 0))
        zeros = ir.Constant(ir.VectorType(self.word, _WIDTH), [0] * _WIDTH)
        return self.builder.shuffle_vector(first, undefined, zeros)


class _Scan(_Loops):
    def __init__(self, builder: ir.IRBuilder, points, candidates, count, dim, best, index) -> None:
        super().__init__(builder, points, candidates, count, dim)
        self.best, self.index = best, index

    def _loop(self, dim: int, head: ir.Block) -> None:
        builder, registers = self.builder, range(_registers(dim))
        loop, out = builder.append_basic_block(f"loop{dim}"), builder.append_basic_block(f"out{dim}")
        points = self._chunk(dim)
        best = [self._load(self.best, r * _WIDTH, self.floats) for r in registers]
        index = [self._load(self.index, r * _WIDTH, self.words) for r in registers]
        builder.cbranch(self._any_candidates(), loop, out)

        builder.position_at_end(loop)
        step = self._phi(self.long, ir.Constant(self.long, 0), head)
        kept = [self._phi(self.floats, best[r], head) for r in registers]
        where = [self._phi(self.words, index[r], head) for r in registers]
        scores = self._scores(points, step)
        position = self._broadcast(builder.trunc(step, self.word), self.words)
        better = [builder.fcmp_ordered("<", scores[r], kept[r]) for r in registers]
        new_best = [builder.select(better[r], scores[r], kept[r]) for r in registers]
        new_index = [builder.select(better[r], position, where[r]) for r in registers]
        following = builder.add(step, ir.Constant(self.long, 1))
        for phi, value in zip([step, *kept, *where], [following, *new_best, *new_index], strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, self.count), loop, out)

        builder.position_at_end(out)
        results = []
        for before, after in zip(best + index, new_best + new_index, strict=True):
            phi = self._phi(before.type, before, head)
            phi.add_incoming(after, loop)
            results.append(phi)
        for r in registers:
            self._store(results[r], self.best, r * _WIDTH)
            self._store(results[len(registers) + r], self.index, r * _WIDTH)


class _Collect(_Loops):
    def __init__(self, builder: ir.IRBuilder, points, candidates, count, dim, limits, hits, masks) -> None:
        super().__init__(builder, points, candidates, count, dim)
        self.limits, self.hits, self.masks = limits, hits, masks

    def _loop(self, dim: int, head: ir.Block) -> ir.Value:
        builder, registers = self.builder, range(_registers(dim))
        loop, out = builder.append_basic_block(f"loop{dim}"), builder.append_basic_block(f"out{dim}")
        points = self._chunk(dim)
        limits = [self._load(self.limits, r * _WIDTH, self.floats) for r in registers]
        zero, one = ir.Constant(self.long, 0), ir.Constant(self.long, 1)
        builder.cbranch(self._any_candidates(), loop, out)

        builder.position_at_end(loop)
        step, found = self._phi(self.long, zero, head), self._phi(self.long, zero, head)
        mask = zero
        for r, score in enumerate(self._scores(points, step)):
            inside = builder.fcmp_ordered("<=", score, limits[r])
            part = builder.zext(builder.bitcast(inside, ir.IntType(_WIDTH)), self.long)
            mask = builder.or_(mask, builder.shl(part, ir.Constant(self.long, r * _WIDTH)))
        # The mask is always written, and overwritten by the next one if it is empty: a branch would be mispredicted
        # too often.
        hit = builder.inttoptr(self.hits, self.word.as_pointer())
        builder.store(builder.trunc(step, self.word), builder.gep(hit, [found]))
        words = builder.inttoptr(self.masks, self.long.as_pointer())
        builder.store(mask, builder.gep(words, [found]))
        more = builder.add(found, builder.zext(builder.icmp_unsigned("!=", mask, zero), self.long))
        following = builder.add(step, one)
        step.add_incoming(following, loop)
        found.add_incoming(more, loop)
        builder.cbranch(builder.icmp_signed("<", following, self.count), loop, out)

        builder.position_at_end(out)
        total = self._phi(self.long, zero, head)
        total.add_incoming(more, loop)
        return total


@njit(nogil=True)
def scan(points, candidates, count, dim, best, index):
    """Lowers `best` and sets `index` for one chunk; all but `count` and `dim` are addresses.

    points: fp32 [dim, lanes(dim)]; candidates: fp32 [count, dim + 1], rows (−2 δ, |δ|²); best: fp32 [lanes(dim)];
    index: int32 [lanes(dim)], the row of the nearest candidate, untouched where none is below `best`.
    """
    _scan(points, candidates, count, dim, best, index)


@njit(nogil=True)
def collect(points, candidates, count, dim, limits, hits, masks):
    """Candidates whose score is at most its limit for any vector of one chunk; returns how many there are.

    limits: fp32 [lanes(dim)]; hits: int32 [count], their rows; masks: int64 [count], bit v set for vector v. The other
    arguments are those of [`scan`]. All but `count` and `dim` are addresses.
    """
    return _collect(points, candidates, count, dim, limits, hits, masks)
