"""What the benchmarks share: flags, rows measured in processes of their own, files of results, tables.

A benchmark is a list of jobs, each a dict that says what is measured (`{"method": "gptq", "bits": 3}`), and a function
that measures one and returns a dict of numbers. Job and numbers together are a row of the file:

    results/NAME.json    {"settings": …, "environments": [{"commit", "torch", …}], …, "rows": [{…, "environment": 0}]}

The file is written after every row. A call whose rows are there already measures nothing and prints the table, so a
run that was ended goes on where it stopped, and `--fresh` measures again. Rows of different settings never share a
file.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from timing import device_name, timed

from cluscomp_peft.compress.calibration.text import read_documents

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "results")
PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "numpy", "numba", "bitsandbytes"),
    *("hqq", "faiss-cpu", "scikit-learn"),
)
_OWN = ("results", "fresh", "row")  # flags of this file

Row = dict[str, Any]


# -- flags


def arguments(description: str | None, name: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark.

    Args:
        name (`str`, *optional*): Of the results; None makes it a flag that has to be given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results",
        default=name,
        required=name is None,
        metavar="NAME",
        help="of the file under results/, or a path without .json; - writes none",
    )
    parser.add_argument("--fresh", action="store_true", help="measures again what the file holds already")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # the job that a process of its own measures
    return parser


def settings_of(options: argparse.Namespace, *names: str) -> Row:
    """The named flags, or all but this file's own, as a file of results keeps them: paths without their folders."""
    values = vars(options)
    found = {key: values[key] for key in names or values if key not in _OWN}
    return {key: os.path.basename(os.path.normpath(v)) if _is_path(v) else v for key, v in found.items()}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (os.sep in value or os.path.exists(value))


# -- processes


class RowFailed(RuntimeError):
    """A process that should measure a row ended with an error."""


def child(script: str, job: Row, *flags: str, environment: dict[str, str] | None = None) -> Row:
    """What `script`, called with this process's flags and then `flags`, measures of the job in a process of its own.

    Raises:
        RowFailed: If it ends with another status than 0; the message is the last line that it said.
    """
    command = [sys.executable, script, *sys.argv[1:], *flags, "--row", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise RowFailed((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def answer(options: argparse.Namespace, measure: Callable[[Row], Row]) -> bool:
    """In a process that [`child`] started: measures its job, prints the numbers and returns True."""
    if options.row is None:
        return False
    print(json.dumps(measure(json.loads(options.row))))
    return True


# -- results


class Results:
    """A file of rows.

    Args:
        name (`str`): Of the file under results/, or a path without its ending; "-" for no file.
        settings (`dict`): What all rows share.
        fresh (`bool`): Jobs are measured although the file has their rows.

    Raises:
        SystemExit: If the file holds rows of other settings, and `fresh` is not set.
    """

    def __init__(self, name: str, settings: Row, fresh: bool = False) -> None:
        self.path = None if name == "-" else os.path.join(RESULTS, f"{name}.json")
        self.fresh = fresh
        self.content: Row = {"settings": json.loads(json.dumps(settings)), "environments": [], "rows": []}
        self.failed: list[Row] = []
        self._measured: list[Row] = []  # jobs of this call
        if self.path is None or not os.path.exists(self.path):
            return
        with open(self.path, encoding="utf-8") as file:
            known = json.load(file)
        if known["settings"] == self.content["settings"]:
            self.content = known
        elif not fresh:
            keys = {*known["settings"], *self.content["settings"]}
            other = [key for key in sorted(keys) if known["settings"].get(key) != self.content["settings"].get(key)]
            raise SystemExit(
                f"{self.path} holds rows of other settings ({', '.join(other)}): name another file by --results, or "
                "begin this one anew by --fresh."
            )

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def find(self, job: Row) -> Row | None:
        """The row of a job. Jobs of one file have the same keys, or differ in one that all have."""
        return next((row for row in self.rows if job.items() <= row.items()), None)

    def complete(self, jobs: Iterable[Row], measure: Callable[[Row], Row], workers: int = 1) -> list[Row]:
        """The rows of the jobs. Those that the file has not are measured, `workers` at once, and written one by one.

        A job whose process fails is named on stderr, kept in `failed`, and left out.
        """
        jobs = list(jobs)
        waiting = [job for job in jobs if self._is_due(job)]
        if workers == 1:
            for job in waiting:
                self._take(job, lambda job=job: measure(job))
        else:
            with ThreadPoolExecutor(workers) as pool:
                running = {pool.submit(measure, job): job for job in waiting}
                for future in as_completed(running):
                    self._take(running[future], future.result)
        return [row for row in map(self.find, jobs) if row is not None]

    def _is_due(self, job: Row) -> bool:
        return job not in self._measured and (self.fresh or self.find(job) is None)

    def _take(self, job: Row, result: Callable[[], Row]) -> None:
        try:
            self.add(job, result())
        except RowFailed as error:
            print(f"{json.dumps(job)}: {error}", file=sys.stderr, flush=True)
            self.failed.append(job)

    def add(self, job: Row, measured: Row) -> Row:
        """Puts a row into the file, in the place of the one that the job had."""
        environments, here = self.content["environments"], environment()
        if here not in environments:
            environments.append(here)
        row = {**job, **measured, "environment": environments.index(here)}
        self.content["rows"] = [other for other in self.rows if not job.items() <= other.items()] + [row]
        self._measured.append(job)
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.note()
        return row

    def forget(self, old: Callable[[Row], bool]) -> None:
        """Leaves out rows, in the file too once something is written."""
        self.content["rows"] = [row for row in self.rows if not old(row)]

    def note(self, **values: Any) -> None:
        """Puts values beside the rows, and writes the file."""
        self.content = {**{key: v for key, v in self.content.items() if key != "rows"}, **values, "rows": self.rows}
        if self.path is None:
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(f"{self.path}.tmp", "w", encoding="utf-8") as file:
            file.write(as_text(self.content))
        os.replace(f"{self.path}.tmp", self.path)


def as_text(content: Row) -> str:
    """JSON of a file of results, a line for every row, environment and other entry."""
    lines = []
    for key, value in content.items():
        parts = [json.dumps(part, ensure_ascii=False) for part in value] if isinstance(value, list) else []
        inner = json.dumps(value, ensure_ascii=False) if not parts else "[\n  " + ",\n  ".join(parts) + "\n ]"
        lines.append(f" {json.dumps(key)}: {inner}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def environment(device: str | torch.device | None = None) -> Row:
    """What decides how fast and how right things are: the commit, versions, the machine. `device`: CUDA if any."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found: Row = {"commit": _commit(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = {"device": device_name(device), "processor": _processor(), "threads": torch.get_num_threads()}
    return {**found, "CUDA": torch.version.cuda, **machine}


@cache
def _commit() -> str:
    """The commit of this checkout, "+" behind it where its code differs; the package's version without git."""
    head = _git("rev-parse", "--short", "HEAD")
    if head.returncode:
        return importlib.import_module("cluscomp_peft").__version__
    code = _git("diff", "--quiet", "HEAD", "--", ":/cluscomp_peft", ":/recipes", ":!results")
    return head.stdout.strip() + "+" * bool(code.returncode)


def _git(*arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)
    except OSError:  # no git
        return subprocess.CompletedProcess(arguments, 1, "", "")


@cache
def _processor() -> str:
    if importlib.util.find_spec("llvmlite") is None:
        return platform.machine()
    from llvmlite.binding import get_host_cpu_name

    return get_host_cpu_name()


# -- time


def interleaved(
    jobs: dict[str, Callable[[], object]], device: str | torch.device, rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every job in every round, all of them taking turns, after one call each that counts for nothing.

    What else the machine does then hits all alike; ratios are taken within rounds (see [`ratio`]).
    """
    for job in jobs.values() if warm_up else ():
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(timed(job, device))
    return times


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of the one time over the other."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


# -- tables


def table(rows: Iterable[Row], columns: dict[str, str | Callable[[Row], str]]) -> str:
    """A Markdown table.

    Args:
        columns (`dict`): title → a format of the row's values ("{loss:.4f}"), or a function of the row. A cell whose
            value is missing or None stays empty.
    """

    def cell(column: str | Callable[[Row], str], row: Row) -> str:
        if callable(column):
            return column(row)
        try:
            return column.format_map({key: value for key, value in row.items() if value is not None})
        except KeyError:
            return ""

    lines = [list(columns), *([cell(column, row) for column in columns.values()] for row in rows)]
    ruler = "|---|" + "---:|" * (len(columns) - 1)
    head, *body = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([head, ruler, *body])


# -- text and training


def split_text(path: str, valid: str | None, hold_out: int, tokenizer: Any) -> tuple[list[str], list[str]]:
    """The documents to learn from, and those to measure on: of `valid`, or else the last `hold_out` of `path`."""
    documents = read_documents(path, tokenizer)
    if valid is not None:
        return documents, read_documents(valid, tokenizer)
    return documents[:-hold_out], documents[-hold_out:]


def write_text(path: str, documents: list[str]) -> str:
    """Writes documents as JSON lines, as `cluscomp compress --calibration` reads them; returns the path."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    return path


def shuffled(rows: int, count: int, seed: int) -> torch.Tensor:
    """[count] numbers of rows to train on, int64: every row once before any comes again, in orders of the seed."""
    generator = torch.Generator().manual_seed(seed)
    rounds = 1 + count // rows
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(rounds)])[:count]


def cosine(optimizer: torch.optim.Optimizer, steps: int, warm_up: float = 0.05) -> Any:
    """A schedule of the rate: up over the first share `warm_up` of the steps, and a cosine down to 0 over all."""
    first = max(1, round(warm_up * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / first) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
