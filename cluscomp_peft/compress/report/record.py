"""`cluscomp_report.json`: what `compress` noted of a checkpoint while it made it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..stream.journal import put_file
from .page import render_report

__all__ = ["PAGE_NAME", "REPORT_NAME", "read_report", "write_page"]

REPORT_NAME, PAGE_NAME = "cluscomp_report.json", "report.html"


def read_report(folder: str) -> dict[str, dict[str, Any]]:
    """The report of a compressed checkpoint.

    Returns:
        `dict`: `summary`, `matrices`, and with calibration `blocks` and `losses`; all empty where there is no report.

    Raises:
        ValueError: If the report is damaged.
    """
    path = os.path.join(folder, REPORT_NAME)
    if not os.path.isfile(path):
        return {"summary": {}, "matrices": {}, "blocks": {}, "losses": {}}
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        return {
            "summary": dict(report["summary"]),
            "matrices": {name: dict(entry) for name, entry in dict(report["matrices"]).items()},
            "blocks": {name: dict(entry) for name, entry in dict(report.get("blocks") or {}).items()},
            "losses": dict(report.get("losses") or {}),
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it, it only holds notes.") from error


def write_page(path: str, page: str, title: str | None = None) -> None:
    """Writes the report of a compressed checkpoint as an HTML page with plots.

    Args:
        path (`str`): Folder or hub id of the checkpoint.
        page (`str`): File to write.
        title (`str`, *optional*): Of the page; by default the name of the folder.

    Raises:
        ValueError: If the checkpoint has no report.
    """
    folder = path if os.path.isdir(path) else snapshot_download(path, allow_patterns=["*.json"])
    report = read_report(folder)
    if not report["matrices"]:
        raise ValueError(f"{path} has no {REPORT_NAME}, which the page is drawn from; compress the model again.")
    text = render_report(title or os.path.basename(os.path.abspath(path)), report)
    put_file(page, lambda name: Path(name).write_text(text, encoding="utf-8"))
