"""The tokenizer as GGUF holds it, from the `tokenizer.json` that transformers writes.

byte-level BPE (Llama 3, Qwen, SmolLM)      model "gpt2": tokens and merges. How text is cut before merging is code
                                            in llama.cpp, chosen by a name; it is found by the regular expression
BPE with byte tokens (Llama 2, Mistral)     model "llama": tokens and scores. llama.cpp merges the pair with the
                                            highest score of its token first, so scores are ranks of merges
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from typing import Any

import gguf
from transformers import AutoTokenizer

from ..source import Opened

__all__ = ["write_tokenizer"]

_NEVER_MERGED = -1e6  # below the score of every token that merging makes
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT = (
    _CONTRACTIONS + r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Regular expression of the split before byte-level merging → llama.cpp's name.
_SPLITS = {_SPLIT.format(numbers=r"\p{N}{1,3}"): "llama-bpe", _SPLIT.format(numbers=r"\p{N}"): "qwen2"}


def write_tokenizer(writer: gguf.GGUFWriter, opened: Opened) -> None:
    """Tokens, merges or scores, special tokens and the chat template.

    Raises:
        ValueError: If there is no tokenizer, or llama.cpp has none that works like it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer)
    except Exception as error:
        raise ValueError(f"{opened.tokenizer} has no tokenizer that can be read ({error}); GGUF needs one.") from error
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        opened.config.save_pretrained(folder)
        path = os.path.join(folder, "tokenizer.json")
        if not os.path.isfile(path):
            raise ValueError(f"the tokenizer of {opened.tokenizer} has no tokenizer.json, which GGUF is made from.")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        special = gguf.SpecialVocab(folder, load_merges=not _has_byte_tokens(content))
    if content["model"]["type"] != "BPE":
        raise ValueError(
            f"the tokenizer of {opened.tokenizer} is of type {content['model']['type']}; llama.cpp's models of this "
            "architecture take BPE alone."
        )
    tokens, types = _tokens(content, opened.config.vocab_size)
    if _has_byte_tokens(content):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(content, tokens))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of_split(content, opened.tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ids = tokenizer("a")["input_ids"]
    special.add_special_token["bos"] = ids[0] == tokenizer.bos_token_id
    special.add_special_token["eos"] = ids[-1] == tokenizer.eos_token_id
    special.add_to_gguf(writer, quiet=True)


def _has_byte_tokens(content: dict[str, Any]) -> bool:
    return bool(content["model"].get("byte_fallback"))


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Token and type of each row of the embedding; rows without a token get a name of their own."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in content["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
        if _has_byte_tokens(content) and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[index] = gguf.TokenType.BYTE
    for entry in content["added_tokens"]:
        if entry["id"] < size:
            kind = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
            tokens[entry["id"]], types[entry["id"]] = entry["content"], kind
    unknown = content["model"].get("unk_token")
    if _has_byte_tokens(content) and unknown in tokens:
        types[tokens.index(unknown)] = gguf.TokenType.UNKNOWN
    return tokens, [int(kind) for kind in types]


def _scores(content: dict[str, Any], tokens: list[str]) -> list[float]:
    ranks: dict[str, int] = {}
    for pair in content["model"]["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks[token]) if token in ranks else _NEVER_MERGED for token in tokens]


def _name_of_split(content: dict[str, Any], source: str) -> str:
    """llama.cpp's name for how text is cut before byte-level merging."""
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    byte_level = steps[-1] if kinds and kinds[-1] == "ByteLevel" else None
    if byte_level is not None and not byte_level.get("add_prefix_space"):
        if byte_level.get("use_regex"):
            if len(steps) == 1:
                return "gpt-2"
            if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
                return "smollm"
        elif kinds == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated":
            expression = steps[0]["pattern"].get("Regex")
            if expression in _SPLITS:
                return _SPLITS[expression]
    raise ValueError(
        f"the tokenizer of {source} cuts text in a way that is none of those of GPT-2, SmolLM, Llama 3 and Qwen, and "
        "llama.cpp knows each by name alone. Export --to dense, and convert that with llama.cpp's "
        "convert_hf_to_gguf.py."
    )
