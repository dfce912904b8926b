"""What a long run has done so far, so that it can be killed at any moment and go on later.

    OUT's parent /  .OUT.partial /  journal.json        settings and what is done; replaced as a whole after each unit
                                    model-00001-of-…    finished shards, under their final names
                                    dense.0 …           activations at the boundary of the last finished unit
                                    lock                held by the run that is at work

Everything is written under a temporary name first, and the journal last, so what it names is whole. What lies in the
folder without a journal is nobody's, and is cleared away.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

__all__ = ["JOURNAL", "LOCK", "Journal", "replace_file", "save_tensors"]

JOURNAL, LOCK = "journal.json", "lock"


class Journal:
    """The journal of a working folder, which it creates and locks.

    Args:
        folder (`str`): Working folder.
        settings (`dict`): JSON; a folder with other settings belongs to another job.
        anew (`bool`): Forget an unfinished run with other settings.

    Attributes:
        content (`dict`): What [`commit`] wrote last; empty at first.

    Raises:
        ValueError: If another run is at work there, the folder holds an unfinished run with other settings, or its
            journal is damaged.
    """

    def __init__(self, folder: str, settings: dict[str, Any], anew: bool = False) -> None:
        self.folder = folder
        self._settings = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {}
        os.makedirs(folder, exist_ok=True)
        self._lock = open(os.path.join(folder, LOCK), "a")
        try:
            self._take_lock()
            self._open(anew)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        busy = f"another run is at work in {self.folder}, or has just ended; wait for it, or choose another folder."
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(busy) from error
        # A run that ends takes folder and lock away; a lock that came too late holds a file that is no longer there.
        path = os.path.join(self.folder, LOCK)
        if not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(self._lock.fileno())):
            raise ValueError(busy)

    def _open(self, anew: bool) -> None:
        path = os.path.join(self.folder, JOURNAL)
        known: dict[str, Any] = {}
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8") as file:
                    known = json.load(file)
                known["settings"].keys(), known["content"].keys()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not anew:
                    raise ValueError(
                        f"{path} is damaged ({error!r}); remove {self.folder}, or start anew with --overwrite."
                    ) from error
                known = {}
        if known and known["settings"] != self._settings and not anew:
            keys = sorted({*known["settings"], *self._settings})
            changed = [key for key in keys if known["settings"].get(key) != self._settings.get(key)]
            raise ValueError(
                f"{self.folder} holds an unfinished run with another {', '.join(changed)}; finish it with its own "
                "command, or start anew with --overwrite."
            )
        if known and known["settings"] == self._settings:
            self.content = known["content"]
        for entry in list(os.scandir(self.folder)):
            if entry.name != LOCK and (not self.content or entry.name.endswith(".tmp")):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.remove(entry.path)

    def commit(self, **values: Any) -> None:
        """Adds values to the content and writes it."""
        self.content.update(values)
        text = json.dumps({"settings": self._settings, "content": self.content})

        def write(path: str) -> None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)

        replace_file(os.path.join(self.folder, "journal.json"), write)

    def discard(self) -> None:
        """Removes the folder and lets go of the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Lets go of the lock."""
        self._lock.close()


def save_tensors(path: str, tensors: dict[str, Any]) -> None:
    """Writes a safetensors file, whole or not at all."""
    replace_file(path, lambda temporary: _save(tensors, temporary))


def _save(tensors: dict[str, Any], path: str) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # A full disk is an OSError everywhere else; safetensors has the number in its text alone.
        number = re.search(r"code: (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number.group(1)), os.strerror(int(number.group(1))), path) from error


def replace_file(path: str, write: Callable[[str], object]) -> None:
    """Writes a file under a temporary name, brings it to the disk, and renames it."""
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
