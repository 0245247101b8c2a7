"""The flags of `ant5m train`: what a run is asked to do."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ant5m.errors import UserError
from ant5m.export.hub import check_name
from ant5m.schema import Count, CountOrZero, NotNegative, Positive, Share, check, check_names, flag

Beta = Annotated[float, Meta(ge=0, lt=1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, for how long and how. `None`: decided at the start, and written to the run.

    Raises `UserError` when a value is impossible. `ant5m.train.settings` decides what is left open.
    """

    model: str | None = None
    """preset or config file; default: ant-5m, or the shape of --init"""
    init: str | None = None
    """model to begin with: a run, RUN@STEP, a checkpoint or a Hugging Face folder; its tokenizer must be that
    of the data, or a part of it"""
    keep_optimizer: bool = False
    """begin with the optimizer and its settings of --init too, where its data stood, and without warm-up: a
    run of its own length branches off"""
    data: tuple[str, ...] = ()
    """text (files, folders, globs, hf:OWNER/NAME, builtin), which is packed first, into ant5m-cache beside
    the run folder; or a folder of shards (of `ant5m data pack`); or a mixture.toml of several of either;
    default: built-in English, packed into the run folder"""
    text_column: str = "text"
    """name of the text field in rows of --data"""
    group_column: str | None = None
    """field of what rows of --data belong to, as chapters to a book: all rows of it are held out, or none"""
    max_documents: Count | None = None
    """of --data, read only so many documents of each file or hf: data set, its first ones"""
    max_tokens: Count | None = None
    """of --data, pack only about so many tokens of each text, its first ones; --tokens says how many of them
    are trained on, again and again"""
    tokenizer: Path | None = None
    """tokenizer folder; default: the one beside the shards, or a new one learned from the text, with as many
    entries as the model has rows"""
    out: Path | None = None
    """run folder to create; default: runs/MODEL-NUMBER"""
    resume: Path | None = None
    """run folder to continue with its settings, latest (the newest in runs/), or hub:OWNER/NAME of a pushed
    one; only device, processes, precision, kernels, data, max-minutes, micro-batch-size, push and track may
    be overridden (a flag at its default counts as not given)"""

    steps: Count | None = None
    """optimizer steps of the whole run"""
    tokens: Count | None = None
    """training tokens of the whole run, instead of --steps; default: one epoch of --data, or ten minutes
    without it"""
    max_minutes: Positive | None = None
    """without --steps or --tokens: end with a finished model after so many minutes, the learning rate falling
    with steps or time, whichever is further; with them: save and stop then, for --resume"""
    batch_size: Count | None = None
    """sequences per optimizer step; default: chosen from the number of training tokens"""
    micro_batch_size: Count | None = None
    """sequences per forward and backward pass (gradients are accumulated); default: what fits the device"""
    sequence_length: Count | None = None
    """tokens per sequence, which becomes the model's context length; default: that of --model"""
    short_context: CountOrZero = 0
    """in the first part of the run, cut the sequences into pieces of so many tokens: faster, and the long
    context is learned later; 0: never"""
    short_share: Share = 0.65
    """share of the steps with --short-context"""

    rope_theta: Positive | None = None
    """RoPE base; default: that of the model"""

    document_mask: bool = False
    """keep attention inside documents; in public runs of larger models this made no difference"""

    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the matrices of the layers, AdamW for the rest"""
    learning_rate: Positive | None = None
    """peak learning rate of AdamW; default: 4e-3, on the built-in text 1.2e-2"""
    muon_learning_rate: Positive = 0.014
    """peak learning rate of Muon"""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """betas of AdamW"""
    eps: Positive = 1e-8
    """epsilon of AdamW"""
    weight_decay: NotNegative = 0.1
    """decoupled weight decay; not applied to norms"""
    grad_clip: NotNegative = 1.0
    """clip the gradient to this 2-norm; 0: no clipping"""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """learning rate schedule; wsd: warm-up, stable, linear decay"""
    warmup: Share = 0.03
    """share of the steps that are warm-up"""
    decay: Share = 0.4
    """share of the steps in which wsd decays"""
    final_rate: Share = 0.0
    """final learning rate as a share of the peak"""

    z_loss: NotNegative = 0.0
    """weight of log(sum(exp(logits)))^2, which keeps logits from drifting in long runs with high learning
    rates; PaLM took 1e-4; the loss that is shown stays the cross-entropy"""
    ema: Beta = 0.0
    """decay of an exponential moving average of the weights, such as 0.999, which is evaluated and exported
    where it is better; 0: none"""

    loop_loss: Literal["none", "unlikelihood", "ditto"] = "none"
    """extra loss against repetition, added in the last steps of the run: token unlikelihood, or DITTO on
    phrases repeated on purpose (its steps take twice as long)"""
    loop_loss_weight: NotNegative = 1.0
    """weight of the loop loss; the cross-entropy has weight 1"""
    loop_loss_share: Share = 0.1
    """share of the steps, at the end of the run, that use the loop loss"""

    seed: Seed = 1
    """seed of the initial weights and of the data order"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps (untried)"""
    processes: Count | None = None
    """processes that train together; default: one for each GPU, which must be equal; inside torchrun those
    that it started"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware supports it, else fp16 on a GPU and fp32 on a CPU; on a CPU, bf16 is used
    for the inputs of matrix products only"""
    kernels: str | None = None
    """kernel backend, or auto; default: the value of ANT5M_KERNELS, else auto"""

    eval_every: Count | None = None
    """steps between validations; default: a tenth of all steps"""
    eval_tokens: Count | None = None
    """tokens per validation (the last one uses all); default: about 1.5 % of the training tokens"""
    early_stop: CountOrZero = 0
    """end the run after this many validations in a row without a lower loss; 0: never"""
    eval_tasks: tuple[str, ...] = ()
    """0-shot tasks (or suites, as for `ant5m eval --tasks`) to score while training: blimp arc_easy"""
    eval_items: Count | None = None
    """items of each of these tasks, drawn once; default: up to 2,000, fewer where that takes too long"""
    eval_tasks_every: Count | None = None
    """steps between scores; default: so seldom that all of it takes at most 2 % of the time"""
    eval_data_dir: Path | None = None
    """folder with the items of these tasks; default: the Hugging Face hub"""
    checkpoint_words: tuple[str, ...] = ()
    """export the model after so many words of text, as babylm/chck_1M in the run folder: 1M 2M 10M"""
    sample_every: CountOrZero | None = None
    """steps between sample texts; 0: none; default: as --eval-every"""
    checkpoint_every: Count | None = None
    """steps between checkpoints; default: a tenth of all steps"""
    keep_last: Count = 2
    """number of newest checkpoints to keep"""

    push: str | None = None
    """OWNER/NAME on the Hugging Face hub: keep the newest checkpoint and the finished model there, private"""
    push_every: Literal["save", "end"] = "save"
    """save: upload every checkpoint, in the background; end: only the last one"""
    track: Literal["none", "trackio", "wandb"] = "none"
    """send the metrics there too; trackio keeps them on this machine: `trackio show` is its dashboard"""

    def __post_init__(self) -> None:
        if isinstance(self.data, str | Path | None):
            object.__setattr__(self, "data", (str(self.data),) if self.data is not None else ())
        for name in _PATHS:
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, Path(path))
        check(self, flag)
        check_steps(self.steps or 0)
        if self.push is not None:
            check_name(self.push)
        if self.keep_optimizer and self.init is None:
            raise UserError("--keep-optimizer is of the run that --init names: give that too")
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
        check_names(cls, values, "a training config")
        tuples = {name: tuple(values[name]) for name in _TUPLES if isinstance(values.get(name), list)}
        return cls(**{**values, **tuples})


MAX_STEPS = 20_000_000
"""the learning rate of each is held in memory"""


def check_steps(steps: int) -> None:
    """Raise `UserError` for more steps than a run can have."""
    if steps > MAX_STEPS:
        raise UserError(f"{steps:,} steps are too many: at most {MAX_STEPS:,}, take a larger --batch-size")


DEFAULT_MODEL = "ant-5m"
_PATHS = ("tokenizer", "out", "resume", "eval_data_dir")
_TUPLES = ("data", "betas", "eval_tasks", "checkpoint_words")
