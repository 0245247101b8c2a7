"""Markdown, JSON arrays, CSV, and archives of any of them: the same documents as from .jsonl, in bounded
memory, from any position."""

import csv
import io
import json
import tarfile
import tracemalloc
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_corpus import PACKERS, TEXTS, read, small_blocks, write, write_jsonl, write_parquet  # noqa: F401

from ant5m.data import compression, rows, tar
from ant5m.data.corpus import Corpus
from ant5m.errors import UserError


def as_csv(texts=TEXTS) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    return out.getvalue().encode()


def as_json(texts=TEXTS, **style) -> bytes:
    return json.dumps(
        [{"id": i, "text": text, "more": [i, {"a": 0.5}]} for i, text in enumerate(texts)], **style
    ).encode()


def as_tar(files: dict[str, bytes], format=tarfile.PAX_FORMAT, more=()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in more:
            archive.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.usefixtures("small_blocks")
def test_every_kind_gives_the_documents_of_jsonl(tmp_path, suffix):
    pack = PACKERS[suffix]
    lines = b"\n".join(json.dumps({"text": text}).encode() for text in TEXTS)
    contents = {
        "a.csv": as_csv(),
        "a.json": as_json(),
        "b.json": as_json(indent=2, ensure_ascii=False),
        "c.json": lines,
        "d.json": lines.replace(b"\n{", b"{"),
        "a.tar": as_tar({"a.jsonl": lines}),
        "b.tar": as_tar({"x/a.json": as_json()}, tarfile.GNU_FORMAT),
        "c.tar": as_tar({"a.csv.gz": PACKERS[".gz"](as_csv()), "none.png": b"\0"}, tarfile.USTAR_FORMAT),
    }
    for name, content in contents.items():
        path = write(tmp_path / f"{name}{suffix}", pack(content))
        assert read(path) == TEXTS, name
        corpus = Corpus.open([path])
        cursor = corpus.documents()
        for number in range(1, len(TEXTS)):
            next(cursor)
            assert list(corpus.documents(cursor.position)) == TEXTS[number:], (name, number)


def test_markdown(tmp_path):
    assert read(write(tmp_path / "a.md", "# A\n\nb")) == ["# A\n\nb"]
    assert len(read(write(tmp_path / "b.md", "word " * 40_000))) > 2  # cut as a .txt is


def test_a_folder_is_read_as_one_kind(tmp_path):
    """What lies beside the texts is left out, counted and named; by its own name it is read."""
    write_jsonl(tmp_path / "a.jsonl")
    write(tmp_path / "README.md", "About it.")
    write(tmp_path / "infos.json", "{}")
    with pytest.warns(UserWarning, match=r"2 files of another kind .*: README.md, infos.json"):
        assert read(str(tmp_path)) == TEXTS
    assert read(str(tmp_path / "README.md")) == ["About it."]
    (tmp_path / "a.jsonl").unlink()
    with pytest.warns(UserWarning, match="infos.json"):
        assert read(str(tmp_path)) == ["About it."]
    (tmp_path / "README.md").unlink()
    write(tmp_path / "infos.json", as_json())
    write(tmp_path / "infos.csv", as_csv(["c"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(str(tmp_path)) == ["c", *TEXTS]


def test_archives_are_read_as_folders_are(tmp_path):
    link = tarfile.TarInfo("link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    folder = tarfile.TarInfo("x")
    folder.type = tarfile.DIRTYPE
    write_parquet(tmp_path / "a.parquet")
    files = {
        "x/" + "long/" * 60 + "a.txt": b"one",
        "/../b.md": b"two",
        "x/.hidden.txt": b"no",
        "._c.txt": b"no",
        "empty.txt": b"",
        "a.parquet": (tmp_path / "a.parquet").read_bytes(),
        "naïve.txt": b"three",
    }
    for number, style in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        name = write(tmp_path / f"{number}.tar", as_tar(files, style, [link, folder]))
        with pytest.warns(UserWarning) as told:
            assert read(name) == ["one", "two", "three"]
        text = str(told[0].message)
        assert "2 hidden files" in text and "1 empty files" in text and "1 neither files" in text
        assert "1 files that are not read inside a .tar (unpack it): a.parquet" in text


def test_rows_that_cannot_be_read_are_left_out_one_by_one(tmp_path):
    found = {
        "a.json": b'[{"text": "a"}, 5, {"body": "b"}, {"text": 1}, {"text": "c"}]',
        "b.csv": b"text,id\na,1\nb\n\nc,3\n",
        "c.tar": as_tar({"x.json": b'[{"text": "a"}, []]', "y.csv": b"text\nc\n"}),
    }
    for name, content in found.items():
        path = write(tmp_path / name, content)
        cursor = Corpus.open([path], on_error="skip").documents()
        with pytest.warns(UserWarning, match="left out: "):
            assert list(cursor) == ["a", "c"]
        assert set(cursor.left_out) == {"rows"}


HEADER = as_tar({"a.txt": b"x"})[:512]
BAD = {
    "a.json": (b'[{"text": "a"}', r"a\.json: not valid JSON \(it breaks off\)"),
    "b.json": (b'[{"text": "a"} {"text": "b"}]', "expected , or ] between rows"),
    "c.json": (b'[{"text": "a"}] x', "behind the end"),
    "d.json": (b'[{"text": "a"},', r"not valid JSON"),
    "e.json": (b'{"text": "a"', r"not valid JSON"),
    "f.json": (b"[" * 100_000, "nested too deeply"),
    "g.json": (b'[{"body": "a"}]', r"g\.json, row 1: no column 'text' \(found: body\)"),
    "h.json": (b"[]", "holds no text"),
    "i.json": (b"12", "row 1: not a JSON object"),
    "j.json": ('[{"text": "é"}]'.encode("latin-1"), r"not UTF-8 text \(byte 11\)"),
    "k.json": ("[]".encode("utf-16"), "is UTF-16"),
    "a.csv": (b"text,id\na\n", r"a\.csv, line 2 has 1 fields, the first one 2"),
    "b.csv": (b'text\n"a\nb\n', r"b\.csv: not valid CSV \(line 3: unexpected end of data\)"),
    "c.csv": (b"body\na\n", r"c\.csv, row 1: no column 'text' \(found: body\)"),
    "d.csv": (b"text\n", "holds no text"),
    "e.csv": (b"text\na\0b\n", "is binary"),
    "a.tar": (b"no archive" * 99, r"a\.tar: it is damaged, or no \.tar"),
    "b.tar": (as_tar({"a.txt": b"x" * 999})[:1_000], r"b\.tar, a\.txt: it breaks off inside a\.txt"),
    "c.tar": (as_tar({"a.txt": b"x"})[:1_024], r"c\.tar: it breaks off \(there is no mark of its end\)"),
    "d.tar": (HEADER[:300], r"d\.tar: it breaks off"),
    "e.tar": (as_tar({"a.png": b"x"}), "holds no text"),
    "f.tar": (as_tar({"a.txt": b"x\0"}), r"f\.tar, a\.txt is binary, not text \(byte 1 is NUL\)"),
    "g.tar": (as_tar({"a.txt.gz": b"x"}), r"g\.tar, a\.txt\.gz: .*damaged or not compressed"),
    "h.tar": (as_tar({"a.jsonl": b'{"text": 5}'}), r"h\.tar, a\.jsonl, line 1: column 'text' holds int"),
    "i.tar": (as_tar({"x" * 300: b""}).replace(b"path=", b"path "), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, words = BAD[name]
    with pytest.raises(UserError, match=words) as error:
        read(write(tmp_path / name, content))
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def endless(block: str, limit: int):
    """Blocks of a text that goes on and on; the test fails where more than `limit` characters are read."""
    given = 0
    while True:
        given += len(block)
        assert given <= limit
        yield block


@pytest.mark.parametrize(
    ("begin", "block", "reader"),
    [
        ('[{"text": "', "a", rows.json_values),
        ("[", "[0,", rows.json_values),
        ("text\n", "a", rows.csv_rows),
        ('text\n"', "a\n", rows.csv_rows),
        ("", "a,", rows.csv_rows),
    ],
)
def test_a_row_that_never_ends_is_an_error(monkeypatch, begin, block, reader):
    monkeypatch.setattr(rows, "ROW", 5_000)

    def blocks():
        yield begin
        yield from endless(block * 300, 30_000)

    with pytest.raises(UserError, match=r"not valid (JSON|CSV)"):
        list(reader(blocks()))


def test_memory_is_bounded(tmp_path, monkeypatch):
    """Of a large array or table, and of archives that claim much: names of gigabytes, a sparse file's map."""
    monkeypatch.setattr(compression, "BLOCK", 1 << 14)
    texts = ["some words of a text " * 50] * 2_000  # 2 MB
    claims = tarfile.TarInfo("x")
    claims.type, claims.size = tarfile.XHDTYPE, 1 << 33
    wide = claims.tobuf(tarfile.GNU_FORMAT)
    sparse = bytearray(tarfile.TarInfo("s.txt").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157], sparse[482] = tarfile.GNUTYPE_SPARSE, 1
    sparse[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(sparse))[0]
    block = bytearray(512)
    block[504] = 1
    found = {
        "a.json": as_json(texts),
        "a.csv": as_csv(texts),
        "a.tar": as_tar({"a.json": as_json(texts)}),
        "b.tar.gz": PACKERS[".gz"](as_tar({"a.txt": b"one"})[:1_024] + wide + bytes(1 << 22)),
        "c.tar.gz": PACKERS[".gz"](
            as_tar({"a.txt": b"one"})[:1_024] + bytes(sparse) + bytes(block) * (1 << 15)
        ),
    }
    for name, content in found.items():
        path = write(tmp_path / name, content)
        tracemalloc.start()
        try:
            count = sum(1 for _ in Corpus.open([path]).documents())
            assert count == 2_000
        except UserError:
            assert name in ("b.tar.gz", "c.tar.gz")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 500_000, name


def test_headers_of_other_programs():
    """Of GNU tar, old and new, and star: sizes in base 256, a size in an extended header, a global one."""
    plain = tarfile.TarInfo("a.txt")
    plain.size = 3
    body = b"one".ljust(512, b"\0")
    large = bytearray(plain.tobuf(tarfile.GNU_FORMAT))
    large[124:136] = b"\x80" + (3).to_bytes(11, "big")
    large[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(large))[0]
    small = tarfile.TarInfo("a.txt")
    extended = small.create_pax_global_header({"comment": "x"}) + small._create_pax_generic_header(
        {"size": "3", "path": "b.txt"}, tarfile.XHDTYPE, "utf-8"
    )
    archive = bytes(large) + body + extended + small.tobuf(tarfile.USTAR_FORMAT) + body + bytes(1024)
    found = []
    for size in (1, 511, 4_096):
        blocks = (archive[i : i + size] for i in range(0, len(archive), size))
        found.append([(member.name, member.read()) for member in tar.members(blocks)])
    assert [name for name, _ in found[2]] == ["a.txt", "b.txt"]
    assert found[2] == [("a.txt", b"one"), ("b.txt", b"one")]
    assert [[name for name, _ in one] for one in found] == [["a.txt", "b.txt"]] * 3


def test_a_path_goes_nowhere(tmp_path, monkeypatch):
    """Whatever an archive says, nothing is written."""
    monkeypatch.chdir(tmp_path)
    content = as_tar({"../../outside.txt": b"x", "/tmp/absolute.txt": b"y"})
    before = sorted(Path(tmp_path).rglob("*"))
    assert read(write(tmp_path / "a.tar", content)) == ["x", "y"]
    assert sorted(Path(tmp_path).rglob("*")) == [*before, tmp_path / "a.tar"]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_what_stands_behind_the_end_of_a_tar_is_not_left_out_in_silence(tmp_path, packed):
    one = as_tar({"a.txt": b"one"})
    path = tmp_path / f"a.tar{packed}"
    write(path, PACKERS[packed](one + bytes(10_240)))
    assert read(path) == ["one"]
    for more in (one, b"x", bytes(1 << 21) + b"x"):
        write(path, PACKERS[packed](one + more))
        with pytest.raises(UserError, match=r"a\.tar.*: something stands behind its end"):
            read(path)


def test_a_damaged_end_of_a_compressed_tar_is_noticed(tmp_path):
    whole = PACKERS[".gz"](as_tar({"a.txt": b"one"}))
    with pytest.raises(UserError, match="is damaged or not compressed"):
        read(write(tmp_path / "a.tar.gz", whole[:-8] + bytes(8)))


def test_two_columns_of_the_same_name_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.csv: several columns are named 'text'"):
        read(write(tmp_path / "a.csv", b"text,n,text\na,1,b\n"))
    assert read(write(tmp_path / "b.csv", b"text,n,n\na,1,2\n")) == ["a"]
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"a\.parquet: several columns are named 'text'"):
        read(tmp_path / "a.parquet")
