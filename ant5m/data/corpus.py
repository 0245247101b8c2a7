"""Where text comes from: files, folders, globs, hub data sets, the built-in corpus; read as a stream.

A document is a str. Nothing is ever read whole: a large .txt file is cut at paragraph ends, the rest is read
document by document. The order is stable, and every document has a position from which reading can go on.
What cannot be read stops the reading with one line that names the file and the row, or is left out and
counted.
"""

import atexit
import codecs
import contextlib
import gc
import glob
import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, cast

import msgspec

from ant5m.data import compression
from ant5m.data.folders import Found, find_files
from ant5m.data.rows import csv_rows, json_values, repeated
from ant5m.data.tar import Member, members
from ant5m.errors import UserError, first_line, on_one_line
from ant5m.files import is_lfs_pointer

if TYPE_CHECKING:
    from rich.progress import Progress

LINE = 1 << 26
"""bytes; a longer line of a .jsonl is not read"""
WHOLE = 1 << 17
"""characters; a .txt up to here is one document"""
PIECE = 1 << 16
"""characters; a longer text is cut at paragraph ends into documents of at most this"""
SEPARATOR = "<|endoftext|>"
"""between documents in one .txt file, as in the files of TinyStories or OpenWebText"""

STREAMS = (".txt", ".md", ".jsonl", ".json", ".csv")
"""kinds of files that are read from their first byte to the last, also compressed and inside a .tar"""
FORMATS = (*STREAMS, ".tar", ".parquet")
KNOWN = ".txt, .md, .jsonl, .json, .csv, .tar (also with .gz, .xz, .zst) and .parquet"
IN_FOLDERS = ((".txt", ".jsonl", ".parquet", ".tar"), (".md",), (".json", ".csv"))
"""kinds that are read together from a folder; of several groups the first: a README.md beside texts, or a
table about them, is none of them"""


OnError = Literal["stop", "skip"]
"""what to do with rows and files that cannot be read"""
MOST_NAMES = 20
"""of columns in a message"""
REPORTED = 10
"""of what is left out, named one by one; the rest is only counted"""


class Position(NamedTuple):
    """The next document: the index of its source, and how many records of that source come before it."""

    source: int = 0
    record: int = 0


@dataclass(frozen=True)
class Column:
    """The field of a row that is read."""

    name: str
    render: "Callable[[Any], str] | None" = None
    """as in `Corpus`"""
    group: str | None = None
    """the field of what belongs together; as in `Corpus`"""


@dataclass(frozen=True)
class Source:
    """A file, `hf:...` or `builtin`."""

    name: str
    size: int
    """bytes on the disk, of what is read; 0 when not known"""
    span: tuple[int, int] | None = None
    """what is read of the file, from the first to before the second: bytes, in a .parquet row groups; None:
    all. A span begins and ends between documents, as `ant5m.data.parts` finds it."""


@dataclass(frozen=True)
class Corpus:
    """Sources in the order in which they are read. Make one with `Corpus.open`."""

    sources: tuple[Source, ...]
    text_column: str = "text"
    on_error: OnError = "stop"
    render: "Callable[[Any], str] | None" = None
    """what makes a text of the column's value, or raises `UserError`; None: it is text"""
    max_documents: int | None = None
    """of each source; None: all"""
    group_column: str | None = None
    """rows with the same value there are parts of one thing, as the chapters of a book"""

    @classmethod
    def open(
        cls, names: Sequence[str | Path], text_column: str = "text", on_error: OnError = "stop"
    ) -> "Corpus":
        """Find what `names` stand for: files, folders (searched through), globs, `builtin`,
        `hf:OWNER/NAME[:[CONFIG:]SPLIT]`, and `hf:FOLDER[:...]`, a local data set in the hub's layout.

        Files of a folder or glob come in sorted order; a file named twice is read once. A warning says what a
        folder has that is left out (see `ant5m.data.folders.find_files`). Raises `UserError` when something
        that was named is missing, empty, or of an unknown kind. What is inside is checked when it is read:
        with `on_error` "skip", rows and files that cannot be read are left out, counted by the cursor, and
        the first of them named in warnings.
        """
        if not names:
            raise UserError("no text given: name files, folders, globs, hf:OWNER/NAME or builtin")
        found: dict[str, str] = {}
        for given in names:
            for name in _find(str(given)):
                found.setdefault(os.path.realpath(name) if os.path.exists(name) else name, name)
        return cls(tuple(_source(name) for name in found.values()), text_column, on_error)

    @property
    def size(self) -> int:
        """Bytes on the disk, for progress; 0 when a source does not know its own."""
        return sum(source.size for source in self.sources) if all(s.size for s in self.sources) else 0

    def documents(self, start: Position = Position()) -> "Cursor":  # noqa: B008  (immutable)
        """Read from the beginning, or on from a position that a cursor once gave."""
        return Cursor(self, start)


class Piece(NamedTuple):
    """A part, not the first, of a document that was too long for one; or a row that belongs to a group."""

    text: str
    head: str
    """the first piece of that document; the group"""


Record = str | Piece | UserError
"""what a file holds at one place: text ("" for none), or why it cannot be read"""


class Cursor(Iterator[str]):
    """An iterator over documents that knows where it is. Documents of mere white space are left out."""

    def __init__(self, corpus: Corpus, start: Position) -> None:
        self.position = Position(*start)
        """of the document that the next call gives; JSON-able as a list of two numbers"""
        self.bytes_read = 0
        """of `Corpus.size`"""
        self.head = ""
        """the first piece of the document that the last text belongs to, or its group; the text itself if it
        is whole"""
        self.left_out: Counter[str] = Counter()
        """`rows` and `files` that could not be read, since the start of this cursor"""
        self._on_error = corpus.on_error
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
            column = Column(corpus.text_column, corpus.render, corpus.group_column)
            try:
                most = None if corpus.max_documents is None else max(0, corpus.max_documents - skip)
                records = itertools.islice(_read(source, column, skip, report), most)
                for record, item in enumerate(records, skip + 1):
                    self.position = Position(index, record)
                    if isinstance(item, UserError):
                        self._leave_out("rows", item)
                        continue
                    text, self.head = item if isinstance(item, Piece) else (item, item)
                    if text and not text.isspace():
                        blank = False
                        yield text
                if blank and source.span is None:
                    raise UserError(f"{source.name} holds no text")
            except UserError as error:
                self._leave_out("files", error)
            before += source.size
            self.position, self.bytes_read, skip = Position(index + 1), before, 0

    def _leave_out(self, what: str, error: UserError) -> None:
        """Count it, or raise it."""
        if self._on_error == "stop":
            raise error
        self.left_out[what] += 1
        if self.left_out.total() <= REPORTED:
            warnings.warn(f"left out: {error}", stacklevel=2)


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
    if cursor.left_out:
        warnings.warn(describe_left_out(cursor.left_out), stacklevel=2)


def describe_left_out(counts: dict[str, int]) -> str:
    """One line for people about what could not be read."""
    rows, files = counts.get("rows", 0), counts.get("files", 0)
    return f"could not be read and was left out: {rows:,} rows, {files:,} files or what was left of them"


Report = Callable[[int], None]
"""called now and then with the bytes read from the disk"""


def is_no_path(name: str) -> bool:
    """Whether it names no file or folder: `builtin`, `hf:...`."""
    return name == "builtin" or name.startswith("hf:")


def _find(name: str) -> Iterable[str]:
    if name.startswith("hf:"):
        _hub_parts(name)
    if is_no_path(name):
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
    found = find_files(folder, lambda path: file_format(path) in FORMATS)
    kinds = {file_format(path) for path in found.files}
    chosen = next((group for group in IN_FOLDERS if kinds & {*group}), ())
    found.keep(lambda path: file_format(path) in chosen, "other kind")
    found.warn()
    if not found.files:
        raise UserError(f"{folder} holds no text file: {KNOWN} are read")
    return [str(path) for path in found.files]


def _source(name: str) -> Source:
    if is_no_path(name):
        return Source(name, 0)
    path = Path(name)
    if file_format(path) not in FORMATS:
        raise UserError(f"{name} is of an unknown kind: {KNOWN} are read")
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{name} is neither a file nor a folder")
        if not size:
            raise UserError(f"{name} is empty")
        if is_lfs_pointer(path):
            raise UserError(f"{name} is only a git-lfs pointer, not the text: get it with git lfs pull")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror})") from None
    return Source(name, size)


def file_format(path: Path) -> str:
    """One of `FORMATS`, or another ending; the ending of a compression is left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in compression.SUFFIXES and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read(source: Source, column: Column, skip: int, report: Report) -> Iterator[Record]:
    """The records of one source after the first `skip`; one without text is an empty str."""
    if source.name == "builtin":
        from ant5m.data.builtin import load_builtin

        return iter(load_builtin().documents[skip:])
    if source.name.startswith("hf:"):
        return _read_hub(source.name, column, skip)
    return _read_file(source, column, skip, report)


def _read_file(source: Source, column: Column, skip: int, report: Report) -> Iterator[Record]:
    name, kind = source.name, file_format(Path(source.name))
    try:
        if kind == ".parquet":
            yield from _read_parquet(source, column, skip, report)
            return
        with open(name, "rb") as raw:
            content = compression.blocks(name, raw) if source.span is None else _span(raw, source.span)
            start = source.span[0] if source.span else 0
            blocks = _reported(content, raw, start, report)
            if kind == ".tar":
                yield from _read_tar(name, blocks, column, skip)
            else:
                part = source.span is not None
                yield from _read_stream(kind, _Content(name, blocks, start), column, skip, part)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or first_line(error)})") from None


@dataclass
class _Content:
    """What a file holds, or a part of it."""

    name: str
    blocks: Iterator[bytes]
    start: int = 0
    """bytes of the file before it"""


def _reported(blocks: Iterator[bytes], raw: BinaryIO, start: int, report: Report) -> Iterator[bytes]:
    for block in blocks:
        report(raw.tell() - start)
        yield block


def _read_stream(
    kind: str, content: _Content, column: Column, skip: int = 0, part: bool = False
) -> Iterator[Record]:
    """`part`: whether the content is a part of a file that was cut between documents."""
    if kind == ".jsonl":
        yield from _read_jsonl(content, column, skip)
        return
    if kind == ".json":
        records = _read_json(content, column)
    elif kind == ".csv":
        records = _read_csv(content, column)
    elif column.group:
        raise UserError(
            f"{content.name} has no rows with a column '{column.group}': leave out --group-column"
        )
    else:
        records = cut_documents(_decoded_blocks(content), part)
    yield from itertools.islice(records, skip, None)


def _read_tar(name: str, blocks: Iterator[bytes], column: Column, skip: int) -> Iterator[Record]:
    """The files in an archive one behind the other, each as if it lay beside the others in a folder."""
    yield from itertools.islice(_in_tar(name, blocks, column), skip, None)


def _in_tar(name: str, blocks: Iterator[bytes], column: Column) -> Iterator[Record]:
    left_out = Found(Path(name))
    place = ""
    try:
        for member in members(blocks):
            path, place = Path(name) / member.name.lstrip("/"), f", {member.name}"
            kind = file_format(path)
            if kind not in FORMATS:
                continue
            fault = _fault(member, kind)
            if fault:
                left_out.leave_out(fault, path)
                continue
            inner = compression.blocks(member.name, cast(BinaryIO, member))
            yield from _read_stream(kind, _Content(f"{name}, {member.name}", inner), column)
            place = ""
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(on_one_line(name)) else f"{name}{place}: {told}") from None
    left_out.warn()


def _fault(member: Member, kind: str) -> str | None:
    """Why a file in an archive is left out: a key of `ant5m.data.folders.KINDS`, or None."""
    if any(part.startswith(".") and part not in (".", "..") for part in Path(member.name).parts):
        return "hidden"
    if not member.regular:
        return "special"
    if kind not in STREAMS:
        return "not in a tar"
    return None if member.size else "empty"


def cut_documents(blocks: Iterable[str], separated: bool = False) -> Iterator[str | Piece]:
    """Documents of a text that arrives in blocks.

    Where `<|endoftext|>` occurs, or has occurred before (`separated`), it separates documents and they lose
    the line breaks around it. A document
    longer than `WHOLE` is cut into pieces that, put together, are the document: the first is a str, those
    after it are `Piece`s.
    """
    pending, head = "", None
    for block in blocks:
        *ended, pending = (pending + block).split(SEPARATOR)
        for text in ended:
            for piece in _cut(text.strip("\r\n"), head is not None):
                yield piece if head is None else Piece(piece, head)
                head = piece if head is None else head
            head, separated = None, True
        if head is not None or len(pending) > WHOLE:
            *pieces, pending = _cut(pending, True)
            for piece in pieces:
                yield piece if head is None else Piece(piece, head)
                head = piece if head is None else head
    for piece in _cut(pending.strip("\r\n") if separated else pending, head is not None):
        yield piece if head is None else Piece(piece, head)
        head = piece if head is None else head


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


def _read_json(content: _Content, column: Column) -> Iterator[Record]:
    values = json_values(_decoded_blocks(content), _parse_int)
    with _named(content.name):
        for number, value in enumerate(values, 1):
            yield _text_of_object(value, f"{content.name}, row {number}", column)


def _read_csv(content: _Content, column: Column) -> Iterator[Record]:
    columns = [name for name in (column.name, column.group) if name]
    with _named(content.name):
        for number, row in enumerate(csv_rows(_decoded_blocks(content), columns), 1):
            where = f"{content.name}, row {number}"
            if isinstance(row, UserError):
                yield UserError(f"{content.name}, {row}")
            else:
                yield _text_of_object(row, where, column) if row else ""


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors say in which file."""
    try:
        yield
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(on_one_line(name)) else f"{name}: {told}") from None


def _read_jsonl(content: _Content, column: Column, skip: int) -> Iterator[Record]:
    # Only the text is parsed, whatever stands beside it; `_text_of_row` knows what is wrong with other rows.
    row: Any = msgspec.defstruct("Row", [("text", str | None)], rename={"text": column.name})
    parse: Any = msgspec.json.Decoder(row).decode
    start = content.start
    where = f"{content.name}, behind byte {start:,}" if start else content.name
    for number, line in enumerate(_lines(_raw_blocks(content)), 1):
        if number <= skip:
            continue
        if number == 1 and line and not start:
            line = line.removeprefix(codecs.BOM_UTF8)
        if column.render or column.group:
            yield _text_of_row(line, f"{where}, line {number}", column)
            continue
        try:
            text = parse(line).text or ""
        except (msgspec.MsgspecError, ValueError, RecursionError, TypeError):
            text = _text_of_row(line, f"{where}, line {number}", column)
        yield text


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one longer than `LINE`. Only "\\n" ends a line."""
    pending: list[bytes] = []
    size = 0

    def line() -> bytes | None:
        return b"".join(pending) if size <= LINE else None

    for block in blocks:
        first, *others = block.split(b"\n")
        size += len(first)
        if size <= LINE:
            pending.append(first)
        if not others:
            continue
        yield line()
        yield from others[:-1]
        pending, size = [others[-1]], len(others[-1])
    yield line()


def _text_of_row(line: bytes | None, where: str, column: Column) -> Record:
    """The text of a row that is blank, wrong in some way, or has what only Python's parser takes."""
    if line is None:
        return UserError(
            f"{where}: longer than {LINE >> 20} MiB: a .jsonl has one object a line (is it one JSON array?)"
        )
    try:
        content = line.decode()
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 text (byte {error.start:,} of the line): convert it, try iconv")
    if not content or content.isspace():
        return ""
    try:
        row = json.loads(content, parse_int=_parse_int)
    except (json.JSONDecodeError, RecursionError) as error:
        return UserError(f"{where}: not valid JSON ({getattr(error, 'msg', 'nested too deeply')})")
    return _text_of_object(row, where, column)


def _text_of_object(row: Any, where: str, column: Column) -> Record:
    if not isinstance(row, dict):
        return UserError(f"{where}: not a JSON object")
    if column.name not in row:
        return UserError(f"{where}: {_no_column(column, row)}")
    if column.group and column.group not in row:
        return UserError(f"{where}: no column '{column.group}': name it with --group-column")
    text = _text(row[column.name], where, column)
    text = text if isinstance(text, UserError) or column.render else _without_surrogates(text)
    return _grouped(text, row[column.group]) if column.group else text


def _grouped(text: str | UserError, group: Any) -> Record:
    """What has no group (null, empty) is by itself."""
    if isinstance(text, UserError) or group is None or group == "":
        return text
    return Piece(text, _without_surrogates(str(group)))


def _parse_int(digits: str) -> int:
    # Python refuses to convert thousands of digits, and only the text is wanted.
    return int(digits[:1_000])


def _without_surrogates(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no UTF-8 text can hold: U+FFFD stands for it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_parquet(source: Source, column: Column, skip: int, report: Report) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    name = source.name
    try:
        # A buffered stream in place of whole row groups in memory.
        with pyarrow.parquet.ParquetFile(name, buffer_size=compression.BLOCK, pre_buffer=False) as file:
            schema = file.schema_arrow
            if column.name not in schema.names:
                raise UserError(f"{name}: {_no_column(column, schema.names)}")
            if column.group and column.group not in schema.names:
                raise UserError(f"{name}: no column '{column.group}': name it with --group-column")
            columns = [column.name, *([column.group] if column.group else [])]
            if twice := repeated(columns, schema.names):
                raise UserError(f"{name}: {twice}")
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            first, last = source.span or (0, len(groups))
            row = before = sum(groups[:first])
            rows = sum(groups[first:last])
            while first < last and skip >= groups[first]:
                skip -= groups[first]
                row += groups[first]
                first += 1
            for batch in file.iter_batches(1024, row_groups=range(first, last), columns=columns):
                report(source.size * (row + len(batch) - before) // rows)
                if skip < len(batch):
                    texts = _texts(batch.column(column.name)[skip:], name, row + skip, column)
                    if column.group:
                        groups = batch.column(column.group)[skip:].to_pylist()
                        texts = map(_grouped, texts, groups)
                    yield from texts
                row, skip = row + len(batch), max(0, skip - len(batch))
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        # ValueError: pyarrow takes any bytes for names too. ArithmeticError: counts that cannot be.
        raise UserError(f"{name} is not a readable parquet file ({first_line(error)})") from None


def _texts(values: Any, name: str, row: int, column: Column) -> Iterator[Any]:
    """Of a column of pyarrow, whose first value stands behind `row` others."""
    try:
        found = values.to_pylist()
    except UnicodeDecodeError:  # pyarrow takes any bytes for a string until it is asked for it
        found = [_text_of_value(value, f"{name}, row {row + i}") for i, value in enumerate(values, 1)]
    for number, value in enumerate(found, row + 1):
        yield value if isinstance(value, UserError) else _text(value, f"{name}, row {number}", column)


def _text_of_value(value: Any, where: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return UserError(f"{where}: not UTF-8 text")


def _read_hub(name: str, column: Column, skip: int) -> Iterator[Record]:
    batches = _open_hub(name).skip(skip).iter(batch_size=256)

    def stop() -> None:
        batches.close()
        gc.collect()

    # pyarrow's reading threads hang the interpreter's exit unless the iterator is really gone by then
    # (apache/arrow#45214).
    atexit.register(stop)
    try:
        for batch in batches:
            if column.name not in batch:
                raise UserError(f"{name}: {_no_column(column, batch)}")
            if column.group and column.group not in batch:
                raise UserError(f"{name}: no column '{column.group}': name it with --group-column")
            texts = (_text(value, name, column) for value in batch[column.name])
            yield from map(_grouped, texts, batch[column.group]) if column.group else texts
    except UserError:
        raise
    except Exception as error:  # of the network or of any file format
        raise UserError(f"{name} cannot be read ({first_line(error)})") from None
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
        raise UserError(f"{name} cannot be opened ({first_line(error)})") from None


def _text(value: Any, where: str, column: Column) -> str | UserError:
    if value is None:
        return ""
    if column.render:
        try:
            return column.render(value)
        except UserError as error:
            return UserError(f"{where}: {error}")
    if not isinstance(value, str):
        return UserError(f"{where}: column '{column.name}' holds {type(value).__name__}, not text")
    return value


def _no_column(column: Column, found: Iterable[str]) -> str:
    names = [*found]
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    shown = ", ".join(names[:MOST_NAMES]) or "none"
    return f"no column '{column.name}' (found: {shown}{more}): name the text with --text-column"


def _raw_blocks(content: _Content) -> Iterator[bytes]:
    """The bytes of a text file in blocks."""
    name, offset = content.name, content.start
    for block in content.blocks:
        if not offset and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{name} is UTF-16: convert it, try iconv -f UTF-16 -t UTF-8")
        if b"\0" in block:
            raise UserError(f"{name} is binary, not text (byte {offset + block.index(0):,} is NUL)")
        yield block
        offset += len(block)


def _span(raw: BinaryIO, span: tuple[int, int]) -> Iterator[bytes]:
    place, end = span
    raw.seek(place)
    while block := raw.read(min(compression.BLOCK, end - place)):
        place += len(block)
        yield block


def _decoded_blocks(content: _Content) -> Iterator[str]:
    name, offset = content.name, content.start
    decoder = codecs.getincrementaldecoder("utf-8" if offset else "utf-8-sig")()
    for block in _raw_blocks(content):
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
