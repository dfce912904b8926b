"""Are the kernels right on a GPU, how near are they to its limits, and how long does a 70B take?

    python recipes/benchmarks/gpu/suite.py --output results_of_today
    python recipes/benchmarks/gpu/suite.py --parts kernels generation --minutes 3
    python recipes/benchmarks/gpu/suite.py --device cpu --scale 0.01 --output try     # the script itself, tiny

The parts, in this order:

    kernels       decode, linear, codebook_grad at the shapes of 8B and 70B: right? time against dense and the limits
    generation    tokens a second of an 8B, call by call and from a CUDA graph; prefill of a long prompt
    training      steps of an 8B, against dense, LoRA and (if bitsandbytes is installed) QLoRA
    large         steps of a 70B at 2 bits in 24 GiB and at 4 bits in 48 GiB
    kmeans        the matrices of a 70B, and what all of them take

A part is a process of its own that is watched and, if it dies, started again for the rows that are left (report.py).
Each row is written to OUTPUT/PART.json as it comes. A part that has used up its minutes leaves out the rest and says
what is missing. The exit status is 1 if a row failed or a kernel is wrong.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
sys.path.append(str(HERE.parents[2]))  # where the package is not installed

from report import Report, supervise  # noqa: E402

# Minutes for each on an H100 with 16 cores; kernels first, because all else stands on them.
PARTS = {"kernels": 3.5, "generation": 4.0, "training": 3.0, "large": 4.0, "kmeans": 3.0}
MODULES = {"large": "part_training"}


def main() -> None:
    options = arguments().parse_args()
    if options.part is not None:
        run_part(options)
        return
    failed = []
    for part in options.parts:
        minutes = options.minutes or PARTS[part]
        print(f"== {part}, {minutes:g} minutes", flush=True)
        command = [sys.executable, *sys.argv, "--part", part]
        found = supervise(command, options.output, part, options.row_limit, 60 * minutes + options.row_limit)
        failed += [f"{part}: {name}" for name in found]
    print("\n".join(["failed:", *failed]) if failed else "every row was made")
    raise SystemExit(1 if failed else 0)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--output", default=str(HERE.parent / "results" / "gpu"), help="folder")
    parser.add_argument("--minutes", type=float, help=f"for each part; by default {PARTS}")
    parser.add_argument("--row-limit", type=float, default=240, help="seconds after which a row counts as hanging")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=float, default=1.0, help="of widths and depths, for tries")
    parser.add_argument("--repeat", type=int, default=3, help="timings of which the median counts")
    parser.add_argument("--models", nargs="+", choices=["8B", "70B"], default=["8B", "70B"], help="kernels: shapes of")
    parser.add_argument("--bits", nargs="*", type=float, default=[4.0, 3.0, 2.0], help="kernels, kmeans")
    parser.add_argument("--methods", nargs="+", help="generation, training; see random_models.py")
    parser.add_argument("--length", type=int, default=1024, help="training: tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1, help="training: sequences of a step")
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 8], help="kmeans: whose steps are looked into")
    parser.add_argument("--quality", default="default", help="kmeans: of the matrices")
    parser.add_argument("--part", choices=[*PARTS], help="used by the script itself")
    return parser


def run_part(options: argparse.Namespace) -> list[str]:
    """Makes the rows of a part in this process; returns the names of those that failed."""
    import torch
    from harness import environment
    from timing import is_cuda, quiet

    if is_cuda(options.device) and not torch.cuda.is_available():
        raise SystemExit(f"device {options.device!r}: there is no CUDA device here.")
    quiet()
    report = Report(options.output, options.part, options.minutes or PARTS[options.part])
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "part", "parts")}
    report.note(settings=settings, environment=environment(options.device))
    module = import_module(MODULES.get(options.part, f"part_{options.part}"))
    getattr(module, options.part)(report, options)
    return report.failed


if __name__ == "__main__":
    main()
