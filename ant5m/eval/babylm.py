"""The zero-shot protocol of the BabyLM challenge's evaluation pipeline (2025), for causal models.

A sentence is encoded as `transformers` does it: with a BOS only where the tokenizer adds one, so that
elsewhere its first token is not scored. A phrase at its end is scored by the tokens that overlap it, as
offsets say. The most likely one is the answer, the first of equal ones. A task's accuracy is the mean over
its parts.
"""

from collections.abc import Sequence

from ant5m.eval.protocol import Measured, Model, Row, by_part, part_of
from ant5m.eval.scoring import Request


def minimal_pairs(model: Model, rows: Sequence[Row]) -> dict[str, Measured]:
    """BLiMP and its supplement, a file a part: is the good sentence at least as likely as the bad one?"""
    texts = [row[key] for row in rows for key in ("sentence_good", "sentence_bad")]
    sums = phrases(model, [("", text) for text in texts])
    right = [float(good >= bad) for good, bad in zip(sums[::2], sums[1::2], strict=True)]
    return by_part([part_of(row) for row in rows], {"acc": right}, {"acc": 0.5})


def ewok(model: Model, rows: Sequence[Row]) -> dict[str, Measured]:
    """Each target must be likelier after its own context than after the other one; a domain a part.

    `acc` asks it of both targets of an item, `acc_targets` is the share of the targets for which it holds
    (what the EWoK paper reports), `acc_choice` asks whether the first context's own target is the likelier
    one of the two after it (what the challenge's pipeline of 2025 reports).
    """
    pairs = ((1, 1), (1, 2), (2, 1), (2, 2))
    texts = [(row[f"Context{c}"], " " + row[f"Target{t}"]) for row in rows for c, t in pairs]
    sums = phrases(model, texts)
    own = [
        (first > crossed_1, second > crossed_2, first >= crossed_2)
        for first, crossed_2, crossed_1, second in zip(
            sums[::4], sums[1::4], sums[2::4], sums[3::4], strict=True
        )
    ]
    values = {
        "acc": [float(a and b) for a, b, _ in own],
        "acc_targets": [(a + b) / 2 for a, b, _ in own],
        "acc_choice": [float(c) for _, _, c in own],
    }
    chance = {"acc": 0.25, "acc_targets": 0.5, "acc_choice": 0.5}
    return by_part([row["Domain"] for row in rows], values, chance)


def entity_tracking(model: Model, rows: Sequence[Row]) -> dict[str, Measured]:
    """The first option is the right one; a part for each file and number of operations."""
    texts = [(row["input_prefix"], option) for row in rows for option in row["options"]]
    sums = iter(phrases(model, texts))
    right = []
    for row in rows:
        scores = [next(sums) for _ in row["options"]]
        right.append(float(scores.index(max(scores)) == 0))
    parts = [f"{part_of(row)}_{row['numops']}_ops" for row in rows]
    chance = sum(1 / len(row["options"]) for row in rows) / len(rows)
    return by_part(parts, {"acc": right}, {"acc": chance})


def phrases(model: Model, texts: Sequence[tuple[str, str]]) -> list[float]:
    """log p of each phrase behind its beginning, in nats; 0 where nothing of it can be scored."""
    requests, places = list[Request](), list[int]()
    encodings = model.encode([before + phrase for before, phrase in texts], special=True)
    for place, ((before, _), encoding) in enumerate(zip(texts, encodings, strict=True)):
        inside = [index for index, (_, end) in enumerate(encoding.offsets) if end > len(before)]
        if asked := [index for index in inside if index > 0]:
            ids = encoding.ids
            requests.append(Request(ids[: asked[0]], ids[asked[0] : asked[-1] + 1]))
            places.append(place)
    sums = [0.0] * len(texts)
    for place, score in zip(places, model.ask(requests), strict=True):
        sums[place] = score.log_likelihood
    return sums
