"""Errors that say something else than what they are about."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from cluscomp_peft import cli
from cluscomp_peft.failures import in_words, ran_out_of_memory

LIMITED = """
import resource, sys, warnings
from cluscomp_peft.clustering import engines
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[1]) * 2**20,) * 2)
try:
    import llvmlite.binding as binding
    binding.get_host_cpu_name()
except Exception as error:
    engines.give_up("cpu", error)
"""


def raised_from(cause: BaseException) -> OSError:
    try:
        try:
            raise cause
        except BaseException:
            raise OSError("Could not find/load shared object file 'libllvmlite.so'")  # noqa: B904  as llvmlite does
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (raised_from(OSError("libllvmlite.so: failed to map segment from shared object")), True),
        (raised_from(MemoryError()), True),
        (raised_from(OSError("libllvmlite.so: cannot open shared object file: No such file or directory")), False),
        (ValueError("the text says: cannot allocate memory"), False),
        (ImportError("No module named 'llvmlite'"), False),
    ],
)
def test_what_is_about_memory(error, memory):
    assert ran_out_of_memory(error) == memory
    why, cure = in_words(error, "Reinstall numba")
    assert (
        ("memory" in why and "ulimit" in cure)
        if memory
        else (why, cure)
        == (
            f"{type(error).__name__}: {error}",
            "Reinstall numba",
        )
    )


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")
def test_a_limit_is_not_called_a_missing_library():
    pytest.importorskip("llvmlite")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", LIMITED, "40"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "not enough memory to load or run the compiler" in done.stderr and "Reinstall" not in done.stderr


@pytest.mark.parametrize("error", [MemoryError("10 GB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_the_command_says_that_memory_ran_out(error, monkeypatch, capsys):
    def run(*args, **kwargs):
        raise error

    monkeypatch.setattr("cluscomp_peft.compress.checkpoint.compress_checkpoint", run)
    monkeypatch.setattr("cluscomp_peft.compress.checkpoint.check_target", run, raising=False)
    assert cli.main(["compress", "source", "target"]) == 1
    assert "cluscomp compress: out of memory" in capsys.readouterr().err


def test_another_error_is_not_one_of_memory(monkeypatch):
    def run(*args, **kwargs):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("cluscomp_peft.compress.checkpoint.compress_checkpoint", run)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["compress", "source", "target"])
