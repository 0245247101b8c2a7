import csv
import dataclasses
import errno
import functools
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from ant5m.cli import call
from ant5m.data import packing
from ant5m.data.corpus import PIECE, SEPARATOR, WHOLE, Corpus
from ant5m.data.packing import count_words, pack
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.files import lock

WORDS = [
    "the",
    "of",
    "a",
    "quiet",
    "river",
    "ran",
    "under",
    "old",
    "stone",
    "bridges",
    "boats",
    "salt",
    "lamps",
]
ODD = [
    "naïve café — “quoted” 12,345.678 it's THEY'LL",
    "<|endoftext|> is text here <|endoftext|>",
    "👩\u200d👩\u200d👧 🇩🇪 \ufeff\u00a0\u2028\u3000\x85\x1c wide spaces",
    "中文字 ひらがな 한국어 עברית العربية नमस्ते \U0010ffff \ue000",
    "e\u0301 ﬁ Å ½ ² ٣ \x00\x01\x7f",
    "   leading\t\ttabs \r\n\r\n\n trailing   ",
    "x",
]


def make_texts(count, seed=0):
    chance = random.Random(seed)
    return [f"Story {n}. " + " ".join(chance.choices(WORDS, k=chance.randint(3, 60))) for n in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_texts(300) + ODD * 3, vocab_size=320)


@pytest.fixture
def corpus(tmp_path):
    return Corpus.open([write_jsonl(tmp_path / "texts.jsonl", make_texts(400) + ODD)])


def documents_of(folder, split):
    """Ids of each document of a packed split, the end-of-text ids taken off."""
    shards = Shards.open(folder, split)
    tokens = shards.tokens[:]
    ends = np.flatnonzero(tokens == shards.eos_token_id)
    assert ends[-1] == len(tokens) - 1
    return [part[:-1].tolist() for part in np.split(tokens, ends[:-1] + 1)]


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_of_a_small_text_more_is_held_out(tmp_path, tokenizer, monkeypatch):
    """So many tokens as say something about the loss; where the share is said, that share."""
    texts = make_texts(600)
    corpus = Corpus.open([write_jsonl(tmp_path / "texts.jsonl", texts)])
    meta = pack(corpus, tokenizer, tmp_path / "small")
    total = sum(split["tokens"] for split in meta["splits"].values())
    held_out = meta["splits"]["validation"]
    assert 0.02 < held_out["tokens"] / total < 0.09 and held_out["documents"] > 10
    assert meta["options"]["validation_fraction"] is None
    said = pack(corpus, tokenizer, tmp_path / "said", validation_fraction=0.005)["splits"]["validation"]
    assert said["documents"] < held_out["documents"] / 2
    monkeypatch.setattr(packing, "HELD_OUT_TOKENS", said["tokens"])
    enough = pack(corpus, tokenizer, tmp_path / "enough")["splits"]["validation"]
    assert enough["shards"][0]["sha256"] == said["shards"][0]["sha256"]
    two = Corpus.open([write_jsonl(tmp_path / "two.jsonl", texts[:2])])
    assert [split["documents"] for split in pack(two, tokenizer, tmp_path / "two")["splits"].values()] == [
        1,
        1,
    ]


def test_limits_of_what_is_packed(tmp_path, tokenizer, monkeypatch):
    """The first documents of each source; so many tokens and what is left of their batch. A stop changes
    nothing."""
    texts = make_texts(300)
    names = [write_jsonl(tmp_path / f"{part}.jsonl", texts[part * 100 :][:100]) for part in range(3)]
    few = dataclasses.replace(Corpus.open(names), max_documents=7)
    expected = [*texts[:7], *texts[100:107], *texts[200:207]]
    assert list(few.documents()) == expected
    cursor = few.documents()
    for number in range(1, 20):
        next(cursor)
        assert list(few.documents(cursor.position)) == expected[number:]
    monkeypatch.setattr(packing, "BATCH_BYTES", 1 << 11)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 1 << 12)
    options = {"validation_fraction": 0.1, "max_tokens": 4_000}
    meta = pack(Corpus.open(names), tokenizer, tmp_path / "out", **options)
    assert 4_000 <= sum(split["tokens"] for split in meta["splits"].values()) < 4_000 + (1 << 11)
    stop, written = packing.Journal.write, []

    def write(self, out):
        stop(self, out)
        written.append(None)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(packing.Journal, "write", write)
    with pytest.raises(KeyboardInterrupt):
        pack(Corpus.open(names), tokenizer, tmp_path / "again", **options)
    pack(Corpus.open(names), tokenizer, tmp_path / "again", **options)
    assert content(tmp_path / "again") == content(tmp_path / "out")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "hub"])
def test_rows_of_a_group_are_held_out_together(tmp_path, tokenizer, kind, monkeypatch):
    texts = make_texts(120)
    rows = [{"text": text, "book": f"book {number % 12}"} for number, text in enumerate(texts)]
    file = tmp_path / f"texts.{kind}"
    if kind == "hub":
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        (tmp_path / "hub" / "data").mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
        file = f"hf:{tmp_path / 'hub'}"
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["text", "book"])
            writer.writeheader()
            writer.writerows(rows)
    corpus = dataclasses.replace(Corpus.open([file]), group_column="book")
    assert list(corpus.documents()) == texts
    pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.3)
    sides: dict[str, set[str]] = {}
    book_of = {row["text"]: row["book"] for row in rows}
    for split in ("train", "validation"):
        for ids in documents_of(tmp_path / "out", split):
            sides.setdefault(book_of[tokenizer.decode(ids)], set()).add(split)
    assert len(sides) == 12 and all(len(side) == 1 for side in sides.values())
    assert {"train", "validation"} == set().union(*sides.values())
    wrong = dataclasses.replace(Corpus.open([file]), group_column="author")
    with pytest.raises(UserError, match=r"no column 'author'.*--group-column"):
        list(wrong.documents())


def test_ids_are_those_of_tokenizers(tmp_path, corpus, tokenizer):
    meta = pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.1, shard_tokens=1_000)
    texts = list(corpus.documents())
    expected = [tokenizer.backend.encode(text, add_special_tokens=False).ids for text in texts]
    train, validation = (documents_of(tmp_path / "out", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == len(texts)
    held_out = [ids for ids in expected if ids in validation]
    assert validation == held_out  # in order
    assert train == [ids for ids in expected if ids not in validation]
    assert meta == Shards.open(tmp_path / "out").meta


def test_meta_counts_what_is_there(tmp_path, corpus, tokenizer):
    meta = pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.1, shard_tokens=1_000)
    for split, entry in meta["splits"].items():
        texts = [tokenizer.decode(ids) for ids in documents_of(tmp_path / "out", split)]
        assert entry["documents"] == len(texts)
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["words"] == sum(len(text.split()) for text in texts)
        sizes = [shard["tokens"] for shard in entry["shards"]]
        assert entry["tokens"] == sum(sizes)
        assert all(size == 1_000 for size in sizes[:-1])
    assert len(meta["splits"]["train"]["shards"]) > 3
    assert meta["vocab_size"] == 320
    assert meta["eos_token_id"] == tokenizer.eos_token_id
    assert meta["sources"] == [{"name": str(tmp_path / "texts.jsonl"), "size": corpus.size}]
    copy = Tokenizer.load(tmp_path / "out" / "tokenizer")
    assert copy.fingerprint == meta["tokenizer_fingerprint"] == tokenizer.fingerprint


def test_split_depends_on_the_document_alone(tmp_path, tokenizer):
    texts = make_texts(300)

    def held_out(name, texts, **options):
        corpus = Corpus.open([write_jsonl(tmp_path / f"{name}.jsonl", texts)])
        pack(corpus, tokenizer, tmp_path / name, validation_fraction=0.2, **options)
        return sorted(documents_of(tmp_path / name, "validation"))

    first = held_out("first", texts)
    assert 30 < len(first) < 90
    assert held_out("reversed", texts[::-1]) == first
    assert held_out("twice", texts + texts) == sorted(first + first)
    assert held_out("seed", texts, seed=1) != first


@pytest.mark.parametrize("number", [0, 1, 2, 5, 9, 14])
@pytest.mark.parametrize(
    "point", ["_write", "_write_all", "write_json", "fsync", "file_sha256", "_remove_shards"]
)
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    tmp_path, corpus, tokenizer, monkeypatch, point, number
):
    options = {"validation_fraction": 0.1, "shard_tokens": 1_000}
    monkeypatch.setattr(packing, "BATCH_BYTES", 2_000)
    pack(corpus, tokenizer, tmp_path / "whole", **options)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 5_000)
    real, calls = getattr(packing, point), iter(range(1_000))

    def stop(*args, **options):
        if next(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(packing, point, stop)
        try:
            pack(corpus, tokenizer, tmp_path / "out", **options)
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "meta.json").exists()
            pack(corpus, tokenizer, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_going_on_does_not_start_over(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 2_000)
    real, sizes = packing._encode, []

    def encode(batch, *others):
        if len(sizes) == 20:
            raise KeyboardInterrupt
        sizes.append(len(batch.texts))
        return real(batch, *others)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_encode", encode)
        with pytest.raises(KeyboardInterrupt):
            pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.1)
    with pytest.raises(UserError, match="was not finished: run the same"):
        Shards.open(tmp_path / "out")
    packed = sum(sizes)
    sizes.clear()
    monkeypatch.setattr(packing, "_encode", lambda *args: sizes.append(len(args[0].texts)) or real(*args))
    pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.1)
    assert sum(sizes) < 407 - packed * 0.8


def test_the_journal_never_counts_what_may_be_lost(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 2_000)
    synced = {}  # file -> its size when it was last synced

    def fsync(descriptor):
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    real, entries = packing.write_json, []

    def write_json(path, value):
        if path.name == "progress.json":
            entries.append(value["position"])
            for name, split in value["splits"].items():
                files = sorted(path.parent.glob(f"{name}-*.bin*"))
                assert sum(synced.get(file.stat().st_ino, 0) for file in files) >= 2 * split["tokens"]
        real(path, value)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(packing, "write_json", write_json)
    pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.1, shard_tokens=1_000)
    assert len(entries) > 10


def test_a_full_disk_loses_nothing(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 2_000)
    options = {"validation_fraction": 0.1, "shard_tokens": 1_000}
    pack(corpus, tokenizer, tmp_path / "whole", **options)
    real, room = packing._write_all, iter(range(9_000, 0, -1_000))

    def write(file, data):
        if not next(room, 0):
            file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write_all", write)
        with pytest.raises(UserError, match=r"no room left on the disk .* repeat the command"):
            pack(corpus, tokenizer, tmp_path / "out", **options)
    pack(corpus, tokenizer, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.fixture
def unfinished(tmp_path, corpus, tokenizer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packing, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(corpus, tokenizer, tmp_path / "out")
    return tmp_path / "out"


def test_only_the_same_command_goes_on(tmp_path, corpus, tokenizer, unfinished):
    before = content(unfinished)
    other = train_tokenizer(make_texts(300), vocab_size=300)
    more = write_jsonl(tmp_path / "more.jsonl", make_texts(5))
    for what, arguments in {
        "seed": (corpus, tokenizer, unfinished, None, 1),
        "validation_fraction": (corpus, tokenizer, unfinished, 0.1),
        "tokenizer": (corpus, other, unfinished),
        "inputs": (Corpus.open([tmp_path / "texts.jsonl", more]), tokenizer, unfinished),
    }.items():
        with pytest.raises(UserError, match=f"unfinished packing of other {what}"):
            pack(*arguments)
    assert content(unfinished) == before
    text = (tmp_path / "texts.jsonl").read_text(encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text(
        text.replace("river", "RIVER"), encoding="utf-8"
    )  # of the same size
    with pytest.raises(UserError, match="unfinished packing of other inputs"):
        pack(Corpus.open([tmp_path / "texts.jsonl"]), tokenizer, unfinished)


def test_a_damaged_journal_is_refused(corpus, tokenizer, unfinished):
    for damage, message in (("{", "not valid JSON"), ("{}", "damaged"), ("[]", "damaged")):
        (unfinished / "progress.json").write_text(damage)
        with pytest.raises(UserError, match=message):
            pack(corpus, tokenizer, unfinished)


def test_other_content_is_never_touched(tmp_path, corpus, tokenizer):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists with other content"):
        pack(corpus, tokenizer, tmp_path / "full")
    with pytest.raises(UserError, match="exists with other content"):
        pack(corpus, tokenizer, tmp_path / "texts.jsonl")
    pack(corpus, tokenizer, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match="is packed already"):
        pack(corpus, tokenizer, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_validation_gets_a_document(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 1_000)

    def packed(name, texts):
        corpus = Corpus.open([write_jsonl(tmp_path / f"{name}.jsonl", texts)])
        pack(corpus, tokenizer, tmp_path / name, validation_fraction=1e-9, shard_tokens=100)
        return [len(documents_of(tmp_path / name, split)) for split in ("train", "validation")]

    assert packed("two", ["one document", "and another"]) == [1, 1]
    assert packed("twice", ["one document"] * 3 + ["and another"] * 3) == [3, 3]
    assert packed("many", make_texts(50)) == [49, 1]
    for name, texts in {"one": ["alone"], "same": ["alone"] * 4}.items():
        with pytest.raises(UserError, match="too small: no document is left for train"):
            packed(name, texts)
        assert not content(tmp_path / name)  # the way is free for more text
        write_jsonl(tmp_path / f"{name}.jsonl", ["alone", "not alone"])
        assert packed(name, ["alone", "not alone"]) == [1, 1]


def test_filters_that_leave_nothing_of_the_last_batch(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 1_000)
    repeats = [" ".join(WORDS[:12] * 40)] * 5

    def packed(name, texts):
        corpus = Corpus.open([write_jsonl(tmp_path / f"{name}.jsonl", texts)])
        return pack(corpus, tokenizer, tmp_path / name, validation_fraction=0.1, filters=["repeats"])

    meta = packed("last", make_texts(100) + repeats)
    assert meta["removed"]["repeats_documents"] == 5
    assert sum(split["documents"] for split in meta["splits"].values()) == 100
    with pytest.raises(UserError, match="every document was left out"):
        packed("all", repeats)


def test_a_mended_input_is_no_other_command(tmp_path, tokenizer):
    text = tmp_path / "text.txt"
    text.write_bytes("née\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        pack(Corpus.open([text]), tokenizer, tmp_path / "out")
    text.write_text("née<|endoftext|>another<|endoftext|>and one more", encoding="utf-8")
    assert pack(Corpus.open([text]), tokenizer, tmp_path / "out")["splits"]["train"]["documents"] == 2


def test_few_held_out_documents_are_named(tmp_path, tokenizer, corpus, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    words = ["data", "pack", str(tmp_path / "texts.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert call([*words, "--out", str(tmp_path / "[few]")]) == 0
    captured = capsys.readouterr()
    assert "validation has only" in captured.err and "[few]" in captured.out


def test_impossible_options(tmp_path, corpus, tokenizer):
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            pack(corpus, tokenizer, tmp_path / "out", validation_fraction=fraction)
    with pytest.raises(UserError, match="at least one token"):
        pack(corpus, tokenizer, tmp_path / "out", shard_tokens=0)
    assert not (tmp_path / "out").exists()


def test_ids_must_fit_uint16(tmp_path, corpus):
    vocab = {f"t{i}": i for i in range(65_536)} | {"<|endoftext|>": 65_536}
    with pytest.raises(UserError, match="65,537 entries, a shard's uint16 65,536"):
        pack(corpus, Tokenizer(Backend(models.BPE(vocab=vocab, merges=[]))), tmp_path / "out")


def test_an_encoder_that_lies_is_found_out(tmp_path, corpus, tokenizer, monkeypatch):
    pack(corpus, tokenizer, tmp_path / "honest", shard_tokens=1_000)
    honest = Tokenizer.__dict__["_gigatoken"].func

    class Liar:
        def __init__(self, encoder):
            self.encoder, self.calls = encoder, 0

        def encode_batch(self, texts):
            self.calls += 1
            if self.calls > 4:  # good at first: some batches are on the disk by then
                texts = [text.replace("e", "E") for text in texts]
            return self.encoder.encode_batch(texts)

    lying = functools.cached_property(lambda self: Liar(honest(self)))
    lying.__set_name__(Tokenizer, "_gigatoken")
    monkeypatch.setattr(Tokenizer, "_gigatoken", lying)
    monkeypatch.setattr(packing, "BATCH_BYTES", 5_000)
    with pytest.warns(UserWarning, match="gigatoken and tokenizers disagree"):
        pack(corpus, tokenizer, tmp_path / "out", shard_tokens=1_000)
    assert content(tmp_path / "out") == content(tmp_path / "honest")


def test_a_tokenizer_that_gigatoken_does_not_know(tmp_path, corpus):
    vocab = {"<|endoftext|>": 0} | {
        c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)
    }
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("q", "merged_with_next"), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    pack(corpus, Tokenizer(backend), tmp_path / "out", validation_fraction=0.1)
    backend.encode_special_tokens = True
    expected = sorted(backend.encode(text, add_special_tokens=False).ids for text in corpus.documents())
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "validation")
    assert sorted(found) == expected


def test_cache_of_the_encoder_is_renewed(tmp_path, corpus, tokenizer, monkeypatch):
    pack(corpus, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(packing, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(packing, "CACHE_BYTES", 10_000)
    real, made = packing._encoder, []
    monkeypatch.setattr(packing, "_encoder", lambda *args: made.append(1) or real(*args))
    pack(corpus, tokenizer, tmp_path / "out")
    assert len(made) > 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_words_are_those_of_str_split():
    chance = random.Random(0)
    spaces = [c for c in map(chr, range(0x10000)) if c.isspace()]
    letters = [*spaces, *map(chr, range(40)), *"aéß—中あ\u200b\u2010\u3001\ufeff\u0101\U0001f600"]
    texts = ["".join(chance.choices(letters, k=chance.randint(0, 12))) for _ in range(5_000)]
    assert count_words([text.encode() for text in texts]).tolist() == [len(text.split()) for text in texts]


def test_real_documents(tmp_path, tokenizer):
    stories = Path(__file__).parents[2] / "shared/data/corpus/african_storybook/african_storybook.jsonl.xz"
    if not stories.exists():
        pytest.skip("the shared corpus is not here")
    corpus = Corpus.open([stories])
    pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.1)
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "validation")
    encoded = tokenizer.backend.encode_batch(list(corpus.documents()), add_special_tokens=False)
    assert sorted(found) == sorted(row.ids for row in encoded)


def test_command(tmp_path, corpus, tokenizer, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    words = ["data", "pack", str(tmp_path / "texts.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert call([*words, "--out", str(tmp_path / "out"), "--validation-fraction", "0.1"]) == 0
    tokens = Shards.open(tmp_path / "out").num_tokens
    assert f"{tokens:,}" in capsys.readouterr().out
    assert call([*words, "--out", str(tmp_path / "out")]) == 2
    assert "is packed already" in capsys.readouterr().err
    assert call([*words, "--out", str(tmp_path / "new"), "--text-column", "body"]) == 2
    assert "no column 'body'" in capsys.readouterr().err
    assert call(["data", "pack", str(tmp_path / "no.txt"), "--tokenizer", str(tmp_path), "--out", "x"]) == 2


def test_two_at_once_do_not_mix(tmp_path, corpus, tokenizer):
    with lock(tmp_path / "out"), pytest.raises(UserError, match="another process is writing into"):
        pack(corpus, tokenizer, tmp_path / "out")
    pack(corpus, tokenizer, tmp_path / "out")  # the other one died before it wrote anything


def test_what_a_killed_process_left_is_no_other_content(tmp_path, corpus, tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").touch()
    (out / ".progress.json.abcdefgh.aside").write_text("{")
    pack(corpus, tokenizer, out)
    assert {name for name in os.listdir(out) if name.startswith(".")} == {".lock"}


def long_text(seed):
    words = random.Random(seed).choices(WORDS, k=60_000)
    return f"Book {seed}. " + "\n\n".join(" ".join(words[i : i + 100]) for i in range(0, 60_000, 100))


def test_a_document_cut_into_pieces_is_in_one_split(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 100_000)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 100_000)
    books = [long_text(seed) for seed in range(6)]
    assert all(len(book) > 2 * WHOLE for book in books)
    (tmp_path / "books.txt").write_text(SEPARATOR.join(books))
    corpus = Corpus.open([tmp_path / "books.txt"])
    meta = pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.3)
    assert meta["held_out"] == "documents" and meta["splits"]["train"]["documents"] > 2 * 5

    def books_of(folder, split):
        text = "".join(map(tokenizer.decode, documents_of(folder, split)))
        return text, {seed for seed, book in enumerate(books) if book[:40] in text}

    (train, in_train), (held_out, in_validation) = (books_of(tmp_path / "out", s) for s in meta["splits"])
    assert in_train and in_validation and not in_train & in_validation
    assert train == "".join(books[seed] for seed in sorted(in_train))
    assert held_out == "".join(books[seed] for seed in sorted(in_validation))

    real, calls = packing._write, iter(range(1_000))  # and going on in the middle of a book changes nothing

    def stop(*args):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(corpus, tokenizer, tmp_path / "again", validation_fraction=0.3)
    pack(corpus, tokenizer, tmp_path / "again", validation_fraction=0.3)
    assert content(tmp_path / "again") == content(tmp_path / "out")


@pytest.mark.parametrize("fraction", [0.05, 0.8])  # whichever split its one hash falls into
def test_of_a_single_long_document_pieces_are_held_out(tmp_path, tokenizer, fraction):
    (tmp_path / "book.txt").write_text(long_text(1))
    corpus = Corpus.open([tmp_path / "book.txt"])
    assert corpus.size > 3 * PIECE
    with pytest.warns(UserWarning, match="one document: pieces of it are held out"):
        meta = pack(corpus, tokenizer, tmp_path / "out", validation_fraction=fraction)
    assert meta["held_out"] == "pieces" and all(split["documents"] for split in meta["splits"].values())


def byte_level(vocab, eos_token="<|endoftext|>", **options):
    backend = Backend(models.BPE(vocab=vocab, merges=[], **options))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return Tokenizer(backend, eos_token)


def test_a_tokenizer_with_gaps_is_refused_unless_loss_is_allowed(tmp_path):
    letters = sorted(set("".join(WORDS)) | {"Ġ", "c", "f"})
    for name, extra in {"dropped": {}, "unknown": {"unk_token": "<unk>"}}.items():
        vocab = {"<|endoftext|>": 0, "<unk>": 1} | {c: i for i, c in enumerate(letters, 2)}
        tokenizer = byte_level(vocab, **extra)
        texts = [*([" ".join(WORDS)] * 3), "caf\u00e9", "a river", "\u4e2d\u6587 lamps"]
        corpus = Corpus.open([write_jsonl(tmp_path / f"{name}.jsonl", texts)])
        with pytest.raises(UserError, match=r"8 of .* bytes are lost, .*--allow-loss"):
            pack(corpus, tokenizer, tmp_path / name, validation_fraction=0.3)
        meta = pack(corpus, tokenizer, tmp_path / name, validation_fraction=0.3, allow_loss=True)
        assert sum(split["lost_bytes"] for split in meta["splits"].values()) == 2 + 6
        assert sum(Shards.open(tmp_path / name, split).lost_bytes for split in meta["splits"]) == 8


def test_a_byte_level_tokenizer_with_all_bytes_needs_no_measuring(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "lost_bytes", None)
    meta = pack(corpus, tokenizer, tmp_path / "out")
    assert [split["lost_bytes"] for split in meta["splits"].values()] == [0, 0]


def edited(tokenizer, folder, change):
    """The tokenizer after `change` to the content of its tokenizer.json."""
    tokenizer.save(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.load(folder)


def test_an_end_of_text_token_not_marked_special_is_never_made_of_text(tmp_path, corpus, tokenizer):
    def unmark(content):
        content["added_tokens"][0]["special"] = False

    plain = edited(tokenizer, tmp_path / "tok", unmark)
    pack(corpus, plain, tmp_path / "out", validation_fraction=0.1)
    texts = [
        plain.decode(ids)
        for split in ("train", "validation")
        for ids in documents_of(tmp_path / "out", split)
    ]
    assert sorted(texts) == sorted(corpus.documents())


def test_an_end_of_text_id_that_text_becomes_all_the_same_is_refused(tmp_path, corpus):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = byte_level({c: i for i, c in enumerate(alphabet)}, "e")
    with pytest.raises(UserError, match="text of a document becomes the end-of-text token 'e'"):
        pack(corpus, tokenizer, tmp_path / "out")


def test_dropout_is_turned_off(tmp_path, corpus, tokenizer):
    def drop(content):
        content["model"]["dropout"] = 0.5

    noisy = edited(tokenizer, tmp_path / "tok", drop)
    pack(corpus, noisy, tmp_path / "out")
    pack(corpus, tokenizer, tmp_path / "plain")
    assert content(tmp_path / "out") == content(tmp_path / "plain")
    tokenizer.backend.model.dropout = 0.5
    assert Tokenizer(tokenizer.backend).backend.model.dropout is None


NO_SEQUENCE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}


def test_a_post_processor_takes_nothing_of_the_text(tmp_path, corpus, tokenizer):
    """A template without the text itself gives no ids at all, though it adds no special token."""

    def change(content):
        content["post_processor"] = NO_SEQUENCE

    templated = edited(tokenizer, tmp_path / "tok", change)
    pack(corpus, templated, tmp_path / "out")
    pack(corpus, tokenizer, tmp_path / "plain")
    assert content(tmp_path / "out") == content(tmp_path / "plain")


@pytest.mark.parametrize("spelling", ["another letter's id", "an added token"])
def test_letters_that_come_back_as_others_are_lost(tmp_path, tokenizer, spelling):
    def change(content):
        if spelling == "an added token":
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
            content["added_tokens"].append({"id": 320, "content": "é", **flags})
        else:
            content["model"]["vocab"]["Z"] = content["model"]["vocab"]["Q"]

    corpus = Corpus.open([write_jsonl(tmp_path / "a.jsonl", ["QZé"] + ["the quiet river"] * 5)])
    with pytest.raises(UserError, match=r"of .* bytes are lost, .*--allow-loss"):
        pack(corpus, edited(tokenizer, tmp_path / "tok", change), tmp_path / "out")


@pytest.mark.parametrize("option", ["single_word", "lstrip", "rstrip"])
def test_added_tokens_are_found_where_tokenizers_finds_them(tmp_path, tokenizer, option):
    def add(content):
        token = {"id": 320, "content": "colony", "normalized": False, "special": False}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        content["added_tokens"].append({**token, **flags, option: True})

    added = edited(tokenizer, tmp_path / "tok", add)
    texts = [f"{n} " + "the quiet river " * 200 + "xcolony colonys a colony of it" for n in range(40)]
    corpus = Corpus.open([write_jsonl(tmp_path / "a.jsonl", texts)])
    pack(corpus, added, tmp_path / "out", validation_fraction=0.1, allow_loss=True)
    found = [ids for split in ("train", "validation") for ids in documents_of(tmp_path / "out", split)]
    assert sorted(found) == sorted(added.backend.encode(text, add_special_tokens=False).ids for text in texts)


def test_rows_left_out_are_counted_also_when_packing_was_stopped(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 2_000)
    rows = [json.dumps({"text": text}) for text in make_texts(200)]
    for place in (0, 50, 100, 150, len(rows)):
        rows.insert(place, '{"text": 5}')
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    corpus = Corpus.open([tmp_path / "a.jsonl"], on_error="skip")
    real, calls = packing._write, iter(range(1_000))

    def stop(*args):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="line 1: column 'text' holds int"):
        patch.setattr(packing, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.1)
    with pytest.warns(UserWarning, match="line 201"):
        meta = pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.1)
    assert meta["left_out"] == {"rows": 5}
    assert sum(split["documents"] for split in meta["splits"].values()) == 200


def test_a_file_name_that_is_not_utf8(tmp_path, tokenizer):
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")
    Path(name).write_text(SEPARATOR.join(make_texts(20)))
    meta = pack(Corpus.open([tmp_path]), tokenizer, tmp_path / "out", validation_fraction=0.1)
    assert meta == Shards.open(tmp_path / "out").meta and meta["sources"][0]["name"] == name


@pytest.mark.parametrize(
    ("file", "change"),
    {
        "meta.json": ('"bytes": ', '"bytes": 1'),
        "tokenizer/tokenizer_config.json": ('"eos_token": "<|endoftext|>"', '"eos_token": "a"'),
        "tokenizer/tokenizer.json": ('"special": true', '"special": false'),
        "manifest.json": ('"meta.json": "', '"meta.json": "0'),
    }.items(),
)
def test_an_edited_file_is_noticed(tmp_path, corpus, tokenizer, file, change):
    pack(corpus, tokenizer, tmp_path / "out", validation_fraction=0.1)
    path = tmp_path / "out" / file
    before = path.read_text()
    path.write_text(before.replace(*change, 1))
    assert path.read_text() != before
    with pytest.raises(UserError, match=r"is not what was saved \(its hash differs\)"):
        Shards.open(tmp_path / "out", verify=False)
    path.write_text(before)
    Shards.open(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=r"missing|does not exist|not made by"):
        Shards.open(tmp_path / "out")
