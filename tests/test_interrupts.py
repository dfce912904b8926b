"""Ctrl-C in the middle of an import."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time

import pytest

from cluscomp_peft import cli
from cluscomp_peft.interrupts import wait_for_imports

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on Unix")

SWALLOWS = """
import os, signal, time
survived = False
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    survived = True
except BaseException:
    pass
"""


@pytest.fixture
def swallowing(tmp_path, monkeypatch):
    """The name of a module that is interrupted while it is imported, and does not care."""
    (tmp_path / "swallows_interrupts.py").write_text(SWALLOWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "swallows_interrupts"
    sys.modules.pop("swallows_interrupts", None)


def test_an_interrupt_waits_for_the_end_of_an_import(swallowing):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), wait_for_imports():
        importlib.import_module(swallowing)
        time.sleep(10)
    assert sys.modules[swallowing].survived and signal.getsignal(signal.SIGINT) is before


def test_the_command_ends_as_interrupted(swallowing, monkeypatch, capsys):
    def run(*args, **kwargs):
        importlib.import_module(swallowing)
        time.sleep(10)

    monkeypatch.setattr("cluscomp_peft.compress.checkpoint.compress_checkpoint", run)
    assert cli.main(["compress", "source", "target"]) == 130
    assert "interrupted; the same command goes on from there" in capsys.readouterr().err


def test_elsewhere_it_is_raised_at_once_and_others_handlers_are_left_alone():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), wait_for_imports():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert time.monotonic() - started < 5
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        with wait_for_imports():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [True]
