"""Runs the tests in environments of their own: the lowest versions of pyproject.toml, the pinned, the newest.

    python tools/matrix.py [--only lowest,newest] [--pythons python3.12,python3.13] [--tests tests/test_codes.py]

Each environment is `.venv-NAME` and is kept. The lowest versions are those of the direct requirements, as uv finds;
torch is the pinned version everywhere. Where it comes with CUDA's libraries, several GB, an environment is not made
without `--cuda`: the table then says so, and what was done in its place. Status 1 if an install or a test failed.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ["torch", "transformers", "peft", "accelerate", "trl", "safetensors", "datasets", "numba", "numpy"]
PIP = ["-m", "pip", "--disable-pip-version-check"]
INSTALL = [*PIP, "install", "--quiet"]


def call(*command: str | Path) -> str:
    """What a command prints. Raises a RuntimeError with the end of its errors where it fails."""
    try:
        done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError as missing:
        raise RuntimeError(str(missing)) from missing
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(" ".join([*(line for line in lines[:-1] if "ERROR" in line), lines[-1]])[:400])
    return done.stdout


def constraints(name: str, scratch: Path) -> Path:
    """The file of versions that one environment is held to; torch is the pinned one in each."""
    pinned = ROOT / "constraints.txt"
    if name == "pinned":
        return pinned
    torch = scratch / "torch.txt"
    torch.write_text("".join(line for line in pinned.read_text().splitlines(True) if line.startswith("torch==")))
    if name == "newest":
        return torch
    lowest, uv = scratch / "lowest.txt", scratch / "uv"
    call(sys.executable, "-m", "venv", uv)
    call(uv / "bin/python", *INSTALL, "uv")
    # Of the direct requirements alone: whether they can be had together is then for pip to say.
    command = [uv / "bin/uv", "pip", "compile", "pyproject.toml", "--extra", "test", "--constraint", torch, "--quiet"]
    version = "{}.{}".format(*sys.version_info)
    call(*command, "--no-deps", "--resolution", "lowest-direct", "--python-version", version, "--output-file", lowest)
    return lowest


def without_torch(python: Path, held: Path, scratch: Path) -> str | None:
    """None if torch can be had without CUDA's libraries; else why no test is run, and what was checked instead."""
    report = scratch / "report.json"
    call(python, *INSTALL, "--dry-run", "--report", report, "-c", held, "torch")
    wanted = [package["metadata"]["name"] for package in json.loads(report.read_text())["install"]]
    if not any(name.startswith("nvidia-") for name in wanted):
        return None
    call(python, *INSTALL, "--dry-run", "-c", held, "-e", ".[test]")
    code = ["cluscomp_peft", "recipes", "tests", "tools"]
    call(python, "-W", "error", "-X", f"pycache_prefix={scratch}", "-m", "compileall", "-q", *code)
    return (
        "not run: torch comes with CUDA's libraries here (--cuda takes them); "
        "every requirement has a release for it and all code compiles without a warning"
    )


def measure(name: str, interpreter: str, tests: str, cuda: bool) -> dict[str, str]:
    """One row of the table: an environment, its versions, and what its tests say."""
    row = {"environment": name, "python": interpreter}
    try:
        row["python"] = call(interpreter, "-c", "import platform; print(platform.python_version())").strip()
    except RuntimeError:
        return {**row, "result": "not run: no such interpreter here"}
    print(f"== {name}, Python {row['python']}", flush=True)
    other = "" if interpreter == sys.executable else "-" + row["python"].rpartition(".")[0]
    folder = ROOT / f".venv-{name}{other}"
    python = folder / "bin/python"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if not python.exists():
                call(interpreter, "-m", "venv", folder)
                call(python, *INSTALL, "--upgrade", "pip")
            held = constraints(name, Path(scratch))
            reason = None if cuda else without_torch(python, held, Path(scratch))
            if reason is not None:
                return {**row, "result": reason}
            call(python, *INSTALL, "-c", held, "torch")
            call(python, *INSTALL, "--upgrade", "--upgrade-strategy", "eager", "-c", held, "-e", ".[test]")
        listed = json.loads(call(python, *PIP, "list", "--format", "json"))
    except RuntimeError as problem:
        return {**row, "result": f"FAILED to install: {problem}"}
    versions = {package["name"]: package["version"] for package in listed}
    row |= {package: versions.get(package, "-") for package in SHOWN}
    command = [str(python), "-m", "pytest", *shlex.split(tests)]
    closing = "no counts printed"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout or ():
            print(line, end="", flush=True)
            if re.search(r"\d+ (passed|failed|errors?)\b.* in ", line):
                closing = line.strip("= \n")
    return {**row, "result": closing if run.returncode == 0 else f"FAILED: status {run.returncode}, {closing}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="lowest,pinned,newest", help="which environments")
    parser.add_argument("--pythons", default="python3.12,python3.13", help="more interpreters, with pinned versions")
    parser.add_argument("--tests", default="", help="arguments of pytest; without, the whole suite")
    parser.add_argument("--cuda", action="store_true", help="also take builds of torch that bring CUDA's libraries")
    arguments = parser.parse_args()
    runs = [(name, sys.executable) for name in arguments.only.split(",") if name]
    runs += [("pinned", python) for python in arguments.pythons.split(",") if python]
    rows = [measure(name, interpreter, arguments.tests, arguments.cuda) for name, interpreter in runs]
    header = ["environment", "python", *SHOWN, "result"]
    print("\n| " + " | ".join(header) + " |\n|" + " - |" * len(header))
    for row in rows:
        print("| " + " | ".join(row.get(column, "-") for column in header) + " |")
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = next(requirement for requirement in requirements if requirement.startswith("torch"))
    print(f"\ntorch is the pinned version in each; others of {allowed} were not run.")
    return int(any(row["result"].startswith("FAILED") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
