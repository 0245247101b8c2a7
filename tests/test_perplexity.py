"""Three numbers with three units, equal to what the logits say, over exactly the text that is named."""

import hashlib
import itertools
import json
import math

import pytest
import tokenizers
import torch
import torch.nn.functional as F

from ant5m.data.corpus import Corpus
from ant5m.data.packing import pack
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.eval.perplexity import (
    Evaluation,
    encode_texts,
    evaluate,
    evaluate_as_lm_eval,
    open_data,
    record_evaluation,
    rolling,
    run_data,
)
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig

SENTENCE = "the ant carries a leaf along the path and the other ants follow it to the nest by the old tree"
DOCUMENTS = [" ".join(SENTENCE.split()[i:] + SENTENCE.split()[: i // 2]) + f" née {i}.\n" for i in range(19)]
CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DOCUMENTS * 20, vocab_size=300)


@pytest.fixture(scope="module")
def net() -> Ant:
    torch.manual_seed(0)
    return Ant(CONFIG)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return Corpus.open([file])


def nats_by_hand(net, ids, window):
    """Sum over windows of -log p(next token), from the full logits."""
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        part = torch.tensor(ids[start : start + window + 1])
        with torch.inference_mode():
            total += F.cross_entropy(net(part[None, :-1])[0], part[1:], reduction="sum").item()
    return total


def test_texts_are_scored_to_the_last_token(net, tokenizer, corpus):
    eos = [tokenizer.eos_token_id]
    ids = eos + [token for text in DOCUMENTS for token in tokenizer.encode(text) + eos]
    shards = encode_texts(corpus, tokenizer)
    assert shards.tokens[:].tolist() == ids[1:]
    for batch_size, window in ((1, 32), (3, 32), (8, 7)):
        result = evaluate(net, shards, batch_size, window, text="ants")
        assert result.tokens == len(ids) - 1
        assert result.nats == pytest.approx(nats_by_hand(net, ids, window), rel=1e-5)
        assert result.bytes == len("".join(DOCUMENTS).encode())
        assert result.words == sum(len(text.split()) for text in DOCUMENTS)
        assert (result.text, result.window) == ("ants", window)
    assert evaluate(net, shards).window == 32


def test_masked_documents_are_scored_as_if_alone(net, tokenizer, corpus):
    shards, eos = encode_texts(corpus, tokenizer), tokenizer.eos_token_id
    ids, nats = [eos, *shards.tokens[:].tolist()], 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        # An end-of-text token still sees its document, and begins none.
        cuts = [0, *(i + 1 for i, token in enumerate(window[:-2]) if token == eos), len(window) - 1]
        nats += sum(nats_by_hand(net, window[a : b + 1], 32) for a, b in itertools.pairwise(cuts))
    result = evaluate(net, shards, 3, document_mask=True)
    assert result.document_mask and result.nats == pytest.approx(nats, rel=1e-5)
    assert result.nats != pytest.approx(evaluate(net, shards, 3).nats, rel=1e-3)


def test_a_part_leaves_words_and_bytes_unknown(net, tokenizer, corpus):
    shards = encode_texts(corpus, tokenizer)
    result = evaluate(net, shards, limit_tokens=40)
    first, last = [0, *shards.tokens[:32].tolist()], (shards.num_tokens // 32 - 1) * 32
    expected = nats_by_hand(net, first, 32) + nats_by_hand(
        net, shards.tokens[last - 1 : last + 8].tolist(), 32
    )
    assert result.tokens == 40 and result.nats == pytest.approx(expected)
    assert (result.words, result.bytes, result.word_perplexity, result.bits_per_byte) == (None,) * 4
    assert evaluate(net, shards, limit_tokens=10**9) == evaluate(net, shards)


def test_three_numbers():
    result = Evaluation("text", nats=420.0, tokens=100, words=60, bytes=300, window=32)
    assert result.loss == 4.2
    assert result.token_perplexity == pytest.approx(math.exp(4.2))
    assert result.word_perplexity == pytest.approx(math.exp(7.0))
    assert result.bits_per_byte == pytest.approx(420 / math.log(2) / 300)
    assert set(result.to_dict()) == {
        *(
            "text",
            "loss",
            "token_perplexity",
            "word_perplexity",
            "bits_per_byte",
            "tokens",
            "words",
            "bytes",
            "window",
            "document_mask",
            "lost_bytes",
        )
    }
    assert Evaluation("text", 1e5, 10, 1, 1, 32).word_perplexity == math.inf


def test_an_untrained_model_knows_nothing(tokenizer, corpus):
    flat = Ant(CONFIG)
    torch.nn.init.zeros_(flat.model.embed_tokens.weight)
    assert evaluate(flat, encode_texts(corpus, tokenizer)).loss == pytest.approx(math.log(300), rel=1e-6)
    assert flat.training


def test_shards(net, tokenizer, corpus, tmp_path):
    pack(corpus, tokenizer, tmp_path / "data", validation_fraction=0.4)
    shards, text = open_data([tmp_path / "data"], tokenizer)
    assert shards.split == "validation" and "validation split" in text
    result = evaluate(net, shards)
    assert result.tokens == shards.num_tokens
    assert result.bytes == shards.counts["bytes"] < len("".join(DOCUMENTS).encode())
    assert result.nats == pytest.approx(nats_by_hand(net, [0, *shards.tokens[:].tolist()], 32), rel=1e-5)
    other = train_tokenizer(DOCUMENTS * 20, vocab_size=290)
    with pytest.raises(UserError, match="another tokenizer"):
        open_data([tmp_path / "data"], other)
    with pytest.raises(UserError, match="alone"):
        open_data([tmp_path / "data", tmp_path / "text.jsonl"], tokenizer)
    assert Shards.open(tmp_path / "data", "train").num_tokens > 0


def test_run_data(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"train": {"data": str(tmp_path / "books")}}))
    assert run_data(tmp_path) == [tmp_path / "books"]
    (tmp_path / "config.json").write_text('{"train": {"data": null}}')
    with pytest.raises(UserError, match="is not here"):
        run_data(tmp_path)
    (tmp_path / "data").mkdir()
    assert run_data(tmp_path) == [tmp_path / "data"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="give --data"):
        run_data(tmp_path)


def test_record_keeps_what_else_is_known(tmp_path):
    first = Evaluation("a", 4.0, 2, 1, 5, 32)
    (tmp_path / "eval.json").write_text('{"zero_shot": {"blimp": 0.7}}')
    record_evaluation(tmp_path, "step-00000005", first, held_out=True)
    record_evaluation(tmp_path, "step-00000005", Evaluation("b", 4.0, 2, 1, 5, 32), held_out=False)
    record_evaluation(tmp_path, "step-00000010", first, held_out=True)
    record_evaluation(tmp_path, "step-00000010", Evaluation("a", 2.0, 2, 1, 5, 32), held_out=True)
    values = json.loads((tmp_path / "eval.json").read_text())
    assert values["zero_shot"] == {"blimp": 0.7}
    kept = [(one["text"], one["loss"], one["checkpoint"], one["held_out"]) for one in values["perplexity"]]
    assert kept == [
        ("a", 2.0, "step-00000005", True),
        ("b", 2.0, "step-00000005", False),
        ("a", 1.0, "step-00000010", True),
    ]
    (tmp_path / "eval.json").write_text("[]")
    with pytest.raises(UserError, match="move it away"):
        record_evaluation(tmp_path, "step-00000010", first, held_out=True)


def test_no_bits_per_byte_where_bytes_are_lost(tmp_path, net):
    letters = sorted(set(SENTENCE) - {" "})
    vocab = {"<|endoftext|>": 0, "\u0120": 1} | {letter: i for i, letter in enumerate(letters, 2)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    gaps = Tokenizer(backend)
    (tmp_path / "a.txt").write_text(f"{SENTENCE} caf\u00e9<|endoftext|>{SENTENCE}")
    with pytest.raises(UserError, match=r"2 of .* bytes are lost.*--allow-loss"):
        open_data([tmp_path / "a.txt"], gaps)
    found = evaluate(net, open_data([tmp_path / "a.txt"], gaps, allow_loss=True)[0])
    assert found.lost_bytes == 2 and found.bits_per_byte is None and found.word_perplexity is None
    (tmp_path / "b.txt").write_text(SENTENCE)
    assert evaluate(net, open_data([tmp_path / "b.txt"], gaps)[0]).bits_per_byte > 0


def test_shards_of_an_earlier_reading_of_the_tokenizer_are_known(tmp_path, corpus, tokenizer):
    """Shards and models keep the fingerprint of the file as it was read when they were made."""
    tokenizer.save(tmp_path / "tok")
    content = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())
    content["added_tokens"][0]["special"] = False
    content["model"]["dropout"] = 0.1
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(content))
    then = tokenizers.Tokenizer.from_file(str(tmp_path / "tok" / "tokenizer.json"))
    packed_with = hashlib.sha256(
        json.dumps(json.loads(then.to_str()), sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
    now = Tokenizer.load(tmp_path / "tok")
    assert now.fingerprint == tokenizer.fingerprint != packed_with
    assert now.has_fingerprint(packed_with) and now.has_fingerprint(now.fingerprint)
    assert not now.has_fingerprint("0" * 64) and not tokenizer.has_fingerprint(packed_with)


def test_packed_text_is_scored_as_plain_text_is(net, tokenizer, corpus, tmp_path):
    pack(corpus, tokenizer, tmp_path / "packed", validation_fraction=0.5)
    shards = Shards.open(tmp_path / "packed", "validation")
    documents = [tokenizer.decode(ids) for ids in shards.documents()]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    plain, packed = encode_texts(Corpus.open([tmp_path / "plain.jsonl"]), tokenizer), evaluate(net, shards)
    assert evaluate(net, plain, text=packed.text) == packed
    assert packed.tokens == shards.num_tokens and packed.bytes == len("".join(documents).encode())


def test_lm_evals_convention_is_lm_evals(net, tokenizer, corpus):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from ant5m.eval.harness import AntLM

    for length in (1, 31, 32, 33, 64, 70):
        windows = get_rolling_token_windows(list(range(length)), 99, 32, 1)
        expected = [tuple(map(list, make_disjoint_window(window))) for window in windows]
        assert [tuple(map(list, one)) for one in rolling(list(range(length)), 99, 32)] == expected
    found = evaluate_as_lm_eval(net, encode_texts(corpus, tokenizer), tokenizer)
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in DOCUMENTS]
    nats = -sum(AntLM(net=net, tokenizer=tokenizer).loglikelihood_rolling(asked))
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.bytes == len("".join(DOCUMENTS).encode()) and found.byte_perplexity == pytest.approx(
        math.exp(nats / found.bytes)
    )
    ours = evaluate(net, encode_texts(corpus, tokenizer))
    assert ours.tokens == found.tokens + len(DOCUMENTS)  # an end-of-text token a document
