"""The folder of a compressed checkpoint: from the hidden one where work goes on to its place, never half written."""

from __future__ import annotations

import os
import shutil

from safetensors.torch import load_file, save_file

from ..compress.journal import JOURNAL, LOCK, replace_file

__all__ = ["ONE_NAME", "check_target", "join_shards", "move", "write_text"]

ONE_NAME = "model.safetensors"
_ONE_FILE = 1 << 26  # bytes of weights up to which shards are joined in the end


def check_target(source: str, target: str, overwrite: bool) -> None:
    target = os.path.abspath(target)
    if os.path.isfile(os.path.join(target, JOURNAL)):
        _tidy(target)  # a run was killed at its very last step
    if not os.path.exists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return
    if os.path.commonpath([os.path.realpath(target), os.path.realpath(source)]) == os.path.realpath(target):
        raise ValueError(f"{target} is the dense model itself, or holds it; choose another folder.")
    if not overwrite:
        raise ValueError(f"{target} exists already; choose another folder, or overwrite it with --overwrite.")
    if not os.path.isfile(os.path.join(target, "config.json")):
        raise ValueError(f"{target} holds something that is no model, which --overwrite does not touch; remove it.")


def join_shards(work: str, shards: dict[str, dict[str, int]]) -> None:
    """One file of the shards of a small model."""
    if sum(map(sum, (keys.values() for keys in shards.values()))) > _ONE_FILE:
        return
    whole = os.path.join(work, ONE_NAME)
    if not os.path.exists(whole):
        tensors = {}
        for shard in shards:
            tensors.update(load_file(os.path.join(work, shard)))
        replace_file(whole, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    for shard in shards:
        if os.path.exists(os.path.join(work, shard)):
            os.remove(os.path.join(work, shard))


def write_text(path: str, text: str) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    replace_file(path, write)


def move(work: str, target: str) -> None:
    """The working folder, without what only a run needs, becomes the target.

    The journal goes last: until the target is in its place, a run that is interrupted goes on.
    """
    for entry in list(os.scandir(work)):
        if entry.name.startswith(("dense.", "compressed.")):
            os.remove(entry.path)
    if os.path.isdir(target):
        # Set aside first: at no moment is there neither the old checkpoint nor the new one.
        shutil.rmtree(_old(target), ignore_errors=True)
        os.rename(target, _old(target))
    os.rename(work, target)
    _tidy(target)


def _tidy(target: str) -> None:
    """Removes what a run leaves beside a finished checkpoint."""
    for name in (LOCK, JOURNAL):
        if os.path.exists(os.path.join(target, name)):
            os.remove(os.path.join(target, name))
    shutil.rmtree(_old(target), ignore_errors=True)


def _old(target: str) -> str:
    parent, name = os.path.split(target)
    return os.path.join(parent, f".{name}.old")
