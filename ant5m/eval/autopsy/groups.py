"""Grouped queries: do query heads that share keys and values differ, and does it matter whose they are?"""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ant5m.eval.autopsy import forward
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
)
from ant5m.eval.autopsy.heads import ROWS, WINDOWS
from ant5m.model.ant import Ant


@torch.inference_mode()
def examine(net: Ant, sample: Windows, step: Step) -> Section:
    """Likeness of heads, and the loss when a KV head is silenced or query heads read another one."""
    config = net.config
    step("groups: likeness of heads")
    by_window = overlaps(net, sample.spread(WINDOWS))
    patterns = by_window.mean(0)
    other = untrained(net)
    random = overlaps(other, sample.spread(WINDOWS)).mean(0)
    weights, random_weights = _likeness(net), _likeness(other)
    silenced = [
        [_silenced(net, sample, layer, head, step) for head in range(config.num_key_value_heads)]
        for layer in range(config.num_hidden_layers)
    ]
    swapped = []
    if config.num_key_value_heads > 1:
        swapped = [_swapped(net, sample, layer, step) for layer in range(config.num_hidden_layers)]
    group = config.num_attention_heads // config.num_key_value_heads
    findings = [
        *_likenesses(by_window, random, weights, random_weights, group),
        _ablation(silenced),
        *_regrouping(swapped),
    ]
    data = {
        "pattern_overlap": patterns.tolist(),
        "pattern_overlap_half": half_widths(by_window).tolist(),
        "pattern_overlap_with_random_weights": random.tolist(),
        "query_weight_likeness": weights.tolist(),
        "loss_without_kv_head": [[one.to_dict() for one in layer] for layer in silenced],
        "loss_when_reading_the_next_kv_head": [one.to_dict() for one in swapped],
    }
    return Section("groups", findings, {"groups": _picture(patterns, silenced, swapped, group)}, data)


@torch.inference_mode()
def overlaps(net: Ant, input_ids: Tensor) -> Tensor:
    """[W, layers, H, H]: share of the attention that two heads have in common, mean of sum_j min(p, p')."""
    usual = forward.Attention.of(net, input_ids.shape[1])
    length = input_ids.shape[1]
    rows = torch.linspace(length // 4, length - 1, min(ROWS, length), device=net.device).long().unique()
    found: list[Tensor] = []

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pattern = forward.scores(*usual.queries_and_keys(q, k), rows).softmax(-1)
        heads = pattern.shape[1]
        shared = [torch.minimum(pattern[:, [one]], pattern).sum(-1).mean(2) for one in range(heads)]
        found.append(torch.stack(shared, 1).cpu())
        return usual(layer, q, k, v)

    forward.hidden(net, net.model.embed_tokens(input_ids), watch)
    return torch.stack(found, 1)


def _likeness(net: Ant) -> Tensor:
    """[layers, H, H]: likeness of the heads' query matrices, whatever rotation lies between them.

    ||A B'||_F^2 / (||A A'||_F ||B B'||_F) for A, B [D, C]: linear CKA (Kornblith et al. 2019), uncentred.
    """
    found = []
    for layer in forward.layers(net):
        heads = layer.self_attn.q_proj.weight.detach().double().unflatten(0, (-1, net.config.head_size))
        product = torch.einsum("aic,bjc->abij", heads, heads).square().sum((-1, -2))
        own = product.diagonal().sqrt()
        found.append((product / (own[:, None] * own).clamp(min=1e-30)).cpu())
    return torch.stack(found)


def _only(layer: int, changed: forward.Attend, usual: forward.Attend) -> forward.Attend:
    return lambda index, q, k, v: (changed if index == layer else usual)(index, q, k, v)


def _silenced(net: Ant, sample: Windows, layer: int, head: int, step: Step) -> Estimate:
    """Cost of replacing what a KV head's queries read by its mean over all tokens."""
    step(f"groups: layer {layer} without KV head {head}")
    usual = forward.Attention.of(net, sample.length)
    readers = usual.reads == head

    def silent(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        read = usual(index, q, k, v).clone()
        read[:, :, readers] = read[:, :, readers].mean((0, 1))
        return read

    return sample.cost(net, _only(layer, silent, usual), layer)


def _swapped(net: Ant, sample: Windows, layer: int, step: Step) -> Estimate:
    """Cost of every query head of a layer reading the next group's KV head."""
    step(f"groups: layer {layer} regrouped")
    usual = forward.Attention.of(net, sample.length)
    other = usual.changed(reads=(usual.reads + 1) % net.config.num_key_value_heads)
    return sample.cost(net, _only(layer, other, usual), layer)


def split(likeness: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The values [..., layers, pairs] of pairs of heads within a group, and of pairs across groups."""
    heads = likeness.shape[-1]
    of = torch.arange(heads) // group
    pair = torch.ones(heads, heads, dtype=torch.bool).triu(1)
    same = of[:, None] == of
    return likeness[..., pair & same], likeness[..., pair & ~same]


def _likenesses(
    by_window: Tensor, random: Tensor, weights: Tensor, random_weights: Tensor, group: int
) -> list[Finding]:
    if by_window.shape[-1] == 1:
        return []
    (inside, across), (null_within, null_across) = split(by_window, group), split(random, group)
    same, other = split(weights, group)
    chief = (inside if inside.numel() else across).mean(0)
    copies = int((chief > 0.95).sum())
    return [
        Finding(
            "likeness of heads that share keys",
            chief.mean().item(),
            f"attention shared within groups {_over(inside)}, across groups {_over(across)}; {copies} of "
            f"{chief.numel()} pairs {'within groups ' if inside.numel() else ''}are near copies (above 0.95)",
            f"random weights: within {_mean(null_within)}, across {_mean(null_across)} (they look everywhere "
            "alike, so they share most)",
            "Sharing keys makes heads look at the same places only if within is well above across; near "
            "copies are capacity that is not used.",
            "Two heads that look at the same place through different keys count as alike; what they write "
            "may differ.",
        ),
        Finding(
            "likeness of query matrices",
            same.mean().item() if same.numel() else other.mean().item(),
            f"within groups {_mean(same)}, across groups {_mean(other)} (1: the same up to a rotation)",
            f"{torch.cat(split(random_weights, group), 1).mean().item():.2f} with random weights",
            "Above chance, heads listen to the same directions of the stream.",
            "Rotations are not resolved: heads that are rotated copies may score differently under RoPE.",
        ),
    ]


def _over(values: Tensor) -> str:
    """The mean of values [W, ...] with an interval over the windows."""
    return within(estimate(values.flatten(1))) if values.numel() else "no pairs"


def _mean(values: Tensor) -> str:
    return f"{values.mean().item():.2f}" if values.numel() else "no pairs"


def _ablation(silenced: list[list[Estimate]]) -> Finding:
    flat = [(one, layer, head) for layer, row in enumerate(silenced) for head, one in enumerate(row)]
    worst, layer, head = max(flat, key=lambda item: item[0].mean)
    idle = sum(not (one.clear and one.mean > 0) for one, *_ in flat)
    return Finding(
        "loss without a KV head",
        worst.mean,
        f"{worst} nats for the most needed (layer {layer}, head {head}); {idle} of {len(flat)} can be "
        "silenced without a cost beyond the uncertainty",
        "0: the head does not matter",
        "Each KV head's reading is replaced by its mean. Many idle ones: keys and values are not the scarce "
        "part; a few that cost much: they are.",
        "One at a time: heads that stand in for one another all seem idle. 95 % intervals, so about one in "
        "40 idle heads seems to cost by chance.",
        f"{idle} of {len(flat)} KV heads can be silenced without a cost beyond the uncertainty",
    )


def _regrouping(swapped: list[Estimate]) -> list[Finding]:
    if not swapped:
        return []
    worst = max(range(len(swapped)), key=lambda layer: swapped[layer].mean)
    total = sum(one.mean for one in swapped) / len(swapped)
    return [
        Finding(
            "loss when heads are regrouped",
            total,
            f"mean over layers {total:+.3f} nats; most in layer {worst} ({swapped[worst]})",
            "0: the KV heads are interchangeable",
            "Query heads read the next group's keys and values. A cost means that groups have become "
            "different; none, that one KV head would have done.",
            "Queries were trained for their own keys, so some cost says little about how many KV heads a new "
            "model needs: that takes a controlled run.",
        )
    ]


def _picture(patterns: Tensor, silenced: list[list[Estimate]], swapped: list[Estimate], group: int) -> Figure:
    layers, heads = patterns.shape[:2]
    figure = Figure(figsize=(13, 2 + 0.34 * layers), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    image = left.imshow(patterns.mean(0).numpy(), vmin=0, vmax=1, cmap="viridis")
    for edge in range(group, heads, group):
        left.axhline(edge - 0.5, color="white", linewidth=2)
        left.axvline(edge - 0.5, color="white", linewidth=2)
    left.set(xticks=range(heads), yticks=range(heads), xlabel="query head", ylabel="query head")
    left.set_title("Attention shared by two heads\n(mean over layers; lines part the groups)")
    figure.colorbar(image, ax=left, shrink=0.8)

    costs = np.array([[one.mean for one in row] for row in silenced])
    bound = max(1e-6, float(np.abs(costs).max()))
    image = middle.imshow(costs, aspect="auto", cmap="RdBu_r", vmin=-bound, vmax=bound)
    middle.set(xlabel="KV head", ylabel="layer", xticks=range(costs.shape[1]), yticks=range(layers))
    middle.set_title("Rise of the loss without a KV head\n(nats per token; * beyond the uncertainty)")
    for layer, row in enumerate(silenced):
        for head, one in enumerate(row):
            label = f"{one.mean:.3f}{'*' if one.clear else ''}"
            color = "white" if abs(one.mean) > 0.6 * bound else "black"
            if costs.shape[1] <= 8:
                middle.text(head, layer, label, ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=middle, shrink=0.8)

    if swapped:
        means, halves = [one.mean for one in swapped], [one.half for one in swapped]
        right.errorbar(means, range(layers), xerr=halves, fmt="o", capsize=3)
        right.axvline(0, color="black", linewidth=0.8)
        right.set(xlabel="loss (nats per token)", ylabel="layer", yticks=range(layers))
        right.set_ylim(layers - 0.5, -0.5)
        right.set_title("Rise of the loss when query heads\nread the next group's keys and values")
        right.grid(alpha=0.3)
    else:
        right.set_axis_off()
    return figure
