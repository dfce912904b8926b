"""A command line's errors: those of a subcommand come with its own usage, and with the flag that is meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

__all__ = ["Parser"]

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
            words = self.format_usage() if found[1] else message.partition("choose from")[2]
            known = re.findall(r"--[\w-]+" if found[1] else r"[\w-]+", words)
            near = difflib.get_close_matches(wrong, known, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)
