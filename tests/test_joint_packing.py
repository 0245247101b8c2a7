"""A text packed in parts: the same bytes whoever packs which part, and however often they are killed."""

import functools
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from part_processes import OPTIONS, deadly_part, fast_part
from test_packing import ODD, content, documents_of, make_texts, write_jsonl
from test_ranks import free_port

from ant5m.cli import call
from ant5m.data import joint_packing, packing
from ant5m.data.conversations import PLAIN_TEMPLATE, ROLES, ChatTemplate, Conversations
from ant5m.data.corpus import SEPARATOR, Corpus
from ant5m.data.joint_packing import pack_jointly
from ant5m.data.packing import pack
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import train_tokenizer
from ant5m.errors import UserError
from ant5m.files import lock

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_texts(300) + ODD * 3, vocab_size=320)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four files, of which the first has half of the text."""
    folder = tmp_path_factory.mktemp("texts")
    texts = make_texts(400) + ODD
    cuts = [0, 200, 290, 350, len(texts)]
    return Corpus.open(
        [
            write_jsonl(folder / f"{number}.jsonl", texts[begin:end])
            for number, (begin, end) in enumerate(itertools.pairwise(cuts))
        ]
    )


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 5_000)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(joint_packing, "_pack_part", fast_part)


@pytest.fixture
def here(monkeypatch):
    """No other process: the parts are packed in this one, in any order."""

    def share_out(work, next_job, workers, meanwhile):
        numbers = list(iter(next_job, None))
        random.Random(len(numbers)).shuffle(numbers)
        for number in numbers:
            work(number)
            meanwhile()

    monkeypatch.setattr(joint_packing, "share_out", share_out)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_documents_and_counts_are_those_of_one_process(tmp_path, corpus, tokenizer, here, parts):
    one = pack(corpus, tokenizer, tmp_path / "one", **OPTIONS)
    meta = pack_jointly(corpus, tokenizer, tmp_path / "many", parts, **OPTIONS)
    if parts == 1:
        assert content(tmp_path / "many") == content(tmp_path / "one")
        return
    for split in ("train", "validation"):
        assert documents_of(tmp_path / "many", split) == documents_of(tmp_path / "one", split)
        ours, theirs = ({**m["splits"][split], "shards": None} for m in (meta, one))
        assert ours == theirs
    assert len(meta["splits"]["train"]["shards"]) >= len(one["splits"]["train"]["shards"])
    assert meta["options"] == {**one["options"], "parts": parts}
    assert {**meta, "splits": None, "options": None} == {**one, "splits": None, "options": None}
    assert Shards.open(tmp_path / "many").meta == meta
    assert {path.name for path in (tmp_path / "many").iterdir()} == {
        *(shard["name"] for split in meta["splits"].values() for shard in split["shards"]),
        *("meta.json", "manifest.json", "tokenizer", ".lock"),
    }


def test_the_bytes_do_not_depend_on_the_workers_nor_on_kills(tmp_path, corpus, tokenizer, monkeypatch):
    folders = [tmp_path / str(workers) for workers in (1, 2, 3)]
    for workers, folder in enumerate(folders, 1):
        with monkeypatch.context() as patch:
            part = functools.partial(deadly_part, tmp_path / f"killed-{workers}")
            patch.setattr(joint_packing, "_pack_part", part)
            with pytest.raises(UserError, match=r"died \(SIGKILL\): repeat the command"):
                pack_jointly(corpus, tokenizer, folder, 3, workers, **OPTIONS)
        assert (folder / "progress.json").exists() and not (folder / "meta.json").exists()
        pack_jointly(corpus, tokenizer, folder, 3, 4 - workers, **OPTIONS)
    first, *others = map(content, folders)
    assert all(other == first for other in others)


def run(tmp_path, tokenizer, corpus, how, rank=None, port=0):
    tokenizer.save(tmp_path / "tokenizer")
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    names = [source.name for source in corpus.sources]
    return subprocess.Popen(
        [sys.executable, HERE / "part_processes.py", tmp_path / "tokenizer", tmp_path / "out", how, *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", **({} if rank is None else place)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_parent_killed_its_processes_end_and_the_next_one_goes_on(tmp_path, corpus, tokenizer):
    out = tmp_path / "out"
    parent = run(tmp_path, tokenizer, corpus, "slow")
    while not list(out.glob("part-*/train-00000.bin.partial")):
        assert parent.poll() is None, parent.stderr.read()
        time.sleep(0.02)
    with pytest.raises(UserError, match="another process is writing into"):
        pack_jointly(corpus, tokenizer, out, 3, 1, **OPTIONS)
    parent.kill()
    parent.wait()
    pack_jointly(corpus, tokenizer, out, 3, 1, **OPTIONS)  # waits for those that still hold a part
    pack_jointly(corpus, tokenizer, tmp_path / "whole", 3, 2, **OPTIONS)
    assert content(out) == content(tmp_path / "whole")


def test_two_processes_of_torchrun_share_the_parts(tmp_path, corpus, tokenizer, here):
    port = free_port()
    ranks = [run(tmp_path, tokenizer, corpus, "fast", rank, port) for rank in range(2)]
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    pack_jointly(corpus, tokenizer, tmp_path / "whole", 3, **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


LITTLE = {"validation_fraction": 1e-9, "shard_tokens": 1_000}


@pytest.fixture(scope="module")
def little(tmp_path_factory, corpus, tokenizer):
    out = tmp_path_factory.mktemp("little") / "out"
    meta = pack_jointly(corpus, tokenizer, out, 3, **LITTLE)
    assert meta["splits"]["validation"]["documents"] == 1
    return content(out)


@pytest.mark.parametrize("number", [0, 1, 3, 8, 22])
@pytest.mark.parametrize("module, point", [
    (packing, "_write"), (packing, "write_json"), (packing, "file_sha256"), (joint_packing, "begin"),
    (joint_packing, "shard_name"), (joint_packing, "remove_parts"), (joint_packing, "finish"),
])  # fmt: skip
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    tmp_path, corpus, tokenizer, here, little, monkeypatch, module, point, number
):
    """With so little held out that the document with the lowest hash is, which one part alone has."""
    real, calls = getattr(module, point), itertools.count()

    def stop(*args, **named):
        if next(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, point, stop)
        try:
            pack_jointly(corpus, tokenizer, tmp_path / "out", 3, **LITTLE)
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "meta.json").exists()
            pack_jointly(corpus, tokenizer, tmp_path / "out", 3, **LITTLE)
    assert content(tmp_path / "out") == little


def test_equal_documents_are_held_out_together_from_all_parts(tmp_path, tokenizer, here, monkeypatch):
    """Also when it stops after the first of them was."""
    texts = make_texts(60)
    names = [write_jsonl(tmp_path / f"{n}.jsonl", texts) for n in range(3)]
    real, calls = fast_part, itertools.count()
    for stop_at in (3, 4, 5, 99):
        out = tmp_path / str(stop_at)
        calls = itertools.count()

        def part(*arguments, calls=calls, stop_at=stop_at):
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(joint_packing, "_pack_part", part)
            try:
                pack_jointly(Corpus.open(names), tokenizer, out, 3, validation_fraction=1e-9)
            except KeyboardInterrupt:
                pack_jointly(Corpus.open(names), tokenizer, out, 3, validation_fraction=1e-9)
        assert len(documents_of(out, "validation")) == 3


def test_a_text_that_is_one_document_in_all_parts_is_held_out_by_pieces(tmp_path, tokenizer, here):
    book = "\n\n".join(make_texts(2_000))
    for n in range(2):
        (tmp_path / f"{n}.txt").write_text(book)
    corpus = Corpus.open([tmp_path / "0.txt", tmp_path / "1.txt"])
    with pytest.warns(UserWarning, match="the text is one document"):
        meta = pack_jointly(corpus, tokenizer, tmp_path / "out", 2, validation_fraction=0.3)
    with pytest.warns(UserWarning, match="the text is one document"):
        one = pack(corpus, tokenizer, tmp_path / "one", validation_fraction=0.3)
    assert meta["held_out"] == one["held_out"] == "pieces"
    for split in ("train", "validation"):
        assert documents_of(tmp_path / "out", split) == documents_of(tmp_path / "one", split)


def test_what_was_left_out_is_summed_and_named(tmp_path, tokenizer, here):
    names = []
    for n in range(3):
        names.append(write_jsonl(tmp_path / f"{n}.jsonl", make_texts(50, n)))
        names[-1].write_text(names[-1].read_text() + '{"text": 3}\nnot JSON\n' * 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        corpus = Corpus.open(names, on_error="skip")
        meta = pack_jointly(corpus, tokenizer, tmp_path / "out", 3, validation_fraction=0.2)
    assert meta["left_out"] == {"rows": 18}
    lines = [str(one.message) for one in told]
    assert len(lines) == 10 and all(line.startswith("left out: ") for line in lines)
    assert {name.name for name in names[:2]} <= {Path(line.split(",")[0]).name for line in lines}


def test_a_part_that_does_not_trust_gigatoken_packs_with_tokenizers(
    tmp_path, corpus, tokenizer, here, monkeypatch
):
    pack(corpus, tokenizer, tmp_path / "one", **OPTIONS)
    real, calls = packing._verify, itertools.count()
    monkeypatch.setattr(packing, "_verify", lambda *args: next(calls) != 1 and real(*args))
    with pytest.warns(UserWarning, match="gigatoken and tokenizers disagree") as told:
        pack_jointly(corpus, tokenizer, tmp_path / "out", 3, **OPTIONS)
    assert len(told) == 1
    assert documents_of(tmp_path / "out", "train") == documents_of(tmp_path / "one", "train")


def test_conversations_keep_their_masks(tmp_path, tokenizer, here):
    template = ChatTemplate(tokenizer, PLAIN_TEMPLATE)
    for n in range(2):
        rows = [[{"role": role, "content": text} for role in ROLES[1:]] for text in make_texts(40, n)]
        lines = [json.dumps({"messages": row}) for row in rows]
        (tmp_path / f"{n}.jsonl").write_text("\n".join(lines))
    corpus = Conversations.find([tmp_path / "0.jsonl", tmp_path / "1.jsonl"], template)
    assert pickle.loads(pickle.dumps(corpus)).template.text == template.text
    one = pack(corpus, tokenizer, tmp_path / "one", **OPTIONS)
    meta = pack_jointly(corpus, tokenizer, tmp_path / "out", 2, **OPTIONS)
    assert documents_of(tmp_path / "out", "train") == documents_of(tmp_path / "one", "train")
    for shard in meta["splits"]["train"]["shards"]:
        assert shard["mask"] == shard["name"].replace(".bin", ".mask")
        size = -(-shard["tokens"] // 8)
        assert (tmp_path / "out" / shard["mask"]).stat().st_size == size
    learned = [_learned(tmp_path / name, m) for name, m in (("one", one), ("out", meta))]
    assert learned[0] == learned[1] and 0 < sum(learned[0]) < len(learned[0])


def _learned(folder, meta):
    bits = []
    for shard in meta["splits"]["train"]["shards"]:
        packed = np.fromfile(folder / shard["mask"], np.uint8)
        bits += np.unpackbits(packed, bitorder="little")[: shard["tokens"]].tolist()
    return bits


@pytest.fixture
def unfinished(tmp_path, corpus, tokenizer, here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(joint_packing, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(joint_packing._Joint, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack_jointly(corpus, tokenizer, tmp_path / "out", 3, **OPTIONS)
    return tmp_path / "out"


def test_only_the_same_command_goes_on(tmp_path, corpus, tokenizer, unfinished):
    before = content(unfinished)
    assert "part-00002/progress.json" in before
    for parts in (1, 2, 4):
        with pytest.raises(UserError, match="unfinished packing of other parts: repeat the command"):
            pack_jointly(corpus, tokenizer, unfinished, parts, **OPTIONS)
    with pytest.raises(UserError, match="unfinished packing of other seed"):
        pack_jointly(corpus, tokenizer, unfinished, 3, seed=1, **OPTIONS)
    with lock(unfinished), pytest.raises(UserError, match="another process is writing into"):
        pack_jointly(corpus, tokenizer, unfinished, 3, **OPTIONS)
    assert content(unfinished) == before
    pack_jointly(corpus, tokenizer, unfinished, 3, **OPTIONS)
    with pytest.raises(UserError, match="is packed already"):
        pack_jointly(corpus, tokenizer, unfinished, 3, **OPTIONS)


def test_a_folder_in_which_nothing_was_packed_is_free_for_another_command(tmp_path, tokenizer, here):
    names = [tmp_path / "0.txt", tmp_path / "1.txt"]
    for name in names:
        name.write_bytes("née\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        pack_jointly(Corpus.open(names), tokenizer, tmp_path / "out", 2)
    for name in names:
        name.write_text(SEPARATOR.join(make_texts(5)))
    pack_jointly(Corpus.open(names), tokenizer, tmp_path / "out", 1)
    assert not list((tmp_path / "out").glob("part-*"))


def test_mistakes_are_one_line(tmp_path, corpus, tokenizer, capsys):
    tokenizer.save(tmp_path / "tokenizer")
    xz = [tmp_path / "a.jsonl.xz", tmp_path / "b.jsonl.xz"]
    for path in xz:
        path.write_bytes(b"no xz")
    texts = [source.name for source in corpus.sources]

    def told(*words):
        words = ["data", "pack", *map(str, words), "--tokenizer", str(tmp_path / "tokenizer")]
        assert call([*words, "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("error: ") == 1 and "Traceback" not in err
        return err

    assert "2 parts at most, not into 3" in told(*xz, "--parts", 3)
    assert "1 to 10,000 parts, not in 0" in told(*texts, "--parts", 0)
    assert "at least one process must work, not 0" in told(*texts, "--parts", 2, "--workers", 0)
    assert not (tmp_path / "out").exists()
    assert "damaged or not compressed" in told(*xz, "--parts", 2, "--workers", 1)
