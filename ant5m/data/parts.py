"""A corpus cut into parts of about the same size, one behind the other, that are read independently.

A part is some whole sources, one after the other, where that is about even. A source larger than half a part
is cut itself, where its kind allows it without reading all of it: a .jsonl behind a line, a .txt or .md
behind `<|endoftext|>`, a .parquet between row groups. All others stay whole: compressed text, a .txt without
that mark, .csv, .json, .tar, and data sets of the hub.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ant5m.data import compression
from ant5m.data.corpus import LINE, SEPARATOR, Corpus, Source, file_format
from ant5m.errors import UserError

_ENDS = {".jsonl": b"\n", ".txt": SEPARATOR.encode(), ".md": SEPARATOR.encode()}
"""of a document, by the kind of file"""
_Mark = tuple[int, int]
"""a place in a source: the bytes before it, and itself in the unit of `Source.span`"""


MOST = 10_000
"""parts: each has a folder, and a journal of its own"""


def cut(corpus: Corpus, count: int) -> list[Corpus]:
    """`count` parts that, read one after the other, are the corpus; they depend on `count` and the files
    alone.

    Raises `UserError` when there are not so many places to cut at.
    """
    if not 1 <= count <= MOST:
        raise UserError(f"a text is packed in 1 to {MOST:,} parts, not in {count:,}")
    sources = _pieces(corpus, count)
    if len(sources) < count:
        most = len(sources)
        while len(_pieces(corpus, most)) < most:
            most -= 1
        raise UserError(
            f"this text can be cut into {most} parts at most, not into {count}: between files, and in large "
            "files between lines of a .jsonl, <|endoftext|> of a .txt, row groups of a .parquet. Give "
            f"--parts {most}"
        )
    before = [0, *itertools.accumulate(source.size if corpus.size else 1 for source in sources)]
    ends = [0, *_nearest(before, _wanted(before[-1], count)), len(sources)]
    return [
        dataclasses.replace(corpus, sources=tuple(sources[begin:end]))
        for begin, end in itertools.pairwise(ends)
    ]


def _wanted(size: int, count: int) -> list[int]:
    return [size * part // count for part in range(1, count)]


def _nearest(before: Sequence[int], wanted: Sequence[int]) -> Iterator[int]:
    """For each wanted size the number of sources that come before the cut; no part is empty."""
    first = 1
    for number, size in enumerate(wanted):
        last = len(before) - 1 - (len(wanted) - number)  # one source, at least, for each part that follows
        chosen = min(range(first, last + 1), key=lambda n: abs(before[n] - size))
        yield chosen
        first = chosen + 1


def _pieces(corpus: Corpus, count: int) -> list[Source]:
    """The sources, those above half a part cut near where the parts should end."""
    pieces = []
    start = 0
    for source in corpus.sources:
        end = start + source.size
        offsets = [size - start for size in _wanted(corpus.size, count) if start < size < end]
        large = 2 * source.size * count > corpus.size
        marks = _marks(source, offsets) if offsets and large else []
        pieces += [
            Source(source.name, after - before, (first, last))
            for (before, first), (after, last) in itertools.pairwise(marks)
        ] or [source]
        start = end
    return pieces


def _marks(source: Source, offsets: Sequence[int]) -> list[_Mark]:
    """The places to cut, one from each offset (bytes) on, and both ends of the source; none where it is not
    cut."""
    path = Path(source.name)
    kind = file_format(path)
    try:
        if kind == ".parquet":
            return _between_row_groups(source, offsets)
        if kind in _ENDS and path.suffix.lower() == kind:
            return _behind(_ENDS[kind], source, offsets)
    except OSError:  # whoever reads it says what is wrong
        pass
    return []


def _between_row_groups(source: Source, offsets: Sequence[int]) -> list[_Mark]:
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_metadata(source.name)
        sizes = [found.row_group(number).total_byte_size for number in range(found.num_row_groups)]
    except (pyarrow.ArrowException, ValueError, ArithmeticError):
        return []
    total = max(1, sum(sizes))
    before = [0, *(source.size * size // total for size in itertools.accumulate(sizes))]
    groups = {bisect.bisect_left(before, offset) for offset in offsets}
    return _if_cut([(before[group], group) for group in sorted({0, *groups, len(sizes)})])


def _behind(end: bytes, source: Source, offsets: Sequence[int]) -> list[_Mark]:
    with open(source.name, "rb") as file:
        found = itertools.takewhile(bool, (_find(file, end, offset) for offset in offsets))
        places = {0, source.size, *found}
    return _if_cut([(place, place) for place in sorted(places)])


def _if_cut(marks: list[_Mark]) -> list[_Mark]:
    return marks if len(marks) > 2 else []


def _find(file: BinaryIO, end: bytes, offset: int) -> int:
    """Where the first `end` from `offset` on is over; 0 when there is none for as far as a line may go."""
    file.seek(offset)
    block = b""
    while file.tell() - offset < LINE and (read := file.read(compression.BLOCK)):
        block = block[1 - len(end) :] + read if len(end) > 1 else read
        if (place := block.find(end)) >= 0:
            return file.tell() - len(block) + place + len(end)
    return 0
