"""Two minutes on a new device: does everything that a user does work there?

    python recipes/benchmarks/gpu/smoke.py --output smoke
    python recipes/benchmarks/gpu/smoke.py --device cpu --output smoke      # tries the script itself, tiny

Steps are in smoke_steps.py. Each is guarded and its result written to OUTPUT/smoke.json as it comes (see report.py);
the exit status is 1 if one failed. `--steps` runs some of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
sys.path.append(str(HERE.parents[2]))  # where the package is not installed

from report import Report, supervise  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="smoke", help="folder")
    parser.add_argument("--steps", nargs="+", help="names of steps; all by default")
    parser.add_argument("--step-limit", type=float, default=150, help="seconds after which a step counts as hanging")
    parser.add_argument("--checkpoint", help="used by the script itself")
    options = parser.parse_args()
    if options.checkpoint is not None:
        from smoke_steps import run

        run(options.device, options.checkpoint, Report(options.output, "smoke"), options.steps)
        return
    # Before any process makes a handle of cuBLAS: with it the same run gives the same bytes.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--checkpoint", folder]
        failed = supervise(command, options.output, "smoke", row_limit=options.step_limit)
    print(f"failed: {', '.join(failed)}" if failed else "all steps passed")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
