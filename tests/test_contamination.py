"""Benchmark items in a training text are found, named and left out."""

import json
import tracemalloc

import numpy as np
import pytest

from ant5m.cli import call
from ant5m.data.contamination import WORDS, ItemIndex, hashes_of, plain
from ant5m.data.corpus import Corpus
from ant5m.data.packing import pack
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import train_tokenizer
from ant5m.eval import results
from ant5m.eval.items import texts_of
from ant5m.eval.results import TaskResult
from ant5m.eval.schemas import HellaSwag, MinimalPair
from ant5m.files import write_json

LONG = "The quick brown fox jumps over the lazy dog while nine small ants carry it home"
OTHER = "A plain text about rivers and hills, which nobody ever put into a benchmark of any kind at all."


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def items(tmp_path):
    folder = tmp_path / "items"
    piqa = {"sol1": "short", "sol2": "shorter", "label": 0}
    write(
        folder / "piqa.jsonl",
        [{"goal": LONG, **piqa}, {"goal": "no", **piqa}, {"goal": OTHER.upper(), **piqa}],
    )
    arc = {"choices": {"text": ["red ants", "it home now and then"], "label": ["A", "B"]}, "answerKey": "A"}
    question = " ".join(LONG.split()[:-2])
    write(folder / "arc_easy.jsonl", [{"question": question.rsplit(" ", 3)[0], **arc}])
    return folder


@pytest.fixture
def text(tmp_path):
    quoted = f"He said: “{LONG.replace('fox', 'Fox,').replace('dog', 'dog –')}.” Then he went."
    rows = [
        OTHER.replace("ever", "never"),
        f"{quoted} {quoted}",
        *(f"Document {i}: {OTHER[:60]}" for i in range(40)),
    ]
    write(tmp_path / "text.jsonl", [{"text": row} for row in rows])
    return tmp_path / "text.jsonl"


def test_words_are_compared_without_case_and_punctuation():
    words = b" ".join(plain("Don't “stop” — well-known É_a,\u00a0b!").split()).decode()
    assert words == "dont stop wellknown éa b"
    words = LONG.split()
    for count in (WORDS - 1, WORDS, len(words)):
        assert len(hashes_of(" ".join(words[:count]))) == max(0, count - WORDS + 1)
    assert set(hashes_of(LONG).tolist()) & set(hashes_of("so " + LONG.upper()).tolist()) == set(
        hashes_of(LONG).tolist()
    )


def test_every_shared_stretch_is_found_and_no_other():
    """Against sets of word tuples."""
    random = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(3)]
    draw = lambda n: " ".join(random.choice(vocabulary, n))  # noqa: E731
    items, texts = [draw(20) for _ in range(50)], [draw(3000) for _ in range(40)]

    def grams(text):
        words = text.split()
        return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}

    index = ItemIndex({"x": [[item] for item in items]})
    own = [grams(item) for item in items]
    for text in texts:
        all_of_it = grams(text)
        expected = [number for number, some in enumerate(own) if some & all_of_it]
        assert index.find(text).tolist() == expected
    assert any(len(index.find(text)) for text in texts) and not all(len(index.find(text)) for text in texts)


def polynomials(text):
    """`hashes_of` in plain Python, from the words of `plain`."""
    base, every = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mixed(word):
        x = 0
        for letter in word:
            x = (x + ord(letter) + 1) * base & every
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ x >> 33) * factor & every
        return x ^ x >> 33

    words = [mixed(word) for word in plain(text).decode().split(" ") if word]
    grams = [words[i : i + WORDS] for i in range(len(words) - WORDS + 1)]
    return [sum(word * base ** (WORDS - 1 - i) for i, word in enumerate(gram)) & every for gram in grams]


def test_words_are_those_of_the_plain_text():
    """Characters of every plane stand inside and between words."""
    codes = [*range(0, 0xD800, 3), *range(0xE000, 0x40000, 11), *range(0x40000, 0x110000, 997)]
    for first in range(0, len(codes), 300):
        text = " ".join(f"x{chr(code)}Y {chr(code)}" for code in codes[first : first + 300])
        assert hashes_of(text).tolist() == hashes_of(plain(text).decode()).tolist()
    odd = "aÉß ΑΣ Σ\u0130İ “”—\u00a0\u3000\x1c\x85\x00,.'\U0001f600\U00020000\U0003134a\ud800"
    random = np.random.default_rng(1)
    for length in (0, 1, 12, 13, 40, 400):
        text = "".join(random.choice(list(odd + " " * 10), 4 * length))
        assert hashes_of(text).tolist() == polynomials(text)
    assert len(hashes_of(text)) > 100


def test_letters_that_change_places_between_words_are_another_text():
    assert hashes_of(f"to hat {LONG}").tolist()[0] != hashes_of(f"th oat {LONG}").tolist()[0]


def peak_of(action):
    """Bytes that Python and numpy hold at most while it runs, beyond what they held before."""
    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_bounded_by_the_items_and_one_document():
    items = [[f"w{i} {LONG} w{i}"] for i in range(5_000)]
    grams = sum(len(LONG.split()) + 3 - WORDS for _ in items)
    hashes_of("")  # the table of letters is made
    assert peak_of(lambda: ItemIndex({"x": items})) < 200 * grams + (1 << 20)
    index = ItemIndex({"x": items[:9]})
    huge = "A line of words, none of which is in an item. “It goes on” ... " * 50_000
    assert peak_of(lambda: index.find(huge)) < 4 * len(huge.encode())  # while it is encoded

    def check(count):
        return peak_of(lambda: index.check(((str(i), huge[: 1 << 18] + LONG) for i in range(count)), "", ""))

    assert check(12) < 1.2 * check(2)


def test_an_items_texts_are_those_that_could_be_written():
    pair = {"sentence_good": "a b", "sentence_bad": "c d"}
    assert texts_of(pair, MinimalPair) == ["a b", "c d"]
    row = {"activity_label": "x", "ctx_a": "he", "ctx_b": "runs", "endings": ["far", "away"], "label": "1"}
    assert texts_of(row, HellaSwag) == ["he", "runs", "he runs far", "he runs away"]


def test_the_command_counts_and_names(items, text, capsys):
    assert call(["data", "contamination", str(text), "--against", str(items), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 42 and found["contaminated_documents"] == 1
    piqa = found["tasks"]["piqa"]
    assert (piqa["items"], piqa["too_short"], piqa["contaminated"], piqa["share"]) == (3, 1, 1, 0.5)
    (worst,) = found["worst"]
    assert worst["document"].endswith("document 2") and worst["excerpt"].startswith("the quick brown fox")
    assert call(["data", "contamination", str(text), "--against", str(items)]) == 0
    page = capsys.readouterr().out
    assert "50.00%" in page and "document 2" in page


def test_the_table_says_whether_the_text_was_checked(items, text, tmp_path):
    def piqa():
        settings = {"limit": None, "data": "x", "sha256": None, "lm_eval": "1"}
        return [TaskResult("piqa", {"acc": (0.5, 0.1)}, 3, 0.5, settings)]

    run = tmp_path / "run"
    write_json(run / "config.json", {"train": {"data": str(tmp_path / "all")}})
    assert results.contamination_of(run) is results.UNCHECKED is results.contamination_of(None)
    assert "was not checked" in results.markdown(piqa(), results.contamination_of(run))
    tokenizer = train_tokenizer([OTHER, LONG] * 20, vocab_size=280)
    pack(Corpus.open([text]), tokenizer, tmp_path / "all", validation_fraction=0.2)
    assert call(["data", "contamination", str(tmp_path / "all"), "--against", str(items)]) == 0
    page = results.markdown(piqa(), results.contamination_of(run))
    assert "| piqa† |" in page and "piqa 1 of 2" in page


def test_packing_leaves_documents_with_items_out(items, text, tmp_path, capsys):
    tokenizer = train_tokenizer([OTHER, LONG] * 20, vocab_size=280)
    tokenizer.save(tmp_path / "tok")
    words = ["data", "pack", str(text), "--tokenizer", str(tmp_path / "tok"), "--validation-fraction", "0.2"]
    assert call([*words, "--out", str(tmp_path / "all")]) == 0
    assert call([*words, "--out", str(tmp_path / "clean"), "--exclude-items", str(items)]) == 0
    assert "documents with items 1" in capsys.readouterr().out
    counts = {}
    for name in ("all", "clean"):
        splits = [Shards.open(tmp_path / name, split) for split in ("train", "validation")]
        documents = [tokenizer.decode(ids) for shards in splits for ids in shards.documents(block=7)]
        counts[name] = len(documents)
        assert any(LONG[:9] in document for document in documents) == (name == "all")
        assert call(["data", "contamination", str(tmp_path / name), "--against", str(items), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert json.loads((tmp_path / name / "contamination.json").read_text()) == found
        assert Shards.open(tmp_path / name).num_tokens == splits[0].num_tokens  # the folder is still whole
    assert counts["all"] == counts["clean"] + 1
    meta = json.loads((tmp_path / "clean" / "meta.json").read_text())
    assert meta["excluded_items"]["piqa"] == {"items": 3, "too_short": 1}


def test_a_packing_goes_on_with_the_same_items_only(items, text, tmp_path, monkeypatch):
    from ant5m.data import packing

    tokenizer = train_tokenizer([OTHER, LONG] * 20, vocab_size=280)
    index = ItemIndex({"piqa": [[LONG]]})

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        pack(Corpus.open([text]), tokenizer, tmp_path / "out", exclude=index)
    monkeypatch.undo()
    with pytest.raises(Exception, match="other exclude_items"):
        pack(Corpus.open([text]), tokenizer, tmp_path / "out", exclude=ItemIndex({"piqa": [["x"]]}))
    pack(Corpus.open([text]), tokenizer, tmp_path / "out", exclude=index)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{text}", "--against", "nowhere"], "not a folder of benchmark files"),
        (["{text}", "--against", "{empty}"], "no items of a known task"),
        (["nothing.txt", "--against", "{items}"], "does not exist"),
    ],
)
def test_mistakes(items, text, tmp_path, capsys, words, said):
    (tmp_path / "empty").mkdir()
    places = {"items": items, "text": text, "empty": tmp_path / "empty"}
    assert call(["data", "contamination", *(word.format(**places) for word in words)]) == 2
    assert said in capsys.readouterr().err
