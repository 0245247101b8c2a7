"""A corpus in parts: put together they are the corpus, whatever the files are."""

import itertools
import json
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest

from ant5m.data import compression, corpus, parts
from ant5m.data.corpus import SEPARATOR, Corpus, Position
from ant5m.data.parts import cut
from ant5m.errors import UserError

chance = random.Random(0)
TEXTS = [f"{n} naïve — 中文 " + "one or\nmore words " * chance.randint(1, 30) for n in range(120)]


def write(path, texts=TEXTS):
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if path.suffix == ".csv":
        path.write_text("text\n" + "\n".join(f'"{text}"' for text in texts), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(rows.encode()))
    elif path.suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + rows.encode())
    elif path.suffix == ".txt":
        path.write_text(f"\r\n{SEPARATOR}\n".join(texts), encoding="utf-8", newline="")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=5)
    return path


def read(corpora):
    return [list(one.documents()) for one in corpora]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that every boundary is met."""
    monkeypatch.setattr(compression, "BLOCK", 64)
    monkeypatch.setattr(corpus, "WHOLE", 700)
    monkeypatch.setattr(corpus, "PIECE", 200)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_one_large_file_is_cut_between_documents(tmp_path, suffix, count):
    whole = Corpus.open([write(tmp_path / f"a{suffix}")])
    made = cut(whole, count)
    texts = read(made)
    assert joined(texts) == list(whole.documents())
    assert len(made) == count and all(texts)
    assert sum(one.size for one in made) == whole.size
    sizes = [sum(map(len, part)) for part in texts]
    assert max(sizes) < 2 * sum(sizes) / count
    assert cut(whole, count) == made
    if count == 1:
        assert made == [whole]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_a_part_of_a_file_is_read_on_from_any_position(tmp_path, suffix):
    part = cut(Corpus.open([write(tmp_path / f"a{suffix}")]), 3)[1]
    cursor = part.documents()
    seen = [(text, cursor.position, cursor.bytes_read) for text in cursor]
    assert all(before[2] <= after[2] for before, after in itertools.pairwise(seen))
    assert cursor.bytes_read == part.size and seen[-1][2] > part.size / 2
    for place in range(0, len(seen), 5):
        assert list(part.documents(Position(*seen[place][1]))) == [text for text, *_ in seen[place + 1 :]]


def test_sources_are_shared_out_by_size(tmp_path):
    names = []
    for number, count in enumerate([5, 5, 40, 5, 5, 20, 20, 20]):
        names.append(write(tmp_path / f"{number}.jsonl.xz", TEXTS[:count]))
    whole = Corpus.open(names)
    for count in (2, 3, 5, 8):
        made = cut(whole, count)
        assert tuple(joined(one.sources for one in made)) == whole.sources and all(
            one.sources for one in made
        )
        assert joined(read(made)) == list(whole.documents())
    large = Corpus.open([write(tmp_path / "large.jsonl"), *names[:2]])
    assert [len(one.sources) for one in cut(large, 4)] == [1, 1, 1, 3]


def test_sources_of_unknown_size_are_shared_out_by_number():
    whole = Corpus.open(["hf:a/b:one", "hf:a/b:two", "hf:a/b:three", "builtin"])
    assert [[source.name for source in one.sources] for one in cut(whole, 2)] == [
        ["hf:a/b:one", "hf:a/b:two"],
        ["hf:a/b:three", "builtin"],
    ]


@pytest.mark.parametrize(
    "name, count", [("a.jsonl.xz", 2), ("one.txt", 2), ("a.jsonl", 500), ("a.csv", 2), ("a.json", 2)]
)
def test_more_parts_than_places_to_cut_are_refused(tmp_path, name, count):
    texts = ["One line\n" * 200] if name == "one.txt" else TEXTS
    whole = Corpus.open([write(tmp_path / name, texts)])
    with pytest.raises(UserError, match=rf"parts at most, not into {count}: .*Give --parts (\d+)$") as error:
        cut(whole, count)
    most = int(str(error.value).split()[-1])
    assert len(cut(whole, most)) == most
    with pytest.raises(UserError, match="1 to 10,000 parts, not in 0"):
        cut(whole, 0)


def test_what_cannot_be_read_stays_whole_and_is_named_when_it_is_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    whole = Corpus.open([tmp_path / "a.parquet"])
    with pytest.raises(UserError, match="1 parts at most"):
        cut(whole, 2)
    with pytest.raises(UserError, match="not a readable parquet file"):
        list(cut(whole, 1)[0].documents())


def test_a_bad_row_is_named_by_where_its_part_begins(tmp_path):
    path = write(tmp_path / "a.jsonl")
    raw = path.read_bytes()
    place = raw.index(b"\n", 2 * len(raw) // 3) + 1
    path.write_bytes(raw[:place] + b"{}\n" + raw[place:])
    part = cut(Corpus.open([path]), 2)[1]
    start, _ = part.sources[0].span
    row = raw[start:place].count(b"\n") + 1
    with pytest.raises(UserError, match=rf"a.jsonl, behind byte {start:,}, line {row}: no column"):
        list(part.documents())


def test_the_mark_is_sought_as_far_as_a_line_may_go(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LINE", 500)
    path = tmp_path / "a.txt"
    path.write_text("x" * 3_000 + SEPARATOR + "y" * 1_000)
    with pytest.raises(UserError, match="1 parts at most"):
        cut(Corpus.open([path]), 2)


def test_a_mark_between_two_reads_is_found_and_a_document_alone_loses_its_line_breaks(tmp_path):
    path = tmp_path / "a.txt"
    for length in range(150, 190):  # reads are of 64 bytes, from the middle of the file on
        path.write_text("x" * length + SEPARATOR + "\n" + "y" * 40 + "\n")
        first, second = read(cut(Corpus.open([path]), 2))
        assert first[-1][-1] == "x" and second == ["y" * 40]
