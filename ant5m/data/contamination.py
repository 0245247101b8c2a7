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

from ant5m import _cpu

WORDS = 13
"""in a row"""
REPORT = "contamination.json"
"""in a folder of shards"""
WORST = 10
"""documents that a report names"""

_SPACE = b" \t\n\v\f\r\x1c\x1d\x1e\x1f"
_PUNCTUATION = string.punctuation.encode()
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_KNOWN = 0x40000
"""No code point from here on is a letter, a digit or a space."""
_NEEDS_PYTHON = "\u0130\u03a3"
"""Lower case of the first is two characters, that of the second depends on its neighbors."""


def plain(text: str) -> bytes:
    """A text as it is compared: lower case, without punctuation, in UTF-8, with spaces as white space."""
    text = text.lower()
    if not text.isascii():
        for mark in set(_NOT_ASCII.findall(text)):  # a few, in most texts
            if mark.isspace():
                text = text.replace(mark, " ")
            elif not mark.isalnum():
                text = text.replace(mark, "")
    spaces = bytes.maketrans(_SPACE, b" " * len(_SPACE))
    return text.encode("utf-8", "replace").translate(spaces, _PUNCTUATION)


def hashes_of(text: str, filter: NDArray[np.uint64] | None = None) -> NDArray[np.uint64]:
    """A hash of each `WORDS` words in a row of a text, uint64 [words - 12]: of the words of `plain(text)`.

    filter: only hashes that it may have (see `_filter_of`), in their order.
    """
    found = _hash(text.encode("utf-8", "replace"), filter)
    return np.frombuffer(_hash(plain(text), filter) if found is None else found, np.uint64)


def _hash(raw: bytes, filter: NDArray[np.uint64] | None) -> Any:
    """Bytes of the hashes, or None where the text has a character that needs Python."""
    letters = _letters()
    return _cpu.hash_ngrams(
        text=raw,
        letters=letters.ctypes.data,
        known=len(letters),
        n=WORDS,
        filter=0 if filter is None else filter.ctypes.data,
        filter_words=0 if filter is None else len(filter),
    )


@functools.cache
def _letters() -> NDArray[np.uint32]:
    """What `plain` makes of every single character, for csrc/cpu/ngrams.h."""
    found = np.full(_KNOWN, _cpu.LEFT_OUT, np.uint32)
    for code, letter in enumerate(map(str.lower, map(chr, range(_KNOWN)))):
        if letter.isspace():
            found[code] = _cpu.SPACE
        elif letter.isalnum() or (code < 128 and letter not in string.punctuation):
            found[code] = ord(letter[0])
    found[[ord(mark) for mark in _NEEDS_PYTHON]] = _cpu.ASK
    return found


def _filter_of(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Two bits for each hash, in 64 or more bits for each: nearly all others lack one."""
    words = np.zeros(1 << max(10, len(hashes) - 1).bit_length(), np.uint64)
    one, place = np.uint64(1), (hashes >> np.uint64(12)) & np.uint64(len(words) - 1)
    bits = one << (hashes & np.uint64(63)) | one << (hashes >> np.uint64(6) & np.uint64(63))
    np.bitwise_or.at(words, place, bits)
    return words


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
        hashes, item_ids = [], []
        for name, items in tasks.items():
            for texts in items:
                digest.update("\n".join((name, *texts)).encode("utf-8", "surrogatepass"))
                own = np.unique(
                    np.concatenate([hashes_of(text) for text in texts] or [np.empty(0, np.uint64)])
                )
                self.counts[name].items += 1
                self.counts[name].too_short += not len(own)
                hashes.append(own)
                item_ids.append(np.full(len(own), len(self._task_of), np.int64))
                self._task_of.append(name)
        self.fingerprint = digest.hexdigest()
        """sha256 of all texts"""
        flat = np.concatenate([*hashes, np.empty(0, np.uint64)])
        order = flat.argsort(kind="stable")
        self._hashes = flat[order]
        self._item_ids = np.concatenate([*item_ids, np.empty(0, np.int64)])[order]
        self._filter = _filter_of(self._hashes)

    def find(self, text: str) -> NDArray[np.int64]:
        """Numbers of the items that share `WORDS` words in a row with a document, sorted."""
        hashes = hashes_of(text, self._filter)
        if not len(hashes):
            return np.empty(0, np.int64)
        low = self._hashes.searchsorted(hashes, "left")
        high = self._hashes.searchsorted(hashes, "right")
        found = [self._item_ids[a:b] for a, b in zip(low, high, strict=True) if b > a]
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
