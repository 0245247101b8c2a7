"""Loops: how often the model's text goes round in circles, beside text that people wrote."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer
from ant5m.eval import loops
from ant5m.eval.autopsy.evidence import Finding, Section, Step
from ant5m.eval.loops import LoopStatistics
from ant5m.model.ant import Ant

NEW_TOKENS = 256


def examine(net: Ant, tokenizer: Tokenizer, shards: Shards, prompts: Sequence[str], step: Step) -> Section:
    """Every decoding over the prompts, and as many stretches of held-out text of the same length."""
    found = []
    prompts = [_fitting(prompt, tokenizer, net.config.max_position_embeddings // 2) for prompt in prompts]
    length = min(NEW_TOKENS, net.config.max_position_embeddings)
    for decoding in loops.DECODINGS:
        step(f"loops: {decoding}, {len(prompts)} texts")
        found.append(loops.measure_loops(net, tokenizer, prompts, decoding, NEW_TOKENS))
    people = _held_out(shards, tokenizer, len(prompts), length)
    findings = [_finding(one, people) for one in found]
    looping = [one for one in found if one.longest]
    data = {"model": [one.to_dict() for one in found], "text": people.to_dict() if people else None}
    data["longest"] = max(looping, key=_stretch).to_dict()["longest"] if looping else None
    return Section("loops", findings, {"loops": _picture(found, people)}, data)


def _fitting(prompt: str, tokenizer: Tokenizer, length: int) -> str:
    """The prompt, cut where it leaves a tiny context no room to write."""
    ids = tokenizer.encode(prompt)
    return prompt if len(ids) <= length else tokenizer.decode(ids[:length])


def _stretch(one: LoopStatistics) -> int:
    return one.longest.words if one.longest else 0


def _held_out(shards: Shards, tokenizer: Tokenizer, count: int, length: int) -> LoopStatistics | None:
    """Of up to `count` stretches, evenly spread over the text; None when no document is long enough."""
    spans = stretches(shards, length)
    if not spans:
        return None
    chosen = np.linspace(0, len(spans) - 1, min(count, len(spans))).astype(int)
    rows = [shards.tokens[slice(*spans[index])].tolist() for index in chosen]
    return loops.text_loops(tokenizer, rows, length)


def stretches(shards: Shards, length: int) -> list[tuple[int, int]]:
    """(from, to) of pieces of documents, `length` tokens long where a document does not end before.

    Texts of a model end early too; pieces below a quarter of `length` are left out.
    """
    ends = [*np.flatnonzero(shards.tokens[:] == shards.eos_token_id).tolist(), shards.num_tokens]
    spans, start = [], 0
    for end in ends:
        spans += [(first, min(first + length, end)) for first in range(start, end, length)]
        start = end + 1
    return [(first, end) for first, end in spans if end - first >= length // 4]


def _finding(one: LoopStatistics, people: LoopStatistics | None) -> Finding:
    low, high = one.interval
    first = "" if one.first_loop is None else f"; the first after about {one.first_loop:.0f} tokens"
    longest = ""
    if one.longest:
        longest = (
            f" Longest: {one.longest.cycle[:80]!r} {one.longest.times} times in a row, after "
            f"{one.longest.prompt!r}."
        )
    return Finding(
        f"loops, {one.decoding}",
        one.loop_rate,
        f"{one.loop_rate:.0%} of {one.texts} texts loop ({low:.0%} to {high:.0%}){first}; repeated 1-/4-grams"
        f" {one.repeated[1]:.0%} / {one.repeated[4]:.0%}, distinct {one.distinct[1]:.2f} / "
        f"{one.distinct[4]:.2f}; {one.ended:.0%} end by themselves",
        _compared(people),
        _meaning(one, people) + longest,
        f"{one.texts} short prompts, texts of at most {one.max_new_tokens} tokens; a text that ends early "
        "has had less time to loop.",
        f"{one.loop_rate:.0%} of {one.texts} texts loop ({one.decoding})"
        if one.decoding in ("greedy", "sampled at 0.8")
        else "",
    )


def _compared(people: LoopStatistics | None) -> str:
    if people is None:
        return "no held-out document is long enough to compare with"
    return (
        f"held-out text: {people.loop_rate:.0%} of {people.texts} stretches, repeated "
        f"{people.repeated[1]:.0%} / {people.repeated[4]:.0%}"
    )


def _meaning(one: LoopStatistics, people: LoopStatistics | None) -> str:
    most = people.interval[1] if people else 0.05
    if one.interval[0] <= most:
        return "No more loops than in the text itself, within the uncertainty."
    if one.decoding.startswith("greedy"):
        return "Loops far more than the text. Greedy text does so at every size; small models the most."
    return "Loops more than the text although tokens are drawn: the model is nearly certain of its repeats."


def _picture(found: list[LoopStatistics], people: LoopStatistics | None) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [*found, *([people] if people else [])]
    rates = np.array([one.loop_rate for one in shown])
    errors = np.abs(np.array([one.interval for one in shown]).T - rates)
    colors = ["tab:blue"] * len(found) + ["tab:gray"]
    left.barh(
        [one.decoding for one in shown],
        100 * rates,
        xerr=100 * errors,
        capsize=3,
        color=colors[: len(shown)],
    )
    left.invert_yaxis()
    left.set(xlim=(0, 100), xlabel="texts that loop (%), 95 % interval", title="Loops")
    for one in shown:
        shares = [100 * share for share in one.repeated.values()]
        right.plot(list(one.repeated), shares, "k--" if one is people else "o-", label=one.decoding)
    right.set(xticks=range(1, 5), ylim=(0, 100), xlabel="n", ylabel="repeated n-grams (%)")
    right.set_title("Repetition within a text")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    return figure
