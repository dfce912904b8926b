"""Text in, token windows out.

Documents come from a jsonl file (rows with `text`, `messages`, or `prompt` and `completion`) or a plain text file,
each also compressed with xz. They are tokenised, joined by the end-of-sequence token, and cut into windows that do not
overlap, so that every token is read once.
"""

from __future__ import annotations

import json
import lzma
import os
import re
from typing import Any

import torch
from jinja2 import TemplateError

__all__ = ["calibration_windows", "read_documents", "token_windows"]

_SUFFIXES = (".jsonl", ".json", ".txt", ".xz")
_HUB_CHARACTERS = 20_000_000  # of a hub data set: ten times what 128 sequences of 2048 tokens take


def read_documents(path: str, tokenizer: Any = None) -> list[str]:
    """The documents of a text file, or of a data set on the hub.

    Args:
        path (`str`): `.jsonl` or `.json` (a row a line) or any other name for plain text, one document; `.xz` may
            follow. Or a hub id, owner/name, also with a configuration, owner/name:config: its training split.
        tokenizer (*optional*): Its chat template renders `messages`.

    Raises:
        ValueError: If the file is missing, cut off or empty, or a row has none of the known fields.
    """
    if not os.path.isfile(path):
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", path) and not path.endswith(_SUFFIXES):
            return _hub_documents(path, tokenizer)
        raise ValueError(f"{path} is not a file; give a .jsonl or .txt file, also compressed with .xz, or a hub id.")
    opener = lzma.open if path.endswith(".xz") else open
    name = path.removesuffix(".xz")
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if not name.endswith((".jsonl", ".json")):
                documents = [file.read()]
            else:
                documents = [
                    _parse(line, tokenizer, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()
                ]
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it is damaged, cut off or not UTF-8 text.") from error
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text.")
    return documents


def token_windows(
    documents: list[str],
    tokenizer: Any,
    length: int,
    *,
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> list[torch.Tensor]:
    """Windows [1, ≤ length] of int64 tokens; the last one may be shorter, windows of one token are dropped.

    Args:
        documents (`list[str]`): Joined by the end-of-sequence token.
        tokenizer: Of the model.
        length (`int`): Tokens of a window, at least 2.
        max_tokens (`int`, *optional*): Stop after so many tokens.
        vocab_size (`int`, *optional*): Rows of the model's embedding; tokens beyond it are refused.

    Raises:
        ValueError: If there are too few tokens for one window of two, or one is out of range.
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens to predict one, got seqlen={length}.")
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if max_tokens is not None and len(tokens) >= max_tokens:
            tokens = tokens[:max_tokens]
            break
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens, at least 2 are needed.")
    if vocab_size is not None and max(tokens) >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token {max(tokens)}, but the model has {vocab_size} embeddings; they do not belong "
            "together."
        )
    stream = torch.tensor(tokens, dtype=torch.int64)
    windows = [stream[start : start + length][None] for start in range(0, len(stream), length)]
    return [window for window in windows if window.shape[1] > 1]


def calibration_windows(
    model: Any, tokenizer: Any, source: str, path: str, samples: int, seqlen: int | None
) -> torch.Tensor:
    """Tokens to compress by, [sequences, length] int64.

    Args:
        model: Dense; its config says how many positions there are.
        tokenizer: Of the model, or None. source (`str`): What errors call the model.
        path (`str`): Text, see [`read_documents`].
        samples (`int`): Sequences to take from it at most.
        seqlen (`int`, *optional*): Tokens of a sequence; 2048, or what the model takes.

    Raises:
        ValueError: If there is no tokenizer, not enough text, or a number is out of range.
    """
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer, so calibration text cannot be read; leave out --calibration.")
    if samples < 1:
        raise ValueError(f"calibration needs at least one sample, got {samples}.")
    limit = getattr(model.config, "max_position_embeddings", None)
    length = min(2048, limit or 2048) if seqlen is None else seqlen
    if limit is not None and length > limit:
        raise ValueError(f"--seqlen {length} is more than the {limit} positions of the model; give at most {limit}.")
    documents = read_documents(path, tokenizer)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    windows = token_windows(documents, tokenizer, length, max_tokens=samples * length, vocab_size=vocabulary)
    whole = [window for window in windows if window.shape[1] == length]
    if not whole:
        raise ValueError(
            f"{path} has {windows[0].shape[1]} tokens, fewer than one calibration sequence of {length}; give more "
            "text, or a smaller --seqlen."
        )
    return torch.cat(whole)


def _hub_documents(path: str, tokenizer: Any) -> list[str]:
    """Documents of a hub data set, read as a stream up to `_HUB_CHARACTERS`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{path} is on the hub, which needs the package datasets: pip install datasets") from error
    name, _, config = path.partition(":")
    documents: list[str] = []
    size = 0
    for number, row in enumerate(load_dataset(name, config or None, split="train", streaming=True), 1):
        documents.append(_document(row, tokenizer, f"{path}, row {number}"))
        size += len(documents[-1])
        if size > _HUB_CHARACTERS:
            break
    if not size:
        raise ValueError(f"{path} holds no text.")
    return [document for document in documents if document.strip()]


def _parse(line: str, tokenizer: Any, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}).") from error
    return _document(row, tokenizer, where)


def _document(row: Any, tokenizer: Any, where: str) -> str:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return row["prompt"] + row["completion"]
        messages = row.get("messages")
        if isinstance(messages, list):
            turns = _turns(messages, where)
            if not getattr(tokenizer, "chat_template", None):
                return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            try:
                return tokenizer.apply_chat_template(turns, tokenize=False)
            except TemplateError as error:
                raise ValueError(f"{where} does not fit the tokenizer's chat template: {error}") from error
    raise ValueError(f"{where} has none of `text`, `messages`, or `prompt` and `completion`.")


def _turns(messages: list, where: str) -> list[dict]:
    if not messages:
        raise ValueError(f"{where} has no messages.")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where} has a message without `role` and `content`.")
    return messages
