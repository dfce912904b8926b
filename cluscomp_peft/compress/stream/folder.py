"""The folder of a compressed checkpoint: how the hidden folder of a run becomes the target, in one step.

    .OUT.partial ── renamed ──► OUT                 the journal goes with it, and is removed last
                    OUT ──────► .OUT.old            a checkpoint that --overwrite replaces, until the new one is there

Only folders that the journal names by their inode are removed: a folder keeps its inode when it is renamed. A folder
that merely has such a name, or holds a copy of a journal, belongs to the user.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .joined import INDEX_NAME, ONE_NAME
from .journal import JOURNAL, LOCK, Journal, hold_lock, read_journal, replace_file
from .source import DenseCheckpoint

__all__ = [
    "at_work",
    "check_target",
    "free_name",
    "move",
    "work_folder",
    "write_index",
    "write_text",
]


def check_target(source: str, target: str, overwrite: bool) -> None:
    """Refuses a place where no checkpoint can be put, or where something of the user's is in the way.

    Raises:
        ValueError: If it is a mount point or a link, exists already, holds the dense model, or, with `overwrite`, is
            no model.
    """
    target = os.path.abspath(target)
    if os.path.islink(target):
        raise ValueError(
            f"{target} is a symbolic link to {os.path.realpath(target)}; name that folder itself, or another one."
        )
    if os.path.ismount(target):
        raise ValueError(
            f"{target} is a mount point, which cannot be replaced by a finished folder; choose a folder inside it."
        )
    _finish_earlier(target)
    if not os.path.exists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return
    if os.path.commonpath([os.path.realpath(target), os.path.realpath(source)]) == os.path.realpath(target):
        raise ValueError(f"{target} is the model itself, or holds it; choose another folder.")
    if not overwrite:
        raise ValueError(f"{target} exists already; choose another folder, or overwrite it with --overwrite.")
    if not _is_model(target):
        raise ValueError(f"{target} holds something that is no model, which --overwrite does not touch; remove it.")


def work_folder(target: str) -> str:
    """Where the work for a target goes on."""
    parent, name = os.path.split(os.path.abspath(target))
    return os.path.join(parent, f".{name}.partial")


def write_index(work: str, shards: dict[str, dict[str, int]]) -> None:
    """The index of several shards, file name to bytes by key; nothing where there is one file of all."""
    if ONE_NAME in shards:
        return
    places = {key: shard for shard, keys in shards.items() for key in keys}
    total = sum(map(sum, (keys.values() for keys in shards.values())))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_text(os.path.join(work, INDEX_NAME), json.dumps(index, indent=1))


def write_text(path: str, text: str) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    replace_file(path, write)


def move(journal: Journal, target: str) -> None:
    """The working folder, without what only a run needs, becomes the target.

    The journal goes last: until the target is in its place, a run that is interrupted goes on.
    """
    work = journal.folder
    for entry in list(os.scandir(work)):
        if entry.name.startswith(("dense.", "compressed.")):
            os.remove(entry.path)
    if os.path.isdir(target):
        # Set aside first: at no moment is there neither the old checkpoint nor the new one.
        aside = free_name(target)
        journal.commit(aside={"path": aside, "inode": _inode(target)}, moved=_inode(work))
        os.rename(target, aside)
    else:
        journal.commit(moved=_inode(work))
    os.rename(work, target)
    _tidy(target, journal.content)


def _restore_aside(journal: Journal, target: str) -> None:
    """Puts back a checkpoint that a run set aside and then could not replace."""
    aside = journal.content.get("aside")
    if aside is None:
        return
    if not os.path.lexists(target) and _is_aside(aside):
        os.rename(aside["path"], target)
    del journal.content["aside"]
    journal.commit()


@contextmanager
def at_work(journal: Journal, target: str, source: DenseCheckpoint, measured: bool = False) -> Iterator[None]:
    """Inside of this a run is at work. After an error finished shards are kept, and the error says how to go on.

    Args:
        journal ([`Journal`]): Of the working folder; closed in the end.
        target (`str`): What the folder shall become.
        source ([`DenseCheckpoint`]): What is read; a change of it explains whatever else is found.
        measured (`bool`): Specs in the journal were measured, which is worth keeping too.

    Raises:
        OSError: If the disk is full.
    """
    try:
        _restore_aside(journal, target)
        yield
    except BaseException as error:
        _keep_or_discard(journal, target, error, measured)
        if isinstance(error, (ValueError, OSError)):
            source.refuse_changes()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"{os.path.dirname(target)} is full; make room there and run the same command again, it goes on from "
                "there.",
            ) from error
        raise
    finally:
        journal.close()


def _keep_or_discard(journal: Journal, target: str, error: BaseException, measured: bool) -> None:
    """After an error: keeps finished shards and adds a note on how to continue; removes a folder without any."""
    if os.path.isdir(journal.folder):
        _restore_aside(journal, target)
    done = len(journal.content.get("done", {}))
    if done:
        error.add_note(
            f"The {done} finished shards stay in {journal.folder}: the same command goes on from there, --overwrite "
            "starts anew, and removing that folder gives them up."
        )
    elif isinstance(error, ValueError) or not (measured and "specs" in journal.content):
        journal.discard()


def _finish_earlier(target: str) -> None:
    """Tidies a checkpoint whose run was killed at its very last step."""
    try:
        known = read_journal(target)
    except ValueError:
        return  # nothing says that it is ours
    if known is None or known["content"].get("moved") != _inode(target):
        return
    with hold_lock(target):
        _tidy(target, known["content"])


def _tidy(target: str, content: dict[str, Any]) -> None:
    """Removes what a run leaves beside a finished checkpoint."""
    aside = content.get("aside")
    if aside is not None and _is_aside(aside):
        shutil.rmtree(aside["path"], ignore_errors=True)
    for name in (LOCK, JOURNAL):
        if os.path.exists(os.path.join(target, name)):
            os.remove(os.path.join(target, name))


def free_name(target: str) -> str:
    """A name beside a target that nothing has, to set aside what is there."""
    parent, name = os.path.split(target)
    path, number = os.path.join(parent, f".{name}.old"), 1
    while os.path.lexists(path):
        number += 1
        path = os.path.join(parent, f".{name}.old-{number}")
    return path


def _is_aside(aside: dict[str, Any]) -> bool:
    path = aside["path"]
    return os.path.isdir(path) and not os.path.islink(path) and _inode(path) == aside["inode"]


def _inode(folder: str) -> list[int]:
    status = os.stat(folder)
    return [status.st_dev, status.st_ino]


def _is_model(folder: str) -> bool:
    """Whether config.json is that of a model: many programs have a file of that name."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and not config.keys().isdisjoint({"model_type", "architectures"})
