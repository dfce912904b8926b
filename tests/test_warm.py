"""The Python that tests start processes with (`tests/warm`) is one, but for what it has imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm import python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and hands files over")


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([python("torch"), *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("import sys; sys.exit('no')", 1),
        ("1 / 0", 1),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("raise KeyboardInterrupt", -2),
    ],
)
def test_a_process_ends_as_that_of_python_does(code, status):
    ours, theirs = run("-c", code), subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ours.returncode == theirs.returncode == status
    assert (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)


REPORT = "import json, os, sys; print(json.dumps([sys.argv, sys.path[:2], os.getcwd(), os.environ['X'], __name__]))"


@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_a_process_has_what_it_was_given(tmp_path, kind):
    (tmp_path / "report.py").write_text(REPORT)
    command = {"-c": ["-c", REPORT], "-m": ["-m", "report"], "script": ["report.py"]}[kind]
    options = dict(cwd=tmp_path, env={**os.environ, "PYTHONPATH": "/other", "X": "é"}, capture_output=True, text=True)
    ours, theirs = (
        subprocess.run([one, "-u", *command, "a b"], **options) for one in (python("torch"), sys.executable)
    )
    assert theirs.returncode == 0 and (ours.stdout, ours.stderr) == (theirs.stdout, theirs.stderr)


def test_libraries_are_imported_and_ours_are_not():
    done = run(
        "-c", "import sys; print('torch' in sys.modules, 'cluscomp_peft' in sys.modules, 'peft' in sys.modules)"
    )
    assert done.stdout.split() == ["True", "False", "False"]
    done = subprocess.run(
        [python(), "-c", "import sys; print('cluscomp_peft' in sys.modules)"], stdout=subprocess.PIPE
    )
    assert done.stdout.split() == [b"True"]


def test_open_files_are_those_of_whoever_starts_it():
    reading, writing = os.pipe()
    done = run(
        "-c", f"import os, sys; os.write({writing}, sys.stdin.buffer.read())", input="hello", pass_fds=[writing]
    )
    os.close(writing)
    with open(reading, "rb") as file:
        assert done.returncode == 0 and file.read() == b"hello"


WAIT = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *given: sys.exit(5))
print(os.getpid(), flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 5), (signal.SIGKILL, -9)])
def test_signals_reach_it_and_it_does_not_outlive_whoever_started_it(number, status):
    process = subprocess.Popen([python("torch"), "-c", WAIT], stdout=subprocess.PIPE)
    worker = Path("/proc") / process.stdout.readline().decode().strip()
    assert worker.exists()
    process.send_signal(number)
    assert process.wait(60) == status
    process.stdout.close()
    ends = time.monotonic() + 60
    while worker.exists() and time.monotonic() < ends:
        time.sleep(0.01)
    assert not worker.exists()
