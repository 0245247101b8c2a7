"""ArithMark-2.0: integer arithmetic with four answers, under its own scoring rule.

An item has `ctx` ("59 + 45 ="), four `endings` (each with a leading space) and `label`, the number of the
right one. Context and ending are tokenised apart, without special tokens; the ending with the largest sum of
log-probabilities is the answer, whatever its length.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ant5m.errors import UserError
from ant5m.eval.scoring import Request, score

if TYPE_CHECKING:
    from ant5m.data.tokenizer import Tokenizer
    from ant5m.model.ant import Ant

NAME = "ArithMark-2.0"
HUB = "AxiomicLabs/ArithMark-2.0"
FIELDS = ("ctx", "endings", "label")
CHANCE = 0.25


def evaluate(
    net: "Ant",
    tokenizer: "Tokenizer",
    rows: Sequence[dict[str, Any]],
    on_scored: Callable[[int], None] | None = None,
) -> list[float]:
    """1.0 for every item that is answered right, else 0.0. Raises `UserError` where an item is otherwise."""
    requests = list[Request]()
    for number, row in enumerate(rows, 1):
        _check(row, number)
        context = tokenizer.encode(row["ctx"])
        requests += [Request(context, tokenizer.encode(ending)) for ending in row["endings"]]
    scores = score(net, requests, on_scored)
    sums = np.array([one.log_likelihood for one in scores]).reshape(len(rows), 4)
    labels = np.array([int(row["label"]) for row in rows])
    return (sums.argmax(-1) == labels).astype(float).tolist()


def _check(row: dict[str, Any], number: int) -> None:
    context, endings = row["ctx"], row["endings"]
    texts = isinstance(context, str) and bool(context) and isinstance(endings, list) and len(endings) == 4
    if not texts or not all(isinstance(ending, str) and ending for ending in endings):
        raise UserError(f"{NAME}, item {number}: needs a text in ctx and four in endings")
    if str(row["label"]) not in ("0", "1", "2", "3"):
        raise UserError(f"{NAME}, item {number}: label is {row['label']!r}, not 0 to 3")
