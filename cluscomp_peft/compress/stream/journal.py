"""What a long run has done so far, so that it can be killed at any moment and go on later.

    OUT's parent /  .OUT.partial /  journal.json        settings and what is done; replaced as a whole after each shard
                                    model-00001-of-…    finished shards, under their final names
                                    dense.0 …           activations at the boundary of the last finished shard
                                    lock                held by the run that is at work

Everything is written under a temporary name first, and the journal last, so what it names is whole. A journal is the
first thing that a run writes, so a folder without one of ours belongs to somebody else, whatever it is called: it is
neither written into nor cleared.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from safetensors.torch import save_file

__all__ = [
    "JOURNAL",
    "LOCK",
    "Journal",
    "disk_errors",
    "hold_lock",
    "put_file",
    "read_journal",
    "replace_file",
    "save_tensors",
]

JOURNAL, LOCK = "journal.json", "lock"
_MADE_BY = "cluscomp compress"


class Journal:
    """The journal of a working folder, which it creates and locks.

    Args:
        folder (`str`): Working folder.
        settings (`dict`): JSON; a folder with other settings belongs to another job.
        anew (`bool`): Forget an unfinished run with other settings.

    Attributes:
        content (`dict`): What [`commit`] wrote last; empty at first.

    Raises:
        ValueError: If another run is at work there, the folder holds an unfinished run with other settings or
            something that is no run of ours, or its journal is damaged.
    """

    def __init__(self, folder: str, settings: dict[str, Any], anew: bool = False) -> None:
        self.folder = folder
        self._settings = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {}
        os.makedirs(folder, exist_ok=True)
        self._refuse_what_is_not_ours()
        self._lock = hold_lock(folder)
        try:
            self._open(anew)
        except BaseException:
            self.close()
            raise

    def _refuse_what_is_not_ours(self) -> None:
        if os.path.islink(self.folder):
            raise ValueError(f"{self.folder}, where this run would work, is a symbolic link; remove it.")
        # What a run leaves that was killed before its first journal was there.
        others = set(os.listdir(self.folder)) - {LOCK, f"{JOURNAL}.tmp"}
        if others and read_journal(self.folder) is None:
            raise ValueError(
                f"{self.folder}, where this run would work, holds files that are no unfinished run "
                f"({', '.join(sorted(others)[:3])}); move or remove them."
            )

    def _open(self, anew: bool) -> None:
        known = read_journal(self.folder)
        if known and known["settings"] != self._settings and not anew:
            keys = sorted({*known["settings"], *self._settings})
            changed = [key for key in keys if known["settings"].get(key) != self._settings.get(key)]
            raise ValueError(
                f"{self.folder} holds an unfinished run with another {', '.join(changed)}; finish it with its own "
                "command, or start anew with --overwrite."
            )
        if known and known["settings"] == self._settings:
            self.content = known["content"]
        elif known and "aside" in known["content"]:
            self.content = {"aside": known["content"]["aside"]}  # a checkpoint of the user's, not of that run
        self._write()
        for entry in list(os.scandir(self.folder)):
            if entry.name not in (LOCK, JOURNAL) and (not self._begun() or entry.name.endswith(".tmp")):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.remove(entry.path)

    def _begun(self) -> bool:
        return bool(self.content.keys() - {"aside"})

    def commit(self, **values: Any) -> None:
        """Adds values to the content and writes it."""
        self.content.update(values)
        self._write()

    def _write(self) -> None:
        text = json.dumps({"made_by": _MADE_BY, "settings": self._settings, "content": self.content})

        def write(path: str) -> None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)

        replace_file(os.path.join(self.folder, JOURNAL), write)

    def discard(self) -> None:
        """Removes the folder and lets go of the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Lets go of the lock."""
        self._lock.close()


def read_journal(folder: str) -> dict[str, Any] | None:
    """`settings` and `content` of the journal of a folder; None if it has none, or one that no run of ours wrote.

    Raises:
        ValueError: If it is damaged.
    """
    path = os.path.join(folder, JOURNAL)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}), so nothing says whose {folder} is; remove it yourself if it is an "
            "unfinished run."
        ) from error
    if not isinstance(known, dict) or known.get("made_by") != _MADE_BY:
        return None
    whole = isinstance(known.get("settings"), dict) and isinstance(known.get("content"), dict)
    return known if whole else None


def hold_lock(folder: str) -> IO[bytes]:
    """The lock of a folder, held until it is closed; its file is made where there is none.

    Raises:
        ValueError: If another run holds it, or what has its name is no lock.
        OSError: If this system has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise OSError(
            "a run locks its folder with fcntl, which this system lacks; run it on Linux or macOS."
        ) from error
    path = os.path.join(folder, LOCK)
    busy = f"another run is at work in {folder}, or has just ended; wait for it, or choose another folder."
    try:
        # A pipe of that name would wait for a reader, and a link lead elsewhere.
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "rb")
    except FileNotFoundError as error:
        raise ValueError(busy) from error
    try:
        if not stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
            raise ValueError(f"{path} is no file; remove it.")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(busy) from error
        # A run that ends takes folder and lock away; a lock that came too late holds a file that is no longer there.
        if not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(lock.fileno())):
            raise ValueError(busy)
    except BaseException:
        lock.close()
        raise
    return lock


def save_tensors(path: str, tensors: dict[str, Any]) -> None:
    """Writes a safetensors file, whole or not at all."""
    replace_file(path, lambda temporary: _save(tensors, temporary))


def _save(tensors: dict[str, Any], path: str) -> None:
    with disk_errors(path):
        save_file(tensors, path, metadata={"format": "pt"})


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turns what libraries written in Rust say of a full or broken disk into the `OSError` that it is everywhere else:
    they have its number in their text alone."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # tokenizers raises no class of its own
        number = re.search(r"(?:code:|os error) (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number.group(1)), os.strerror(int(number.group(1))), path) from error


def replace_file(path: str, write: Callable[[str], object]) -> None:
    """Writes a file under a temporary name, brings it to the disk, and renames it. For folders of ours: a file of the
    temporary name, which a killed run may have left, is overwritten."""
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        _bring_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def put_file(path: str, write: Callable[[str], object]) -> None:
    """As [`replace_file`], for folders of the user's, where any other name may be taken."""
    parent, name = os.path.split(os.path.abspath(path))
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}.") as scratch:
        temporary = os.path.join(scratch, name)
        write(temporary)
        _bring_to_disk(temporary)
        os.replace(temporary, path)


def _bring_to_disk(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
