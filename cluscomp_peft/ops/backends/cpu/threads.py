"""Runs a compiled kernel on torch's threads.

Threads are those of torch (`torch.set_num_threads`), whose OpenMP pool also runs the kernels: a second pool would find
the cores taken by threads of the first that spin. Where torch has no GNU OpenMP, threads of Python do the work.
"""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .arguments import MatrixArguments, field_places
from .compilation import compiled

__all__ = ["run"]


def run(name: str, tasks: int, scratch_bytes: int, matrix: MatrixArguments, fields: dict[str, int]) -> None:
    """Runs a kernel of `kernels.py` until all of its tasks are done.

    Args:
        scratch_bytes (`int`): Of each thread.
        matrix ([`MatrixArguments`]): Fills in the fields that describe the weight.
        fields: The kernel's other fields, by name. A call fills in all of those of its kernel: they hold the values of
            the last call otherwise.
    """
    threads = min(torch.get_num_threads(), tasks)
    scratch = torch.zeros(threads * scratch_bytes + 64, dtype=torch.uint8)
    values, places = matrix.fields_of(name), field_places()
    values[places["tasks"]], values[places["scratch"]] = tasks, scratch.data_ptr()
    values[places["scratch_bytes"]] = scratch_bytes
    for key, value in fields.items():
        values[places[key]] = value
    address, argument = compiled().kernel_address(name), ctypes.addressof(values)
    if threads == 1:
        _function(address)(argument)
    elif (parallel := _openmp()) is not None:
        parallel(address, argument, threads, 0)
    else:
        helpers: list[Future[None]] = []
        with suppress(RuntimeError):  # no more threads can be started: this one does the tasks that are left
            pool = _pool(threads, os.getpid())
            helpers.extend(pool.submit(_function(address), argument) for _ in range(threads - 1))
        _function(address)(argument)
        for helper in helpers:
            helper.result()


@functools.cache
def _openmp() -> Any:
    """`GOMP_parallel` of the OpenMP runtime that torch runs on; None where there is none."""
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Of a process: threads do not outlive a fork."""
    return ThreadPoolExecutor(threads)


@functools.cache
def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
