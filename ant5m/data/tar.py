"""The files in a .tar that arrives in blocks, one by one in bounded memory; nothing is written to the disk.

Python's `tarfile` keeps every file's header, and reads a header of any size whole.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from ant5m.errors import UserError

HEADER = 1 << 20
"""bytes; longer names and extended headers are not read"""
_LONG_NAME, _NAMES_OF_LINKS = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_SPARSE = "GNU.sparse."
_MORE_IN_HEADER, _MORE_IN_BLOCK = 482, 504
"""bytes that say whether another block about a sparse file follows"""


@dataclass
class Member:
    """A file in a .tar: read it before the next one is asked for."""

    name: str
    regular: bool
    """whether it is a file whose content is here: no link, device or sparse file"""
    size: int
    """bytes"""
    _stream: "_Stream"

    def __post_init__(self) -> None:
        self._left = self.size

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes more; b"" at the end."""
        data = self._stream.read_some(self._left if size < 0 else min(size, self._left))
        if not data and self._left and size:
            raise UserError(f"it breaks off inside {self.name}")
        self._left -= len(data)
        return data

    def skip(self) -> None:
        """Leave out what is left."""
        while self._left:
            self.read(tarfile.RECORDSIZE)


def members(blocks: Iterator[bytes]) -> Iterator[Member]:
    """The files of an archive in order, without its folders.

    Raises `UserError` when it is damaged or breaks off.
    Source: POSIX.1-2001, pax Interchange Format, and the headers of GNU tar.
    """
    stream = _Stream(blocks)
    name: str | None = None
    extended: dict[str, str] = {}
    while True:
        header = stream.read(tarfile.BLOCKSIZE)
        if not header:
            raise UserError("it breaks off (there is no mark of its end)")
        if not header.strip(tarfile.NUL):
            _check_end(stream)
            return
        info = _parse(header)
        if info.type in (*_EXTENDED, tarfile.XGLTYPE, _LONG_NAME, _NAMES_OF_LINKS):
            content = _header_content(stream, info)
            if info.type == _LONG_NAME:
                name = content.rstrip(tarfile.NUL).decode("utf-8", "surrogateescape")
            elif info.type in _EXTENDED:
                extended = _records(content)
            continue
        more = info.type == tarfile.GNUTYPE_SPARSE and header[_MORE_IN_HEADER]
        while more:  # blocks that say where the content of a sparse file lies
            more = stream.read(tarfile.BLOCKSIZE)[_MORE_IN_BLOCK : _MORE_IN_BLOCK + 1] == b"\1"
        size = _size(extended.get("size"), info.size)
        sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(_SPARSE) for key in extended)
        regular = info.isreg() and not sparse
        size = size if _has_data(info) else 0
        member = Member(extended.get("path") or name or info.name, regular, size, stream)
        name, extended = None, {}
        if not info.isdir():
            yield member
        member.skip()
        stream.read(-size % tarfile.BLOCKSIZE)


def _check_end(stream: "_Stream") -> None:
    """Nothing but padding may follow: of two archives in one file the second would be left out."""
    while data := stream.read_some(tarfile.RECORDSIZE):
        if data.strip(tarfile.NUL):
            raise UserError("something stands behind its end: if these are several archives, split them")


def _parse(header: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise UserError(f"it is damaged, or no .tar ({error})") from None


def _has_data(info: tarfile.TarInfo) -> bool:
    return info.isreg() or info.type not in tarfile.SUPPORTED_TYPES


def _header_content(stream: "_Stream", info: tarfile.TarInfo) -> bytes:
    if info.size > HEADER:
        raise UserError(f"it is damaged, or has a name of {info.size:,} bytes")
    content = stream.read(info.size)
    stream.read(-info.size % tarfile.BLOCKSIZE)
    return content


def _records(content: bytes) -> dict[str, str]:
    """Of an extended header: "LENGTH KEY=VALUE\\n" each, LENGTH of all of it."""
    found = {}
    while content.strip(tarfile.NUL):
        length = content.partition(b" ")[0]
        size = _size(length.decode("ascii", "replace"), 0)
        key, equals, value = content[len(length) + 1 : size].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise UserError("it is damaged (an extended header)")
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        content = content[size:]
    return found


def _size(text: str | None, otherwise: int) -> int:
    if text is None:
        return otherwise
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise UserError("it is damaged (a size)")
    return int(text)


class _Stream:
    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._block = memoryview(b"")

    def read_some(self, most: int) -> bytes:
        """1 to `most` bytes; b"" at the end."""
        while not self._block and most:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._block = memoryview(block)
        data, self._block = self._block[:most], self._block[most:]
        return bytes(data)

    def read(self, size: int) -> bytes:
        """`size` bytes, or none where the archive ends."""
        parts, left = [], size
        while left and (part := self.read_some(left)):
            parts.append(part)
            left -= len(part)
        if left and parts:
            raise UserError("it breaks off")
        return b"".join(parts)
