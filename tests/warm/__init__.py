"""A Python for tests that need processes of their own: forked from one that has imported the libraries, not started.

Importing torch, transformers and PEFT takes about 9 s of a core, most of such tests less than one. [`python`] names
an executable to use in the place of `sys.executable`, which understands `-c`, `-m` and a script. Its process has the
arguments, environment, folder, open files and signals that it was started with; only the libraries are there already.
Tests of what is imported, and when, take `sys.executable` or the level "torch". Where there is no Linux, [`python`] is
`sys.executable`.
"""

from __future__ import annotations

import atexit
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["python"]

HERE = Path(__file__).parent
# What takes long to import in each level: that of others without a model, and all that a command of ours imports.
LEVELS = {
    "torch": ["torch._inductor.compile_fx", "torch.distributed.tensor", "torch.distributed.checkpoint", "numpy"],
    "models": [
        "transformers.models.llama.modeling_llama",
        "peft",
        "cluscomp_peft.tuner.model",
        "cluscomp_peft.hf.quantizer",
        "cluscomp_peft.cli",
    ],
    "trl": ["datasets", "trl.trainer.sft_trainer", "cluscomp_peft.finetune.training", "accelerate.commands.launch"],
    "deepspeed": ["deepspeed"],
}
# As the tests begin, not as one of them has changed it. DeepSpeed chooses a device as it is imported.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
_made: dict[str, str] = {}


def python(level: str = "models") -> str:
    """The path of a Python that has imported a level and those before it; the first call starts it."""
    if sys.platform != "linux":
        return sys.executable
    if level not in _made:
        names = list(LEVELS)
        before = names.index(level) - 1
        parent = python(names[before]) if before >= 0 else sys.executable
        _made[level] = _start(parent, level)
    return _made[level]


def _start(parent: str, level: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    command = [parent, str(HERE / "server.py"), str(folder), *LEVELS[level]]
    server = subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=HERE.parents[1]
    )
    ready, _, _ = select.select([server.stdout], [], [], 300)
    if not ready or server.stdout.readline() != b"ready\n":
        server.kill()
        raise RuntimeError(f"the warm Python of level {level!r} did not start: its error is above")
    atexit.register(_stop, server, folder)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -ISE "{HERE / "client.py"}" "{folder}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def _stop(server: subprocess.Popen, folder: Path) -> None:
    server.stdin.close()
    server.wait(60)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
