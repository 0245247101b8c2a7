"""The built-in studies: a table in which each one varies a single factor, and what it has to say about a
published claim.

The variants of a study differ in the fields that are listed, and in the SwiGLU's width, which takes up what
they free or cost: every variant has `Study.parameters`, within `TOLERANCE`. The exception is `published`,
whose presets differ in everything.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ant5m.errors import UserError
from ant5m.model.config import PRESETS, ModelConfig
from ant5m.model.config_file import load_config
from ant5m.model.costs import count_parameters

TOLERANCE = 0.003
"""of the parameters: the SwiGLU's width comes in steps"""
STEP = 4
"""of the SwiGLU's width, as in the presets"""

StudyName = Literal["published", "vocab", "head-dim", "kv-heads", "depth", "rope-base", "tied", "optimizer"]


@dataclass(frozen=True)
class Claim:
    """A published explanation of why the model collapsed, as a difference between two variants."""

    topic: str
    blamed: str
    """the variant that the claim says is worse"""
    against: str


@dataclass(frozen=True)
class Study:
    """One row of the table. `variants`: name -> changed fields of the model or of the training."""

    factor: str
    variants: dict[str, dict[str, Any]]
    baseline: str
    parameters: int | None
    """of every variant; None: as they come"""
    base: dict[str, Any] = field(default_factory=dict)
    """changes of `ant-5m` that all variants share"""
    note: str = ""
    claim: Claim | None = None


@dataclass(frozen=True)
class Variant:
    """One model, and what is special in its training."""

    name: str
    model: ModelConfig
    train: dict[str, Any] = field(default_factory=dict)
    """fields of `TrainConfig`"""

    @property
    def parameters(self) -> int:
        return sum(count_parameters(self.model).values())


ANT_5M, ANT_5M_SMALL_TABLE = 4_730_240, 3_157_376
"""parameters of ant-5m, and with a table of 4,096"""
SMALL_TABLE = {"vocab_size": 4_096}
LAYERS = "the layers of ant-5m with a table of 4,096, so that the time goes into the layers"


def _shape(layers: int, width: int) -> dict[str, int]:
    heads = width // 32
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def _heads(size: int) -> dict[str, int]:
    heads = 128 // size
    return {"head_dim": size, "num_attention_heads": heads, "num_key_value_heads": heads // 2}


PUBLISHED = ("ant-5m", "ant-5m-wide", "ant-5m-fit")

STUDIES: dict[str, Study] = {
    "vocab": Study(
        "entries of the vocabulary",
        {f"{size}": {"vocab_size": size} for size in (1_024, 2_048, 4_096, 8_192, 16_384, 32_768)},
        baseline="4096",
        parameters=ANT_5M,
        note="ant-5m; one BPE, cut at each size; equal bytes of text",
        claim=Claim("embedding bottleneck", "16384", "4096"),
    ),
    "head-dim": Study(
        "dimensions of a head",
        {f"{size}": _heads(size) for size in (8, 16, 32, 64)},
        baseline="64",
        parameters=ANT_5M_SMALL_TABLE,
        base=SMALL_TABLE,
        note=f"{LAYERS}; two query heads to a KV head in every variant, so that K and V are equally wide",
        claim=Claim("16-dim heads break RoPE", "16", "64"),
    ),
    "kv-heads": Study(
        "key/value heads of 8 query heads",
        {f"{heads}": {"num_key_value_heads": heads} for heads in (8, 4, 2, 1)},
        baseline="8",
        parameters=ANT_5M_SMALL_TABLE,
        base=SMALL_TABLE,
        note=f"{LAYERS}; what fewer KV heads free goes into the SwiGLU",
        claim=Claim("4:1 grouping", "2", "8"),
    ),
    "depth": Study(
        "layers x width",
        {
            f"{n}x{width}": _shape(n, width)
            for n, width in ((20, 128), (13, 160), (9, 192), (7, 256), (5, 256))
        },
        baseline="7x256",
        parameters=ANT_5M,
        base={**SMALL_TABLE, "head_dim": 32},
        note="parameters of ant-5m, table of 4,096, heads of 32, as many KV heads; 13x160 has the ratio of "
        "width to depth of ant-5m (12), 7x256 that of the published correction",
        claim=Claim("deep and narrow", "13x160", "7x256"),
    ),
    "rope-base": Study(
        "RoPE base",
        {f"{base:g}": {"rope_theta": base} for base in (100.0, 1_000.0, 10_000.0, 100_000.0)},
        baseline="10000",
        parameters=ANT_5M_SMALL_TABLE,
        base=SMALL_TABLE,
        note=LAYERS,
    ),
    "tied": Study(
        "head tied to the token table, or its own",
        {"tied": {"tie_word_embeddings": True}, "untied": {"tie_word_embeddings": False}},
        baseline="tied",
        parameters=ANT_5M_SMALL_TABLE,
        base=SMALL_TABLE,
        note=f"{LAYERS}; the second table is paid for by the SwiGLU",
    ),
    "optimizer": Study(
        "optimizer",
        {"adamw": {"optimizer": "adamw"}, "muon": {"optimizer": "muon"}},
        baseline="adamw",
        parameters=ANT_5M_SMALL_TABLE,
        base=SMALL_TABLE,
        note=f"{LAYERS}; fair only with --rate-factors, because each has its own best rate",
    ),
    "published": Study(
        "the published presets",
        {name: {} for name in PUBLISHED},
        baseline="ant-5m",
        parameters=None,
        note="not equal in parameters or FLOPs, and different in several things at once: it says which model "
        "is better, not why; equal bytes of text",
    ),
}

CLAIMS = {study.claim.topic: name for name, study in STUDIES.items() if study.claim}
"""published claim -> the study that tests it"""


def variants_of_study(name: str) -> list[Variant]:
    """The variants of a built-in study. Raises `UserError` on an unknown name."""
    if name not in STUDIES:
        raise UserError(f"there is no study '{name}' (there are {', '.join(STUDIES)})")
    study = STUDIES[name]
    if study.parameters is None:
        return [Variant(preset, PRESETS[preset]) for preset in study.variants]
    start = {**PRESETS["ant-5m"].to_dict(), **study.base}
    variants = []
    for variant, changes in study.variants.items():
        shape = {key: value for key, value in changes.items() if key in start}
        train = {key: value for key, value in changes.items() if key not in start}
        variants.append(
            Variant(variant, fill(ModelConfig.from_dict({**start, **shape}), study.parameters), train)
        )
    return variants


def variants_of_models(names: tuple[str, ...]) -> list[Variant]:
    """One variant a preset or config file. Raises `UserError` when there are fewer than two, or two alike."""
    variants = [
        Variant(Path(name).stem if name.endswith(".json") else Path(name).name, load_config(name))
        for name in names
    ]
    twice = sorted(
        {variant.name for variant in variants if [other.name for other in variants].count(variant.name) > 1}
    )
    if twice:
        raise UserError(f"two models are called {twice[0]}: rename one of the files")
    if len(variants) < 2:
        raise UserError("a comparison needs two models or more, or --study with one of " + ", ".join(STUDIES))
    return variants


def fill(config: ModelConfig, parameters: int) -> ModelConfig:
    """`config` with the SwiGLU's width, in steps of `STEP`, that comes nearest to so many parameters.

    Raises `UserError` when everything else is larger already, or the nearest is off by over `TOLERANCE`.
    """
    rest = {part: count for part, count in count_parameters(config).items() if part != "mlp"}
    unit = 3 * config.hidden_size * config.num_hidden_layers
    width = STEP * round((parameters - sum(rest.values())) / (STEP * unit))
    if width < STEP or abs(sum(rest.values()) + width * unit - parameters) > TOLERANCE * parameters:
        raise UserError(f"no SwiGLU width gives this shape {parameters:,} parameters")
    return dataclasses.replace(config, intermediate_size=width)
