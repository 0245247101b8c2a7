"""The report says what is so: every number is checked on text where it is known."""

import functools
import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ant5m.cli import call
from ant5m.data import health
from ant5m.data.health import examine, repeated_lines, repeated_ngrams, round_trip, unreachable
from ant5m.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.model.config import PRESETS, ModelConfig
from ant5m.model.costs import count_table

TEXT = "the ant carries a leaf along the path and other ants follow it home to their nest by the river"
WORDS = TEXT.split()
SMALL = ModelConfig(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4
)


def costs(config):
    return functools.partial(count_table, config)


def documents(number: int = 1500) -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=20)).capitalize() + "." for _ in range(number)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(), vocab_size=320)


@pytest.fixture(scope="module")
def report(tokenizer):
    return examine(tokenizer, documents(), costs(SMALL), "small", compare=(270, 300, 60_000))


def byte_level(merges: list[str], extra: tuple[str, ...] = (), normalizer=None) -> Tokenizer:
    """A byte-level BPE with these merges ("a b"), and entries that nothing produces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(merge.replace(" ", "") for merge in merges), *extra]
    pairs = [tuple(merge.split()) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, pairs))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def test_the_counts_are_those_of_the_text(report, tokenizer):
    texts = documents()
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    size, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    assert (report.documents, report.bytes, report.words, report.tokens) == (1500, size, words, tokens)
    assert report.bytes_per_token == size / tokens and report.fertility == tokens / words
    ids = [i for text in texts for i in tokenizer.encode(text)]
    ordinary = [i for i in range(320) if i != tokenizer.eos_token_id]
    assert report.unused == sum(i not in set(ids) for i in ordinary) / 319
    assert report.hardly_used == sum(ids.count(i) < health.RARE for i in ordinary) / 319
    top = report.most_frequent[0]
    assert top["token"] == " the" and top["count"] == ids.count(tokenizer.encode(" the")[0])
    assert top["share"] == top["count"] / tokens


def test_our_own_tokenizer_loses_nothing_and_reaches_everything(report):
    assert report.round_trip.lost == report.round_trip.normalized == report.unreachable == []


def test_every_byte_is_tried():
    raw = b"".join(character.encode() for character in health.every_byte())
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert set(raw) == set(range(256)) - never_in_utf8


def test_what_is_lost_makes_it_unfit():
    lower = byte_level([], normalizer=normalizers.Lowercase())
    found = examine(lower, ["Some Text of a few words"], costs(SMALL), "small")
    assert "U+0041" in found.round_trip.lost and "document 1" in found.round_trip.lost
    assert found.verdict == "unfit" and "text is lost" in found.reasons[0]


def test_a_normal_form_is_a_reservation():
    trip = round_trip(byte_level([], normalizer=normalizers.NFC()), ["e\u0301"])
    assert (
        trip.lost == []
        and "accents, composed and combining" in trip.normalized
        and "document 1" in trip.normalized
    )
    found = examine(byte_level([], normalizer=normalizers.NFC()), ["text"], costs(SMALL), "small")
    assert found.verdict == "fit with reservations" and "normal form" in found.reasons[0]


def test_unreachable_entries():
    assert unreachable(byte_level(["a b", "ab c"])) == []
    # "xyz" has no merge; "aĠ" has one, but words are cut before the space; "bc" is reached outside "abc".
    assert unreachable(byte_level(["a Ġ", "a b", "b c"], extra=("xyz",))) == ["aĠ", "xyz"]
    # "abc" exists as "a" + "bc", but "ab" is merged first, always.
    assert unreachable(byte_level(["a b", "b c", "a bc"])) == ["abc"]


def test_repeated_lines():
    line = "All rights reserved by the author of this page."
    texts = [f"Page {i}, which differs from every other page here\n{line}\n" for i in range(10)]
    worst, share = repeated_lines(texts)
    assert [(fragment.text, fragment.count) for fragment in worst] == [(line, 10)]
    assert share == 9 * len(line) / sum(map(len, texts))
    assert repeated_lines(documents(50)) == ([], 0.0)


def test_repeated_fragments():
    plain = byte_level([])
    chance = random.Random(0)
    noise = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=50)) for _ in range(20)]
    worst, share = repeated_ngrams(plain, plain.encode_flat(["SIXTEEN LETTERS!" + text for text in noise])[0])
    assert [(fragment.text, fragment.count) for fragment in worst] == [("SIXTEEN LETTERS!", 20)]
    assert share == 16 * 20 / (66 * 20)
    assert repeated_ngrams(plain, plain.encode_flat(noise)[0]) == ([], 0.0)
    longer = plain.encode_flat(["A FEW MORE LETTERS THAN BEFORE" + text for text in noise])[0]
    assert [fragment.text for fragment in repeated_ngrams(plain, longer)[0]] == ["A FEW MORE LETTE"]
    assert repeated_ngrams(plain, plain.encode_flat(["short"])[0]) == ([], 0.0)


def test_urls_and_boilerplate_are_reservations(tokenizer):
    texts = [f"{text} https://example.org/{i}" for i, text in enumerate(documents(300))]
    found = examine(tokenizer, texts, costs(SMALL), "small")
    urls = sum(len(text.split()[-1]) for text in texts)
    assert found.url_share == urls / sum(map(len, texts))
    assert any("URLs" in reason for reason in found.reasons)
    found = examine(tokenizer, documents(20) * 30, costs(SMALL), "small")
    assert found.repeated_line_share > 0.9 and any("boilerplate" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("name", "parameters", "share"),
    [("ant-5m", 4_730_240, 0.443), ("ant-5m-fit", 4_951_808, 0.212), ("archaea-74m", 74_016_256, 0.695)],
)
def test_the_table_is_that_of_the_model(name, parameters, share):
    config = PRESETS[name]
    found = count_table(config, config.vocab_size)
    assert found["parameters"] == parameters and found["table_share"] == pytest.approx(share, abs=5e-4)


def test_the_table_decides(tokenizer):
    wide = ModelConfig(
        vocab_size=300, hidden_size=512, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4
    )
    tiny = ModelConfig(
        vocab_size=300,
        hidden_size=512,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
    )
    assert examine(tokenizer, documents(300), costs(wide), "wide").verdict != "unfit"
    found = examine(tokenizer, documents(300), costs(tiny), "tiny")
    assert found.verdict == "unfit" and "the table takes" in found.reasons[0]


def test_a_good_match_is_fit(report):
    # Few words make one of them frequent and the sample repetitive; nothing else may be found.
    assert report.verdict != "unfit"
    assert not [reason for reason in report.reasons if "table" in reason or "lost" in reason]


def test_the_verdict_of_clean_numbers(report):
    import dataclasses

    clean = dataclasses.replace(
        report,
        hardly_used=0.0,
        repeated_line_share=0.0,
        repeated_ngram_share=0.0,
        url_share=0.0,
        fertility=1.3,
    )
    clean.most_frequent = [{"token": "x", "count": 1, "share": 0.04}]
    assert health.judge(clean) == ("fit", [])


def test_the_comparison(report, tokenizer):
    assert [row["vocab_size"] for row in report.comparison] == [270, 300]  # the text supports no 60,000
    small, large = report.comparison
    assert small["bytes_per_token"] < large["bytes_per_token"] < report.bytes_per_token
    again = train_tokenizer(documents(), 300)
    assert large["bytes_per_token"] == report.bytes / sum(len(row) for row in again.encode_batch(documents()))
    assert large["table_share"] == count_table(SMALL, 300)["table_share"]


def test_bad_requests(tokenizer):
    with pytest.raises(UserError, match="uint16"):
        examine(tokenizer, documents(5), costs(SMALL), "small", compare=(70_000,))
    with pytest.raises(UserError, match="no text"):
        examine(tokenizer, [], costs(SMALL), "small")


def test_the_picture(report, tmp_path):
    health.draw(report, tmp_path / "deep" / "health.png")
    assert (tmp_path / "deep" / "health.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"health\.txt: use one of"):
        health.draw(report, tmp_path / "health.txt")


def test_the_command(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer.save(tmp_path / "t")
    (tmp_path / "a.txt").write_text("\n".join(documents(200)))
    words = ["tokenizer", "health", "a.txt", "--tokenizer", "t", "--compare", "270", "280"]
    assert call(words) == 0
    shown = capsys.readouterr().out
    assert "bytes per token" in shown and "fit" in shown and (tmp_path / "tokenizer-health.png").exists()
    assert call([*words, "--json", "--preset", "ant-5m-fit", "--picture", "b.svg"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["vocab_size"] == 320
        and len(found["comparison"]) == 2
        and found["model"]["name"] == "ant-5m-fit"
    )
    assert found["reasons"] and (tmp_path / "b.svg").exists()
    assert call([*words, "--preset", "ant-6m"]) == 2
    assert "no preset" in capsys.readouterr().err
