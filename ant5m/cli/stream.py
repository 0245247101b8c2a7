"""Generated text on stdout, token by token."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from ant5m.data.tokenizer import Tokenizer


class Stream:
    """Prints a text as its tokens come; a character whose bytes have not all come waits."""

    def __init__(self, tokenizer: "Tokenizer", ids: Sequence[int], prompt: str = "") -> None:
        """`ids`: the tokens before the first new one. `prompt`: what to print before it."""
        self._tokenizer = tokenizer
        self._tokens = list(ids)
        self._shown = len(tokenizer.decode(self._tokens))
        self._prompt = prompt

    def add(self, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        self._show(self._tokenizer.decode(self._tokens) + "\n")

    def _show(self, text: str) -> None:
        if self._prompt:
            write(self._prompt, bold=True)
            self._prompt = ""
        write(text[self._shown :])
        sys.stdout.flush()
        self._shown = len(text)


def write(text: str, bold: bool = False) -> None:
    """To stdout as it is: rich would turn tabs into spaces and `:key:` into a picture."""
    shown = bold and Console().is_terminal
    sys.stdout.write(f"\033[1m{text}\033[0m" if shown else text)
