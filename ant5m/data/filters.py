"""What `ant5m data pack` can leave out of a document: text that says the same again, and boilerplate.

Models of this size learn to loop from text that repeats itself (Li et al., "Repetition In Repetition Out",
2023), and the published one loops on pieces of URLs. The filters look at one document at a time.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from ant5m.data.ngrams import covered_by, find_repeats, hash_ngrams

FilterName = Literal["repeats", "boilerplate"]
FILTERS: tuple[FilterName, ...] = get_args(FilterName)

LEAST_WORDS = 4
"""of a line that may be called a repeat: shorter ones ("Yes.", "}") come again in good text"""
NGRAM = 10
MOST_REPEATED = 0.1
"""Share of the words in 10-grams that occurred before, above which a document goes. Source: Rae et al.,
"Scaling Language Models: Methods, Analysis & Insights from Training Gopher", 2021, table A1 (counted in
characters there)."""

ADDRESS = re.compile(r"<?\b(?:https?://|www\.)\S+|\b[\w.+-]+@[\w-]+\.[\w.-]*\w>?")
POLICY = re.compile(
    r"javascript|lorem ipsum|terms of use|privacy policy|cookie policy|uses? (?:of )?cookies"
    r"|all rights reserved",
    re.IGNORECASE,
)
"""Lines with it are about a page, not of it. Source: Raffel et al., "Exploring the Limits of Transfer
Learning with a Unified Text-to-Text Transformer" (C4), 2020, section 2.2; and the notice of copyright."""
LEAST_REST = 3
"""words that a line must keep when its addresses are taken out"""


def clean(text: str, filters: Sequence[FilterName]) -> tuple[str, Counter[str]]:
    """A document after `filters`, "" when all of it goes, and what went.

    Counted are `FILTER_lines` (left out), `FILTER_documents` (left out as a whole), `addresses` (URLs and
    e-mail addresses taken out of lines that stay), and `bytes`, the difference in UTF-8.

    repeats: lines that occurred before in the document, then documents of which too much did.
    boilerplate: lines about cookies, policies and copyright; addresses, and lines that consist of them.
    """
    removed: Counter[str] = Counter()
    before = len(text.encode())
    if "boilerplate" in filters:
        text = _without_boilerplate(text, removed)
    if "repeats" in filters:
        text = _without_repeats(text, removed)
    removed["bytes"] += before - len(text.encode())
    return text, removed


def repeated_share(text: str, n: int = NGRAM) -> float:
    """Share of the words that lie in an n-gram of words that occurred before; 0 of a short text."""
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for word in text.split()], np.uint64)
    if len(words) < 2 * n:
        return 0.0
    return float(covered_by(find_repeats(hash_ngrams(words, n)), n).mean())


def _without_repeats(text: str, removed: Counter[str]) -> str:
    seen: set[str] = set()
    kept = []
    for line in text.split("\n"):
        words = line.lower().split()
        key = " ".join(words)
        if len(words) >= LEAST_WORDS and key in seen:
            removed["repeats_lines"] += 1
            continue
        seen.add(key)
        kept.append(line)
    if removed["repeats_lines"]:
        text = _tidy(kept)
    if repeated_share(text) <= MOST_REPEATED:
        return text
    removed["repeats_documents"] += 1
    return ""


def _without_boilerplate(text: str, removed: Counter[str]) -> str:
    kept = []
    for line in text.split("\n"):
        rest, addresses = (
            ADDRESS.subn("", line) if "@" in line or "://" in line or "www." in line else (line, 0)
        )
        if POLICY.search(line) or (addresses and len(rest.split()) < LEAST_REST):
            removed["boilerplate_lines"] += 1
            continue
        removed["addresses"] += addresses
        kept.append(rest)
    if not removed["boilerplate_lines"] and not removed["addresses"]:
        return text
    text = _tidy(kept)
    if not text or text.isspace():
        removed["boilerplate_documents"] += 1
        return ""
    return text


def _tidy(lines: list[str]) -> str:
    """Lines put together, without the rows of empty ones that the missing ones leave."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
