"""Data sets of files and of the hub."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from datasets import load_dataset

from .arguments import Arguments

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_splits"]


def load_splits(script: Arguments) -> tuple[Dataset, Dataset | None]:
    """Data to train on and, if any are named, to evaluate on.

    Raises:
        ValueError: If a path is no file.
    """
    train = _load(script.dataset_name, script.dataset_config, script.dataset_train_split)
    if script.dataset_test is None:
        return train, None
    if os.path.isfile(script.dataset_test):
        return train, _load(script.dataset_test, None, "train")
    return train, _load(script.dataset_name, script.dataset_config, script.dataset_test)


def _load(name: str, config: str | None, split: str) -> Dataset:
    """A file, or a split of a data set of the hub."""
    if os.path.isfile(name):
        kind = "json" if name.removesuffix(".xz").endswith((".jsonl", ".json")) else "text"
        return load_dataset(kind, data_files=name, split="train")
    if name.removesuffix(".xz").endswith((".jsonl", ".json", ".txt")):
        raise ValueError(f"--dataset_name {name} is no file here (and no hub id, which has no such ending).")
    return load_dataset(name, name=config, split=split)
