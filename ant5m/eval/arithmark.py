"""ArithMark: integer arithmetic with four answers, by the boards' own scoring rules.

An item has `ctx` ("59 + 45 ="), four `endings` (each with a leading space) and `label`, the number of the
right one. Context and ending are tokenized apart, without special tokens, and make at most 1,024 tokens. The
answer is the ending with the largest mean log-probability per token (`acc_norm`, what ArithMark-3.0 counts;
lm-eval's `acc_norm` divides by characters) or with the largest sum (`acc`, what ArithMark-2.0 counts); the
first of equal ones is taken.
"""

from collections.abc import Sequence

import numpy as np

from ant5m.eval.protocol import Measured, Model, Row, whole
from ant5m.eval.scoring import Request

CONTEXT = 1_024
"""tokens that the boards' scripts let a model see"""
ENDINGS = 4


def arithmark(model: Model, rows: Sequence[Row]) -> dict[str, Measured]:
    """Both accuracies, and what taking one of the two middle values without a model would score."""
    contexts = model.ids([row["ctx"] for row in rows])
    answers = model.ids([ending for row in rows for ending in row["endings"]])
    most = min(CONTEXT, model.context)
    requests = []
    for number, row in enumerate(rows):
        context = whole(row, number + 1, contexts[number], f"the context {row['ctx']!r}")
        for ending, answer in zip(row["endings"], answers[ENDINGS * number :], strict=False):
            whole(row, number + 1, answer, f"the ending {ending!r}")
            kept = max(1, most - len(answer))
            requests.append(Request(context[-kept:], answer))
    sums = np.array([score.log_likelihood for score in model.ask(requests)])
    sizes = np.array([len(request.continuation) for request in requests])
    labels = np.array([int(row["label"]) for row in rows])

    def right(scores: np.ndarray) -> list[float]:
        return (scores.reshape(-1, ENDINGS).argmax(-1) == labels).astype(float).tolist()

    values = {"acc_norm": right(sums / sizes), "acc": right(sums)}
    chance = dict.fromkeys(values, 1 / ENDINGS)
    return {"": Measured(values, chance, baselines=_middle_values(rows))}


def _middle_values(rows: Sequence[Row]) -> dict[str, float]:
    """What taking one of the two middle values of the four endings, by a coin, would score: wrong answers are
    made around the right one, so it is seldom the largest or the smallest. Empty where an ending is no
    number.
    """
    try:
        numbers = np.array([[float(ending) for ending in row["endings"]] for row in rows])
    except ValueError:
        return {}
    labels = np.array([int(row["label"]) for row in rows])
    rank = numbers.argsort(-1, kind="stable").argsort(-1)[np.arange(len(rows)), labels]
    return {"a middle value": float(np.isin(rank, (1, 2)).mean() / 2)}
