"""Where text comes from: files, folders, globs, hub data sets, the built-in corpus; read as a stream.

A document is a str. Nothing is ever read whole: a large .txt file is cut at paragraph ends, the rest is read
document by document. The order is stable, and every document has a position from which reading can go on.
"""

import atexit
import codecs
import gc
import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import zstandard

from ant5m.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

BLOCK = 1 << 20
"""bytes read at once"""
WHOLE = 1 << 17
"""characters; a .txt up to here is one document"""
PIECE = 1 << 16
"""characters; a longer text is cut at paragraph ends into documents of at most this"""
SEPARATOR = "<|endoftext|>"
"""between documents in one .txt file, as in the files of TinyStories or OpenWebText"""

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
KNOWN = ".txt, .jsonl (also with .gz, .xz, .zst) and .parquet"


class Position(NamedTuple):
    """The next document: the index of its source, and how many records of that source come before it."""

    source: int = 0
    record: int = 0


@dataclass(frozen=True)
class Source:
    """A file, `hf:...` or `builtin`."""

    name: str
    size: int
    """bytes on the disk; 0 when not known"""


@dataclass(frozen=True)
class Corpus:
    """Sources in the order in which they are read. Make one with `Corpus.open`."""

    sources: tuple[Source, ...]
    text_column: str = "text"

    @classmethod
    def open(cls, names: Sequence[str | Path], text_column: str = "text") -> "Corpus":
        """Find what `names` stand for: files, folders (searched through), globs, `builtin`,
        `hf:OWNER/NAME[:[CONFIG:]SPLIT]`, and `hf:FOLDER[:...]`, a local data set in the hub's layout.

        Files of a folder or glob come in sorted order; a file named twice is read once. Raises `UserError`
        when something is missing, empty, or of an unknown kind. What is inside is checked when it is read.
        """
        if not names:
            raise UserError("no text given: name files, folders, globs, hf:OWNER/NAME or builtin")
        found: dict[str, str] = {}
        for given in names:
            for name in _find(str(given)):
                found.setdefault(os.path.realpath(name) if os.path.exists(name) else name, name)
        return cls(tuple(_source(name) for name in found.values()), text_column)

    @property
    def size(self) -> int:
        """Bytes on the disk, for progress; 0 when a source does not know its own."""
        return sum(source.size for source in self.sources) if all(s.size for s in self.sources) else 0

    def documents(self, start: Position = Position()) -> "Cursor":  # noqa: B008  (immutable)
        """Read from the beginning, or on from a position that a cursor once gave."""
        return Cursor(self, start)


class Cursor(Iterator[str]):
    """An iterator over documents that knows where it is. Documents of mere white space are left out."""

    def __init__(self, corpus: Corpus, start: Position) -> None:
        self.position = Position(*start)
        """of the document that the next call gives; JSON-able as a list of two numbers"""
        self.bytes_read = 0
        """of `Corpus.size`"""
        self._texts = self._read(corpus)

    def __next__(self) -> str:
        return next(self._texts)

    def _read(self, corpus: Corpus) -> Iterator[str]:
        first, skip = self.position
        before = sum(source.size for source in corpus.sources[:first])
        self.bytes_read = before
        for index in range(first, len(corpus.sources)):
            source = corpus.sources[index]

            def report(offset: int, before: int = before) -> None:
                self.bytes_read = before + offset

            blank = not skip
            for record, text in enumerate(_read(source.name, corpus.text_column, skip, report), skip + 1):
                self.position = Position(index, record)
                if text and not text.isspace():
                    blank = False
                    yield text
            if blank:
                raise UserError(f"{source.name} holds no text")
            before += source.size
            self.position, self.bytes_read, skip = Position(index + 1), before, 0


def tracked(corpus: Corpus, progress: "Progress", description: str = "reading") -> Iterator[str]:
    """All documents, with a bar."""
    if any(source.name == "builtin" for source in corpus.sources):
        from ant5m.data.builtin import load_builtin

        load_builtin(progress)
    task = progress.add_task(description, total=corpus.size or None)
    cursor = corpus.documents()
    for text in cursor:
        progress.update(task, completed=cursor.bytes_read)
        yield text
    progress.update(task, total=1, completed=1)


Report = Callable[[int], None]
"""called now and then with the bytes read from the disk"""


def _find(name: str) -> Iterable[str]:
    if name.startswith("hf:"):
        _hub_parts(name)
    if name == "builtin" or name.startswith("hf:"):
        return [name]
    path = Path(name)
    if path.is_dir():
        return _within(path)
    if path.exists():
        return [name]
    if not glob.has_magic(name):
        raise UserError(f"{name} does not exist")
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise UserError(f"the pattern '{name}' matches no file")
    return [
        found for match in matches for found in (_within(Path(match)) if Path(match).is_dir() else [match])
    ]


def _within(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [str(path) for path in files if _format(path) in FORMATS and not path.name.startswith(".")]
    if not texts:
        raise UserError(f"{folder} holds no text file: {KNOWN} are read")
    return texts


def _source(name: str) -> Source:
    if name == "builtin" or name.startswith("hf:"):
        return Source(name, 0)
    path = Path(name)
    if _format(path) not in FORMATS:
        raise UserError(f"{name} is of an unknown kind: {KNOWN} are read")
    size = path.stat().st_size
    if not size:
        raise UserError(f"{name} is empty")
    return Source(name, size)


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read(name: str, column: str, skip: int, report: Report) -> Iterator[str]:
    """The records of one source after the first `skip`; one without text is an empty str."""
    if name == "builtin":
        from ant5m.data.builtin import load_builtin

        return iter(load_builtin().documents[skip:])
    if name.startswith("hf:"):
        return _read_hub(name, column, skip)
    kind = _format(Path(name))
    if kind == ".parquet":
        return _read_parquet(name, column, skip, report)
    if kind == ".jsonl":
        return _read_jsonl(name, column, skip, report)
    return _read_text(name, skip, report)


def _read_text(name: str, skip: int, report: Report) -> Iterator[str]:
    for record, text in enumerate(cut_documents(_blocks(name, report))):
        if record >= skip:
            yield text


def cut_documents(blocks: Iterable[str]) -> Iterator[str]:
    """Documents of a text that arrives in blocks.

    Where `<|endoftext|>` occurs, it separates documents and they lose the line breaks around it. A document
    longer than `WHOLE` is cut into pieces that, put together, are the document.
    """
    pending, cutting, separated = "", False, False
    for block in blocks:
        *ended, pending = (pending + block).split(SEPARATOR)
        for text in ended:
            yield from _cut(text.strip("\r\n"), cutting)
            cutting, separated = False, True
        if len(pending) > WHOLE:
            cutting = True
        if cutting:
            *pieces, pending = _cut(pending, cutting)
            yield from pieces
    yield from _cut(pending.strip("\r\n") if separated else pending, cutting)


def _cut(text: str, cutting: bool) -> Iterator[str]:
    start = 0
    # The rest stays long enough for a separator that has only half arrived.
    while (cutting or len(text) > WHOLE) and len(text) - start > PIECE + len(SEPARATOR):
        cutting = True
        end = _paragraph_end(text, start, start + PIECE)
        yield text[start:end]
        start = end
    yield text[start:]


def _paragraph_end(text: str, start: int, end: int) -> int:
    for mark in ("\n\n", "\r\n\r\n", "\n", " "):
        found = text.rfind(mark, start, end)
        if found >= 0:
            return found + len(mark)
    return end


def _read_jsonl(name: str, column: str, skip: int, report: Report) -> Iterator[str]:
    decode = json.JSONDecoder().decode
    for number, line in enumerate(_lines(_blocks(name, report)), 1):
        if number <= skip:
            continue
        if not line or line.isspace():
            yield ""
            continue
        try:
            row = decode(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise UserError(f"{name}, line {number}: not valid JSON ({reason})") from None
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}: not a JSON object")
        if column not in row:
            raise UserError(f"{name}, line {number}: {_no_column(column, row)}")
        text = _text(row[column], f"{name}, line {number}", column)
        yield _without_surrogates(text) if "\\ud" in line or "\\uD" in line else text


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    pending = ""
    for block in blocks:
        *lines, pending = (pending + block).split("\n")
        yield from lines
    yield pending


def _without_surrogates(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no UTF-8 text can hold: U+FFFD stands for it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_parquet(name: str, column: str, skip: int, report: Report) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    size = Path(name).stat().st_size
    try:
        # A buffered stream in place of whole row groups in memory.
        with pyarrow.parquet.ParquetFile(name, buffer_size=BLOCK, pre_buffer=False) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise UserError(f"{name}: {_no_column(column, schema.names)}")
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            first = 0
            while first < len(groups) and skip >= groups[first]:
                skip -= groups[first]
                first += 1
            done = sum(groups[:first])
            for batch in file.iter_batches(1024, row_groups=range(first, len(groups)), columns=[column]):
                done += len(batch)
                report(size * done // file.metadata.num_rows)
                for value in batch.column(0)[skip:].to_pylist() if skip < len(batch) else ():
                    yield _text(value, name, column)
                skip = max(0, skip - len(batch))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a readable parquet file ({_first_line(error)})") from None


def _read_hub(name: str, column: str, skip: int) -> Iterator[str]:
    batches = _open_hub(name).skip(skip).iter(batch_size=256)

    def stop() -> None:
        batches.close()
        gc.collect()

    # pyarrow's reading threads hang the interpreter's exit unless the iterator is really gone by then
    # (apache/arrow#45214).
    atexit.register(stop)
    try:
        for batch in batches:
            if column not in batch:
                raise UserError(f"{name}: {_no_column(column, batch)}")
            for value in batch[column]:
                yield _text(value, name, column)
    except UserError:
        raise
    except Exception as error:  # of the network or of any file format
        raise UserError(f"{name} cannot be read ({_first_line(error)})") from None
    finally:
        atexit.unregister(stop)
        stop()


def _hub_parts(name: str) -> tuple[str, list[str]]:
    path, *rest = name.removeprefix("hf:").split(":")
    if not path or len(rest) > 2:
        raise UserError(f"'{name}' is not of the form hf:OWNER/NAME[:[CONFIG:]SPLIT]")
    return path, rest


def _open_hub(name: str) -> Any:
    import datasets

    path, rest = _hub_parts(name)
    split = rest[-1] if rest else "train"
    try:
        return datasets.load_dataset(path, rest[0] if len(rest) == 2 else None, split=split, streaming=True)
    except Exception as error:  # of the hub, the network, the data set's layout
        raise UserError(f"{name} cannot be opened ({_first_line(error)})") from None


def _text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: column '{column}' holds {type(value).__name__}, not text")
    return value


def _no_column(column: str, found: Iterable[str]) -> str:
    return f"no column '{column}' (found: {', '.join(found) or 'none'}): name the text with --text-column"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _blocks(name: str, report: Report) -> Iterator[str]:
    """The text of a file, plain or compressed, in blocks of `BLOCK` bytes; a byte order mark is left out."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with open(name, "rb") as raw:
        for block in _decompressed(name, raw):
            if not offset and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{name} is UTF-16: convert it, try iconv -f UTF-16 -t UTF-8")
            if b"\0" in block:
                raise UserError(f"{name} is binary, not text (byte {offset + block.index(0):,} is NUL)")
            report(raw.tell())
            yield _decoded(decoder, block, name, offset)
            offset += len(block)
    yield _decoded(decoder, b"", name, offset, final=True)


def _decoded(
    decoder: codecs.IncrementalDecoder, block: bytes, name: str, offset: int, final: bool = False
) -> str:
    kept = len(decoder.getstate()[0])  # bytes of a character that the last block cut
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        where = offset - kept + error.start
        raise UserError(f"{name} is not UTF-8 text (byte {where:,}): convert it, try iconv") from None


def _decompressed(name: str, raw: BinaryIO) -> Iterator[bytes]:
    suffix = Path(name).suffix.lower()
    try:
        if suffix == ".zst":
            yield from _zstandard_frames(raw)
            return
        stream: Any = raw
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif suffix == ".xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115  (the file beneath is closed by the caller)
        while block := stream.read(BLOCK):
            yield block
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
        raise UserError(
            f"{name} is damaged or not compressed as its name says ({_first_line(error)})"
        ) from None


def _zstandard_frames(raw: BinaryIO) -> Iterator[bytes]:
    # The library's own stream takes a file that breaks off for one that ends.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    while chunk := raw.read(BLOCK >> 4):
        while chunk:
            if frame.eof:
                frame = decompressor.decompressobj()
            if block := frame.decompress(chunk):
                yield block
            chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("it breaks off in the middle of a frame")
