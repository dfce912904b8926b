"""Keeps what other packages say to themselves out of the output of our commands.

Libraries warn of each other's deprecated names, announce which accelerator they found, and draw bars into log files. A
user of `cluscomp` can do nothing about any of it. Errors, and every warning that is about this package or its
arguments, pass.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

__all__ = ["hide_bars", "hush", "watched"]

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


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
