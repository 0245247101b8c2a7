"""Examine an architecture before training it: what it costs, what fits, and where it is weak.

Counts are arithmetic and exact. Advice is not: every finding says how good its evidence is, and nothing here
was measured on your data. The thresholds are meant for models of 1-50M parameters.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from ant5m.errors import UserError
from ant5m.model.config import PRESETS, ModelConfig
from ant5m.model.costs import count_activations, count_flops, count_parameters, fitting_tokens

Severity = Literal["ok", "note", "warning", "failure"]
Evidence = Literal["exact", "strong", "suggestive", "weak"]

# Share of a table of this size in all parameters that fits of published runs prefer near 5M parameters.
BEST_TABLE_SHARE = 0.22


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, good or bad."""

    topic: str
    severity: Severity
    value: float
    """the number behind the verdict"""
    number: str
    """the same for people"""
    why: str
    remedy: str
    evidence: Evidence


@dataclass(frozen=True)
class Diagnosis:
    """All that `examine` found out. Sizes are in bytes, work in FLOPs."""

    config: ModelConfig
    parameters: dict[str, int]
    flops_forward: dict[str, int]
    """per token, mean over a full context"""
    flops_training: dict[str, int]
    """forward and backward, per token"""
    memory: dict[str, int]
    findings: list[Check]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def examine(
    config: ModelConfig, max_params: int | None = None, device_memory: int | None = None
) -> Diagnosis:
    """Look at everything. `max_params`: the envelope to keep; `device_memory`: bytes to fit a batch into."""
    forward = count_flops(config)
    return Diagnosis(
        config=config,
        parameters=count_parameters(config),
        flops_forward=forward,
        flops_training={part: 3 * flops for part, flops in forward.items()},
        memory=_memory(config, device_memory),
        findings=[
            *([_envelope(config, max_params)] if max_params is not None else []),
            _table_share(config),
            _vocabulary(config),
            _head_size(config),
            _rope_base(config),
            _key_value_heads(config),
            _depth(config),
        ],
    )


def _memory(config: ModelConfig, device_memory: int | None) -> dict[str, int]:
    total = sum(count_parameters(config).values())
    memory = {
        "weights": 4 * total,
        "gradients": 4 * total,
        "adamw_moments": 8 * total,
        "activations_per_token_fp32": count_activations(config),
        "activations_per_token_half": count_activations(config, half=True),
    }
    if device_memory is not None:
        memory["device"] = device_memory
        for precision, half in (("fp32", False), ("half", True)):
            memory[f"batch_tokens_{precision}"] = fitting_tokens(config, device_memory, half)
    return memory


def _envelope(config: ModelConfig, max_params: int) -> Check:
    parameters = count_parameters(config)
    total = sum(parameters.values())
    number = f"{total:,} of {max_params:,} parameters"
    if total <= max_params:
        return Check("envelope", "ok", total, number, f"{max_params - total:,} are left.", "", "exact")
    published = "This is the published correction as written. " if config == PRESETS["ant-5m-wide"] else ""
    tables = parameters["embedding"] + parameters["head"]
    why = (
        f"{published}It exceeds the envelope by {total - max_params:,} ({total / max_params - 1:.0%}): "
        f"token tables {tables:,}, everything else {total - tables:,}."
    )
    return Check("envelope", "failure", total, number, why, _shrink(config, max_params), "exact")


def _shrink(config: ModelConfig, max_params: int) -> str:
    """Ways into the envelope that change one size, and the presets that lie in it."""
    parameters = count_parameters(config)
    excess = sum(parameters.values()) - max_params
    tables = 1 if config.tie_word_embeddings else 2
    vocabulary = _round_down(config.vocab_size - excess / (tables * config.hidden_size), 64)
    per_width = 3 * config.hidden_size * config.num_hidden_layers
    swiglu = _round_down(config.intermediate_size - excess / per_width, 8)
    ways = []
    if tables == 2 and parameters["head"] >= excess:
        ways.append("tie_word_embeddings true")
    if vocabulary >= 2_048:
        ways.append(f"vocab_size {vocabulary:,}")
    if swiglu >= config.hidden_size:
        ways.append(f"intermediate_size {swiglu:,}")
    fitting = [
        name for name, preset in PRESETS.items() if sum(count_parameters(preset).values()) <= max_params
    ]
    text = (
        f"Any of: {'; '.join(ways)}." if ways else "No single size brings it in: reduce several, width first."
    )
    return text + (f" Presets within it: {', '.join(fitting)}." if fitting else "")


def _table_share(config: ModelConfig) -> Check:
    parameters = count_parameters(config)
    total = sum(parameters.values())
    share = (parameters["embedding"] + parameters["head"]) / total
    severity: Severity = "ok" if share <= 0.30 else "note" if share <= 0.40 else "warning"
    number = f"{share:.1%} of the parameters are token tables"
    why = (
        "Rows of a table are looked up; only the layers compute. Near 5M parameters, fits of published runs "
        "put the best share at 20-24 % and find 14-24 % flat (extrapolated from models of 33M and more)."
    )
    fitting = _round_down(BEST_TABLE_SHARE * total / config.hidden_size, 256)
    remedy = (
        f"Train a tokenizer of about {fitting:,} entries, spend the rest on layers, compare in bits per byte."
    )
    if not config.tie_word_embeddings:
        remedy = f"Tie the head to the table (saves {parameters['head']:,} parameters). " + remedy
    return Check(
        "embedding share", severity, share, number, why, "" if severity == "ok" else remedy, "suggestive"
    )


def _vocabulary(config: ModelConfig) -> Check:
    ratio = config.vocab_size / config.hidden_size
    severity: Severity = "ok" if ratio <= 50 else "note" if ratio <= 100 else "warning"
    number = f"{ratio:.0f} entries per dimension of the width"
    why = (
        f"{config.vocab_size:,} logits come from {config.hidden_size} dimensions: their matrix has at most "
        "that rank. Godey et al. (2024) see this softmax bottleneck at every width below about 1,000, and "
        "worse the narrower; the best published models near 5M have 4,000-6,000 entries."
    )
    fitting = _round_down(50 * config.hidden_size, 256)
    remedy = "" if severity == "ok" else f"At most about {fitting:,} entries at this width, or a wider model."
    return Check("vocabulary against width", severity, ratio, number, why, remedy, "suggestive")


def _head_size(config: ModelConfig) -> Check:
    size = config.head_size
    severity: Severity = "ok" if size >= 32 else "warning"
    number = f"{size} dimensions a head, {size // 2} rotation pairs"
    why = (
        "A head's size bounds the rank of its attention pattern, whatever the width; 32 is known to work "
        "in models of this size, 48-64 is usual. No controlled run has shown 16 to be ruinous: the cost is "
        "estimated at 0.01-0.03 nats."
    )
    remedy = "" if severity == "ok" else _larger_heads(config)
    return Check("head size", severity, size, number, why, remedy, "suggestive")


def _larger_heads(config: ModelConfig) -> str:
    """What heads of 32 would cost, with as many key/value heads as now where there are so many heads."""
    heads, rest = divmod(config.num_attention_heads * config.head_size, 32)
    keys = min(heads, config.num_key_value_heads)
    if rest or not heads or heads % keys or (config.hidden_size % heads and not config.qk_norm):
        return "Heads of 32 or more, if the width allows."
    larger = dataclasses.replace(config, num_attention_heads=heads, num_key_value_heads=keys, head_dim=32)
    before, after = (sum(count_parameters(one).values()) for one in (config, larger))
    cost = f"{after - before:,} parameters more ({after / before - 1:.1%})" if after > before else "none more"
    return f"Fewer, larger heads: {heads} of 32, {keys} of them for keys and values, cost {cost}."


def rope_rotations(config: ModelConfig) -> list[float]:
    """Full rotations that each pair of dimensions makes within the context, fastest first."""
    size, context = config.head_size, config.max_position_embeddings
    return [context * config.rope_theta ** (-pair / size) / (2 * math.pi) for pair in range(0, size, 2)]


def largest_rotating_base(config: ModelConfig) -> float | None:
    """The largest RoPE base with which every pair completes a rotation within the context, or None."""
    fastest = config.max_position_embeddings / (2 * math.pi)
    if config.head_size == 2 or fastest < 1:
        return None
    return math.pow(fastest, config.head_size / (config.head_size - 2))


def _rope_base(config: ModelConfig) -> Check:
    rotations = rope_rotations(config)
    still = [pair for pair, count in enumerate(rotations) if count < 1]
    context = f"{config.max_position_embeddings:,} positions"
    number = f"{len(still)} of {len(rotations)} rotation pairs never complete a rotation in {context}"
    if not still:
        return Check("RoPE base", "ok", 0, number, "Every pair tells positions apart.", "", "exact")
    listed = ", ".join(str(pair) for pair in still) if len(still) <= 4 else f"{still[0]}-{still[-1]}"
    why = (
        f"Pairs {listed} (slowest: {rotations[-1]:.2g} rotations) tell positions apart only weakly; they can "
        "still carry content, and most Llamas have such pairs. Bases from 5,000 to 50,000 differed by less "
        "than 0.009 bits per byte in a 100-step study."
    )
    base = largest_rotating_base(config)
    remedy = (
        f"With rope_theta {math.floor(base):,} every pair would complete one. Worth an experiment of its "
        "own, not a first thing to fix."
        if base is not None and base >= 2
        else "The context is too short for any base."
    )
    return Check("RoPE base", "note", len(still), number, why, remedy, "weak")


def _key_value_heads(config: ModelConfig) -> Check:
    keys = config.num_key_value_heads
    ratio = config.num_attention_heads // keys
    alone = keys == 1 and ratio > 1
    severity: Severity = "ok" if ratio <= 2 else "warning" if alone else "note"
    saved = 2 * config.num_hidden_layers * config.hidden_size * config.head_size
    why = {
        "ok": "At most two query heads share a key/value head: no loss was seen from that.",
        "note": "Shared key/value heads save parameters and cache. No controlled run near this size shows "
        "4:1 to hurt: the cost is estimated at no more than 0.01 nats.",
        "warning": "One key/value head for all queries cost about 0.011 bits per byte against four heads, in "
        "one run of a 17M model that changed something else too.",
    }[severity]
    remedy = ""
    if severity != "ok":
        better = (
            config.num_attention_heads // 2
            if config.num_attention_heads % 2 == 0
            else config.num_attention_heads
        )
        remedy = f"{better} key/value heads cost {(better - keys) * saved:,} parameters more."
    return Check(
        "queries per key/value head",
        severity,
        ratio,
        f"{ratio}:1",
        why,
        remedy,
        "suggestive" if alone else "weak",
    )


def _depth(config: ModelConfig) -> Check:
    ratio = config.hidden_size / config.num_hidden_layers
    severity: Severity = "ok" if 16 <= ratio <= 80 else "note" if ratio > 8 else "warning"
    number = f"width / depth = {ratio:.0f} ({config.hidden_size} / {config.num_hidden_layers})"
    why = (
        "Near 5M parameters the loss is flat for ratios of about 20-50; both ends lose. Too deep for its "
        "width is estimated at 0.02-0.05 nats from 8 downwards, and each layer more costs time."
    )
    remedy = ""
    if severity != "ok":
        # depth * width^2 as now, at width = 32 * depth.
        width = max(32, 32 * round((config.num_hidden_layers * config.hidden_size**2 / 32**2) ** (1 / 3)))
        layers = max(1, round(config.num_hidden_layers * (config.hidden_size / width) ** 2))
        remedy = (
            f"About {layers} layers at width {width} hold as many parameters; the token table changes too."
        )
    return Check("depth against width", severity, ratio, number, why, remedy, "suggestive")


def _round_down(value: float, multiple: int) -> int:
    return int(value // multiple) * multiple


_SCALE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def parse_count(text: str) -> int:
    """5M, 4.95M, 4_950_000 or 4,950,000 as a number. Raises `UserError`."""
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([KMGB]?)", text.strip(), re.IGNORECASE)
    if not match or not (count := round(float(re.sub("[_,]", "", match[1])) * _SCALE[match[2].upper()])):
        raise UserError(f"'{text}' is not a count: write it like 5M or 4_950_000")
    return count


def parse_bytes(text: str) -> int:
    """16GB (10^9), 15GiB (2^30) or 800MB as bytes. Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"'{text}' is not an amount of memory: write it like 16GB or 15GiB")
    unit: int = (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2].upper()))
    return round(float(match[1]) * unit)
