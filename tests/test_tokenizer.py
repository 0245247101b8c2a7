"""The tokenizer is exact, the same by every way of using it, and refuses what cannot work."""

import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ant5m.cli import call
from ant5m.data.health import AWKWARD, every_byte
from ant5m.data.tokenizer import END_OF_TEXT, PROBE, Tokenizer, learn_bpe, spread_sample, train_tokenizer
from ant5m.errors import UserError

TEXT = "the ant carries a leaf along the path and other ants follow it home to their nest by the river 1984"
WORDS = TEXT.split()
SHARED = Path(__file__).parents[2] / "shared" / "data"


def sentences(number: int = 400) -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=12)).capitalize() + ".\n" for _ in range(number)]


def odd_texts() -> list[str]:
    chance = random.Random(1)
    parts = [*AWKWARD.values(), *PROBE, *WORDS, " ", "  ", "\n", "\r\n", "'s", "'LL", "ſ", "5", "12", "\x00"]
    return ["".join(chance.choices(parts, k=chance.randint(1, 9))) for _ in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sentences(), vocab_size=330)


def foreign(pre_tokenizer, normalizer=None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sentences(), trainer)
    return backend


def test_the_vocabulary(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.vocab) == 330
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 0)
    assert " carries" in {tokenizer.decode([i]) for i in range(330)}


def test_arrays_are_decoded_as_tokenizers_does_it():
    """Ids at random, so that bytes are no UTF-8; added tokens with a space; an id that no token has."""
    backend = foreign(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.add_tokens([" two words ", "naïve", "中"])
    opened = Tokenizer(backend, "</s>")
    chance = np.random.default_rng(0)
    for length in (0, 1, 50, 5_000):
        ids = chance.integers(0, opened.vocab_size, length).astype(np.uint16)
        assert opened.decode(ids) == backend.decode(ids.tolist(), skip_special_tokens=False)
    ids[3] = 60_000
    assert opened.decode(ids) == backend.decode(ids.tolist(), skip_special_tokens=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 1, 0)])
    other = Tokenizer(backend, "</s>")
    assert other.decode(ids) == backend.decode(ids.tolist(), skip_special_tokens=False)


def test_everything_comes_back(tokenizer):
    for text in [*every_byte(), *AWKWARD.values(), *odd_texts()]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_fast_way_gives_the_ids_of_tokenizers(tokenizer):
    assert tokenizer._gigatoken is not None
    texts = [*odd_texts(), *sentences(20), ""]
    ids, lengths = tokenizer.encode_flat(texts)
    rows = [tokenizer.encode(text) for text in texts]
    assert ids.dtype == np.uint32 and ids.tolist() == list(itertools.chain(*rows))
    assert lengths.tolist() == list(map(len, rows))
    assert [row.tolist() for row in tokenizer.encode_batch(texts)] == rows
    assert tokenizer.encode_batch([]) == []


def test_a_spelled_special_token_is_text(tokenizer):
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.eos_token_id not in ids and len(ids) > 5
    assert tokenizer.encode_batch([END_OF_TEXT])[0].tolist() == tokenizer.encode(END_OF_TEXT)
    assert tokenizer.decode([tokenizer.eos_token_id]) == END_OF_TEXT


def test_digits_stand_alone(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1984 19.5")] == list("1984 19.5")


def test_transformers_opens_the_folder(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "t", model_max_length=256)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert (opened.eos_token_id, len(opened), opened.model_max_length) == (0, 330, 256)
    assert opened.clean_up_tokenization_spaces is False
    for text in [*sentences(5), "a , b . c ' d", *AWKWARD.values()]:
        if END_OF_TEXT in text:
            continue
        assert opened(text)["input_ids"] == tokenizer.encode(text)
        assert opened.decode(tokenizer.encode(text)) == text


def test_saving_and_loading_keep_the_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    assert {path.name for path in (tmp_path / "t").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    assert train_tokenizer(sentences(), 330).fingerprint == tokenizer.fingerprint
    assert train_tokenizer(sentences(), 329).fingerprint != tokenizer.fingerprint


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one(tokenizer):
    assert tokenizer.shrunk(300).fingerprint == train_tokenizer(sentences(), 300).fingerprint


@pytest.mark.parametrize(
    ("size", "words"), [(65_537, "uint16"), (256, "too small"), (20_000, "supports.*only")]
)
def test_impossible_sizes(size, words):
    with pytest.raises(UserError, match=words):
        train_tokenizer(sentences(10), size)


def test_what_occurs_once_is_not_learned():
    assert learn_bpe(["abcdefgh ijklmnop"], 1_000).vocab_size == 257


def test_the_error_names_a_size_that_works():
    reached = learn_bpe(sentences(10), 20_000).vocab_size
    with pytest.raises(UserError, match=f"ask for {reached:,} or fewer"):
        train_tokenizer(sentences(10), 20_000)
    assert train_tokenizer(sentences(10), reached).vocab_size == reached


def test_no_text():
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([])


def test_the_sample_is_bounded_and_evenly_spread():
    texts = [f"{i:09d}é" for i in range(10_000)]
    sample = spread_sample(iter(texts), 5_000)
    assert 200 < len(sample) <= 5_000 // 11 and sample == spread_sample(texts, 5_000)
    numbers = [int(text[:9]) for text in sample]
    assert len(set(np.diff(numbers))) == 1 and numbers[0] == 0 and numbers[-1] > 9_900
    assert spread_sample(texts[:5], 1_000) == texts[:5]


def test_a_foreign_tokenizer(tmp_path):
    backend = foreign(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no end-of-text token '<\|endoftext\|>'"):
        Tokenizer.load(tmp_path)
    config = {"eos_token": {"content": "</s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    opened = Tokenizer.load(tmp_path)
    assert (opened.eos_token, opened.eos_token_id) == ("</s>", 1)
    assert [row.tolist() for row in opened.encode_batch(odd_texts())] == list(map(opened.encode, odd_texts()))
    opened.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").eos_token_id == 1


@pytest.mark.parametrize(
    "backend",
    [
        foreign(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])),
        foreign(pre_tokenizers.ByteLevel(False), normalizers.Lowercase()),
    ],
)
def test_what_the_fast_encoder_does_not_know_is_still_exact(backend):
    opened = Tokenizer(backend, "</s>")
    ids, lengths = opened.encode_flat(odd_texts())
    assert ids.dtype == np.uint32 and lengths.dtype == np.int64
    assert ids.tolist() == list(itertools.chain(*map(opened.encode, odd_texts())))


def test_a_fast_encoder_that_disagrees_is_not_used(tokenizer, monkeypatch):
    import gigatoken

    class Wrong:
        @staticmethod
        def from_json(_):
            return Wrong()

        def encode_batch_list(self, texts):
            return [[1] for _ in texts]

    monkeypatch.setattr(gigatoken, "Tokenizer", Wrong)
    fresh = Tokenizer(tokenizer.backend)
    assert fresh._gigatoken is None
    assert fresh.encode_batch(["the ant"])[0].tolist() == tokenizer.encode("the ant")


BROKEN = {
    "not json": ("{", "not valid JSON"),
    "a list": ("[]", "expected object, got array"),
    "no model": ('{"version": "1.0"}', "not a tokenizer.json"),
    "another kind": ('{"model": {"type": "WordPiece"}}', "is a WordPiece tokenizer: only BPE"),
    "a panic": (
        '{"model": {"type": "BPE", "continuing_subword_prefix": "##", "vocab": {"a": 0, "b": 1, '
        '"ab": 2}, "merges": [["a", "b"]]}}',
        "is broken",
    ),
    "half a model": ('{"model": {"type": "BPE", "vocab": 5}}', "is broken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    content, words = BROKEN[name]
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=words) as error:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "absent.json")


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_published_tokenizers():
    neox = Tokenizer.load(SHARED / "tokenizers" / "gpt-neox-olmo-dolma-v1_5.tokenizer.json")
    assert (neox.vocab_size, neox.eos_token) == (50_280, END_OF_TEXT)
    files = [str(SHARED / "tokenizers" / f"gpt2_{name}") for name in ("vocab.json", "merges.txt")]
    backend = tokenizers.Tokenizer(models.BPE.from_file(*files))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    gpt2 = Tokenizer(backend)
    assert (gpt2.vocab_size, gpt2.eos_token_id) == (50_257, 50_256)
    assert gpt2.encode("Hello world") == [15496, 995]
    for opened in (neox, gpt2):
        assert opened._gigatoken is not None
        rows = [row.tolist() for row in opened.encode_batch(odd_texts())]
        assert rows == list(map(opened.encode, odd_texts()))


def test_the_command(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("".join(sentences()))
    words = ["tokenizer", "train", str(text), "--vocab-size", "300", "--out", str(tmp_path / "t")]
    assert call(words) == 0
    assert Tokenizer.load(tmp_path / "t").vocab_size == 300
    assert call(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert call([*words[:-1], str(tmp_path / "u"), "--vocab-size", "60000"]) == 2
    assert not (tmp_path / "u").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_the_command_reads_no_more_than_it_is_told(tmp_path):
    rows = [json.dumps({"body": text}) for text in sentences()] + ["{broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    words = ["tokenizer", "train", str(tmp_path / "a.jsonl"), "--vocab-size", "280", "--text-column", "body"]
    assert call([*words, "--out", str(tmp_path / "t")]) == 2
    assert call([*words, "--out", str(tmp_path / "t"), "--max-documents", "300"]) == 0


def test_a_panic_of_the_library_prints_nothing(tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(BROKEN["a panic"][0])
    with pytest.raises(UserError, match="is broken"):
        Tokenizer.load(tmp_path)
    print("still there", file=sys.stderr)
    assert capfd.readouterr().err == "still there\n"
