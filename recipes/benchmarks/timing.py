"""Instruments: clocks, peaks of memory of a device and of a process, and what a device does at most."""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers.utils import logging

T = TypeVar("T")


def device_name(device: str | torch.device) -> str:
    return torch.cuda.get_device_name(device) if is_cuda(device) else "cpu"


def quiet() -> None:
    """Nothing but what the benchmark itself says: where a log is cut, bars and advice would take the room."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str | torch.device) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def timed(job: Callable[[], object], device: str | torch.device) -> float:
    """Seconds of one call, until the device is done."""
    synchronize(device)
    started = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - started


def seconds(job: Callable[[], object], device: str | torch.device, repeat: int) -> float:
    """Median over `repeat` calls after a first one that compiles; of that one where there are none."""
    times = [timed(job, device) for _ in range(1 + repeat)]
    return statistics.median(times[1:] or times)


def capture(job: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of the job, and the tensors that replaying it writes."""
    # What is compiled, and memory that libraries take at first, must not fall into the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        job()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = job()
    return graph, result


def graphed(job: Callable[[], object], device: str | torch.device, repeat: int) -> float | None:
    """As [`seconds`], from a CUDA graph, so that launching costs nothing; None where the job cannot be captured."""
    if not is_cuda(device):
        return None
    try:
        return seconds(capture(job)[0].replay, device, repeat)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def forget_peak(device: str | torch.device) -> None:
    """Frees what nobody holds any more and starts counting the device's peak anew."""
    gc.collect()
    if is_cuda(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: str | torch.device) -> dict[str, int | None]:
    """Bytes since [`forget_peak`]: in tensors, and taken from the device by torch's allocator. None without CUDA."""
    if not is_cuda(device):
        return {"peak": None, "reserved": None}
    return {
        "peak": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def read_status(key: str, pid: int | str = "self") -> int:
    """Bytes of a line of /proc/PID/status: "VmRSS", resident now, or "VmHWM", the most that ever was.

    Raises:
        OSError: If there is no such process, or no /proc.
        StopIteration: If the process has ended and nobody has waited for it.
    """
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def forget_process_peak() -> None:
    """Sets this process's VmHWM to what is resident now (Linux)."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def return_memory() -> None:
    """Gives memory that was freed back to the system, where that takes asking for: under glibc."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def peak_of(code: str, *arguments: str) -> int:
    """Bytes of the most memory that a Python process held, read while it runs: the figure of a child that is gone
    (ru_maxrss) would count what this process held when it started the child."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, read_status("VmHWM", process.pid))
        except (OSError, StopIteration):
            break
        time.sleep(0.02)
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(arguments) or code} failed with status {process.returncode}")
    return peak


def measure_limits(device: str | torch.device, repeat: int) -> dict:
    """What the device does in a second: FP32 multiply-adds without TF32 ("flops"), those of bf16 ("bf16"), bytes."""
    side, count = (8192, 1 << 29) if is_cuda(device) else (256, 1 << 20)
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = {}
    for name, dtype in (("flops", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        rates[name] = 2 * side**3 / seconds(lambda matrix=matrix: matrix @ matrix, device, repeat)
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    rates["bytes"] = 8 * count / seconds(lambda: target.copy_(source), device, repeat)
    return {"device": device_name(device), **rates}
