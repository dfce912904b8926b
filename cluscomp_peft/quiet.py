"""Keeps what other packages say to themselves out of the output of our commands.

Libraries warn of each other's deprecated names, announce which accelerator they found, and draw bars into log files. A
user of `cluscomp` can do nothing about any of it. Errors, and every warning that is about this package or its
arguments, pass.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

__all__ = ["hide_bars", "hush", "one_object", "watched"]

_OTHERS = ("accelerate", "bitsandbytes", "datasets", "deepspeed", "kernels", "peft", "torch", "transformers", "trl")
# DeepSpeed prints to standard output that it found no GPU as soon as a trainer imports it.
_LOGGERS = ("DeepSpeed", "bitsandbytes", "kernels")


def watched() -> bool:
    """Whether a terminal shows standard error, where bars are drawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def hush() -> None:
    """Silences other packages in this process, which must be that of a command; best before they are imported."""
    for name in _OTHERS:
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{name}(\.|$)")
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_error)  # its level is set again when the package is imported
    if not watched():
        hide_bars()


def hide_bars() -> None:
    """No bars of transformers, datasets and the hub's client from here on."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers asks the hub's client, too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars

        disable_progress_bars()


@contextmanager
def one_object(wanted: bool = True) -> Iterator[dict[str, Any]]:
    """Where it is `wanted`, standard output is one line of JSON: what is put into the dictionary that this yields. It
    is printed in the end, if there is anything and no error; what others print meanwhile goes to standard error."""
    result: dict[str, Any] = {}
    if not wanted:
        yield result
        return
    with redirect_stdout(sys.stderr):
        yield result
    if result:
        print(json.dumps(result), flush=True)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
