"""What the protocols that lm-eval does not have are given, and what they give back.

A protocol is a function `(Model, rows) -> {part: Measured}`; a benchmark without parts has the one part "".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from ant5m.errors import UserError
from ant5m.eval.items import stem
from ant5m.eval.scoring import Request, Score

if TYPE_CHECKING:
    from ant5m.data.tokenizer import Tokenizer

Row = dict[str, Any]
"""an item, as its schema has it; `FILE` names the file that it came from"""
FILE = " file"


@dataclass(frozen=True)
class Measured:
    """What a protocol found in the items of one part."""

    values: dict[str, list[float]] = field(default_factory=dict)
    """accuracy -> one value an item, 1.0 where it is answered right"""
    chance: dict[str, float] = field(default_factory=dict)
    """accuracy -> what guessing gives"""
    metrics: dict[str, float] = field(default_factory=dict)
    """what is not a mean over items"""
    over: dict[str, int] = field(default_factory=dict)
    """tokens and bytes of a perplexity"""
    baselines: dict[str, float] = field(default_factory=dict)
    """a rule that needs no model -> its accuracy"""


class Model:
    """A model as a protocol sees it: it turns text into ids, and says how likely continuations are."""

    def __init__(
        self, ask: Callable[[Sequence[Request]], list[Score]], tokenizer: "Tokenizer", context: int
    ) -> None:
        self.ask = ask
        self.context = context
        """tokens that it can see at once"""
        self.eos_token_id = tokenizer.eos_token_id
        # `Tokenizer` takes text that spells a special token for text; transformers does not.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())

    def encode(self, texts: Sequence[str], special: bool = False) -> list[tokenizers.Encoding]:
        """Each text as `transformers` encodes it in the exported folder; `special`: with the special tokens
        that the tokenizer adds, if any."""
        return self._backend.encode_batch(list(texts), add_special_tokens=special)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids, without special tokens."""
        return [encoding.ids for encoding in self.encode(texts)]

    def sentences(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """log p of all tokens of each row but its first, behind the first, in nats; 0 for a single token."""
        asked = [index for index, ids in enumerate(rows) if len(ids) > 1]
        scores = self.ask([Request(rows[index][:1], rows[index][1:]) for index in asked])
        sums = [0.0] * len(rows)
        for index, score in zip(asked, scores, strict=True):
            sums[index] = score.log_likelihood
        return sums


def named(row: Row, number: int) -> str:
    """How an error calls an item."""
    return f"{row[FILE]}, item {number}" if FILE in row else f"item {number}"


def whole(row: Row, number: int, ids: Sequence[int], what: str) -> Sequence[int]:
    """`ids`; `UserError` that names the item where there are none."""
    if not ids:
        raise UserError(f"{named(row, number)}: this tokenizer has no token for {what}")
    return ids


def part_of(row: Row) -> str:
    """The part that BLiMP's own field names, else the file; in the hub's layout, the file's folder."""
    if uid := row.get("UID"):
        return str(uid)
    path = Path(row[FILE])
    return path.parent.name if "-of-" in path.name else stem(path)


def by_part(
    parts: Sequence[str], values: dict[str, list[float]], chance: dict[str, float]
) -> dict[str, Measured]:
    """The values of all items, each under its part."""
    found = {}
    for part in sorted(set(parts)):
        places = [place for place, name in enumerate(parts) if name == part]
        own = {metric: [each[place] for place in places] for metric, each in values.items()}
        found[part] = Measured(own, chance)
    return found
