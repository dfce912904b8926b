# mypy: ignore-errors
# Compiled functions: numba types them, and refuses what does not fit.
"""The compiled kernels of the CPU backend. `arguments.py` prepares what they read, `threads.py` runs them.

A kernel takes the address of an array of int64 (`FIELDS`: addresses, sizes, flags) and works until no task is left.
The first element counts the tasks that were claimed, the second the workers, each of which has scratch memory of its
own: so any pool of threads can run a kernel, and what a task computes does not depend on who ran it. A chunk is eight
codes that follow each other in a packed row, which take b whole bytes.

    decode      task: rows of W             gather a run of channels, transpose, (residual, scales, round), write
    few         task: columns of y          gather 32 input channels in fp32, multiply them with every token
    fewest      task: columns of y          up to four tokens: sums in registers, the multiplication reads the table
    scatter     task: channels of a tile    dL/dW in fp32, times the scales, added to the task's own gradient table
"""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from ....jit import callback
from .loops import call_token_loop, table_loop, takes_bf16, token_loop
from .simd import TOKENS, claim, gather, multiply, scatter, transpose2, transpose4

__all__ = ["FIELDS", "ROWS", "RUN_BYTES", "SLACK", "kernel_address", "table_loop", "takes_bf16", "token_loop"]

FIELDS = namedtuple(
    "FIELDS",
    "claimed workers tasks scratch scratch_bytes most_chunks "  # who does what
    "codes tail safe width bits chunks group in_features out_features num_blocks table row_bytes table_bytes "
    "scale_in scale_out residual residual_item weight item "  # 0 where there is none
    "x tokens y y_step loop lanes grad grad_item start stop grad_table grad_table_bytes grad_in grad_out",
)
RUN_BYTES = 2048  # of a row of W written at once: a quarter of it takes three times as long, for the pages it visits
ROWS = 32  # input channels whose weights a few tokens meet in the first-level cache
SLACK = 64  # elements that a gathered row may be written, or read, too far
_CODE_ROWS = 32  # input channels that the fewest tokens meet at a time: the codes of more would not stay in that cache
_F = FIELDS(*range(len(FIELDS._fields)))
_COUNT = len(_F)


def _reader(number):
    @intrinsic
    def pointer(context, address):
        """An address as the pointer that `carray` makes an array of."""

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), codegen

    @njit(nogil=True, error_model="numpy")
    def array(address, count):
        return carray(pointer(address), (count,))

    return array


_longs, _floats = _reader(types.int64), _reader(types.float32)
_words, _halves = _reader(types.int32), _reader(types.uint16)


@njit(nogil=True, error_model="numpy")
def _codes_of(a, channel):
    """Address of a packed row; the last rows lie in a copy that may be read beyond its end."""
    if channel < a[_F.safe]:
        return a[_F.codes] + channel * a[_F.width]
    return a[_F.tail] + (channel - a[_F.safe]) * a[_F.width]


@njit(nogil=True, error_model="numpy")
def _table_of(a, channel):
    """Address of the codebook that a channel uses."""
    if a[_F.num_blocks] == 1:
        return a[_F.table]
    return a[_F.table] + channel * a[_F.num_blocks] // a[_F.in_features] * a[_F.table_bytes]


@njit(nogil=True, error_model="numpy")
def _outputs(a, task):
    """First chunk, number of chunks, first output and number of outputs of a task."""
    first = task * a[_F.chunks] // a[_F.tasks]
    chunks = (task + 1) * a[_F.chunks] // a[_F.tasks] - first
    start = first * 8 * a[_F.group]
    return first, chunks, start, min(chunks * 8 * a[_F.group], a[_F.out_features] - start)


@njit(nogil=True, error_model="numpy")
def _gather_channels(a, first, chunks, start, stop, item, place, step):
    """Weights of the input channels [start, stop), channel by channel, `step` bytes apart."""
    for channel in range(start, stop):
        codes = _codes_of(a, channel) + first * a[_F.bits]
        gather(a[_F.row_bytes], codes, chunks, a[_F.bits], a[_F.group] * item, _table_of(a, channel), place)
        place += step


@njit(nogil=True, error_model="numpy")
def _finish(a, values, spare, output, start, count):
    """(V + residual) · s_in · s_out of one output and `count` input channels, rounded and written.

    The order of the operations is the reference's, to the last bit.
    """
    v = _floats(values, count)
    where = output * a[_F.in_features] + start
    if a[_F.residual] != 0:
        if a[_F.residual_item] == 4:
            residual = _floats(a[_F.residual] + 4 * where, count)
            for i in range(count):
                v[i] += residual[i]
        else:
            halves = _halves(a[_F.residual] + 2 * where, count)
            upper, residual = _words(spare, count), _floats(spare, count)
            for i in range(count):
                upper[i] = np.int32(halves[i]) << 16
            for i in range(count):
                v[i] += residual[i]
    if a[_F.scale_in] != 0:
        scale = _floats(a[_F.scale_in] + 4 * start, count)
        for i in range(count):
            v[i] *= scale[i]
    if a[_F.scale_out] != 0:
        factor = _floats(a[_F.scale_out] + 4 * output, 1)[0]
        for i in range(count):
            v[i] *= factor
    if a[_F.item] == 4:
        target = _floats(a[_F.weight] + 4 * where, count)
        for i in range(count):
            target[i] = v[i]
    else:
        target, digits = _halves(a[_F.weight] + 2 * where, count), _words(values, count)
        for i in range(count):
            word = digits[i]
            # To the nearest, ties to even; a NaN must not be carried into infinity.
            rounded = (word + np.int32(0x7FFF) + ((word >> 16) & np.int32(1))) >> 16
            target[i] = 0x7FC0 if (word & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000) else rounded


def _decode(address):
    a = _longs(address, _COUNT)
    scratch = a[_F.scratch] + claim(address + 8 * _F.workers) * a[_F.scratch_bytes]
    plain = a[_F.scale_in] == 0 and a[_F.scale_out] == 0 and a[_F.residual] == 0
    item = a[_F.item] if plain else 4
    step = (a[_F.most_chunks] * 8 * a[_F.group] + SLACK) * item
    run = RUN_BYTES // a[_F.item]
    lines, line = scratch + run * step, 4 * run
    while True:
        task = claim(address)
        if task >= a[_F.tasks]:
            return
        first, chunks, start, count = _outputs(a, task)
        for channel in range(0, a[_F.in_features], run):
            channels = min(run, a[_F.in_features] - channel)
            _gather_channels(a, first, chunks, channel, channel + channels, item, scratch, step)
            if plain:
                target = a[_F.weight] + (start * a[_F.in_features] + channel) * item
                if item == 4:
                    transpose4(scratch, step, channels, count, target, a[_F.in_features] * 4)
                else:
                    transpose2(scratch, step, channels, count, target, a[_F.in_features] * 2)
                continue
            for o in range(0, count, 8):
                outputs = min(8, count - o)
                transpose4(scratch + 4 * o, step, channels, outputs, lines, line)
                for k in range(outputs):
                    _finish(a, lines + line * k, lines + line * 8, start + o + k, channel, channels)


def _few(address):
    a = _longs(address, _COUNT)
    scratch = a[_F.scratch] + claim(address + 8 * _F.workers) * a[_F.scratch_bytes]
    step = (a[_F.most_chunks] * 8 * a[_F.group] + SLACK) * 4
    sums = scratch + ROWS * step
    while True:
        task = claim(address)
        if task >= a[_F.tasks]:
            return
        first, chunks, start, count = _outputs(a, task)
        _floats(sums, a[_F.tokens] * step // 4)[:] = 0
        for channel in range(0, a[_F.in_features], ROWS):
            rows = min(ROWS, a[_F.in_features] - channel)
            _gather_channels(a, first, chunks, channel, channel + rows, 4, scratch, step)
            for token in range(0, a[_F.tokens], TOKENS):
                x = a[_F.x] + 4 * (token * a[_F.in_features] + channel)
                tokens = min(TOKENS, a[_F.tokens] - token)
                multiply(tokens, scratch, step, rows, count, x, 4 * a[_F.in_features], sums + token * step, step)
        for token in range(a[_F.tokens]):
            y, result = _floats(a[_F.y] + token * a[_F.y_step] + 4 * start, count), _floats(sums + token * step, count)
            for o in range(count):
                y[o] = result[o]


def _fewest(address):
    a = _longs(address, _COUNT)
    sums = a[_F.scratch] + claim(address + 8 * _F.workers) * a[_F.scratch_bytes]
    lanes, group, tokens = a[_F.lanes], a[_F.group], a[_F.tokens]
    size = tokens * 8 * lanes
    # Rows that lie a multiple of 2 KiB apart share few lines of the cache.
    most = _CODE_ROWS // 4 if a[_F.width] % 2048 == 0 else _CODE_ROWS
    while True:
        task = claim(address)
        if task >= a[_F.tasks]:
            return
        first, chunks, start, count = _outputs(a, task)
        result = _floats(sums, chunks * size)
        result[:] = 0
        channel = 0
        while channel < a[_F.in_features]:
            rows = min(most, a[_F.in_features] - channel)
            table = _table_of(a, channel)
            if channel < a[_F.safe]:
                rows = min(rows, a[_F.safe] - channel)
            if a[_F.num_blocks] > 1:
                more = 1
                while more < rows and _table_of(a, channel + more) == table:
                    more += 1
                rows = more
            codes = _codes_of(a, channel) + first * a[_F.bits]
            for chunk in range(chunks):
                call_token_loop(
                    a[_F.loop],
                    codes + chunk * a[_F.bits],
                    a[_F.width],
                    rows,
                    a[_F.x] + 4 * channel,
                    4 * a[_F.in_features],
                    table,
                    sums + 4 * chunk * size,
                )
            channel += rows
        for token in range(tokens):
            y = _floats(a[_F.y] + token * a[_F.y_step] + 4 * start, count)
            o = 0
            for chunk in range(chunks):
                place = chunk * size + token * 8 * lanes
                for _ in range(8):
                    for k in range(min(group, count - o)):
                        y[o + k] = result[place + k]
                    o, place = o + group, place + lanes


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _scale(a, channel, grad, values, spare):
    """Turns a row of dL/dW into dL/dV, and adds its part of the gradients of the scales."""
    outputs = a[_F.out_features]
    g = _floats(grad, outputs)
    factor, total = np.float32(1), np.float32(0)
    if a[_F.scale_in] != 0:
        factor = _floats(a[_F.scale_in] + 4 * channel, 1)[0]
    v = _floats(values, outputs)
    if a[_F.residual] != 0:
        residual = _floats(a[_F.residual] + 4 * (channel - a[_F.start]) * outputs, outputs)
        for o in range(outputs):
            v[o] += residual[o]
    if a[_F.scale_out] != 0:
        scale, grad_out = _floats(a[_F.scale_out], outputs), _floats(spare, outputs)
        for o in range(outputs):
            product = g[o] * v[o]
            grad_out[o] += product * factor
            total += product * scale[o]
            g[o] *= scale[o] * factor
    else:
        for o in range(outputs):
            total += g[o] * v[o]
            g[o] *= factor
    if a[_F.scale_in] != 0:
        _floats(a[_F.grad_in] + 4 * channel, 1)[0] = total


def _scatter(address):
    a = _longs(address, _COUNT)
    scratch = a[_F.scratch] + claim(address + 8 * _F.workers) * a[_F.scratch_bytes]
    outputs, group, chunks = a[_F.out_features], a[_F.group], a[_F.chunks]
    padded = chunks * 8 * group + SLACK
    values = scratch + 4 * padded
    row, digits = _floats(scratch, padded), _words(scratch, padded)
    row[outputs:] = 0
    scaled = a[_F.scale_in] != 0 or a[_F.scale_out] != 0
    channels = a[_F.stop] - a[_F.start]
    while True:
        task = claim(address)
        if task >= a[_F.tasks]:
            return
        table = a[_F.grad_table] + task * a[_F.grad_table_bytes]
        for channel in range(
            a[_F.start] + task * channels // a[_F.tasks], a[_F.start] + (task + 1) * channels // a[_F.tasks]
        ):
            source = a[_F.grad] + (channel - a[_F.start]) * outputs * a[_F.grad_item]
            if a[_F.grad_item] == 4:
                grads = _floats(source, outputs)
                for o in range(outputs):
                    row[o] = grads[o]
            else:
                halves = _halves(source, outputs)
                for o in range(outputs):
                    digits[o] = np.int32(halves[o]) << 16
            codes = _codes_of(a, channel)
            if scaled:
                gather(a[_F.row_bytes], codes, chunks, a[_F.bits], 4 * group, _table_of(a, channel), values)
                _scale(a, channel, scratch, values, a[_F.grad_out] + 4 * task * outputs)
            offset = _table_of(a, channel) - a[_F.table]
            scatter(a[_F.row_bytes], codes, chunks, a[_F.bits], 4 * group, table + offset, scratch)


_KERNELS = {"decode": _decode, "few": _few, "fewest": _fewest, "scatter": _scatter}


@functools.cache
def kernel_address(name: str) -> int:
    """Compiles a kernel (once for the disk) and returns its address."""
    return callback(types.void(types.int64), _KERNELS[name], error_model="numpy")
