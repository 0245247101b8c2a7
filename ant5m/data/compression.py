"""The bytes of a file, plain or compressed: all of them, in bounded memory, or an error that names it.

Whatever a small file claims to hold, no more than a few dozen megabytes of it are in memory at a time, and
the window that a `.zst` or `.xz` was made with.
"""

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from ant5m.errors import UserError, first_line

BLOCK = 1 << 20
"""bytes of content given at once, at most"""
SUFFIXES = (".gz", ".xz", ".zst")
XZ_MEMORY = 1 << 30
"""bytes that an .xz may make its reader hold; xz -9 needs 65 MiB"""
ZSTANDARD_WINDOW = 1 << 31
"""bytes: zstd --long=31, as in large published data sets"""
_INPUT = 1 << 16
# A block of zstandard, 4 bytes at least, becomes up to 128 KiB, and the library gives all it can at once.
_ZSTANDARD_INPUT = 1 << 10


def blocks(name: str | Path, raw: BinaryIO) -> Iterator[bytes]:
    """The content of the open file `raw`, in pieces of at most `BLOCK` bytes.

    The ending of `name` says how it is compressed; anything but `SUFFIXES` is plain. All streams of a file
    are read (gzip members, xz streams with padding between them, zstandard frames). Raises `UserError` when
    it is damaged, breaks off, is followed by other bytes, or is not what its name says.
    """
    read = _READERS.get(Path(name).suffix.lower(), _plain)
    try:
        yield from read(raw)
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
        reason = first_line(error)
        raise UserError(f"{name} is damaged or not compressed as its name says ({reason})") from None


def _plain(raw: BinaryIO) -> Iterator[bytes]:
    while block := raw.read(BLOCK):
        yield block


def _gzip(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as stream:
        yield from _plain(stream)  # type: ignore[arg-type]


def _xz(raw: BinaryIO) -> Iterator[bytes]:
    # Python's own reader takes everything behind padding for garbage, and ends there without a word.
    stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
    padding = 0
    while chunk := raw.read(_INPUT):
        while chunk:
            if stream.eof:
                rest = chunk.lstrip(b"\0")
                padding += len(chunk) - len(rest)
                chunk = rest
                if not chunk:
                    break
                _check_padding(padding)
                stream, padding = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY), 0
            if block := stream.decompress(chunk, BLOCK):
                yield block
            while not stream.eof and not stream.needs_input:
                if block := stream.decompress(b"", BLOCK):
                    yield block
            chunk = stream.unused_data
    if not stream.eof:
        raise EOFError("it breaks off in the middle of a stream")
    _check_padding(padding)


def _check_padding(zeros: int) -> None:
    """Source: The .xz File Format, 1.2.1, section 2.2."""
    if zeros % 4:
        raise lzma.LZMAError("the padding between its streams is not a multiple of four bytes")


def _zstandard(raw: BinaryIO) -> Iterator[bytes]:
    # The library's own stream takes a file that breaks off for one that ends.
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTANDARD_WINDOW)
    frame = decompressor.decompressobj()
    while chunk := raw.read(_ZSTANDARD_INPUT):
        while chunk:
            if frame.eof:
                frame = decompressor.decompressobj()
            content = frame.decompress(chunk)
            for start in range(0, len(content), BLOCK):
                yield content[start : start + BLOCK]
            chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("it breaks off in the middle of a frame")


_READERS = {".gz": _gzip, ".xz": _xz, ".zst": _zstandard}
