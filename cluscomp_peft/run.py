"""Runs a script or module with the plug-in imported first, for tools that cannot be edited.

python -m cluscomp_peft.run train.py --flags          as python train.py --flags
python -m cluscomp_peft.run -m trl.scripts.sft …      as python -m trl.scripts.sft …
"""

from __future__ import annotations

import os
import runpy
import sys

import cluscomp_peft  # noqa: F401  (importing registers)

__all__ = ["main"]

_USAGE = "usage: python -m cluscomp_peft.run SCRIPT [ARGUMENTS]  or  python -m cluscomp_peft.run -m MODULE [ARGUMENTS]"


def main() -> None:
    """Runs the script or module that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or (arguments[0] == "-m" and len(arguments) < 2):
        sys.exit(_USAGE)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(arguments[0]):
        sys.exit(f"{arguments[0]} is not a file.\n{_USAGE}")
    sys.argv = arguments
    # As `python SCRIPT` does: the script's folder comes first on the path.
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
