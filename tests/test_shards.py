import hashlib
import json
import os

import numpy as np
import pytest

from ant5m.data.loader import Loader, sequences
from ant5m.data.shards import FORMAT, Shards, Tokens
from ant5m.errors import UserError


def write_shards(folder, parts, split="train"):
    """A packed folder by hand: one file for each array in `parts`. Returns all tokens."""
    folder.mkdir(exist_ok=True)
    shards = []
    for index, part in enumerate(parts):
        raw = np.asarray(part, "<u2").tobytes()
        name = f"{split}-{index:05d}.bin"
        (folder / name).write_bytes(raw)
        shards.append({"name": name, "tokens": len(raw) // 2, "sha256": hashlib.sha256(raw).hexdigest()})
    tokens = np.concatenate([np.asarray(part, np.uint16) for part in parts])
    counts = {"documents": 1, "tokens": len(tokens), "bytes": 4 * len(tokens), "words": len(tokens)}
    meta = {
        "format": FORMAT,
        "vocab_size": 65_536,
        "eos_token_id": 7,
        "tokenizer_fingerprint": "f" * 64,
        "splits": {split: {**counts, "shards": shards}},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return tokens


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    parts = [random.integers(0, 65_536, size) for size in (100, 3, 1, 64)]
    write_shards(tmp_path / "data", parts)
    return tmp_path / "data"


def edit_meta(folder, edit):
    meta = json.loads((folder / "meta.json").read_text())
    edit(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_shard_files_are_one_sequence(tmp_path):
    tokens = write_shards(tmp_path / "data", [np.arange(10), [65_535], np.arange(20, 25)])
    shards = Shards.open(tmp_path / "data")
    assert shards.num_tokens == len(shards.tokens) == 16
    for start in range(-1, 17):
        for stop in range(-1, 18):
            np.testing.assert_array_equal(shards.tokens[start:stop], tokens[start:stop])
    assert shards.tokens[:].dtype == np.uint16
    assert not shards.tokens[0:3].flags.writeable
    assert shards.counts == {"documents": 1, "tokens": 16, "bytes": 64, "words": 16}
    assert (shards.vocab_size, shards.eos_token_id) == (65_536, 7)


def test_gather_takes_windows_out_of_any_file():
    random = np.random.default_rng(1)
    parts = [random.integers(0, 65_536, size).astype(np.uint16) for size in (50, 1, 1, 9, 200, 2)]
    tokens, every = Tokens(parts), np.concatenate(parts)
    for length in (1, 2, 13, 70):
        starts = np.arange(len(every) - length, dtype=np.int64)
        random.shuffle(starts)
        inputs, targets = (np.full((len(starts), length), -1, np.int64) for _ in range(2))
        tokens.gather(starts, length, inputs, targets)
        windows = np.lib.stride_tricks.sliding_window_view(every, length + 1)[starts]
        np.testing.assert_array_equal(inputs, windows[:, :-1])
        np.testing.assert_array_equal(targets, windows[:, 1:])


@pytest.mark.parametrize(
    ("start", "length"), [(-1, 4), (6, 4), (10, 1), (9, 1), (2**63 - 2, 4), (0, 10), (0, 99)]
)
def test_gather_refuses_windows_outside(start, length):
    tokens = Tokens([np.zeros(4, np.uint16), np.zeros(6, np.uint16)])
    inputs, targets = np.zeros((1, length), np.int64), np.zeros((1, length), np.int64)
    with pytest.raises(IndexError):
        tokens.gather(np.array([start]), length, inputs, targets)


@pytest.mark.parametrize(
    "part", [np.zeros(4, np.int32), np.zeros((2, 2), np.uint16), np.zeros(8, np.uint16)[::2]]
)
def test_tokens_are_flat_uint16(part):
    with pytest.raises(ValueError, match="uint16"):
        Tokens([part])


def test_gather_refuses_arrays_it_cannot_fill():
    tokens = Tokens([np.zeros(10, np.uint16)])
    starts, good = np.zeros(2, np.int64), np.zeros((2, 4), np.int64)
    frozen = good.copy()
    frozen.flags.writeable = False
    for bad in (good.astype(np.int32), np.zeros((2, 3), np.int64), np.zeros((4, 2), np.int64).T, frozen):
        with pytest.raises(ValueError, match="targets"):
            tokens.gather(starts, 4, good, bad)
        with pytest.raises(ValueError, match="inputs"):
            tokens.gather(starts, 4, bad, good)
    with pytest.raises(ValueError, match="starts"):
        tokens.gather(starts.astype(np.int32), 4, good, good)


def test_edited_shard_is_named(folder):
    path = folder / "train-00003.bin"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"train-00003\.bin .*edited"):
        Shards.open(folder)
    assert Shards.open(folder, verify=False).num_tokens == 168


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_and_missing_shards_are_named(folder, verify):
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00000\.bin has 198 bytes instead of 200"):
        Shards.open(folder, verify=verify)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin is missing"):
        Shards.open(folder, verify=verify)


def test_folders_that_are_no_shards(tmp_path, folder):
    with pytest.raises(UserError, match="not a folder of shards"):
        Shards.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no meta"):
        Shards.open(tmp_path)
    with pytest.raises(UserError, match="has no validation split"):
        Shards.open(folder, "validation")
    (folder / "progress.json").write_text("{}")
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match="not finished: run the same"):
        Shards.open(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda meta: meta.update(format="other"),
        lambda meta: meta.pop("tokenizer_fingerprint"),
        lambda meta: meta.update(vocab_size="many"),
        lambda meta: meta.update(splits=[]),
        lambda meta: meta["splits"]["train"].pop("words"),
        lambda meta: meta["splits"]["train"].update(shards=["train-00000.bin"]),
        lambda meta: meta["splits"]["train"]["shards"][0].update(name="../data/train-00000.bin"),
        lambda meta: meta["splits"]["train"]["shards"][0].update(tokens=-1),
    ],
)
def test_foreign_meta_is_refused(folder, edit):
    edit_meta(folder, edit)
    with pytest.raises(UserError, match=r"meta\.json"):
        Shards.open(folder)


def test_broken_json_is_refused(folder):
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Shards.open(folder)


def test_fingerprint_is_that_of_tokens_and_tokenizer(tmp_path):
    def fingerprint(name, parts, edit=lambda meta: None):
        write_shards(tmp_path / name, parts)
        edit_meta(tmp_path / name, edit)
        return Shards.open(tmp_path / name).fingerprint

    first = fingerprint("a", [[1, 2], [3]])
    assert first == fingerprint("b", [[1, 2], [3]])
    assert first == fingerprint(
        "c", [[1, 2], [3]], lambda meta: meta.update(sources=[{"name": "another", "size": 1}])
    )
    assert first != fingerprint("d", [[1, 2], [4]])
    assert first != fingerprint("e", [[1, 2], [3]], lambda meta: meta.update(tokenizer_fingerprint="0" * 64))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda split: split.update(bytes=-1), r"splits\[\.\.\.\]\.bytes: expected int >= 0"),
        (lambda split: split.update(words=None), r"words: expected int, got null"),
        (lambda split: split.update(tokens=5), "counts other tokens than its shards have"),
        (lambda split: split.update(words=10_000), "more words or lost bytes than bytes"),
        (lambda split: split.update(lost_bytes=True), r"lost_bytes: expected int, got bool"),
        (lambda split: split["shards"][0].update(tokens=0), r"shards\[0\]\.tokens: expected int >= 1"),
        (lambda split: split["shards"][0].update(name="../x.bin"), "outside the folder"),
        (lambda split: split.pop("bytes"), "missing required field bytes"),
    ],
)
def test_impossible_counts_are_named(folder, edit, words):
    edit_meta(folder, lambda meta: edit(meta["splits"]["train"]))
    with pytest.raises(UserError, match=words) as error:
        Shards.open(folder)
    assert str(folder / "meta.json") in str(error.value)


@pytest.fixture(params=["slice", "gather", "documents", "sequences", "batches", "all"])
def read(request):
    """What reads the tokens of a split: training, evaluation, the built-in prompts, `documents`."""
    inputs = np.empty((1, 8), np.int64)
    return {
        "slice": lambda shards: shards.tokens[:8],
        "gather": lambda shards: shards.tokens.gather(np.zeros(1, np.int64), 8, inputs, inputs.copy()),
        "documents": lambda shards: list(shards.documents()),
        "sequences": lambda shards: list(sequences(shards, 2, 4)),
        "batches": lambda shards: [loader.next() for loader in [Loader(shards, 2, 4, 0)] * 30],
        "all": lambda shards: shards.tokens.behind(3)[:],
    }[request.param]


def test_a_shard_cut_while_it_is_in_use_is_an_error_not_a_dead_process(folder, read):
    shards = Shards.open(folder)
    with (folder / "train-00000.bin").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(UserError, match=r"train-00000\.bin was cut while it was in use"):
        read(shards)


def test_a_shard_cut_during_a_read_is_an_error_not_a_dead_process(folder, read, monkeypatch):
    """The file is as long as it should be when the read begins, and the system gives it in small portions."""
    shards = Shards.open(folder)
    real = os.pread

    def cut(descriptor, size, position):
        found = real(descriptor, min(size, 6), position)
        os.truncate(folder / "train-00000.bin", 2)
        return found

    monkeypatch.setattr(os, "pread", cut)
    with pytest.raises(UserError, match=r"train-00000\.bin was cut while it was in use"):
        read(shards)


def test_a_read_in_portions_is_whole(folder, monkeypatch):
    """One call gives 2 GiB at most, and less on some network drives."""
    whole = Shards.open(folder).tokens[:]
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, position: real(file, min(size, 3), position))
    np.testing.assert_array_equal(Shards.open(folder).tokens[:], whole)
