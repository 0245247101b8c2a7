"""The token table: how many directions it uses, and whether the model only ever says frequent tokens."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from ant5m.data.shards import Shards
from ant5m.eval.autopsy.evidence import Estimate, Finding, Section, Step, Windows, estimate
from ant5m.model.ant import Ant

TOPS = (10, 100, 1000)
"""k of the k most frequent tokens"""
FREQUENT = 500
"""tokens whose rows are compared with one another"""
COUNT_AT_MOST = 100_000_000
"""tokens of the training text that are counted"""


@dataclass(frozen=True)
class Counts:
    """How often each token occurs, int64 [V], and in what."""

    values: Tensor
    where: str


def count_tokens(shards: Shards, vocab_size: int, where: str) -> Counts:
    """Count a split, its first `COUNT_AT_MOST` tokens."""
    end, step = min(shards.num_tokens, COUNT_AT_MOST), 1 << 20
    total = np.zeros(vocab_size, np.int64)
    for start in range(0, end, step):
        total += np.bincount(shards.tokens[start : min(start + step, end)], minlength=vocab_size)[:vocab_size]
    return Counts(torch.from_numpy(total), f"{end:,} tokens of {where}")


def effective_rank(singular: Tensor) -> float:
    """exp(entropy of the normalized singular values): Roy and Vetterli, "The effective rank" (2007)."""
    share = singular.double() / singular.double().sum()
    return torch.special.entr(share).sum().exp().item()


@torch.inference_mode()
def examine(net: Ant, sample: Windows, counts: Counts, step: Step) -> Section:
    """The table of the inputs; where the head has its own, mass and bottleneck are the head's."""
    step("embedding: spectrum and rows")
    table, occurred = net.model.embed_tokens.weight.float(), counts.values.to(net.device)
    chance = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)).to(net.device)
    order = occurred.argsort(descending=True, stable=True)
    spectrum, null = (torch.linalg.svdvals(rows) for rows in (table, chance))
    overlap = _overlaps(table[order[: _frequent(occurred)]])
    norms = table.norm(dim=-1)
    step("embedding: mean prediction")
    mass = _mass(net, sample, order)
    findings = [
        _rank(table, spectrum, null),
        _overlap(table, overlap),
        _norms(norms, occurred, counts.where),
        _untrained(net, table, occurred, counts.where),
        *_masses(net, mass, counts.where),
        _bottleneck(net, sample),
    ]
    figure = _picture(spectrum, null, overlap, norms, occurred, mass, table.shape[1])
    data: dict[str, Any] = {
        "spectrum": spectrum.tolist(),
        "spectrum_of_a_random_table": null.tolist(),
        "mass": {k: {name: value.to_dict() for name, value in one.items()} for k, one in mass.items()},
    }
    return Section("embedding", findings, {"embedding": figure}, data)


def _rank(table: Tensor, spectrum: Tensor, null: Tensor) -> Finding:
    rank, chance = effective_rank(spectrum), effective_rank(null)
    first = (spectrum[0].square() / spectrum.square().sum()).item()
    return Finding(
        "effective rank of the token table",
        rank,
        f"{rank:.1f} of {min(table.shape)} dimensions; the first direction holds {first:.0%} of the energy",
        f"{chance:.1f} in a table of random numbers",
        "Tokens are told apart along about so many directions. Far below the random table: the width is not "
        "used; a large first direction is what all rows share, usually how rare a token is.",
        "A trained table is never as even as a random one; how low is harmful was not established.",
        f"{rank:.1f} of {min(table.shape)} dimensions of the token table are used (random: {chance:.1f})",
    )


def _frequent(occurred: Tensor) -> int:
    return max(2, min(FREQUENT, int((occurred > 0).sum()), len(occurred)))


def _overlaps(rows: Tensor) -> Tensor:
    """Cosines of all pairs of rows, flat."""
    unit = F.normalize(rows, dim=-1)
    cosine = unit @ unit.T
    return cosine[torch.ones_like(cosine, dtype=torch.bool).triu(1)]


def _overlap(table: Tensor, overlap: Tensor) -> Finding:
    size, chance = table.shape[1], math.sqrt(2 / (math.pi * table.shape[1]))
    value = overlap.abs().mean().item()
    return Finding(
        "overlap of frequent tokens",
        value,
        f"mean |cosine| {value:.3f} (mean cosine {overlap.mean().item():+.3f}) between the "
        f"{_rows_of_pairs(len(overlap))} most frequent tokens",
        f"{chance:.3f} between random directions in {size} dimensions",
        "Above chance, frequent tokens share directions: by meaning, by frequency, or for want of room.",
        "Overlap alone is no damage: similar words should be similar. Look at it beside the rank.",
    )


def _rows_of_pairs(pairs: int) -> int:
    return round((1 + math.sqrt(1 + 8 * pairs)) / 2)


def _norms(norms: Tensor, occurred: Tensor, where: str) -> Finding:
    used = occurred > 0
    x, y = occurred[used].double().log10(), norms[used].double()
    r = _correlation(x, y)
    half = 1.96 / math.sqrt(max(1, len(x) - 3))
    low, high = (math.tanh(math.atanh(max(-0.999999, min(0.999999, r))) + side * half) for side in (-1, 1))
    return Finding(
        "length of rows against frequency",
        r,
        f"correlation {r:+.2f} ({low:+.2f} to {high:+.2f}) of length and log frequency",
        "0: no relation",
        "In a tied table a row's length is also how loudly the head says that token.",
        f"Frequencies are of {where}; a correlation says nothing of the cause.",
    )


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale else 0.0


def _untrained(net: Ant, table: Tensor, occurred: Tensor, where: str) -> Finding:
    never = occurred == 0
    share = never.double().mean().item()
    still = (never & _as_initialized(table, net.config.initializer_range)).double().mean().item()
    return Finding(
        "rows that were never trained",
        share,
        f"{share:.1%} of the rows belong to tokens that never occur; {still:.1%} of all also look as "
        "initialized",
        "a few percent with a tokenizer of the same text: bytes and parts of words that never stand alone",
        "As inputs these rows learned nothing. With a tied head all rows are pushed away from what is said, "
        "so they move without being learned.",
        f"Counted in {where}. 'As initialized': length and mean lie within three standard deviations of "
        f"draws with deviation {net.config.initializer_range}.",
    )


def _as_initialized(table: Tensor, deviation: float) -> Tensor:
    """bool [V]: which rows could be fresh draws from N(0, deviation^2), by their mean square and mean."""
    size = table.shape[1]
    square = table.square().mean(-1) / deviation**2
    mean = table.mean(-1) / deviation
    # A mean of n squared normals has variance 2 / n.
    return ((square - 1).abs() < 3 * (2 / size) ** 0.5) & (mean.abs() < 3 * size**-0.5)


def _mass(net: Ant, sample: Windows, order: Tensor) -> dict[int, dict[str, Estimate]]:
    """k -> share of the k most frequent tokens: in probability, as the most likely token, in the text."""
    tops = [k for k in TOPS if k < len(order)] or [max(1, len(order) // 2)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    mass, argmax = [], []
    for read in sample.read:
        probability = F.linear(read, net.head_weight).float().softmax(-1)
        mass.append(torch.stack([probability[:, order[:k]].sum(-1) for k in tops]))
        argmax.append(place[probability.argmax(-1)])
    masses, best, text = torch.stack(mass, 1), torch.stack(argmax), place[sample.targets]
    return {
        k: {
            "model": estimate(masses[index]),
            "argmax": estimate((best < k).double()),
            "text": estimate((text < k).double()),
            "difference": estimate(masses[index] - (text < k).float()),
        }
        for index, k in enumerate(tops)
    }


def _masses(net: Ant, mass: dict[int, dict[str, Estimate]], where: str) -> list[Finding]:
    return [
        Finding(
            f"mass on the {k} most frequent tokens",
            one["difference"].mean,
            f"model {one['model'].mean:.1%}, text {one['text'].mean:.1%}: difference "
            f"{100 * one['difference'].mean:+.1f} ± {100 * one['difference'].half:.1f} points; its most "
            f"likely token is one of them {one['argmax'].mean:.1%} of the time",
            f"the text's own share, {one['text'].mean:.1%}",
            _mass_meaning(one["difference"]),
            f"The k are those of {where}. A calibrated model that knows nothing but frequencies also has the "
            "text's share; that the most likely token is a frequent one is normal.",
            f"probability of the {k} most frequent tokens: {one['model'].mean:.1%} (text: "
            f"{one['text'].mean:.1%})"
            if k == min(mass)
            else "",
        )
        for k, one in mass.items()
    ]


def _mass_meaning(difference: Estimate) -> str:
    if not difference.clear:
        return "The model gives them as much as the text does: no collapse to frequent tokens in probability."
    more = "more" if difference.mean > 0 else "less"
    return f"The model gives them {more} than the text does, beyond the uncertainty."


def _bottleneck(net: Ant, sample: Windows) -> Finding:
    head, read = net.head_weight.double(), sample.read.flatten(0, 1).double()
    # Softmax ignores what is common to all tokens. The singular values of read @ head.T, from small products:
    # those of R @ head.T, where read = Q R.
    centred = head - head.mean(0)
    small = torch.linalg.qr(read, mode="r").R @ torch.linalg.qr(centred, mode="r").R.T
    rank = effective_rank(torch.linalg.svdvals(small))
    size, vocabulary = net.config.hidden_size, net.config.vocab_size
    return Finding(
        "softmax bottleneck",
        rank,
        f"the logits have at most rank {size} for {vocabulary:,} tokens; their effective rank is {rank:.1f}",
        f"{size}: all dimensions alike",
        f"Whatever the weights, log-probabilities of all contexts lie in {size} + 1 dimensions: that is "
        "arithmetic (Yang et al. 2018), and not a fault of this training.",
        "It does not say that a higher rank would lower the loss; that takes a model of another width.",
    )


def _picture(
    spectrum: Tensor,
    null: Tensor,
    overlap: Tensor,
    norms: Tensor,
    occurred: Tensor,
    mass: dict[int, dict[str, Estimate]],
    size: int,
) -> Figure:
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for values, label, style in ((spectrum, "this table", "-"), (null, "random table", "--")):
        axes[0, 0].plot((values / values.square().mean().sqrt()).cpu(), style, label=label)
    axes[0, 0].set(xlabel="direction", ylabel="singular value / RMS", yscale="log", title="Spectrum")
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter("{x:g}")
    axes[0, 0].legend()

    bins = np.linspace(-1, 1, 101)
    axes[0, 1].hist(overlap.cpu().numpy(), bins=bins, density=True, alpha=0.7, label="frequent tokens")
    deviation = size**-0.5
    chance = np.exp(-0.5 * (bins / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
    axes[0, 1].plot(bins, chance, "--", color="tab:orange", label=f"random in {size} dimensions")
    axes[0, 1].set(xlabel="cosine of two rows", ylabel="density", title="Overlap of frequent tokens")
    axes[0, 1].legend(loc="upper right", fontsize=8)

    used = (occurred > 0).cpu()
    axes[1, 0].scatter(
        occurred.cpu()[used], norms.cpu()[used], s=3, alpha=0.25, label="occur", rasterized=True
    )
    if not used.all():
        axes[1, 0].scatter(
            np.full(int((~used).sum()), 0.5), norms.cpu()[~used], s=3, color="tab:red", label="never occur"
        )
    axes[1, 0].set(xscale="log", xlabel="occurrences", ylabel="length of the row", title="Length of rows")
    axes[1, 0].legend()

    names = {"text": "text", "model": "model, mean probability", "argmax": "model, most likely token"}
    for index, (name, label) in enumerate(names.items()):
        places = np.arange(len(mass)) + 0.27 * (index - 1)
        heights = [100 * one[name].mean for one in mass.values()]
        errors = [100 * one[name].half for one in mass.values()]
        axes[1, 1].bar(places, heights, 0.25, yerr=errors, label=label, capsize=3)
    axes[1, 1].set_xticks(range(len(mass)), [f"{k:,}" for k in mass])
    axes[1, 1].set(xlabel="the k most frequent tokens", ylabel="share (%)", title="Who gets the probability")
    axes[1, 1].margins(y=0.25)
    axes[1, 1].legend(loc="upper left", fontsize=9)
    return figure
