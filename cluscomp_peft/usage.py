"""A command line's errors: those of a subcommand come with its own usage, and with the flag that is meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

__all__ = ["Parser", "nearest", "with_names"]

_WRONG = re.compile(r"unrecognized arguments: (--[\w-]+)|invalid choice: '([^']*)'")


class Parser(argparse.ArgumentParser):
    """A parser whose subcommands, which are parsers of the same class, answer for what nobody recognises."""

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but what nobody recognises is an error of the subcommand, not of the whole command."""
        options, rest = self.parse_known_args(None if args is None else list(args), namespace)
        if rest:
            getattr(options, "parser", self).error(f"unrecognized arguments: {' '.join(rest)}")
        return options

    def error(self, message: str) -> NoReturn:
        """Prints the usage, the error and the nearest of what there is; ends with status 2."""
        found = _WRONG.search(message)
        if found is not None:
            wrong = found[1] or found[2]
            words = self.format_help() if found[1] else message.partition("choose from")[2]
            message += nearest(wrong, re.findall(r"--[\w-]+" if found[1] else r"[\w-]+", words))
        super().error(message)


def nearest(wrong: str, known: Iterable[str]) -> str:
    """The end of an error about a word: the one that is meant, or nothing."""
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def with_names(words: Sequence[str], *names: str) -> list[str]:
    """Words of a command line with a flag before each of those that come first: `MODEL OUT --rank 8` as `--model MODEL
    --output_dir OUT --rank 8`."""
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    named = [part for flag, word in zip(names, words[:first], strict=False) for part in (flag, word)]
    return [*named, *words[min(first, len(names)) :]]
