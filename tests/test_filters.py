"""The filters of `ant5m data pack`: what goes, what stays, what is counted, and packing with them."""

import os
from collections import Counter

import numpy as np
import pytest
from test_packing import content, documents_of, make_texts, tokenizer, write_jsonl  # noqa: F401  (fixture)

from ant5m.cli import call
from ant5m.data import packing
from ant5m.data.corpus import Corpus
from ant5m.data.filters import NGRAM, clean, repeated_share
from ant5m.data.packing import pack
from ant5m.errors import UserError

LONG = "The river ran under the old stone bridges."
AGAIN = " ".join(f"{number} more boats" for number in range(12))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_a_line_is_said_once():
    text = f"{LONG}\n\nYes.\n\n{LONG.upper()}\n\nYes.\n  {LONG}  \nThe end of it."
    kept, removed = clean(text, ["repeats"])
    assert kept == f"{LONG}\n\nYes.\n\nYes.\nThe end of it."
    assert removed == Counter(repeats_lines=2, bytes=len(text) - len(kept))
    assert clean(text, []) == (text, Counter(bytes=0))


def test_a_document_that_repeats_itself_goes():
    fresh = " ".join(f"word{number}" for number in range(200))
    kept, removed = clean(f"{fresh} {AGAIN}", ["repeats"])
    assert kept == f"{fresh} {AGAIN}" and not +removed
    kept, removed = clean(f"{fresh} {AGAIN} and then {AGAIN}", ["repeats"])
    assert kept == "" and removed["repeats_documents"] == 1 and removed["bytes"] > 1_000


def plain_share(words, n):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    marked = {i + j for i, gram in enumerate(grams) if gram in grams[:i] for j in range(n)}
    return len(marked) / len(words)


@pytest.mark.parametrize("n", [1, 2, 3, NGRAM])
def test_the_share_of_repeated_words(n):
    chance = np.random.default_rng(n)
    for length in (2 * n, 40, 200):
        words = [f"w{i}" for i in chance.integers(3 if n > 3 else 12, size=length)]
        assert repeated_share(" ".join(words), n) == pytest.approx(plain_share(words, n))
    assert repeated_share("", n) == 0


@pytest.mark.parametrize(
    "line, rest",
    [
        ("Read https://example.org/a?b=c#d before the others.", "Read  before the others."),
        ("Ask someone@example.org or look at www.example.org", "Ask  or look at "),
        ("See http://example.org", None),
        ("We use cookies to improve your visit.", None),
        ("Copyright 2001. All Rights Reserved.", None),
        ("x = a @ b", "x = a @ b"),
        ("He said: wwww.", "He said: wwww."),
    ],
)
def test_boilerplate(line, rest):
    kept, removed = clean(f"{LONG}\n{line}\nThe end.", ["boilerplate"])
    assert kept.split("\n") == [part for part in (LONG, rest, "The end.") if part is not None]
    assert removed["boilerplate_lines"] == (rest is None)


def test_packing_counts_what_the_filters_took(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    texts = [*make_texts(200), f"{LONG}\n{LONG}", f"{AGAIN} {AGAIN}", "See http://example.org"]
    corpus = Corpus.open([write_jsonl(tmp_path / "texts.jsonl", texts)])
    plain, filtered = tmp_path / "plain", tmp_path / "filtered"
    pack(corpus, tokenizer, plain, validation_fraction=0.1)
    monkeypatch.setattr(packing, "BATCH_BYTES", 1_000)
    words = ["data", "pack", str(tmp_path / "texts.jsonl"), "--out", str(filtered)]
    tokenizer.save(tmp_path / "tok")
    words += ["--tokenizer", str(tmp_path / "tok"), "--validation-fraction", "0.1"]
    assert call([*words, "--filters", "repeats", "boilerplate"]) == 0
    meta = packing.read_json(filtered / "meta.json")
    whole = packing.read_json(plain / "meta.json")
    counted = {"repeats_lines": 1, "repeats_documents": 1, "boilerplate_lines": 1, "boilerplate_documents": 1}
    lost = sum(whole["splits"][name]["bytes"] - meta["splits"][name]["bytes"] for name in meta["splits"])
    assert meta["removed"] == {**counted, "bytes": lost}
    assert "removed" not in whole and meta["options"]["filters"] == ["repeats", "boilerplate"]
    sides = [documents_of(folder, "validation") for folder in (plain, filtered)]
    assert [ids for ids in sides[0] if ids in sides[1]] == sides[1]  # no document changes sides


def test_packing_with_filters_goes_on(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(packing, "BATCH_BYTES", 500)
    monkeypatch.setattr(packing, "JOURNAL_BYTES", 500)
    texts = [text for one in make_texts(60) for text in (one, f"{AGAIN} {AGAIN}")]
    corpus = Corpus.open([write_jsonl(tmp_path / "texts.jsonl", texts)])
    options = {"validation_fraction": 0.1, "filters": ["repeats"]}
    assert pack(corpus, tokenizer, tmp_path / "whole", **options)["removed"]["repeats_documents"] == 60
    write, calls = packing._write, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(packing, "_write", stop)
    for _ in range(20):
        try:
            pack(corpus, tokenizer, tmp_path / "out", **options)
            break
        except KeyboardInterrupt:
            continue
    assert len(calls) > 6 and content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_unknown_filter(tmp_path, tokenizer):  # noqa: F811
    corpus = Corpus.open([write_jsonl(tmp_path / "texts.jsonl", make_texts(3))])
    with pytest.raises(UserError, match="no filter 'spam'"):
        pack(corpus, tokenizer, tmp_path / "out", filters=["repeats", "spam"])
