"""What a long run has done so far, so that it can be killed at any moment and go on later.

    OUT's parent /  .OUT.partial /  journal.json        settings and what is done; replaced as a whole after each unit
                                    model-00001-of-…    finished shards, under their final names
                                    dense.0 …           activations at the boundary of the last finished unit
                                    lock                held by the run that is at work

Everything is written under a temporary name first, and the journal last, so what it names is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from typing import Any

from safetensors.torch import save_file

__all__ = ["Journal", "replace_file"]


class Journal:
    """The journal of a working folder, which it creates and locks.

    Args:
        folder (`str`): Working folder.
        settings (`dict`): JSON; a folder with other settings belongs to another job.

    Attributes:
        content (`dict`): What [`commit`] wrote last; empty at first.

    Raises:
        ValueError: If another run is at work there, or the folder holds an unfinished run with other settings.
    """

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._settings = json.loads(json.dumps(settings))
        os.makedirs(folder, exist_ok=True)
        self._lock = open(os.path.join(folder, "lock"), "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"another run is at work in {folder}; wait for it, or choose another folder.") from error
        self.content: dict[str, Any] = {}
        path = os.path.join(folder, "journal.json")
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                known = json.load(file)
            if known["settings"] != self._settings:
                keys = sorted({*known["settings"], *self._settings})
                changed = [key for key in keys if known["settings"].get(key) != self._settings.get(key)]
                self.close()
                raise ValueError(
                    f"{folder} holds an unfinished run with another {', '.join(changed)}; finish it with its own "
                    "command, or start anew with --overwrite."
                )
            self.content = known["content"]

    def commit(self, **values: Any) -> None:
        """Adds values to the content and writes it."""
        self.content.update(values)
        text = json.dumps({"settings": self._settings, "content": self.content})

        def write(path: str) -> None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)

        replace_file(os.path.join(self.folder, "journal.json"), write)

    def save_tensors(self, name: str, tensors: dict[str, Any]) -> None:
        """Writes a safetensors file of the folder."""
        replace_file(os.path.join(self.folder, name), lambda path: save_file(tensors, path, metadata={"format": "pt"}))

    def close(self) -> None:
        """Lets go of the lock."""
        self._lock.close()


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
