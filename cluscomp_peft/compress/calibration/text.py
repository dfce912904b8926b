"""Text in, token windows out.

The package brings a text of its own, `builtin.jsonl`: 270 documents that were written for it, under its licence:
articles and other prose, conversations, code, mathematics, tables, and thirty languages. Other documents come from a
jsonl file (rows with `text`, `messages`, or `prompt` and `completion`) or a plain text file, each also compressed with
xz, of which no more is read than text can unpack to. They are tokenised, joined by the end-of-sequence token, and cut
into windows that do not overlap, so that every token is read once.
"""

from __future__ import annotations

import json
import lzma
import os
import re
from collections.abc import Iterator
from typing import IO, Any

import torch
from jinja2 import TemplateError

from .errors import CannotCalibrate

__all__ = ["AUTO", "BUILTIN", "NONE", "calibration_windows", "evaluation_windows", "read_documents", "token_windows"]

AUTO, BUILTIN, NONE = "auto", "builtin", "none"  # what may stand in the place of a file

_BUILTIN_PATH = os.path.join(os.path.dirname(__file__), "builtin.jsonl")
_ROWS = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_ROWS, ".txt", ".xz")
_TAKES_PARTS = re.compile(r"\bin\s+[\w.\[\]'\"]*\bcontent\b")  # a template that goes through parts by itself
_HUB_CHARACTERS = 20_000_000  # of a hub data set: ten times what 128 sequences of 2048 tokens take
_UNPACKED = 64  # times its own bytes, which is ten times what xz makes of text: more is no text
_LENGTH = 2048  # tokens of a window, where the model takes as many
_BUILTIN_LENGTH = 512  # tokens of a window: most of its documents are shorter
_MOST_UNKNOWN = 0.2  # of the tokens
_ANYWAY = 1 << 24  # characters that every compressed file may unpack to


def read_documents(path: str, tokenizer: Any = None) -> list[str]:
    """The documents of a text file, or of a data set on the hub.

    Args:
        path (`str`): `.jsonl`, `.ndjson` or `.json` (a row a line) or any other name for plain text, one document;
            `.xz` may follow, and upper case is the same. Or a hub id, owner/name, also with a configuration,
            owner/name:config: its training split. Or "builtin".
        tokenizer (*optional*): Its chat template renders `messages`.

    Raises:
        ValueError: If the file is missing, cut off or empty, unpacks to more than text does, or a row has none of the
            known fields.
    """
    if path == BUILTIN:
        path = _BUILTIN_PATH
    if not os.path.isfile(path):
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", path) and not path.lower().endswith(_SUFFIXES):
            return _hub_documents(path, tokenizer)
        raise ValueError(f"{path} is not a file; give a .jsonl or .txt file, also compressed with .xz, or a hub id.")
    name = path.lower()
    opener = lzma.open if name.endswith(".xz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if not name.removesuffix(".xz").endswith(_ROWS):
                documents = ["".join(_lines(file, path))]
            else:
                documents = [
                    _parse(line, tokenizer, f"{path}:{number}")
                    for number, line in enumerate(_lines(file, path), 1)
                    if line.strip()
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
        tokens += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
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
        seqlen (`int`, *optional*): Tokens of a sequence; 2048 (512 of the built-in text), or what the model takes.

    Raises:
        CannotCalibrate: If there is no tokenizer, or one that does not know the text.
        ValueError: If there is not enough text, or a number is out of range.
    """
    if tokenizer is None:
        raise CannotCalibrate(f"{source} has no tokenizer, so calibration text cannot be read")
    if samples < 1:
        raise ValueError(f"calibration needs at least one sample, got {samples}.")
    limit = getattr(model.config, "max_position_embeddings", None)
    usual = _BUILTIN_LENGTH if path == BUILTIN else _LENGTH
    length = min(usual, limit or usual) if seqlen is None else seqlen
    if limit is not None and length > limit:
        raise ValueError(f"--seqlen {length} is more than the {limit} positions of the model; give at most {limit}.")
    documents = read_documents(path, tokenizer)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    windows = token_windows(documents, tokenizer, length, max_tokens=samples * length, vocab_size=vocabulary)
    whole = [window for window in windows if window.shape[1] == length]
    if not whole:
        if path == BUILTIN and seqlen is None:
            raise CannotCalibrate(f"the tokenizer of {source} finds {windows[0].shape[1]} tokens in the built-in text")
        raise ValueError(
            f"{path} has {windows[0].shape[1]} tokens, fewer than one calibration sequence of {length}; give more "
            "text, or a smaller --seqlen."
        )
    tokens = torch.cat(whole)
    unknown = 0.0 if tokenizer.unk_token_id is None else float((tokens == tokenizer.unk_token_id).float().mean())
    if unknown > _MOST_UNKNOWN:
        raise CannotCalibrate(f"the tokenizer of {source} does not know {100 * unknown:.0f} % of the text")
    return tokens


def evaluation_windows(model: Any, tokenizer: Any, source: str, path: str, most: int) -> list[torch.Tensor]:
    """Windows [1, length] to measure a model on, those that `cluscomp evaluate --max-tokens MOST` cuts.

    Args:
        model, tokenizer, source, path: As for [`calibration_windows`].
        most (`int`): Tokens to take.

    Raises:
        CannotCalibrate: If there is no tokenizer.
        ValueError: If the text cannot be read, or has a token that the model does not know.
    """
    if tokenizer is None:
        raise CannotCalibrate(f"{source} has no tokenizer, so text cannot be read")
    length = min(_LENGTH, getattr(model.config, "max_position_embeddings", None) or _LENGTH)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    documents = read_documents(path, tokenizer)
    return token_windows(documents, tokenizer, length, max_tokens=most, vocab_size=vocabulary)


def _lines(file: IO[str], path: str) -> Iterator[str]:
    """The lines of a file, as long as it is one of text."""
    limit = max(_ANYWAY, _UNPACKED * os.path.getsize(path))
    left = limit + 1
    while line := file.readline(left):
        left -= len(line)
        if not left:
            raise ValueError(
                f"{path} unpacks to more than {limit:,} characters, {_UNPACKED} times its size, so it is no text that "
                "was compressed; unpack it yourself if it is."
            )
        yield line


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
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON that can be read ({error}).") from error
    return _document(row, tokenizer, where)


def _document(row: Any, tokenizer: Any, where: str) -> str:
    document = _text_of(row, tokenizer, where)
    try:
        document.encode()
    except UnicodeEncodeError as error:  # JSON can say what no text can be
        raise ValueError(f"{where} holds half a character ({error}).") from error
    return document


def _text_of(row: Any, tokenizer: Any, where: str) -> str:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return row["prompt"] + row["completion"]
        messages = row.get("messages")
        if isinstance(messages, list):
            turns = _turns(messages, where)
            template = getattr(tokenizer, "chat_template", None)
            if not _TAKES_PARTS.search(str(template)):
                turns = [{**turn, "content": _words(turn["content"], where)} for turn in turns]
            if not template:
                return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            try:
                return tokenizer.apply_chat_template(turns, tokenize=False)
            except (TemplateError, TypeError) as error:
                raise ValueError(f"{where} does not fit the tokenizer's chat template: {error}") from error
    raise ValueError(f"{where} has none of `text`, `messages`, or `prompt` and `completion`.")


def _turns(messages: list, where: str) -> list[dict]:
    if not messages:
        raise ValueError(f"{where} has no messages.")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where} has a message without `role` and `content`.")
    return messages


def _words(content: Any, where: str) -> str:
    """The text of a message, which is a string or a list of parts with their types."""
    if isinstance(content, str) or content is None:  # of a turn that calls tools
        return content or ""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    raise ValueError(f"{where} has a message whose `content` is neither text nor a list of parts of text.")
