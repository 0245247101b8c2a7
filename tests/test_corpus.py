"""Every way in gives the same documents, in bounded memory, from any position; bad input gets one line."""

import gc
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ant5m.data import compression, corpus
from ant5m.data.corpus import SEPARATOR, Corpus, Position, cut_documents
from ant5m.errors import UserError

TEXTS = ["One.\n\nTwo.", "naïve — 中文 👩\u200d👧", 'quotes " and \\ and \t', "x" * 5000, "\u2028 line\r\n"]
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: zstandard.compress(raw[: len(raw) // 2]) + zstandard.compress(raw[len(raw) // 2 :]),
}


def write_jsonl(path: Path, texts=TEXTS, column="text", pack=bytes) -> str:
    rows = (json.dumps({"id": i, column: text}) for i, text in enumerate(texts))
    path.write_bytes(pack("\n".join(rows).encode()))
    return str(path)


def write_parquet(path: Path, texts=TEXTS, column="text") -> str:
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return str(path)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(*names: str, **options) -> list[str]:
    return list(Corpus.open(names, **options).documents())


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks, pieces and whole texts of a few characters, so that every boundary is met."""
    monkeypatch.setattr(compression, "BLOCK", 64)
    monkeypatch.setattr(corpus, "WHOLE", 200)
    monkeypatch.setattr(corpus, "PIECE", 50)


@pytest.mark.parametrize("suffix", PACKERS)
def test_jsonl(tmp_path, suffix, small_blocks):
    assert read(write_jsonl(tmp_path / f"a.jsonl{suffix}", pack=PACKERS[suffix])) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_txt(tmp_path, suffix):
    assert read(write(tmp_path / f"a.TXT{suffix}", PACKERS[suffix](TEXTS[1].encode()))) == [TEXTS[1]]


def test_parquet(tmp_path):
    assert read(write_parquet(tmp_path / "a.parquet")) == TEXTS


def test_another_text_column(tmp_path):
    names = (
        write_jsonl(tmp_path / "a.jsonl", column="body"),
        write_parquet(tmp_path / "b.parquet", column="body"),
    )
    assert read(*names, text_column="body") == TEXTS * 2


def test_blank_documents_are_left_out(tmp_path):
    assert read(write_jsonl(tmp_path / "a.jsonl", ["", " \n", "a", None, "b"])) == ["a", "b"]
    assert read(write_parquet(tmp_path / "a.parquet", ["", None, "a", " ", "b"])) == ["a", "b"]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    name = write(tmp_path / "a.jsonl", r'{"text": "a \ud83d b \ud83d\ude00 \\ud83d"}')
    assert read(name) == ["a \ufffd b 😀 \\ud83d"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == ["hello"]


def test_long_texts_are_cut_at_paragraph_ends_and_lose_nothing(tmp_path, small_blocks):
    text = "\n\n".join(f"Paragraph {i} of é and 中文." for i in range(40)) + "\n"
    pieces = read(write(tmp_path / "a.txt", text))
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(len(piece) <= 50 + len(SEPARATOR) for piece in pieces)
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])


def test_a_text_without_any_break_is_cut_all_the_same(tmp_path, small_blocks):
    text = "é" * 999
    pieces = read(write(tmp_path / "a.txt", text))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 50 + len(SEPARATOR)


@pytest.mark.parametrize("block", [1, 3, 7, 64, 10_000])
def test_separated_documents_in_one_file(block, small_blocks):
    texts = ["First.", "x" * 180, "Long. " * 100, "Last."]
    whole = f"\n{SEPARATOR}\n".join(texts) + f"\n{SEPARATOR}\n"
    blocks = [whole[i : i + block] for i in range(0, len(whole), block)]
    pieces = list(cut_documents(blocks))
    found = [text for piece in pieces if (text := piece if isinstance(piece, str) else piece.text)]
    heads = {piece.head for piece in pieces if not isinstance(piece, str)}
    assert heads == {found[2]}  # of the one document that is cut
    assert found[:2] == texts[:2] and found[-1] == texts[-1]
    assert "".join(found[2:-1]).strip() == texts[2].strip()


def test_a_separator_that_arrives_in_halves_is_not_cut(small_blocks):
    for length in range(200, 300):
        assert list(cut_documents("x" * length + SEPARATOR + "b"))[-1] == "b"


def test_folders_and_globs_are_sorted_and_read_once(tmp_path):
    inner = tmp_path / "books" / "inner"
    inner.mkdir(parents=True)
    b, a = write(tmp_path / "books" / "b.txt", "b"), write(inner / "a.txt.gz", gzip.compress(b"a"))
    write(tmp_path / "books" / "README.md", "no text")
    write(tmp_path / "books" / ".hidden.txt", "no text")
    assert read(str(tmp_path / "books")) == ["b", "a"]
    assert read(str(tmp_path / "books" / "**" / "*.txt*")) == ["b", "a"]
    assert read(str(tmp_path / "bo*"), a) == ["b", "a"]
    assert read(a, b, str(tmp_path / "books")) == ["a", "b"]


def test_the_order_is_that_of_the_names(tmp_path):
    names = [f"{i * 7 % 40:02d}" for i in range(40)]
    for name in names:
        write(tmp_path / f"{name}.txt", name)
    assert read(str(tmp_path)) == read(str(tmp_path / "*.txt")) == sorted(names)


def test_reading_goes_on_from_any_position(tmp_path, small_blocks):
    text = "\n\n".join(f"Paragraph {i}." for i in range(60))
    texts = [*TEXTS[:2], "", *TEXTS[2:]]
    files = [
        write(tmp_path / "a.txt", text),
        write_jsonl(tmp_path / "b.jsonl.zst", texts, pack=PACKERS[".zst"]),
        write_parquet(tmp_path / "c.parquet", texts),
        write(tmp_path / "d.txt.gz", gzip.compress(text.encode())),
    ]
    source = Corpus.open(files)
    cursor = source.documents()
    positions, documents = [cursor.position], []
    for document in cursor:
        documents.append(document)
        positions.append(Position(*json.loads(json.dumps(cursor.position))))
    assert cursor.bytes_read == source.size == sum(Path(file).stat().st_size for file in files)
    for number, position in enumerate(positions):
        assert list(source.documents(position)) == documents[number:]
    assert list(source.documents(cursor.position)) == []


def test_reading_goes_on_within_a_large_row_group(tmp_path):
    texts = [str(i) for i in range(3_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    source = Corpus.open([tmp_path / "a.parquet"])
    for record in (1, 1_024, 2_500, 2_999, 3_000):
        assert list(source.documents(Position(0, record))) == texts[record:]


def test_progress_grows_with_the_reading(tmp_path, small_blocks):
    source = Corpus.open([write_jsonl(tmp_path / "a.jsonl"), write_parquet(tmp_path / "b.parquet")])
    cursor = source.documents()
    seen = [cursor.bytes_read for _ in cursor]
    assert seen == sorted(seen) and 0 < seen[0] < source.size


def test_memory_stays_small(tmp_path):
    name = write(tmp_path / "a.txt", ("A sentence of some length. " * 40 + "\n\n") * 20_000)
    tracemalloc.start()
    size = sum(map(len, Corpus.open([name]).documents()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 20_000_000 and peak < 12_000_000


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set in the hub's layout, with two splits."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", TEXTS[:3])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", TEXTS[3:])
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", ["held out"])
    return folder


def test_hub_data_set(hub, monkeypatch):
    monkeypatch.chdir(hub.parent)
    assert read("hf:./hub") == read(f"hf:{hub}:train") == read(f"hf:{hub}:default:train") == TEXTS
    assert read(f"hf:{hub}:validation") == ["held out"]
    source = Corpus.open([f"hf:{hub}"])
    cursor = source.documents()
    assert [next(cursor), next(cursor)] == TEXTS[:2]
    assert list(source.documents(cursor.position)) == TEXTS[2:]
    for name, words in {
        f"hf:{hub}:nowhere": "nowhere",
        f"hf:{hub.parent / 'absent'}": "cannot be opened",
        "hf:": "hf:OWNER/NAME",
        "hf:a:b:c:d": "hf:OWNER/NAME",
    }.items():
        with pytest.raises(UserError, match=words):
            read(name)
    with pytest.raises(UserError, match=r"no column 'body' \(found: id, text\)"):
        read(f"hf:{hub}", text_column="body")


def test_hub_data_set_of_jsonl(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl")
    assert read(f"hf:{tmp_path / 'hub'}") == TEXTS


def test_a_hub_data_set_read_in_part_is_closed_before_the_process_ends(monkeypatch):
    # Otherwise pyarrow's threads may hang or abort the process, but not every time.
    hooks, closed = [], []

    class Dataset:
        def skip(self, _):
            return self

        def iter(self, batch_size):
            try:
                yield {"text": ["a", "b"]}
            finally:
                closed.append(True)

    monkeypatch.setattr(corpus.atexit, "register", hooks.append)
    monkeypatch.setattr(corpus.atexit, "unregister", hooks.remove)
    monkeypatch.setattr(corpus, "_open_hub", lambda _: Dataset())
    cursor = Corpus.open(["hf:a/b"]).documents()
    assert next(cursor) == "a" and not closed
    hooks[0]()
    assert closed
    assert read("hf:a/b") == ["a", "b"]
    del cursor
    gc.collect()
    assert hooks == []


BAD = {
    "a.txt": (b"", "is empty"),
    "b.txt": (b"text \x00 more", r"is binary, not text \(byte 5 is NUL\)"),
    "c.txt": ("h\u00e9llo".encode("latin-1"), r"is not UTF-8 text \(byte 1\)"),
    "d.txt": ("é".encode()[:1], r"is not UTF-8 text \(byte 0\)"),
    "e.txt": (b" \n\n ", "holds no text"),
    "f.doc": (b"text\nhello", r"unknown kind: \.txt, \.md, \.jsonl"),
    "g": (b"hello", "unknown kind"),
    "h.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"h\.jsonl, line 3: not valid JSON"),
    "i.jsonl": (b'{"text": "a"}\n[1]\n', "line 2: not a JSON object"),
    "j.jsonl": (
        b'{"body": "a", "title": "b"}\n',
        r"line 1: no column 'text' \(found: body, title\).*--text-column",
    ),
    "k.jsonl": (b'{"text": 5}\n', "line 1: column 'text' holds int, not text"),
    "k2.jsonl": (b'{"text": ' + b"5" * 9_999 + b"}", "line 1: column 'text' holds int, not text"),
    "k3.jsonl": (b'{"text": ["a"]}', "line 1: column 'text' holds list, not text"),
    "k4.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000, "line 2: not valid JSON \\(nested too deeply"),
    "l.jsonl": (b'{"text": "a"}\n{"text": "' + b"\xff" + b'"}', r"line 2: not UTF-8 text \(byte 10"),
    "m.parquet": (b"PAR1 no parquet", "not a readable parquet file"),
    "n.txt.gz": (b"not gzip", "damaged or not compressed"),
    "o.txt.gz": (gzip.compress(b"hello" * 999)[:-9], "damaged"),
    "p.txt.xz": (lzma.compress(b"hello" * 999)[:-9], "damaged"),
    "q.txt.zst": (zstandard.compress(b"hello" * 999)[:-3], "damaged"),
    "r.txt.zst": (b"not zstd", "damaged or not compressed"),
    "s.parquet.gz": (gzip.compress(b"x"), "unknown kind"),
    "t.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, words = BAD[name]
    with pytest.raises(UserError, match=words) as error:
        read(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_bad_names(tmp_path):
    (tmp_path / "empty").mkdir()
    for names, words in {
        (): "no text given",
        (str(tmp_path / "absent.txt"),): "absent.txt does not exist",
        (str(tmp_path / "*.txt"),): "matches no file",
        (str(tmp_path / "empty"),): "holds no text file",
    }.items():
        with pytest.raises(UserError, match=words):
            Corpus.open(names)


def test_parquet_without_text(tmp_path):
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text' \(found: id, body\).*--text-column"):
        read(write_parquet(tmp_path / "a.parquet", column="body"))
    with pytest.raises(UserError, match="column 'id' holds int, not text"):
        read(write_parquet(tmp_path / "a.parquet"), text_column="id")


def test_all_of_an_xz_is_read_behind_padding(tmp_path):
    parts = [lzma.compress(json.dumps({"text": text}).encode() + b"\n") for text in TEXTS]
    assert read(write(tmp_path / "a.jsonl.xz", bytes(8).join(parts) + bytes(4))) == TEXTS


def test_a_row_is_read_whatever_stands_beside_its_text(tmp_path):
    others = [
        '"n": ' + "1" * 5_000,
        '"n": NaN',
        '"n": 1e999',
        '"n": "\\ud800"',
        '"text": 1, "m": {"text": 2}',
    ]
    rows = [f'{{{other}, "text": "text {i}"}}' for i, other in enumerate(others)]
    assert read(write(tmp_path / "a.jsonl", "\r\n".join(rows))) == [f"text {i}" for i in range(len(rows))]


def test_a_row_with_bytes_that_are_not_utf8_beside_its_text(tmp_path):
    assert read(write(tmp_path / "a.jsonl", b'{"text": "a", "by": "Jos\xe9"}')) == ["a"]


def test_a_line_above_the_limit_is_named(tmp_path, small_blocks, monkeypatch):
    def blocks(length):
        yield from [b"x" * 1_000] * (length // 1_000)

    monkeypatch.setattr(corpus, "LINE", 100_000)
    assert [len(line) for line in corpus._lines(blocks(100_000))] == [100_000]
    assert list(corpus._lines([*blocks(101_000), b"\nshort"])) == [None, b"short"]
    name = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "' + "x" * 100_000 + '"}\n{"text": "b"}')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: longer than 0 MiB"):
        read(name)
    with pytest.warns(UserWarning, match="line 2: longer"):
        assert read(name, on_error="skip") == ["a", "b"]


def test_one_long_line_in_bounded_memory(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        for _ in range(200):
            file.write(b"x" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match="line 1: longer than 64 MiB"):
        read(str(tmp_path / "a.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20


def test_a_parquet_string_that_is_not_utf8(tmp_path):
    raw = pyarrow.array([b"a", b"caf\xe9", None, b"b"], pyarrow.binary())
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 4, raw.buffers(), raw.null_count)
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: not UTF-8"):
        read(str(tmp_path / "a.parquet"))
    with pytest.warns(UserWarning, match="row 2"):
        assert read(str(tmp_path / "a.parquet"), on_error="skip") == ["a", "b"]


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path):
    files = [
        write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": 5}\n\xff\n{"body": 1}\n{"text": "b"}\n'),
        write(tmp_path / "b.txt.gz", gzip.compress(b"hello" * 99)[:-9]),
        write(tmp_path / "c.txt", b" \n"),
        write(tmp_path / "d.txt", b"d"),
    ]
    source = Corpus.open(files, on_error="skip")
    cursor = source.documents()
    with pytest.warns(UserWarning) as said:
        documents = [(text, cursor.position) for text in cursor]
    assert [text for text, _ in documents] == ["a", "b", "d"]
    assert cursor.left_out == {"rows": 3, "files": 2} and cursor.bytes_read == source.size
    for number, words in enumerate(
        ["line 2: column", "line 3: not UTF-8", "line 4: no column", "b.txt.gz", "c.txt"]
    ):
        assert words in str(said[number].message)
    for number, (_, position) in enumerate(documents, 1):
        assert [*source.documents(position)] == ["a", "b", "d"][number:]


def test_where_a_cut_document_began(tmp_path, small_blocks):
    long = "".join(f"Sentence {i} of a long document.\n\n" for i in range(20))
    name = write(tmp_path / "a.txt", f"short{SEPARATOR}{long}{SEPARATOR}{long}")
    cursor = Corpus.open([name]).documents()
    heads = [(text, cursor.head, cursor.position) for text in cursor]
    assert heads[0][:2] == ("short", "short")
    assert {head for _, head, _ in heads[1:]} == {heads[1][0]} and len(heads) > 10
    again = Corpus.open([name]).documents(heads[4][2])
    assert next(again) == heads[5][0] and again.head == heads[1][0]


def test_folders_say_what_they_left_out(tmp_path):
    for name in ("a.txt", "part/b.txt", ".ipynb_checkpoints/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, name)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "c.txt", "c")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "part")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="1 hidden files and folders: .ipynb_checkpoints"):
        assert read(str(tmp_path)) == ["a.txt", "c", "part/b.txt"]
    with pytest.warns(UserWarning, match="1 links to nothing: gone"):
        assert read(str(tmp_path / "data")) == ["c", "part/b.txt"]
