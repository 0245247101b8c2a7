"""The flags of `ant5m train`: what a run is asked to do."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ant5m.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, for how long and how. `None`: decided at the start, and written to the run.

    Raises `UserError` when a value is impossible. `ant5m.train.plan` fills in what is left open.
    """

    model: str = "ant-5m"
    """preset or config file"""
    data: Path | None = None
    """folder of shards (of `ant5m data pack`); default: built-in English, packed into the run folder"""
    tokenizer: Path | None = None
    """tokenizer folder; default: the one beside the shards, or a new one trained on the built-in text"""
    out: Path | None = None
    """run folder to create; default: runs/MODEL-NUMBER"""
    resume: Path | None = None
    """run folder to continue with its settings; only device, precision, kernels, data, max-minutes and
    micro-batch-size may be overridden (a flag at its default counts as not given)"""

    steps: int | None = None
    """optimizer steps of the whole run"""
    tokens: int | None = None
    """training tokens of the whole run, instead of --steps; default: one epoch of --data, or ten minutes
    without it"""
    max_minutes: float | None = None
    """save and stop after this many minutes; without --steps or --tokens it also sets the number of steps"""
    batch_size: int | None = None
    """sequences per optimizer step; default: chosen from the number of training tokens"""
    micro_batch_size: int | None = None
    """sequences per forward and backward pass (gradients are accumulated); default: what fits the device"""
    sequence_length: int | None = None
    """tokens per sequence, which becomes the model's context length; default: that of --model"""

    document_mask: bool = False
    """keep attention inside documents; in public runs of larger models this made no difference"""

    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the matrices of the layers, AdamW for the rest"""
    learning_rate: float | None = None
    """peak learning rate of AdamW; default: 4e-3, on the built-in text 1.2e-2"""
    muon_learning_rate: float = 0.014
    """peak learning rate of Muon"""
    betas: tuple[float, float] = (0.9, 0.99)
    """betas of AdamW"""
    eps: float = 1e-8
    """epsilon of AdamW"""
    weight_decay: float = 0.1
    """decoupled weight decay; not applied to norms"""
    grad_clip: float = 1.0
    """clip the gradient to this 2-norm; 0: no clipping"""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """learning rate schedule; wsd: warm-up, stable, linear decay"""
    warmup: float = 0.03
    """share of the steps that are warm-up"""
    decay: float = 0.4
    """share of the steps in which wsd decays"""
    final_rate: float = 0.0
    """final learning rate as a share of the peak"""

    loop_loss: Literal["none", "unlikelihood", "ditto"] = "none"
    """extra loss against repetition, added in the last steps of the run: token unlikelihood, or DITTO on
    phrases repeated on purpose (its steps take twice as long)"""
    loop_loss_weight: float = 1.0
    """weight of the loop loss; the cross-entropy has weight 1"""
    loop_loss_share: float = 0.1
    """share of the steps, at the end of the run, that use the loop loss"""

    seed: int = 1
    """seed of the initial weights and of the data order"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware supports it, else fp16 on a GPU and fp32 on a CPU; on a CPU, bf16 is used
    for the inputs of matrix products only"""
    kernels: str | None = None
    """kernel backend, or auto; default: the value of ANT5M_KERNELS, else auto"""

    eval_every: int | None = None
    """steps between validations; default: a tenth of all steps"""
    eval_tokens: int | None = None
    """tokens per validation (the last one uses all); default: about 1.5 % of the training tokens"""
    early_stop: int = 0
    """end the run after this many validations in a row without a lower loss; 0: never"""
    sample_every: int | None = None
    """steps between sample texts; 0: none; default: as --eval-every"""
    checkpoint_every: int | None = None
    """steps between checkpoints; default: a tenth of all steps"""
    keep_last: int = 2
    """number of newest checkpoints to keep"""

    def __post_init__(self) -> None:
        for name in _PATHS:
            path = getattr(self, name)
            if not isinstance(path, str | Path | None):
                raise UserError(f"{_flag(name)} must be a path, not {path!r}")
            if path is not None:
                object.__setattr__(self, name, Path(path))
        for name in ("model", "device", "kernels"):
            if not isinstance(getattr(self, name), str) and (name != "kernels" or self.kernels is not None):
                raise UserError(f"{_flag(name)} must be a name, not {getattr(self, name)!r}")
        for name in ("steps", "tokens", "batch_size", "micro_batch_size", "sequence_length", "eval_every"):
            _check_count(self, name, 1)
        for name in ("eval_tokens", "checkpoint_every", "keep_last"):
            _check_count(self, name, 1)
        for name in ("sample_every", "early_stop", "seed"):
            _check_count(self, name, 0)
        for name in ("learning_rate", "muon_learning_rate", "eps", "max_minutes"):
            _check_range(self, name, above=0)
        for name in ("weight_decay", "grad_clip", "loop_loss_weight"):
            _check_range(self, name, least=0)
        for name in ("warmup", "decay", "final_rate", "loop_loss_share"):
            _check_range(self, name, least=0, most=1)
        if type(self.document_mask) is not bool:
            raise UserError(f"{_flag('document_mask')} is on or off, not {self.document_mask!r}")
        pair = isinstance(self.betas, list | tuple) and len(self.betas) == 2
        if not pair or not all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{_flag('betas')} must be two numbers from 0 to below 1, not {self.betas}")
        for field in dataclasses.fields(self):
            choices = get_args(field.type)
            value = getattr(self, field.name)
            if choices and isinstance(choices[0], str) and value not in choices:
                raise UserError(f"{_flag(field.name)} must be one of {', '.join(choices)}, not {value!r}")
        if self.seed >= 2**63:
            raise UserError(f"--seed must fit 63 bits, which {self.seed} does not")
        check_steps(self.steps or 0)
        if self.steps and self.tokens:
            raise UserError("--steps and --tokens say the same thing twice: give one of them")
        if self.batch_size and self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UserError(
                f"--micro-batch-size ({self.micro_batch_size}) must divide --batch-size ({self.batch_size})"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`. Raises `UserError` on an unknown name or an impossible value."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"unknown in a training config: {', '.join(unknown)}")
        betas = {"betas": tuple(values["betas"])} if isinstance(values.get("betas"), list) else {}
        return cls(**{**values, **betas})


MAX_STEPS = 20_000_000
"""the learning rate of each is held in memory"""


def check_steps(steps: int) -> None:
    """Raise `UserError` for more steps than a run can have."""
    if steps > MAX_STEPS:
        raise UserError(f"{steps:,} steps are too many: at most {MAX_STEPS:,}, take a larger --batch-size")


_PATHS = ("data", "tokenizer", "out", "resume")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value and abs(value) != float("inf")


def _may_be_open(name: str) -> bool:
    return getattr(TrainConfig, name, ...) is None


def _check_count(config: TrainConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if value is None and _may_be_open(name):
        return
    if type(value) is not int or value < least:
        raise UserError(f"{_flag(name)} must be a whole number of at least {least}, not {value!r}")


def _check_range(
    config: TrainConfig,
    name: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    value = getattr(config, name)
    if value is None and _may_be_open(name):
        return
    if not _is_number(value):
        raise UserError(f"{_flag(name)} must be a number, not {value!r}")
    if above is not None and value <= above:
        raise UserError(f"{_flag(name)} must be above {above}, not {value}")
    if (least is not None and value < least) or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{_flag(name)} must be {limits}, not {value}")
