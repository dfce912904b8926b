"""A folder of ours on the hub: `cluscomp push DIR OWNER/NAME`.

`model.push_to_hub` of transformers and PEFT uploads weights and config, with a card that says nothing of this package.
A folder that our commands wrote has more: our card with its licence, the report, tokenizer and generation settings.
This uploads all of it in one commit. What is changed on the way, never in the folder: the card loads the model by its
hub id, and an adapter names its base by one.
"""

from __future__ import annotations

import json
import os
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from ..compress.report.card import renamed_card
from ..compress.stream.headers import check_folder
from .adapter import is_adapter, read_config

__all__ = ["push_folder"]

_CARD, _ADAPTER = "README.md", "adapter_config.json"
_LEFT = ("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")  # of a run


def push_folder(folder: str, repo: str, *, base: str | None = None, private: bool | None = None) -> dict[str, Any]:
    """Uploads a model or an adapter to the hub, whose repository is made if there is none.

    Files of the folder itself go along, not folders inside of it (checkpoints of a run, its base, the merged model).

    Args:
        folder (`str`): Of a model or an adapter.
        repo (`str`): Hub id, owner/name.
        base (`str`, *optional*): Of an adapter: hub id of the model that it belongs to, where its config names a
            folder of this machine.
        private (`bool`, *optional*): Of a repository that is made.

    Returns:
        `dict`: url of the commit, repo, files (their names), bytes.

    Raises:
        ValueError: If the folder holds neither, or the base of an adapter is not said by a hub id.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder; give the one that a command of cluscomp wrote.")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    contents: dict[str, str | bytes] = {name: os.path.join(folder, name) for name in names if name not in _LEFT}
    places = {os.path.basename(os.path.abspath(folder)): repo}
    if is_adapter(folder):
        named = read_config(folder).base_model_name_or_path or ""
        if base is None and (os.path.exists(named) or named.count("/") > 1 or not named):
            raise ValueError(
                f"the adapter {folder} names {named or 'nothing'} as its base, which is nowhere on the hub; push the "
                "base, and give its hub id with --base."
            )
        if base is not None:
            with open(os.path.join(folder, _ADAPTER), encoding="utf-8") as file:
                content = json.load(file)
            content["base_model_name_or_path"] = base
            contents[_ADAPTER] = json.dumps(content, indent=2).encode()
            places[os.path.basename(os.path.abspath(named))] = base
    elif base is not None:
        raise ValueError(f"--base is for adapters, and {folder} is none; leave it out.")
    else:
        check_folder(folder)
    if _CARD in contents:
        with open(os.path.join(folder, _CARD), encoding="utf-8") as file:
            contents[_CARD] = renamed_card(file.read(), places, base).encode()
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    done = api.create_commit(
        repo,
        [CommitOperationAdd(name, content) for name, content in contents.items()],
        commit_message="Upload by cluscomp push",
    )
    sizes = [len(value) if isinstance(value, bytes) else os.path.getsize(value) for value in contents.values()]
    return {"repo": repo, "url": done.commit_url, "files": sorted(contents), "bytes": sum(sizes)}
