"""Rows that are written as they come, and a watch over the process that makes them.

A part of the suite is a list of named rows, each made by a function. One that raises becomes a row with "error", its
traceback goes into a log, and the next row follows. Some faults take the process along: an illegal address leaves a
CUDA context that refuses everything after it, a kernel may hang, a library may abort. So [`supervise`] runs a part in
a process of its own, ends it when a row takes too long, and starts it again for the rows that are left.

    OUTPUT/NAME.json    {"settings", "environment", "running", "missing", "rows": [{"name", "seconds", …}]}
    OUTPUT/NAME.log     tracebacks and the end of what a process that died had to say

Nothing here imports torch, so the process that watches starts at once and holds no memory of the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["RESTART", "Report", "supervise"]

RESTART = 75  # exit status of a process that asks for another one to make the rows that are left
_POLL = 0.2  # seconds


class Report:
    """The file of a part.

    Args:
        folder (`str`): Where it lies; made if it is not there.
        name (`str`): Of the part.
        minutes (`float`, *optional*): After so many, rows are left out and named under "missing"; counted from the
            first process on.
    """

    def __init__(self, folder: str | Path, name: str, minutes: float | None = None) -> None:
        self.path = Path(folder) / f"{name}.json"
        self.log_path = self.path.with_suffix(".log")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.minutes = minutes
        self.content: dict[str, Any] = {"started": time.time(), "missing": [], "rows": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def rows(self) -> list[dict]:
        return self.content["rows"]

    @property
    def failed(self) -> list[str]:
        """Names of the rows with an error."""
        return [row["name"] for row in self.rows if "error" in row]

    def note(self, **values: Any) -> None:
        """Puts values beside the rows."""
        self.content.update(values)
        self.write()

    def run(self, name: str, job: Callable[[], dict | None], show: Callable[[dict], str] | None = None) -> dict | None:
        """The row of a job, or None if it was left out because an earlier process has it or time is over.

        Args:
            name (`str`): Of the row; no two rows share one.
            job (`Callable`): Returns what the row holds.
            show (`Callable`, *optional*): The row in words, for the screen.
        """
        if any(row["name"] == name for row in self.rows):
            return None
        if self.minutes is not None and time.time() - self.content["started"] > 60 * self.minutes:
            if not self.content["missing"]:
                print(f"{name:<40} left out, as all that follows: {self.minutes:g} minutes are over", flush=True)
            self.content["missing"].append(name)
            self.write()
            return None
        self.note(running={"name": name, "since": time.time()})
        row: dict[str, Any] = {"name": name}
        started = time.perf_counter()
        try:
            row.update(job() or {})
        except Exception as error:
            row["error"] = one_line(error)
            with open(self.log_path, "a", encoding="utf-8") as log:
                log.write(f"--- {name}\n{traceback.format_exc()}\n")
        row["seconds of all"] = time.perf_counter() - started
        self.content["running"] = None
        self.add(row)
        words = f"FAILED: {row['error']}" if "error" in row else show(row) if show else _words(row)
        print(f"{name:<40} {words}", flush=True)
        if "error" in row and _device_is_lost():
            print("the device's context is lost; going on in a new process", flush=True)
            raise SystemExit(RESTART)
        return row

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def supervise(
    command: list[str], folder: str | Path, name: str, row_limit: float = 240.0, part_limit: float = 3600.0
) -> list[str]:
    """Runs a process that fills the report `name`, again until one ends with status 0; returns what failed.

    Args:
        command (`list[str]`): The process; it makes only those rows that the report does not have.
        folder (`str`): Of the report.
        name (`str`): Of the part.
        row_limit (`float`): Seconds after which a row counts as hanging.
        part_limit (`float`): Seconds for the whole part.
    """
    report = Report(folder, name)
    for path in (report.path, report.log_path):
        path.unlink(missing_ok=True)
    ends = time.time() + part_limit
    before = 0
    while True:
        process = subprocess.Popen(command)
        reason = _watch(process, report.path, row_limit, ends)
        report = Report(folder, name)
        running = report.content.get("running")
        if process.returncode == 0:
            return report.failed
        if running:
            report.content["running"] = None
            end = reason or f"the process ended with status {process.returncode}"
            report.add({"name": running["name"], "error": end})
            print(f"{running['name']:<40} FAILED: {end}", flush=True)
        if time.time() >= ends or len(report.rows) == before:
            # Without a new row another process would end as this one did.
            report.note(missing=[*report.content["missing"], "all that follows"])
            print(f"{name}: stopped ({reason or f'status {process.returncode}'})", flush=True)
            return [*report.failed, name]
        before = len(report.rows)


def _watch(process: subprocess.Popen, path: Path, row_limit: float, ends: float) -> str | None:
    """Waits for a process; why it was ended, None if it ended by itself."""
    while process.poll() is None:
        time.sleep(_POLL)
        try:
            running = json.loads(path.read_text(encoding="utf-8")).get("running")
        except FileNotFoundError:
            running = None
        over = running is not None and time.time() - running["since"] > row_limit
        if over or time.time() > ends:
            process.kill()
            process.wait()
            return f"ended after {row_limit:.0f} s" if over else "the time of the part was over"
    return None


def one_line(error: BaseException, width: int = 200) -> str:
    """An error's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:width]


def _device_is_lost() -> bool:
    """Whether the CUDA context of this process answers with an error to everything."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception as error:
        return not isinstance(error, torch.OutOfMemoryError)
    return False


def _words(row: dict) -> str:
    facts = (f"{key} {_value(value)}" for key, value in row.items() if key not in ("name", "seconds of all"))
    return f"ok  {row['seconds of all']:6.1f} s  " + ", ".join(facts)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
