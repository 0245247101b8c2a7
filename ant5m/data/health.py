"""Is this tokenizer fit for this text and for a model of this size?

Everything is measured on a sample of the text: what the tokenizer loses, how far it compresses, which of its
entries earn their row in the model's table, and which pieces of text crowd out the rest.
"""

import dataclasses
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ant5m.data.ngrams import covered_by, hash_ngrams
from ant5m.data.tokenizer import MAX_VOCAB_SIZE, Tokenizer, check_vocab_size, learn_bpe, spread_sample
from ant5m.errors import UserError
from ant5m.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.progress import Progress

Table = Callable[[int], dict[str, float]]
"""What a model's token table costs with so many entries: `parameters` of the model, `table_parameters`, and
their share `table_share`."""

SAMPLE_BYTES = 10_000_000
RARE = 10
"""an entry that the sample uses less often is hardly used"""
NGRAM = 16
"""tokens of a fragment that is looked for again"""
REPEATS = 5
"""occurrences from which a fragment or a line counts as boilerplate"""
LINE = 40
"""characters of a line that is looked for again"""
ROUND_TRIP_BYTES = 2_000_000

AWKWARD = {
    "accents, composed and combining": "é e\u0301 Å A\u030a ễ e\u0323\u0302 \u0301 Z\u0351\u036b\u0343 ﬁ ½",
    "emoji with joiners": "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪 ❤\ufe0f 🏴\U000e0067\U000e0062\U000e007f",
    "right to left": "שלום עולם \u202bمرحبا بالعالم\u202c \u200f",
    "scripts without spaces": "東京特許許可局 กรุงเทพมหานคร ភ្នំពេញ ပြည်",
    "line ends": "one\r\ntwo\rthree\n\n\nfour\r\n\r\n\u2028\u2029\x85\x0b\x0c",
    "spaces": " a  b   c\t\td \u00a0\u2003\u3000\u200b\ufeff e ",
    "control characters": "\x00\x01\x08\x1b[0m\x7f\x9f",
    "private use and unassigned": "\ue000\uf8ff\U000f0000\U0010ffff\u0378\ufffe\uffff\ufffd",
    "other digits and letters": "٣٤٥ ४५६ Ⅷ 𝟘𝟙𝟚 𝔘𝔫𝔦 ＡＢＣ ǅ ß ſ İ ı",
    "spelled special tokens": "<|endoftext|> <s></s> [UNK] <unk> <0x0A> ▁ Ġ",
}


@dataclass
class Fragment:
    """A piece of text that comes again and again."""

    text: str
    count: int


@dataclass
class RoundTrip:
    """Names of what is not the same after encoding and decoding: characters (which hold every byte that UTF-8
    has), kinds of awkward Unicode, documents of the sample.
    """

    lost: list[str]
    normalized: list[str]
    """comes back in another Unicode normal form"""


@dataclass
class Health:
    """What `examine` found. Shares are between 0 and 1; counts are of the sample."""

    vocab_size: int
    documents: int
    bytes: int
    words: int
    """pieces between white space"""
    tokens: int
    bytes_per_token: float
    fertility: float
    """tokens per word"""
    round_trip: RoundTrip
    unused: float
    """share of the vocabulary that the sample never uses"""
    hardly_used: float
    """share of the vocabulary used fewer than `RARE` times, the unused included"""
    unreachable: list[str]
    """entries that no text is ever encoded to"""
    most_frequent: list[dict[str, Any]]
    """token, count, share of all tokens; most frequent first"""
    url_share: float
    """of the characters"""
    repeated_line_share: float
    """of the characters: lines that occur `REPEATS` times or more, but for their first time"""
    repeated_lines: list[Fragment]
    repeated_ngram_share: float
    """of the tokens: those inside `NGRAM`-token fragments that occur `REPEATS` times or more"""
    repeated_ngrams: list[Fragment]
    model: dict[str, Any]
    """name, parameters, table_parameters, table_share with this vocabulary"""
    comparison: list[dict[str, Any]]
    """of tokenizers learned from the sample: vocab_size, bytes_per_token, fertility, hardly_used, parameters,
    table_parameters, table_share"""
    frequencies: list[int]
    """occurrences of each used entry, most frequent first"""
    verdict: str = "fit"
    """fit, fit with reservations, or unfit"""
    reasons: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; without `frequencies`, which only the picture needs."""
        values = dataclasses.asdict(self)
        del values["frequencies"]
        return values


def examine(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    table: Table,
    model_name: str,
    compare: Sequence[int] = (),
    sample_bytes: int = SAMPLE_BYTES,
    progress: "Progress | None" = None,
) -> Health:
    """Judge a tokenizer on an evenly spread sample of `texts`, for a model whose `table` costs this.

    `compare`: vocabulary sizes for which a tokenizer is learned from the same sample and measured on it;
    those that the sample does not support are left out. Raises `UserError` when there is no text.
    """
    for vocab_size in compare:
        check_vocab_size(vocab_size)
    sample = spread_sample(texts, sample_bytes)
    if not sample:
        raise UserError("there is no text to judge the tokenizer on")
    size, words = _measure(sample)
    ids = tokenizer.encode_flat(sample)[0]
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    ordinary = np.delete(counts, list(special_ids(tokenizer)))
    characters = sum(map(len, sample))
    lines, line_share = repeated_lines(sample)
    ngrams, ngram_share = repeated_ngrams(tokenizer, ids)
    health = Health(
        vocab_size=tokenizer.vocab_size,
        documents=len(sample),
        bytes=size,
        words=words,
        tokens=len(ids),
        bytes_per_token=size / len(ids),
        fertility=len(ids) / max(1, words),
        round_trip=round_trip(tokenizer, sample),
        unused=float((ordinary == 0).mean()),
        hardly_used=float((ordinary < RARE).mean()),
        unreachable=unreachable(tokenizer),
        most_frequent=_most_frequent(counts, tokenizer),
        url_share=sum(len(url) for text in sample for url in _URL.findall(text)) / characters,
        repeated_line_share=line_share,
        repeated_lines=lines,
        repeated_ngram_share=ngram_share,
        repeated_ngrams=ngrams,
        model={"name": model_name, **table(tokenizer.vocab_size)},
        comparison=_compare(sample, compare, table, progress) if compare else [],
        frequencies=sorted((int(n) for n in counts if n), reverse=True),
    )
    health.verdict, health.reasons = judge(health)
    return health


def _measure(sample: Sequence[str]) -> tuple[int, int]:
    """Bytes and words."""
    return sum(len(text.encode()) for text in sample), sum(len(text.split()) for text in sample)


# Does everything come back?


def every_byte() -> list[str]:
    """Characters whose UTF-8 holds every byte that UTF-8 can hold, in every place it can stand."""
    two = [chr(code) for code in range(0x800)]
    three = [chr(code) for code in range(0x800, 0x10000, 0x41) if not 0xD800 <= code < 0xE000]
    four = [chr(code) for code in range(0x10000, 0x110000, 0x1041)]
    return two + three + four


def round_trip(tokenizer: Tokenizer, sample: Sequence[str]) -> RoundTrip:
    """Encode and decode characters with every byte, the awkward Unicode, and documents of the sample."""
    found = RoundTrip([], [])
    texts = {f"U+{ord(character):04X}": character for character in every_byte()} | AWKWARD
    for number, document in enumerate(spread_sample(sample, ROUND_TRIP_BYTES), 1):
        texts[f"document {number}"] = document
    for name, text in texts.items():
        back = tokenizer.decode(tokenizer.encode(text))
        if back == text:
            continue
        same = unicodedata.normalize("NFKC", back) == unicodedata.normalize("NFKC", text)
        (found.normalized if same else found.lost).append(name)
    return found


# Which entries are of use?


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that are not learned from text."""
    return set(tokenizer.backend.get_added_tokens_decoder())


def _most_frequent(counts: np.ndarray, tokenizer: Tokenizer, number: int = 20) -> list[dict[str, Any]]:
    order = np.argsort(-counts, kind="stable")[:number]
    total = counts.sum()
    return [
        {"token": tokenizer.decode([i]), "count": int(counts[i]), "share": float(counts[i] / total)}
        for i in order
        if counts[i]
    ]


def unreachable(tokenizer: Tokenizer) -> list[str]:
    """Entries that no text becomes, because the merges make something else of their own spelling or because
    the pre-tokenizer cuts it wherever it stands.
    """
    special = special_ids(tokenizer)
    spelled = {token: i for token, i in tokenizer.vocab.items() if i not in special}
    merge = tokenizer.backend.model.tokenize
    merged = [token for token, i in spelled.items() if [piece.id for piece in merge(token)] == [i]]
    never = spelled.keys() - set(merged)
    texts = {token: tokenizer.decode([spelled[token]]) for token in merged}
    # A spelling with U+FFFD is a part of a character: it has no text of its own to try.
    tried = [token for token in merged if "\ufffd" not in texts[token]]
    for before, after in (("", ""), ("a", "a"), (" ", " "), (".", "."), ("\n", "\n"), ("1", "1")):
        rows = tokenizer.encode_batch([before + texts[token] + after for token in tried])
        tried = [token for token, row in zip(tried, rows, strict=True) if spelled[token] not in row]
    return sorted(never | set(tried), key=spelled.__getitem__)


# What crowds out the rest?

_URL = re.compile(r"(?:https?://|www\.)\S+")


def repeated_lines(texts: Sequence[str], number: int = 5) -> tuple[list[Fragment], float]:
    """Lines that occur `REPEATS` times or more, those that take most first, and their share of the text."""
    counts = Counter(line for text in texts for line in map(str.strip, text.split("\n")) if len(line) >= LINE)
    again = {line: count for line, count in counts.items() if count >= REPEATS}
    share = sum(len(line) * (count - 1) for line, count in again.items()) / max(1, sum(map(len, texts)))
    worst = sorted(again, key=lambda line: (-len(line) * again[line], line))[:number]
    return [Fragment(line, again[line]) for line in worst], share


def repeated_ngrams(tokenizer: Tokenizer, ids: np.ndarray, number: int = 5) -> tuple[list[Fragment], float]:
    """Fragments of `NGRAM` tokens that occur `REPEATS` times or more, most frequent first, and the share of
    the tokens that lie in one.
    """
    if len(ids) < NGRAM:
        return [], 0.0
    hashes = hash_ngrams(ids.astype(np.uint64), NGRAM)
    _, first, inverse, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    covered = covered_by(counts[inverse] >= REPEATS, NGRAM)
    fragments: list[Fragment] = []
    taken: list[int] = []
    for index in np.lexsort((first, -counts)):
        if counts[index] < REPEATS or len(fragments) == number:
            break
        start = int(first[index])
        if all(abs(start - other) >= NGRAM for other in taken):  # not the same fragment, shifted
            taken.append(start)
            fragments.append(Fragment(tokenizer.decode(ids[start : start + NGRAM]), int(counts[index])))
    return fragments, float(covered.mean())


# What would other vocabularies do?


def _compare(
    sample: list[str], sizes: Sequence[int], table: Table, progress: "Progress | None"
) -> list[dict[str, Any]]:
    size, words = _measure(sample)
    largest = learn_bpe(sample, max(sizes), progress)
    rows = []
    for vocab_size in sorted(size for size in set(sizes) if size <= largest.vocab_size):
        ids = largest.shrunk(vocab_size).encode_flat(sample)[0]
        counts = np.bincount(ids, minlength=vocab_size)[1:]  # the end of a text is no part of it
        rows.append(
            {
                "vocab_size": vocab_size,
                "bytes_per_token": size / len(ids),
                "fertility": len(ids) / max(1, words),
                "hardly_used": float((counts < RARE).mean()),
                **table(vocab_size),
            }
        )
    return rows


# The verdict


def judge(health: Health) -> tuple[str, list[str]]:
    """`fit`, `fit with reservations` or `unfit`, and why."""
    unfit, reservations = _failures(health), _reservations(health)
    if unfit:
        return "unfit", unfit + reservations
    return ("fit with reservations" if reservations else "fit"), reservations


def _failures(health: Health) -> list[str]:
    found = []
    if health.round_trip.lost:
        found.append(f"text is lost: {named(health.round_trip.lost)}")
    if health.vocab_size > MAX_VOCAB_SIZE:
        found.append(
            f"{health.vocab_size:,} entries do not fit the shards' uint16 (at most {MAX_VOCAB_SIZE:,})"
        )
    if health.model["table_share"] > 0.75:
        found.append(_table_reason(health) + ": hardly anything is left to think with")
    return found


def named(names: Sequence[str], number: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - number:,} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def _reservations(health: Health) -> list[str]:
    found = []
    if health.round_trip.normalized:
        found.append(
            f"text is changed into another Unicode normal form: {named(health.round_trip.normalized)}"
        )
    if 0.35 < health.model["table_share"] <= 0.75:
        found.append(_table_reason(health) + ": a smaller vocabulary leaves more to the layers")
    enough = health.tokens >= 100 * health.vocab_size
    if health.hardly_used > 0.25 and enough:
        found.append(
            f"{health.hardly_used:.0%} of the vocabulary is used fewer than {RARE} times: "
            "rows that will hardly be learned"
        )
    if not enough:
        found.append(
            f"the sample is small for {health.vocab_size:,} entries ({health.tokens:,} tokens): "
            "what it says about unused entries is uncertain"
        )
    if len(health.unreachable) > 0.01 * health.vocab_size:
        found.append(f"{len(health.unreachable):,} entries can never be produced")
    if health.fertility > 2:
        found.append(
            f"{health.fertility:.2f} tokens a word: the vocabulary is small for this text, or was learned "
            "from another"
        )
    if health.url_share > 0.02:
        found.append(f"{health.url_share:.1%} of the text are URLs: clean it")
    if max(health.repeated_line_share, health.repeated_ngram_share) > 0.05:
        found.append(
            f"boilerplate: {health.repeated_line_share:.1%} of the text are repeated lines, "
            f"{health.repeated_ngram_share:.1%} repeated fragments: de-duplicate it"
        )
    top = health.most_frequent[0]
    if top["share"] > 0.1:
        found.append(f"{top['token']!r} alone is {top['share']:.0%} of all tokens")
    return found


def _table_reason(health: Health) -> str:
    return f"the table takes {health.model['table_share']:.0%} of {health.model['name']}'s parameters"


# The picture


def picture_kind(path: Path) -> str:
    """What the suffix of a picture says; `UserError` where that cannot be drawn."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in kinds:
        raise UserError(
            f"a picture cannot be written as {path.name}: use one of .{', .'.join(sorted(kinds))}"
        )
    return kind


def draw(health: Health, path: Path) -> None:
    """Three panels, as a PNG or what the suffix says: frequencies, bytes per token, share of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    frequency, compression, share = figure.subplots(1, 3)
    _draw_frequency(frequency, health)
    points = sorted([*health.comparison, _as_point(health)], key=lambda point: point["vocab_size"])
    _draw_compression(compression, health)
    _draw_share(share, health, points)
    figure.suptitle(f"{health.vocab_size:,} entries on {health.bytes / 1e6:.1f} MB of text: {health.verdict}")
    picture = io.BytesIO()
    figure.savefig(picture, format=picture_kind(path), dpi=120)
    write_file(path, picture.getvalue())


def _as_point(health: Health) -> dict[str, Any]:
    return {"vocab_size": health.vocab_size, "this": True, **health.model}


def _draw_frequency(axes: "Axes", health: Health) -> None:
    ranks = np.arange(1, len(health.frequencies) + 1)
    axes.loglog(ranks, health.frequencies, color="tab:blue")
    axes.axhline(RARE, color="tab:red", linewidth=0.8, linestyle="--", label=f"{RARE} times")
    axes.axvline(health.vocab_size, color="0.5", linewidth=0.8, linestyle=":", label="vocabulary")
    axes.set(xlabel="rank of the token", ylabel="occurrences", title=f"{health.unused:.1%} never used")
    axes.legend(frameon=False)


def _draw_compression(axes: "Axes", health: Health) -> None:
    sizes = [row["vocab_size"] for row in health.comparison]
    reached = [row["bytes_per_token"] for row in health.comparison]
    if sizes:
        axes.plot(sizes, reached, "o-", label="learned from this sample")
    axes.plot(health.vocab_size, health.bytes_per_token, "r*", markersize=12, label="this tokenizer")
    ticks = sorted({*sizes, health.vocab_size})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    axes.set(xlabel="entries", ylabel="bytes per token", title="compression")
    axes.legend(frameon=False)


def _draw_share(axes: "Axes", health: Health, points: list[dict[str, Any]]) -> None:
    labels = [f"{p['vocab_size']:,}" + (" *" if "this" in p else "") for p in points]
    tables = [p["table_parameters"] / 1e6 for p in points]
    rest = [(p["parameters"] - p["table_parameters"]) / 1e6 for p in points]
    axes.bar(labels, rest, color="tab:blue", label="layers")
    bars = axes.bar(labels, tables, bottom=rest, color="tab:orange", label="table")
    axes.bar_label(bars, [f"{p['table_share']:.0%}" for p in points], padding=2)
    axes.margins(x=0.1 if len(points) > 1 else 1.5, y=0.15)
    axes.set(
        xlabel="entries (* this tokenizer)", ylabel="million parameters", title=f"{health.model['name']}"
    )
    axes.tick_params(axis="x", rotation=30)
    axes.legend(framealpha=0.9)
