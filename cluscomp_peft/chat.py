"""A conversation with a model in a terminal: `cluscomp chat DIR`.

A line is a question, and the answer is printed as it is generated. Questions come from the keyboard, from a pipe (a
line each), or from the command line (one, and the command ends). The model's own chat template joins the turns; a
model without one continues each line by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, TextStreamer, set_seed

from .compress.architecture import read_tokenizer, refuse_evaluation
from .compress.stream.headers import base_of, check_folder

__all__ = ["Conversation", "load", "questions"]

HELP = "A line is a question; /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


def load(path: str, adapter: str | None = None, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A model to talk to, and its tokenizer.

    Args:
        path (`str`): Folder or hub id of a model, dense or compressed; or the folder of an adapter.
        adapter (`str`, *optional*): Of the model.
        dtype (`str`): To compute in; "auto" is the model's.
        device (`str`, *optional*): A GPU if there is one.

    Raises:
        ValueError: If it is no causal language model, or has no tokenizer.
    """
    path, adapter = base_of(path, adapter)
    check_folder(path)
    refuse_evaluation(AutoConfig.from_pretrained(path), path, "chat needs a decoder that predicts next tokens")
    tokenizer = (adapter and read_tokenizer(adapter)) or read_tokenizer(path)
    if tokenizer is None:
        raise ValueError(
            f"{path} has no tokenizer that can be read here; copy tokenizer.json and tokenizer_config.json of the "
            "dense model into it."
        )
    if device is None and torch.accelerator.is_available():
        device = str(torch.accelerator.current_accelerator())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval(), tokenizer


def questions(prompt: str | None) -> Iterator[str]:
    """What the user says: `prompt` alone, or lines of standard input until it ends."""
    if prompt is not None:
        yield prompt
        return
    watched = sys.stdin.isatty()
    if watched:
        import readline  # noqa: F401  (editing and history of `input`)

        print(HELP, file=sys.stderr)
    while True:
        try:
            line = (input("> ") if watched else input()).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line


class Conversation:
    """Turns of a conversation, and answers to them.

    Args:
        model, tokenizer: Of a causal language model.
        system (`str`, *optional*): What the model is told before the first question.
        max_new_tokens (`int`): That an answer may have.
        temperature (`float`, *optional*): Of sampling; 0 takes the likeliest token each time. By default what the
            model's generation settings say.
        seed (`int`, *optional*): Of sampling.
        printed (`bool`): Print answers to standard output while they are generated.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        seed: int | None = None,
        printed: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.templated = bool(tokenizer.chat_template)
        if max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {max_new_tokens}.")
        if temperature is not None and not 0 <= temperature <= 100:
            raise ValueError(f"--temperature must be between 0 and 100, got {temperature}.")
        if system is not None and not self.templated:
            raise ValueError("--system needs a chat template, and this tokenizer has none; leave it out.")
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.turns = list(self._start)
        self.printed = printed
        self._sampling: dict[str, Any] = {}
        if temperature is not None:
            sampled = {"do_sample": True, "temperature": temperature}
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            self._sampling = sampled if temperature > 0 else greedy
        if seed is not None:
            set_seed(seed)

    def clear(self) -> None:
        """Forgets all turns."""
        self.turns = list(self._start)

    def answer(self, question: str) -> str:
        """The model's answer; Ctrl-C ends it early.

        Raises:
            ValueError: If the conversation has become too long for the model.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        inputs = self._encoded(turns, question).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - length)
        if room < 1:
            raise ValueError(
                f"the conversation has {length} tokens and the model takes {limit}; /clear makes it forget."
            )
        streamer = _Kept(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.printed = self.printed
        padding = self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        try:
            self.model.generate(
                **inputs, max_new_tokens=room, streamer=streamer, pad_token_id=padding, **self._sampling
            )
        except KeyboardInterrupt:
            streamer.end()
        if self.templated:
            self.turns = [*turns, {"role": "assistant", "content": streamer.text}]
        return streamer.text

    def _encoded(self, turns: list[dict[str, str]], question: str) -> Any:
        if not self.templated:
            return self.tokenizer(question, return_tensors="pt", return_token_type_ids=False)
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


class _Kept(TextStreamer):
    """Prints text as it comes, and keeps it."""

    text, printed = "", True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self.printed:
            super().on_finalized_text(text, stream_end)
