"""Rows of .json and .csv files that arrive in blocks of text, one by one in bounded memory."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ant5m.errors import UserError

ROW = 1 << 26
"""characters; a longer row is not read"""
_SPACE = " \t\n\r"


def json_values(blocks: Iterable[str], parse_int: Callable[[str], Any] = int) -> Iterator[Any]:
    """The elements of an array, or the values of a file that has one behind the other.

    Raises `UserError` where it is not JSON, breaks off, or has a value of more than `ROW` characters.
    """
    text = _JsonText(blocks, json.JSONDecoder(parse_int=parse_int))
    array = text.skip("[")
    while not text.ended():
        if array and text.skip("]"):
            array = False
            break
        yield text.value()
        if array and not text.skip(","):
            text.expect("]")
            array = False
            break
    if array:
        raise UserError("not valid JSON (it breaks off)")
    if not text.ended():
        raise UserError("not valid JSON (something stands behind the end of the array)")


class _JsonText:
    """A text that is looked at from a place on, and read further where that does not suffice."""

    def __init__(self, blocks: Iterable[str], decoder: json.JSONDecoder):
        self._blocks, self._decoder = iter(blocks), decoder
        self._text, self._place = "", 0
        self._complete = False

    def ended(self) -> bool:
        return not self._next()

    def skip(self, mark: str) -> bool:
        """Whether `mark` comes next; then it is behind us."""
        found = self._next() == mark
        self._place += found
        return found

    def expect(self, mark: str) -> None:
        if not self.skip(mark):
            what = "it breaks off" if self.ended() else f"expected , or {mark} between rows"
            raise UserError(f"not valid JSON ({what})")

    def value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except RecursionError:
                raise UserError("not valid JSON (nested too deeply)") from None
            except json.JSONDecodeError as error:
                if self._complete:
                    raise UserError(f"not valid JSON ({error.msg})") from None
                if len(self._text) - self._place > ROW:
                    raise UserError(
                        f"not valid JSON, or a row of more than {ROW >> 20}M characters ({error.msg})"
                    ) from None
            else:
                # A number at the end may go on.
                if end < len(self._text) or self._complete or isinstance(value, dict | list | str):
                    self._place = end
                    return value
            self._read(len(self._text) - self._place)

    def _next(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _SPACE:
                self._place += 1
            if self._place < len(self._text) or self._complete:
                return self._text[self._place : self._place + 1]
            self._read(1)

    def _read(self, least: int) -> None:
        """So much more: a long value is not begun again for every block."""
        parts, size = [self._text[self._place :]], 0
        while size < max(1, least):
            block = next(self._blocks, None)
            if block is None:
                self._complete = True
                break
            parts.append(block)
            size += len(block)
        self._text, self._place = "".join(parts), 0


def repeated(columns: Iterable[str], names: Sequence[str]) -> str:
    """What is wrong where `names` has one of `columns` several times: nobody knows which is meant."""
    return next((f"several columns are named '{one}'" for one in columns if names.count(one) > 1), "")


def csv_rows(blocks: Iterable[str], columns: Sequence[str] = ()) -> Iterator[dict[str, str] | UserError]:
    """The rows behind the first, which names their fields; one with another number of fields is an error.

    Raises `UserError` where it is not CSV, has a field or line of more than `ROW` characters, or names one of
    `columns` twice.
    """
    csv.field_size_limit(ROW)
    rows = csv.reader(_lines(blocks), strict=True)
    names: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"not valid CSV (line {rows.line_num:,}: {error})") from None
        if row is None:
            return
        if names is None:
            names = row
            if twice := repeated(columns, names):
                raise UserError(twice)
        elif row and len(row) != len(names):
            yield UserError(f"line {rows.line_num:,} has {len(row)} fields, the first one {len(names)}")
        else:
            yield dict(zip(names, row, strict=False))


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their ends."""
    pending: list[str] = []
    size = 0
    for block in blocks:
        *ended, rest = block.split("\n")
        for line in ended:
            yield "".join([*pending, line, "\n"])
            pending, size = [], 0
        pending.append(rest)
        size += len(rest)
        if size > ROW:
            raise UserError(f"not valid CSV, or a line of more than {ROW >> 20}M characters")
    if size:
        yield "".join(pending)
