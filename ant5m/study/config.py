"""The flags of `ant5m compare`: what an experiment is asked to do."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from msgspec import Meta

from ant5m.errors import UserError
from ant5m.schema import Count, Positive, check, flag
from ant5m.study.studies import STUDIES, StudyName, Variant, variants_of_models, variants_of_study

TRAINING = ("sequence_length", "optimizer", "precision", "kernels")
"""flags that go into every run as they are"""


MAX_SEEDS = 1_000


@dataclass(frozen=True)
class CompareConfig:
    """What to compare, on what, for how long. Raises `UserError` when a value is impossible."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL...]")] = ()
    """presets or config files, the first being the baseline; or none, with --study"""
    study: StudyName | None = None
    """a built-in study"""
    variants: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--arms",))] = ()
    """only these variants of the study, and its baseline; default: all"""
    data: tuple[str, ...] = ("builtin",)
    """texts as for `ant5m data pack`; one tokenizer per vocabulary size is trained on them"""
    out: Path | None = None
    """folder of the study, a new one or one to continue; default: runs/study-NAME"""
    cache: Path | None = None
    """folder for tokenizers and shards, which studies on the same text can share; default: in --out"""

    tokens: Count = 10_000_000
    """training tokens per run of the baseline; with another tokenizer, as many as give the same bytes"""
    seeds: Count = 3
    """runs per variant, with seeds 1, 2, ..."""
    sequence_length: Count | None = None
    """tokens per sequence, and the models' context length; default: that of each model"""
    batch_size: Count | None = None
    """sequences per optimizer step, for all variants; default: chosen from the number of tokens"""
    optimizer: Literal["adamw", "muon"] = "muon"
    """optimizer, unless the study varies it"""
    learning_rate: Positive = 4e-3
    """peak learning rate of AdamW, for all variants"""
    muon_learning_rate: Positive = 0.014
    """peak learning rate of Muon, for all variants"""
    rate_factors: tuple[Positive, ...] = (1.0,)
    """train every variant with both learning rates times each of these factors; the best one counts"""

    validation_fraction: Annotated[float, Meta(gt=0, lt=1)] = 0.005
    """share of the documents that is held out for validation"""
    workers: Count = 1
    """runs at the same time: one GPU each on a machine with GPUs, else they share the CPU"""
    device: str = "auto"
    """auto, cpu, cuda"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """as for `ant5m train`"""
    kernels: str | None = None
    """as for `ant5m train`"""

    def __post_init__(self) -> None:
        if bool(self.models) == bool(self.study):
            raise UserError(f"name two models or more, or --study with one of {', '.join(STUDIES)}")
        check(self, flag)
        if not self.rate_factors:
            raise UserError("--rate-factors needs at least one number above 0")
        if self.seeds > MAX_SEEDS or self.workers > MAX_SEEDS:
            raise UserError(f"--seeds and --workers must be at most {MAX_SEEDS:,}")
        if len(set(self.rate_factors)) < len(self.rate_factors):
            raise UserError("--rate-factors names a factor twice")

    @property
    def name(self) -> str:
        return self.study or "comparison"

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"study-{self.name}"

    @property
    def baseline(self) -> str:
        """The variant to which differences are taken."""
        return STUDIES[self.study].baseline if self.study else self.design()[0].name

    def design(self) -> list[Variant]:
        """The variants, in order, with the context they are trained on. Raises `UserError`."""
        variants = variants_of_study(self.study) if self.study else variants_of_models(self.models)
        unknown = [name for name in self.variants if name not in {variant.name for variant in variants}]
        if unknown:
            raise UserError(
                f"there is no variant '{unknown[0]}' (there are {', '.join(one.name for one in variants)})"
            )
        if self.variants:
            keep = {*self.variants, STUDIES[self.study].baseline if self.study else variants[0].name}
            variants = [variant for variant in variants if variant.name in keep]
        if self.sequence_length is None:
            return variants
        length = self.sequence_length
        return [
            dataclasses.replace(
                variant, model=dataclasses.replace(variant.model, max_position_embeddings=length)
            )
            for variant in variants
        ]

    def identity(self) -> dict[str, Any]:
        """What decides the result besides the variants and the text, in plain values: only the same may be
        continued. Paths are not in it, so that a study may be moved."""
        free = ("models", "data", "out", "cache", "workers", "device")
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
