"""From a `TrainConfig` to a trained model: data, plan, training, evaluation, export, report."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ant5m import kernels
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.eval.perplexity import Evaluation
from ant5m.model.ant import Ant
from ant5m.model.huggingface import check_tokenizer
from ant5m.train.config import TrainConfig
from ant5m.train.default_text import pack_default_text
from ant5m.train.plan import complete, measure_speed
from ant5m.train.precision import choose_device, choose_precision
from ant5m.train.report import device_of, finish
from ant5m.train.run import Run
from ant5m.train.stop import Stop
from ant5m.train.trainer import Trainer


@dataclass(frozen=True)
class Result:
    """What came out of `pretrain`."""

    run: Path
    step: int
    steps: int
    """of the whole run"""
    stopped: str | None
    """why the run ended before its last step (see `ant5m.train.stop.EXIT_CODES`), or None"""
    evaluation: Evaluation | None
    """over the whole validation split; None when the run was stopped"""
    device: str
    """what it ran on and in which precision, for people"""


def pretrain(config: TrainConfig) -> Result:
    """Start a run, or continue the one that `config.resume` names, and leave a run folder behind.

    Raises `UserError` when something asked for is impossible or not there (nothing is written then), and when
    the training breaks down (the last good checkpoint stays).
    """
    started = time.monotonic()
    run = Run.open(config) if config.resume else Run.create(config)
    device = choose_device(run.config.device)
    if run.config.kernels is not None:
        kernels.select(run.config.kernels)
    precision = choose_precision(run.config.precision, device)
    if run.config.data is None:
        run.write()
        _pack_default_text(run)
    train, validation, tokenizer = _open_data(run)
    torch.manual_seed(run.config.seed)
    net = Ant(run.model).to(device)

    measure = functools.partial(measure_speed, net, run.config, precision)
    run.config = complete(run.config, run.model, train.num_tokens, device, measure)
    run.data = {"fingerprint": train.fingerprint, "train": train.counts, "validation": validation.counts}
    trainer = Trainer(run, net, train, validation, tokenizer)
    run.write()
    if not (run.tokenizer / "tokenizer.json").exists():
        tokenizer.save(run.tokenizer, run.model.max_position_embeddings)
    _introduce(run, net, precision)
    limit = run.config.max_minutes
    with Stop(started + 60 * limit if limit else None) as stop:
        trainer.fit(stop)
    done = trainer.step == trainer.steps
    evaluation = finish(run, trainer) if done else None
    stopped = None if done else stop.reason
    return Result(run.folder, trainer.step, trainer.steps, stopped, evaluation, device_of(trainer))


def _pack_default_text(run: Run) -> None:
    try:
        pack_default_text(run)
    except KeyboardInterrupt:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"stopped while the text was prepared. Go on with: ant5m train --resume {run.folder}")
        raise


def _open_data(run: Run) -> tuple[Shards, Shards, Tokenizer]:
    """The two splits and the tokenizer that they were packed with."""
    train, validation = Shards.open(run.shards), Shards.open(run.shards, "validation")
    known = run.data.get("fingerprint")
    if known not in (None, train.fingerprint):
        raise UserError(f"{run.shards} is not the data of {run.folder}: resume with the same data")
    given = run.config.tokenizer or run.shards / "tokenizer"
    folder = run.tokenizer if run.tokenizer.exists() else given
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != train.tokenizer_fingerprint:
        raise UserError(f"{run.shards} was packed with another tokenizer than {folder}: pack the text again")
    check_tokenizer(tokenizer, run.model)
    return train, validation, tokenizer


def _introduce(run: Run, net: Ant, precision: str) -> None:
    config = run.config
    assert config.steps and config.batch_size and config.sequence_length
    where = torch.cuda.get_device_name(net.device) if net.device.type == "cuda" else "the CPU"
    tokens = config.steps * config.batch_size * config.sequence_length
    parameters, unique = sum(p.numel() for p in net.parameters()), run.data["train"]["tokens"]
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(
        f"{run.folder}: {config.model}, {parameters:,} parameters, on {where} in {precision}\n"
        f"{config.steps:,} steps of {config.batch_size} x {config.sequence_length:,} tokens = {tokens:,}, "
        f"{tokens / unique:.1f} times over the {unique:,} of {run.shards}\n"
        f"{kernels.describe(net.device)}",
        markup=False,
    )
