"""Which benchmark items stand in a training text: those that share 13 words in a row with one of its
documents.

Words are lower case, without punctuation, split at white space, as in Brown et al. 2020 ("Language Models are
Few-Shot Learners", appendix C), who take 13 words at the most; items with fewer in a row cannot be checked,
and are counted. Memory is bounded by the items: of the text only one document is held at a time.
"""

import functools
import hashlib
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORDS = 13
"""in a row"""
REPORT = "contamination.json"
"""in a folder of shards"""
WORST = 10
"""documents that a report names"""

_PUNCTUATION = string.punctuation.encode()
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_SPACE = np.isin(np.arange(256), list(b" \t\n\v\f\r\x1c\x1d\x1e\x1f"))
_TABLE_BITS = 28
_BITS = np.uint8(1) << np.arange(8, dtype=np.uint8)


def plain(text: str) -> bytes:
    """A text as it is compared: lower case, without punctuation, in UTF-8, with ASCII white space only."""
    text = text.lower()
    if not text.isascii():
        for mark in set(_NOT_ASCII.findall(text)):  # a few, in most texts
            if mark.isspace():
                text = text.replace(mark, " ")
            elif not mark.isalnum():
                text = text.replace(mark, "")
    return text.encode("utf-8", "replace").translate(None, _PUNCTUATION)


def hashes_of(text: str) -> NDArray[np.uint64]:
    """A hash of each `WORDS` words in a row, uint64 [words - 12].

    A word's is sum_i byte_i * base^i modulo 2^64, from prefix sums over the whole text. That of many words is
    sum_k word_k * base^k, put together from those of 1, 2, 4 and 8 words: 13 = 8 + 4 + 1.
    """
    raw = np.frombuffer(plain(text), np.uint8)
    inside = np.zeros(len(raw) + 2, np.int8)
    inside[1:-1] = ~_SPACE[raw]
    edges = np.flatnonzero(np.diff(inside))
    starts, ends = edges[::2], edges[1::2]
    count = len(starts) - WORDS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    sums = np.zeros(len(raw) + 1, np.uint64)
    np.cumsum((raw + np.uint64(1)) * _powers(len(raw), _BASE), out=sums[1:])
    one = (sums[ends] - sums[starts]) * _powers(len(raw), _INVERSE)[starts]
    two = one[:-1] + one[1:] * _power(1)
    four = two[:-2] + two[2:] * _power(2)
    eight = four[:-4] + four[4:] * _power(4)
    return eight[:count] + four[8 : 8 + count] * _power(8) + one[12 : 12 + count] * _power(12)


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 1 << 64))


def _powers(count: int, base: int) -> NDArray[np.uint64]:
    """base^0, base^1, ... modulo 2^64; as many as a power of two, so that few lengths are kept."""
    return _powers_of_two(max(1, count - 1).bit_length(), base)[:count]


@functools.lru_cache(maxsize=64)
def _powers_of_two(bits: int, base: int) -> NDArray[np.uint64]:
    found = np.ones(1 << bits, np.uint64)
    for bit in range(bits):
        half = 1 << bit
        found[half : 2 * half] = found[:half] * np.uint64(pow(base, half, 1 << 64))
    return found


@dataclass
class TaskCount:
    """Of one task."""

    items: int = 0
    too_short: int = 0
    """items without so many words in a row: they cannot be checked"""
    contaminated: int = 0
    """items that share as many with the text"""

    @property
    def share(self) -> float:
        """Of the items that could be checked."""
        return self.contaminated / max(1, self.items - self.too_short)


@dataclass
class Contamination:
    """What a text shares with the items of some tasks."""

    against: str
    """the items, for people"""
    text: str
    """the text, for people"""
    documents: int = 0
    contaminated_documents: int = 0
    tasks: dict[str, TaskCount] = field(default_factory=dict)
    worst: list[dict[str, Any]] = field(default_factory=list)
    """the documents that share most items: `document`, `items`, and an `excerpt` of what is shared"""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        tasks = {name: {**vars(count), "share": count.share} for name, count in self.tasks.items()}
        return {**vars(self), "words": WORDS, "tasks": tasks}


class ItemIndex:
    """The 13-grams of the items of some tasks.

    `tasks` gives for each task its items, and for each item the texts in which 13 words in a row are looked
    for.
    """

    def __init__(self, tasks: Mapping[str, Iterable[Sequence[str]]]) -> None:
        self.counts = {name: TaskCount() for name in tasks}
        self._task_of: list[str] = []
        digest = hashlib.sha256()
        hashes, owners = [], []
        for name, items in tasks.items():
            for texts in items:
                digest.update("\n".join((name, *texts)).encode("utf-8", "surrogatepass"))
                own = np.unique(
                    np.concatenate([hashes_of(text) for text in texts] or [np.empty(0, np.uint64)])
                )
                self.counts[name].items += 1
                self.counts[name].too_short += not len(own)
                hashes.append(own)
                owners.append(np.full(len(own), len(self._task_of), np.int64))
                self._task_of.append(name)
        self.fingerprint = digest.hexdigest()
        """sha256 of all texts"""
        flat = np.concatenate([*hashes, np.empty(0, np.uint64)])
        order = flat.argsort(kind="stable")
        self._hashes = flat[order]
        self._owners = np.concatenate([*owners, np.empty(0, np.int64)])[order]
        # A bit for the first bits of each hash: nearly all of a text's are sorted out by it.
        self._table = np.zeros(1 << (_TABLE_BITS - 3), np.uint8)
        place = self._hashes >> np.uint64(64 - _TABLE_BITS)
        np.bitwise_or.at(self._table, place >> np.uint64(3), _BITS[place & np.uint64(7)])

    def find(self, text: str) -> NDArray[np.int64]:
        """Numbers of the items that share `WORDS` words in a row with a document, sorted."""
        hashes = hashes_of(text)
        place = hashes >> np.uint64(64 - _TABLE_BITS)
        hashes = hashes[(self._table[place >> np.uint64(3)] & _BITS[place & np.uint64(7)]) > 0]
        if not len(hashes):
            return np.empty(0, np.int64)
        low = self._hashes.searchsorted(hashes, "left")
        high = self._hashes.searchsorted(hashes, "right")
        found = [self._owners[a:b] for a, b in zip(low, high, strict=True) if b > a]
        return np.unique(np.concatenate([*found, np.empty(0, np.int64)]))

    def has(self, text: str) -> bool:
        """Whether a document shares `WORDS` words in a row with any item."""
        return bool(len(self.find(text)))

    def describe(self) -> dict[str, dict[str, int]]:
        """For each task its items, and how many are too short to be found."""
        return {name: {"items": one.items, "too_short": one.too_short} for name, one in self.counts.items()}

    def excerpt(self, text: str) -> str:
        """The first words in a row of a document that an item has, too."""
        shared = np.isin(hashes_of(text), self._hashes)
        if not shared.any():
            return ""
        first = int(shared.argmax())
        return b" ".join(plain(text).split()[first : first + WORDS]).decode()

    def check(self, documents: Iterable[tuple[str, str]], against: str, text: str) -> Contamination:
        """Look at all (name, document) of a text."""
        report = Contamination(against, text)
        seen = np.zeros(len(self._task_of), bool)
        shared: Counter[str] = Counter()
        excerpts: dict[str, str] = {}
        for name, document in documents:
            report.documents += 1
            found = self.find(document)
            if len(found):
                report.contaminated_documents += 1
                seen[found] = True
                _keep_worst(shared, excerpts, name, len(found), document, self)
        report.tasks = {name: TaskCount(**vars(count)) for name, count in self.counts.items()}
        for number in np.flatnonzero(seen).tolist():
            report.tasks[self._task_of[number]].contaminated += 1
        report.worst = [
            {"document": name, "items": count, "excerpt": excerpts[name]}
            for name, count in shared.most_common(WORST)
        ]
        return report


def _keep_worst(
    shared: Counter[str], excerpts: dict[str, str], name: str, count: int, document: str, index: ItemIndex
) -> None:
    """Only so many names are held, however many documents there are."""
    if len(shared) >= WORST:
        least, fewest = min(shared.items(), key=lambda item: item[1])
        if count <= fewest:
            return
        del shared[least], excerpts[least]
    shared[name] = count
    excerpts[name] = index.excerpt(document)
