"""The data path beside its peers, in one run: batches against numpy, packing against `tokenizers`.

Variants are interleaved: every round runs each once. Ratios are medians of the rounds' own ratios.
"""

import shutil
import statistics
import time

import numpy as np
import pytest

from ant5m.data.builtin import load_builtin
from ant5m.data.contamination import ItemIndex
from ant5m.data.corpus import Corpus
from ant5m.data.packing import pack
from ant5m.data.shards import Shards, Tokens
from ant5m.data.tokenizer import train_tokenizer


@pytest.mark.parametrize("batch_size", [8, 64, 512])
def test_batches(benchmark, capsys, batch_size, length=1_024, rounds=200):
    """int64 inputs and targets of a batch, out of 400 MB of uint16 tokens at random places."""
    chance = np.random.default_rng(0)
    flat = chance.integers(0, 16_384, 200_000_000, dtype=np.uint16)
    tokens = Tokens([flat])
    inputs, targets = (np.empty((batch_size, length), np.int64) for _ in range(2))
    starts = np.empty(batch_size, np.int64)

    def draw():
        starts[:] = chance.integers(0, len(flat) - length, batch_size)

    def index():
        windows = flat[starts[:, None] + np.arange(length + 1)]
        inputs[:], targets[:] = windows[:, :-1], windows[:, 1:]

    def ours():
        tokens.gather(starts, length, inputs, targets)

    seconds = _in_turn(benchmark, ours, {"numpy, one index": index}, draw, rounds)
    benchmark.group = "batches"
    benchmark.extra_info |= {"batch": [batch_size, length]}
    written = (inputs.nbytes + targets.nbytes) / 1e6
    _report(benchmark, capsys, f"batch of {batch_size} x {length}", seconds, dict.fromkeys(seconds, written))


def test_packing(benchmark, capsys, tmp_path, copies=8, rounds=5):
    """A text file to shards, beside `tokenizers` doing no more than encode a part of the same documents.

    The text is the built-in corpus, repeated `copies` times, so that one-time costs do not count for much.
    """
    documents = [text.replace("\0", "") for text in load_builtin().documents]
    tokenizer = train_tokenizer(documents, vocab_size=16_384)
    part = documents[::8]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents * copies), encoding="utf-8")
    corpus = Corpus.open([tmp_path / "text.txt"])

    def clear():
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)

    def ours():
        pack(corpus, tokenizer, tmp_path / "shards")

    def peer():
        tokenizer.backend.encode_batch_fast(part, add_special_tokens=False)

    seconds = _in_turn(benchmark, ours, {"tokenizers": peer}, clear, rounds)
    benchmark.group = "packing"
    benchmark.extra_info["vocab_size"] = tokenizer.vocab_size
    sizes = {"ant5m": copies * _megabytes(documents), "tokenizers": _megabytes(part)}
    _report(benchmark, capsys, f"packing {sizes['ant5m']:.0f} MB", seconds, sizes)


def test_contamination(benchmark, capsys, tmp_path, rounds=5, items=20_000, words=60):
    """Looking for 13-grams of items in a text and in shards, and packing without the documents that have
    them, beside packing, on one thread. The items are words of the text at random, which are in none of its
    documents."""
    documents = [text.replace("\0", "") for text in load_builtin().documents]
    tokenizer = train_tokenizer(documents[::8], vocab_size=16_384)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    corpus = Corpus.open([tmp_path / "text.txt"])
    pack(corpus, tokenizer, tmp_path / "packed")
    known, chance = np.array(" ".join(documents).split()), np.random.default_rng(0)
    index = ItemIndex({"made": ([" ".join(chance.choice(known, words))] for _ in range(items))})

    def check(documents):
        assert not index.check((("", text) for text in documents), "", "").contaminated_documents

    def clear():
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)

    peers = {
        "packing with --exclude-items": lambda: pack(corpus, tokenizer, tmp_path / "shards", exclude=index),
        "check of text": lambda: check(corpus.documents()),
        "check of shards": lambda: check(map(tokenizer.decode, Shards.open(tmp_path / "packed").documents())),
    }
    seconds = _in_turn(
        benchmark,
        lambda: pack(corpus, tokenizer, tmp_path / "shards"),
        peers,
        clear,
        rounds,
        time.process_time,
    )
    benchmark.group = "contamination"
    size = _megabytes(documents)
    _report(
        benchmark, capsys, f"packing {size:.0f} MB, processor time", seconds, dict.fromkeys(seconds, size)
    )


def _megabytes(texts):
    return sum(len(text.encode()) for text in texts) / 1e6


def _in_turn(benchmark, ours, peers, prepare, rounds, clock=time.perf_counter):
    """Seconds of every round by variant; `prepare` comes before every variant and is not timed."""
    seconds = {name: [] for name in ("ant5m", *peers)}

    def timed(name, action):
        start = clock()
        action()
        seconds[name].append(clock() - start)

    def others():
        for name, action in peers.items():
            prepare()
            timed(name, action)
        prepare()

    benchmark.pedantic(timed, args=("ant5m", ours), setup=others, rounds=rounds, warmup_rounds=1)
    return {name: values[1:] for name, values in seconds.items()}


def _report(benchmark, capsys, title, seconds, megabytes):
    """MB/s of each variant, and how many times its speed ours is: into the results, and on the terminal."""
    rates = {name: [megabytes[name] / value for value in values] for name, values in seconds.items()}
    with capsys.disabled():
        print(f"\n{title}")
        for name, values in rates.items():
            rate = statistics.median(values)
            ratio = statistics.median(
                ours / value for ours, value in zip(rates["ant5m"], values, strict=True)
            )
            benchmark.extra_info[name] = {
                "mb_per_second": round(rate, 1),
                "ant5m_times_as_fast": round(ratio, 2),
            }
            print(f"  {name:28} {rate:10,.1f} MB/s   ant5m is {ratio:.2f} times as fast")
