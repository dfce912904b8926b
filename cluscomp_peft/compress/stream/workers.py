"""Several processes, each of which makes one shard after another.

    parent      lock, journal, progress bar     ── shard ──►              worker i     its share of the cores, or GPU
                                                ◄── weights clustered, report, error ──

The bytes do not depend on which process makes a shard. A run that ended early continues with the shards that its
journal does not name. If a worker dies, the run ends with an error. If the parent dies, its workers end too, so that
no process writes into a folder whose lock is free.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import connection
from typing import Any

import torch

from .shards import Job, compress_shard, small_memory
from .split import Shard

__all__ = ["Advance", "compress_in_workers", "peak_memory", "visible_devices"]

Advance = Callable[[int], object]
_PATIENCE = 10  # seconds for idle workers to end by themselves


def compress_in_workers(
    shards: Sequence[Shard],
    job: Job,
    workers: int,
    devices: Sequence[torch.device],
    progress: Advance,
    finished: Callable[[Shard, dict[str, Any]], object],
) -> int:
    """Makes shards in `workers` processes, each with its share of the threads that `job` names.

    Args:
        shards: Handed out in turn, each to the first worker that is idle.
        job ([`Job`]): As for one process.
        workers (`int`): Processes, at most as many as there are shards.
        devices: Worker i clusters on devices[i % len(devices)].
        progress: Called in this process with the number of weights of every matrix that is clustered.
        finished: Called in this process with a shard that is written, and its report.

    Returns:
        `int`: Bytes of the most memory that the workers held, added up.

    Raises:
        ChildProcessError: If a worker dies.
        Exception: What a worker raised, with its traceback as a note.
    """
    threads = job.settings.threads or torch.get_num_threads()
    job = replace(job, settings=replace(job.settings, threads=max(1, threads // workers)))
    waiting, team = list(reversed(shards)), []
    try:
        for number in range(min(workers, len(shards))):
            team.append(_Worker(number, job, devices[number % len(devices)]))
            team[-1].take(waiting.pop())
        busy = {worker.link: worker for worker in team}
        while busy:
            for link in connection.wait(list(busy)):
                worker = busy[link]  # type: ignore[index]
                kind, value = worker.hear()
                if kind == "progress":
                    progress(value)
                elif kind == "error":
                    raise value
                elif kind == "done":
                    assert worker.shard is not None
                    finished(worker.shard, value)
                    if waiting:
                        worker.take(waiting.pop())
                    else:
                        del busy[worker.link]
        for worker in team:
            worker.dismiss()
        return sum(worker.memory for worker in team)
    finally:
        for worker in team:
            worker.end()


def visible_devices(device: str | None) -> list[torch.device]:
    """The devices that a user's choice means: all GPUs for "cuda", and for None where there are any, else one device.

    Raises:
        ValueError: If it is no device, or a GPU that is not there.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}.") from error
    if place.type != "cuda":
        return [place]
    count = torch.cuda.device_count()
    if (place.index or 0) >= count:
        raise ValueError(f"device {device} is not there, PyTorch sees {count} GPUs; choose another one, or cpu.")
    return [place] if place.index is not None else [torch.device("cuda", index) for index in range(count)]


def peak_memory() -> int:
    """Bytes of the most memory that this process held."""
    try:
        # ru_maxrss of a young process includes what the one that started it held.
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # which Windows lacks

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Worker:
    """A process and the pipe to it, as the parent sees them."""

    def __init__(self, number: int, job: Job, device: torch.device) -> None:
        self.number, self.memory, self.shard = number, 0, None  # type: int, int, Shard | None
        self._started = False
        context = multiprocessing.get_context("spawn")
        self.link, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, job, device), name=f"cluscomp-worker-{number}", daemon=True
        )
        self.process.start()
        theirs.close()  # so that the pipe ends when the worker does

    def take(self, shard: Shard) -> None:
        self.shard = shard
        try:
            self.link.send(shard)
        except OSError as error:
            raise self._dead() from error

    def hear(self) -> tuple[str, Any]:
        try:
            kind, value, self.memory = self.link.recv()
        except (EOFError, OSError) as error:
            raise self._dead() from error
        self._started = True
        return kind, value

    def dismiss(self) -> None:
        """Lets a worker that is idle end by itself."""
        self.link.close()
        self.process.join(_PATIENCE)

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.link.close()

    def _dead(self) -> ChildProcessError:
        self.process.join(_PATIENCE)
        status = self.process.exitcode
        who = f"worker {self.number} (process {self.process.pid})"
        if not self._started:
            return ChildProcessError(
                f"{who} could not start and ended with status {status}; what it printed says why. A script that asks "
                'for workers must do so under `if __name__ == "__main__":`.'
            )
        how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        assert self.shard is not None
        return ChildProcessError(
            f"{who} {how} while it made {self.shard.file}. Finished shards are kept: run the same command again, it "
            "goes on from there; with fewer workers if memory ran out."
        )


@small_memory()
def _work(link: connection.Connection, job: Job, device: torch.device) -> None:
    """What a worker does: shards in, reports out, until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(job.settings.threads or 1)
    lock = threading.Lock()

    def say(kind: str, value: Any) -> None:
        with lock:  # matrices that are clustered beside each other all report
            link.send((kind, value, peak_memory()))

    say("started", None)
    while True:
        try:
            shard = link.recv()
        except EOFError:
            return
        try:
            say("done", compress_shard(shard, job, device, lambda count: say("progress", count)))
        except Exception as error:
            say("error", _portable(error))


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error as another process can raise it, with its traceback as a note."""
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker:\n{traceback.format_exc()}")
    return error
