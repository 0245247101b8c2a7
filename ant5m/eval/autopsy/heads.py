"""The heads: where they look, what position means to them, and which rotation pairs of RoPE carry weight."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ant5m.eval.autopsy import forward
from ant5m.eval.autopsy.embedding import Counts
from ant5m.eval.autopsy.evidence import (
    Estimate,
    Finding,
    Section,
    Step,
    Windows,
    estimate,
    half_widths,
    untrained,
    within,
    write_values,
)
from ant5m.model.ant import Ant

ROWS = 64
"""query positions of a window that are looked at, spread evenly"""
WINDOWS = 8
"""windows, spread over them all, that are looked at for this; losses are of all"""
SHIFT = 1_000
"""positions; RoPE must not care"""


@dataclass(frozen=True)
class Looks:
    """What the heads do, each [layers, H] but for `pairs`."""

    entropy: Tensor
    """of the attention, as a share of the entropy of looking everywhere alike"""
    distance: Tensor
    """mean distance, as a share of the mean distance of looking everywhere alike"""
    first: Tensor
    """share on the window's first token"""
    first_alike: float
    """the same of looking everywhere alike"""
    shifted: Tensor
    """RMS change of the scores when all positions move by `SHIFT`, over the RMS of the scores"""
    shuffled: Tensor
    """RMS change of the scores when positions are shuffled, over their RMS; both within a row"""
    pairs: Tensor
    """[layers, H, D / 2]: share of the variance of the scores within a row that comes from each pair"""
    halves: dict[str, Tensor]
    """of `entropy`, `distance`, `first` and `shuffled`: half the 95 % interval over the windows"""
    means: dict[str, Estimate]
    """`entropy`, `distance`, `first` and `shuffled` over all heads, with an interval over the windows"""


@torch.inference_mode()
def examine(net: Ant, sample: Windows, counts: Counts, step: Step) -> Section:
    """Patterns and scores on some windows, losses on all."""
    usual = forward.Attention.of(net, sample.length)
    looks = look(net, sample.spread(WINDOWS), step)
    step("heads: the same shape with random weights")
    random = look(untrained(net), sample.spread(WINDOWS), lambda what: None)
    costs = {}
    for name, changed in _positions(usual, sample.length).items():
        step(f"RoPE: {name}")
        costs[name] = sample.cost(net, changed)
    pairs = []
    for pair in range(net.config.head_size // 2):
        step(f"RoPE: without pair {pair}")
        keep = usual.pairs.clone()
        keep[pair] = 0
        pairs.append(sample.cost(net, usual.changed(pairs=keep)))
    step("context: the far past hidden")
    far = _far_past(net, sample)
    bins, unigram = _bins(sample.losses), _bins(_unigram(sample, counts))
    findings = [
        _entropy(looks, random),
        _distance(looks),
        _sink(looks),
        _sensitivity(looks, random),
        _losses(costs),
        _pairs(net, looks, pairs),
        _context(far, sample.length),
    ]
    data = {
        **{name: getattr(looks, name).tolist() for name in looks.halves},
        **{f"{name}_half": half.tolist() for name, half in looks.halves.items()},
        "pair_energy": looks.pairs.tolist(),
        "loss_without_pair": [one.to_dict() for one in pairs],
        "loss_with_positions": {name: one.to_dict() for name, one in costs.items()},
        "loss_by_position": [{"from": a, "to": b, **one.to_dict()} for a, b, one in bins],
        "unigram_loss_by_position": [{"from": a, "to": b, **one.to_dict()} for a, b, one in unigram],
    }
    figures = {"heads": _heads_picture(looks), "rope": _rope_picture(net, looks, pairs, costs, bins, unigram)}
    return Section("heads", findings, figures, data)


@torch.inference_mode()
def look(net: Ant, input_ids: Tensor, step: Step) -> Looks:
    """Watch every head on windows [W, T]."""
    length = input_ids.shape[1]
    usual = forward.Attention.of(net, length)
    rows = torch.linspace(1, length - 1, min(ROWS, length - 1), device=net.device).long().unique()
    mask = forward.seen(rows, length)
    places = torch.arange(length, device=net.device)
    far = usual.changed(angle=forward.angles(net.config, places + SHIFT))
    mixed = usual.changed(angle=forward.angles(net.config, _shuffle(length).to(net.device)))
    found: dict[str, list[Tensor]] = {name: [] for name in ("entropy", "distance", "first")}
    found |= {name: [] for name in ("shifted", "shuffled", "pairs")}

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step(f"heads: layer {layer}")
        turned_q, turned_k = usual.queries_and_keys(q, k)
        score = forward.scores(turned_q, turned_k, rows)
        pattern = score.softmax(-1)
        away = (rows[:, None] - places).clamp(min=0).to(pattern.dtype)
        found["entropy"].append(torch.special.entr(pattern).sum(-1).mean(2))
        found["distance"].append((pattern * away).sum(-1).mean(2))
        found["first"].append(pattern[..., 0].mean(2))
        for name, other in (("shifted", far), ("shuffled", mixed)):
            moved = forward.scores(*other.queries_and_keys(q, k), rows)
            change = _variance(moved - score, mask) / _variance(score, mask).clamp(min=1e-30)
            found[name].append(change.sqrt())
        found["pairs"].append(_pair_energy(turned_q, turned_k, rows, mask))
        return usual(layer, q, k, v)

    forward.hidden(net, net.model.embed_tokens(input_ids), watch)
    alike = mask / mask.sum(-1, keepdim=True)
    windows = {name: torch.stack(each).cpu() for name, each in found.items()}  # [layers, W, H] but for pairs
    pairs = windows.pop("pairs")
    values = {name: each.mean(1) for name, each in windows.items()}
    most = torch.special.entr(alike).sum(-1).mean().cpu()
    middle = (alike * (rows[:, None] - places)).sum(-1).mean().cpu()
    by_window = {
        name: windows[name].transpose(0, 1) / scale  # [W, layers, H]
        for name, scale in (("entropy", most), ("distance", middle), ("first", 1), ("shuffled", 1))
    }
    return Looks(
        entropy=values["entropy"] / most,
        distance=values["distance"] / middle,
        first=values["first"],
        first_alike=alike[:, 0].mean().item(),
        shifted=values["shifted"],
        shuffled=values["shuffled"],
        pairs=pairs,
        halves={name: half_widths(each) for name, each in by_window.items()},
        means={name: estimate(each.flatten(1)) for name, each in by_window.items()},
    )


def _variance(score: Tensor, mask: Tensor) -> Tensor:
    """Mean square [W, H] of scores [W, H, R, T] about the mean of what a row sees, which softmax ignores."""
    score = score.masked_fill(~mask, 0)
    square = score.square().sum(-1) - score.sum(-1).square() / mask.sum(-1)
    return square.clamp(min=0).sum(2) / mask.sum()


def _pair_energy(q: Tensor, k: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """[H, D / 2]: each rotation pair's share of the variance of the scores within a row."""
    half = q.shape[-1] // 2
    energy = []
    for pair in range(half):
        own = [pair, pair + half]
        part = q[:, :, rows][..., own] @ k[..., own].transpose(-1, -2)
        energy.append(_variance(part, mask).mean(0))
    total = torch.stack(energy, -1)
    return total / total.sum(-1, keepdim=True).clamp(min=1e-30)


def _shuffle(length: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))


def _positions(usual: forward.Attention, length: int) -> dict[str, forward.Attention]:
    still = torch.zeros_like(usual.angle)
    return {
        "no rotation": usual.changed(angle=still),
        "positions shuffled": usual.changed(angle=usual.angle[_shuffle(length).to(still.device)]),
        "positions reversed": usual.changed(angle=-usual.angle),
    }


def _far_past(net: Ant, sample: Windows) -> Estimate:
    """Nats per token that the windows' last quarters cost more when the first halves are hidden."""
    half, quarter = sample.length // 2, max(1, sample.length // 4)
    late = sample.targets[:, half:]
    attend = forward.Attention.of(net, late.shape[1])
    near = forward.hidden(net, net.model.embed_tokens(sample.input_ids[:, half:]), attend)
    hidden = forward.token_losses(net, near, late)
    return estimate((hidden - sample.losses[:, half:])[:, -quarter:])


def _unigram(sample: Windows, counts: Counts) -> Tensor:
    """Nats [W, T] of the targets by frequency alone, each token counted once more than it occurs."""
    share = (counts.values.double() + 1) / (counts.values.sum() + len(counts.values))
    return -share.log().to(sample.targets.device)[sample.targets]


def _bins(losses: Tensor) -> list[tuple[int, int, Estimate]]:
    """(from, to, loss) over positions in the window, in bins that double."""
    length = losses.shape[1]
    edges = [0, *(2**n for n in range(2, 30) if 2**n < length), length]
    return [(start, end, estimate(losses[:, start:end])) for start, end in itertools.pairwise(edges)]


def _span(looks: Looks, name: str) -> str:
    """The lowest and the highest head, each with its interval."""
    values, halves = getattr(looks, name).flatten(), looks.halves[name].flatten()
    ends = (int(values.argmin()), int(values.argmax()))
    return " to ".join(within(Estimate(values[i].item(), halves[i].item())) for i in ends)


def _entropy(looks: Looks, random: Looks) -> Finding:
    value = looks.means["entropy"]
    wide = (looks.entropy > 0.95).double().mean().item()
    return Finding(
        "attention entropy",
        value.mean,
        f"{within(value)} of the largest possible (heads: {_span(looks, 'entropy')}); {wide:.0%} of the "
        "heads look nearly everywhere alike (above 0.95)",
        f"{random.entropy.mean().item():.2f} with random weights",
        "Low: a head picks few positions. Near 1: it averages over the whole past, and its queries and keys "
        "do next to nothing.",
        "An averaging head is not useless: it is a bag of words.",
    )


def _distance(looks: Looks) -> Finding:
    value = looks.means["distance"]
    near = (looks.distance < 0.25).double().mean().item()
    return Finding(
        "mean distance of attention",
        value.mean,
        f"{within(value)} times that of looking everywhere alike (heads: {_span(looks, 'distance')}); "
        f"{near:.0%} of the heads look at the near past (below 0.25)",
        "1: everywhere alike",
        "Below 1 a head prefers the recent past, above 1 the distant one (often the first token).",
        "Distance says where a head looks, not what for.",
    )


def _sink(looks: Looks) -> Finding:
    value, most = looks.means["first"], int(looks.first.argmax())
    share, half = (100 * each.flatten()[most].item() for each in (looks.first, looks.halves["first"]))
    return Finding(
        "attention on the first token",
        value.mean,
        f"{100 * value.mean:.1f} ± {100 * value.half:.1f} % on average, {share:.1f} ± {half:.1f} % in the "
        "head with the most",
        f"{looks.first_alike:.1%} when looking everywhere alike",
        "A share far above chance is an attention sink: where a head looks when it has nothing to look for.",
        "Sinks are usual in trained models (Xiao et al. 2024) and no sign of damage.",
    )


def _sensitivity(looks: Looks, random: Looks) -> Finding:
    value, shifted = looks.means["shuffled"], looks.shifted.max().item()
    deaf = (looks.shuffled < 0.1).double().mean().item()
    return Finding(
        "sensitivity of scores to position",
        value.mean,
        f"shuffled positions change the scores by {within(value)} of their size (heads: "
        f"{_span(looks, 'shuffled')}); {deaf:.0%} of the heads hardly notice (below 0.1)",
        f"{random.shuffled.mean().item():.2f} with random weights; {math.sqrt(2):.2f} if old and new scores "
        f"had nothing in common; moving all positions by {SHIFT:,}: at most {shifted:.1e} (RoPE: exactly 0)",
        "Near 0 a head's scores depend on content only; large, position decides.",
        "Random weights are sensitive too: sensitivity is not yet use. The losses below tell.",
    )


def _losses(costs: dict[str, Estimate]) -> Finding:
    off, shuffled = costs["no rotation"], costs["positions shuffled"]
    used = off.clear and off.mean > 0
    return Finding(
        "loss without positions",
        off.mean,
        f"no rotation {off}, shuffled {shuffled}, reversed {costs['positions reversed']} nats per token",
        "0: the model does not use RoPE",
        "The model uses the rotation: taking it away costs loss beyond the uncertainty."
        if used
        else "No cost beyond the uncertainty: this model has not learned to use the rotation.",
        "The weights were trained with RoPE and could not adapt: a model trained without it would lose less.",
        f"loss without the rotation: {off} nats per token",
    )


def _pairs(net: Ant, looks: Looks, costs: list[Estimate]) -> Finding:
    energy = looks.pairs.mean((0, 1))
    count, rotations = len(energy), _rotations(net)
    matter = [pair for pair, one in enumerate(costs) if one.clear and one.mean > 0]
    worst = max(range(count), key=lambda pair: costs[pair].mean)
    slow = [pair for pair in range(count) if rotations[pair] < 1]
    share = energy[slow].sum().item() if slow else 0.0
    return Finding(
        "rotation pairs that carry weight",
        float(len(matter)),
        f"{len(matter)} of {count} cost loss when taken away, pair {worst} the most ({costs[worst]} nats); "
        f"the {len(slow)} pairs that never complete a rotation carry {share:.0%} of the variance of the "
        "scores",
        f"{len(slow) / count:.0%} of the variance if all pairs carried alike",
        "Fast pairs can say 'just before'; slow ones hardly change with position and serve content. Where "
        "the variance lies in slow pairs, heads look for content more than for place.",
        "Pairs are taken away one at a time in all heads; others may do the same work, and then none seems "
        "to matter.",
        f"{len(matter)} of {count} rotation pairs cost loss when they are removed",
    )


def _rotations(net: Ant) -> list[float]:
    """Full rotations of each pair within the context."""
    last = forward.angles(net.config, torch.tensor([net.config.max_position_embeddings]))
    return (last[0] / (2 * math.pi)).tolist()


def _context(far: Estimate, length: int) -> Finding:
    verdict = "do not help this model beyond the uncertainty."
    if far.clear:
        verdict = "help this model." if far.mean > 0 else "cost this model more than they help."
    return Finding(
        "use of the far past",
        far.mean,
        f"{far} nats per token, lost by the last quarter of a window when its first half is hidden",
        "0: what lies further back than the near past changes nothing",
        f"Tokens more than {length // 4:,} to {length // 2:,} positions back {verdict}",
        "The same tokens with and without the far past, so difficulty cancels; it mixes what the text offers "
        "with what the model can use.",
        f"loss without the far past: {far} nats per token",
    )


def _heads_picture(looks: Looks) -> Figure:
    layers, heads = looks.entropy.shape
    figure = Figure(figsize=(13, 1.8 + 0.32 * layers), layout="constrained")
    shown = (
        (looks.entropy, "Entropy / that of looking\neverywhere alike", 1),
        (looks.distance, "Distance / that of looking\neverywhere alike", 2),
        (looks.first, f"Share on the first token\n(alike: {looks.first_alike:.3f})", 1),
        (looks.shuffled, "Change of scores when\npositions are shuffled", math.sqrt(2)),
    )
    for axis, (values, title, most) in zip(figure.subplots(1, 4), shown, strict=True):
        image = axis.imshow(values.numpy(), aspect="auto", vmin=0, vmax=most, cmap="viridis")
        axis.set(xlabel="query head", title=title, xticks=range(heads), yticks=range(layers))
        figure.colorbar(image, ax=axis, shrink=0.9)
        if heads <= 8:
            write_values(axis, values, bright=most / 2)
    figure.axes[0].set_ylabel("layer")
    return figure


def _rope_picture(
    net: Ant,
    looks: Looks,
    pairs: list[Estimate],
    costs: dict[str, Estimate],
    bins: list[tuple[int, int, Estimate]],
    unigram: list[tuple[int, int, Estimate]],
) -> Figure:
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    every = -(-len(pairs) // 9)  # so many labels have room
    ticks = range(0, len(pairs), every)
    rotations = [f"{pair}\n{count:.3g}" for pair, count in enumerate(_rotations(net))][::every]
    image = axes[0, 0].imshow((100 * looks.pairs.mean(1)).numpy(), aspect="auto", cmap="viridis", vmin=0)
    axes[0, 0].set(ylabel="layer", xlabel="rotation pair, its rotations within the context")
    axes[0, 0].set_title("Share of the variance of the scores (%)")
    axes[0, 0].set_xticks(ticks, rotations, fontsize=9)
    figure.colorbar(image, ax=axes[0, 0])

    places = np.arange(len(pairs))
    axes[0, 1].bar(places, [one.mean for one in pairs], yerr=[one.half for one in pairs], capsize=3)
    axes[0, 1].axhline(0, color="black", linewidth=0.8)
    axes[0, 1].set(ylabel="loss (nats per token)", xlabel="rotation pair, its rotations within the context")
    axes[0, 1].set_title("Rise of the loss without the pair")
    axes[0, 1].set_xticks(ticks, rotations, fontsize=9)

    axes[1, 0].barh(
        list(costs),
        [one.mean for one in costs.values()],
        xerr=[one.half for one in costs.values()],
        capsize=3,
    )
    axes[1, 0].axvline(0, color="black", linewidth=0.8)
    axes[1, 0].xaxis.set_major_locator(MaxNLocator(5))
    axes[1, 0].set(xlabel="loss (nats per token)", title="Rise of the loss with other positions")

    labels = [f"{start}" if end - start == 1 else f"{start}-{end - 1}" for start, end, _ in bins]
    means, halves = [one.mean for *_, one in bins], [one.half for *_, one in bins]
    axes[1, 1].errorbar(range(len(bins)), means, yerr=halves, fmt="o-", capsize=3, label="model")
    frequency = [one.mean for *_, one in unigram]
    axes[1, 1].plot(range(len(bins)), frequency, "--", color="tab:gray", label="token frequency alone")
    axes[1, 1].legend()
    axes[1, 1].set_xticks(range(len(bins)), labels, rotation=45, fontsize=8)
    axes[1, 1].set(xlabel="position in the window", ylabel="loss (nats per token)", title="Loss by position")
    axes[1, 1].grid(alpha=0.3)
    return figure
