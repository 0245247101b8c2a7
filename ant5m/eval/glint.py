"""The protocol of the Glint Tiny-ML Leaderboard's own script, which is not lm-eval's.

Texts are cut to their first 256 tokens, no BOS is added, log-probabilities are summed: the first token of a
text has nothing before it and is not scored.
"""

import math
from collections.abc import Sequence

from ant5m.eval.protocol import Measured, Model, Row, by_part, part_of

WINDOW = 256
"""tokens"""


def blimp(model: Model, rows: Sequence[Row]) -> dict[str, Measured]:
    """By part: is the good sentence likelier than the bad one (a tie is wrong)?

    `acc` is the script's: without the first token. `acc_first_word` puts the end-of-text token in front, so
    that the first word counts too.
    """
    ids = model.ids([row[key] for row in rows for key in ("sentence_good", "sentence_bad")])
    behind = [[model.eos_token_id, *one[:WINDOW]][: model.context + 1] for one in ids]
    without, with_first = model.sentences(_cut(model, ids)), model.sentences(behind)
    values = {
        "acc": [float(good > bad) for good, bad in zip(without[::2], without[1::2], strict=True)],
        "acc_first_word": [
            float(good > bad) for good, bad in zip(with_first[::2], with_first[1::2], strict=True)
        ],
    }
    return by_part([part_of(row) for row in rows], values, dict.fromkeys(values, 0.5))


def arc_easy(model: Model, rows: Sequence[Row]) -> dict[str, Measured]:
    """Question, a space and each choice as one text; the most likely is the answer, the first of equal
    ones."""
    texts = [f"{row['question']} {choice}" for row in rows for choice in row["choices"]["text"]]
    sums = iter(model.sentences(_cut(model, model.ids(texts))))
    right = []
    for row in rows:
        scores = [next(sums) for _ in row["choices"]["text"]]
        right.append(float(row["choices"]["label"][scores.index(max(scores))] == row["answerKey"]))
    chance = sum(1 / len(row["choices"]["text"]) for row in rows) / len(rows)
    return {"": Measured({"acc": right}, {"acc": chance})}


def wikitext(model: Model, rows: Sequence[Row]) -> dict[str, Measured]:
    """The whole text (its lines with an empty one between them) in windows of 256 tokens that do not overlap.

    byte perplexity = token perplexity ^ (tokens / bytes): the tokens are all of the text's, though the first
    of each window is not scored.
    """
    text = "\n\n".join(row["text"] for row in rows)
    (ids,) = model.ids([text])
    step = min(WINDOW, model.context + 1)
    windows = [ids[start : start + step] for start in range(0, len(ids), step)]
    nats = -sum(model.sentences(windows))
    scored = sum(len(window) - 1 for window in windows)
    size = len(text.encode())
    per_token = nats / max(1, scored)
    metrics = {
        "token_perplexity": math.exp(min(700.0, per_token)),
        "byte_perplexity": math.exp(per_token * len(ids) / size),
        "bits_per_byte": per_token * len(ids) / size / math.log(2),
    }
    return {"": Measured(metrics=metrics, over={"tokens": scored, "bytes": size})}


def _cut(model: Model, rows: Sequence[list[int]]) -> list[list[int]]:
    most = min(WINDOW, model.context + 1)  # the last token is only predicted
    return [ids[:most] for ids in rows]
