"""From a `TrainConfig` to a trained model: data, plan, training, evaluation, export, report."""

import contextlib
import functools
import time
import warnings
from collections.abc import Iterator
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
from ant5m.model.checkpoint import check_tokenizer
from ant5m.train.config import TrainConfig
from ant5m.train.default_text import pack_default_text
from ant5m.train.plan import complete, measure_speed
from ant5m.train.precision import choose_device, choose_precision
from ant5m.train.report import device_of, finish, times_over
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
    if device.type == "cuda" and device.index is not None:
        # Whatever asks the current device, as the check of the kernels does, means this one.
        torch.cuda.set_device(device)
    with _selected(run.config.kernels):
        return _pretrain(run, device, started)


@contextlib.contextmanager
def _selected(backend: str | None) -> Iterator[None]:
    """`backend` as the one in use, for one run; None: the one that is."""
    before = kernels.selected()
    kernels.select(before if backend is None else backend)
    try:
        yield
    finally:
        kernels.select(before)


def _pretrain(run: Run, device: torch.device, started: float) -> Result:
    precision = choose_precision(run.config.precision, device)
    limit = run.config.max_minutes
    deadline = started + 60 * limit if limit else None
    if run.config.data is None:
        if run.config.tokenizer and not run.has_tokenizer:
            check_tokenizer(Tokenizer.load(run.config.tokenizer), run.model)
        run.claim()
        run.write()
        _pack_default_text(run)
    train, validation, tokenizer = _open_data(run)
    torch.manual_seed(run.config.seed)
    net = Ant(run.model).to(device)

    measure = functools.partial(measure_speed, net, run.config, precision)
    run.config = complete(run.config, run.model, train.num_tokens, device, measure, deadline)
    run.data = {"fingerprint": train.fingerprint, "train": train.counts, "validation": validation.counts}
    trainer = Trainer(run, net, train, validation, tokenizer)
    run.ran = {"device": device_of(trainer), "kernels": kernels.describe(device)}
    run.write()
    if not run.has_tokenizer:
        tokenizer.save(run.tokenizer, run.model.max_position_embeddings)
    _introduce(run, net, precision)
    with Stop(deadline) as stop:
        trainer.fit(stop)
    done = trainer.step == trainer.steps
    evaluation = _finish(run, trainer) if done else None
    stopped = None if done else stop.reason
    return Result(run.folder, trainer.step, trainer.steps, stopped, evaluation, device_of(trainer))


def _pack_default_text(run: Run) -> None:
    with _interruptible(run, "stopped while the text was prepared. Go on"):
        pack_default_text(run)


def _finish(run: Run, trainer: Trainer) -> Evaluation:
    with _interruptible(run, "the trained model is saved. Evaluate and export it"):
        return finish(run, trainer)


@contextlib.contextmanager
def _interruptible(run: Run, what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"{what} with: ant5m train --resume {run.folder}", markup=False)
        raise


def _open_data(run: Run) -> tuple[Shards, Shards, Tokenizer]:
    """The two splits and the tokenizer that they were packed with."""
    train, validation = Shards.open(run.shards), Shards.open(run.shards, "validation")
    known = run.data.get("fingerprint")
    if known not in (None, train.fingerprint):
        raise UserError(f"{run.shards} is not the data of {run.folder}: resume with the same data")
    given = run.config.tokenizer or run.shards / "tokenizer"
    folder = run.tokenizer if run.has_tokenizer else given
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != train.tokenizer_fingerprint:
        raise UserError(f"{run.shards} was packed with another tokenizer than {folder}: pack the text again")
    check_tokenizer(tokenizer, run.model)
    unused = run.model.vocab_size - tokenizer.vocab_size
    if unused > run.model.vocab_size / 10:
        warnings.warn(
            f"the model has a row for {run.model.vocab_size:,} tokens, the tokenizer only "
            f"{tokenizer.vocab_size:,}: {unused * run.model.hidden_size:,} parameters can never be used. "
            "Choose a --model with as many rows, or learn a larger vocabulary",
            stacklevel=2,
        )
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
        f"{times_over(tokens, unique)} times over the {unique:,} of {run.shards}\n"
        f"{run.ran['kernels']}",
        markup=False,
    )
