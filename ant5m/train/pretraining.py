"""From a `TrainConfig` to a trained model: data, settings, training, evaluation, export, report."""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ant5m import kernels
from ant5m.data.loader import Loader
from ant5m.data.tokenizer import Tokenizer
from ant5m.device import choose_device, choose_precision, describe_device, peak_flops
from ant5m.errors import UserError, first_line
from ant5m.eval.perplexity import Evaluation
from ant5m.export import hub
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import STATE, check_tokenizer, checkpoints, latest_checkpoint
from ant5m.model.costs import count_flops
from ant5m.train.callback import Callback
from ant5m.train.checkpoint import SaveCheckpoints, load_checkpoint
from ant5m.train.config import TrainConfig
from ant5m.train.data import TrainingData
from ant5m.train.default_text import pack_default_text
from ant5m.train.early_stop import EarlyStop
from ant5m.train.losses import AddLoopLoss
from ant5m.train.metrics import MetricsFile, TensorBoard
from ant5m.train.plan import check_memory, keeps_tokens, measure_speed
from ant5m.train.progress import TrainingProgress
from ant5m.train.push import PREFIX, PushCheckpoints, fetch_run
from ant5m.train.report import count_epochs, finish
from ant5m.train.run import Run
from ant5m.train.samples import WriteSamples
from ant5m.train.settings import Settings, resolve
from ant5m.train.stop import Stop
from ant5m.train.tracker import Tracker, check_tracker
from ant5m.train.trainer import NonFiniteLoss, Trainer
from ant5m.train.validation import Validate


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
    the training diverges (the last good checkpoint stays).
    """
    started = time.monotonic()
    if str(config.resume).startswith(PREFIX):
        config = dataclasses.replace(config, resume=fetch_run(str(config.resume), config.out), out=None)
    run = Run.open(config.resume, config) if config.resume else Run.create(config)
    try:
        device = choose_device(run.config.device)
        if device.type == "cuda" and device.index is not None:
            # Whatever asks the current device, as the check of the kernels does, means this one.
            torch.cuda.set_device(device)
        check_tracker(run.config.track)
        if run.config.push:
            _claim_repository(run.config.push)
        with _selected(run.config.kernels):
            return _pretrain(run, device, started)
    finally:
        run.release()


def _claim_repository(repo: str) -> None:
    """Find out before the training whether it can be pushed; a hub that is out of reach may be back then."""
    try:
        hub.create(repo)
    except hub.HubUnreachable as error:
        warnings.warn(str(error), stacklevel=2)


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
    limit = run.config.max_minutes
    deadline = started + 60 * limit if limit else None
    precision = choose_precision(run.config.precision, device)
    check_memory(run.model, run.config.batch_size or 1, device)
    data = _prepare_data(run)
    torch.manual_seed(run.config.seed)
    net = Ant(run.model).to(device)
    measure = functools.partial(measure_speed, net, run.config, precision)
    settings = resolve(run.config, run.model, data.train.num_tokens, device, precision, measure, deadline)
    trainer = _make_trainer(run, settings, net, data)
    _resume(run, trainer, data.tokenizer)
    _write_run(run, settings, data)
    _introduce(run, settings, net)
    with Stop(deadline) as stop:
        _fit(run, trainer, stop)
    run.ran |= kernels.choices()
    run.write()
    evaluation = _finish(run, trainer, data) if trainer.complete else None
    stopped = None if trainer.complete else stop.reason
    return Result(
        run.folder,
        trainer.step,
        settings.steps,
        stopped,
        evaluation,
        describe_device(settings.device, settings.precision),
    )


def _prepare_data(run: Run) -> TrainingData:
    """That of the run; without one, made from the built-in text in the run folder."""
    if run.config.data is None:
        if run.config.tokenizer and not run.has_tokenizer:
            check_tokenizer(Tokenizer.load(run.config.tokenizer), run.model)
        run.claim()
        run.write()
        with _interruptible(run, "stopped while the text was prepared. Go on"):
            pack_default_text(run)
    return TrainingData.open(run)


def _make_trainer(run: Run, settings: Settings, net: Ant, data: TrainingData) -> Trainer:
    resident = net.device if keeps_tokens(data.train.num_tokens, net.device) else None
    loader = Loader(
        data.train, settings.batch_size, settings.sequence_length, settings.seed, resident=resident
    )
    eos_token_id = data.train.eos_token_id if settings.document_mask else None
    return Trainer(settings, net, loader, eos_token_id, _make_callbacks(run, settings, net, data))


def _make_callbacks(run: Run, settings: Settings, net: Ant, data: TrainingData) -> list[Callback]:
    """In the order in which they act; the checkpoint comes behind all that have a state."""
    flops = 3 * sum(count_flops(net.config, settings.sequence_length).values())
    config = run.config
    track = [Tracker(run, config.track)] if config.track != "none" else []
    every = settings.checkpoint_every if config.push_every == "save" else 0
    push = [PushCheckpoints(run, config.push, every)] if config.push else []
    return [
        AddLoopLoss(settings),
        *track,
        MetricsFile(run),
        TensorBoard(run),
        TrainingProgress(settings.steps, flops, peak_flops(net.device, settings.precision)),
        Validate(settings, data.validation),
        EarlyStop(settings.early_stop),
        WriteSamples(settings, data.tokenizer),
        SaveCheckpoints(settings, run, data.tokenizer.fingerprint),
        *push,
    ]


def _resume(run: Run, trainer: Trainer, tokenizer: Tokenizer) -> None:
    """Load the run's newest good checkpoint, where it has any."""
    folder = latest_checkpoint(run.folder)
    if folder is None:
        if checkpoints(run.checkpoints):
            raise UserError(f"no checkpoint in {run.checkpoints} is good: start a new run")
        return
    state = load_checkpoint(folder, trainer.net, trainer.optimizer)
    if not tokenizer.has_fingerprint(state["tokenizer"]):
        raise UserError(f"{folder} was trained with another tokenizer than {run.tokenizer}")
    try:
        trainer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # of a state.json without a manifest
        raise UserError(f"{folder / STATE} is damaged ({first_line(error)})") from None


def _write_run(run: Run, settings: Settings, data: TrainingData) -> None:
    """Make the folder, and write down what was decided."""
    run.config = settings.fix(run.config)
    run.data = data.describe()
    run.ran = {
        "device": describe_device(settings.device, settings.precision),
        "kernels": kernels.describe(settings.device),
    }
    run.claim()
    run.write()
    if not run.has_tokenizer:
        data.tokenizer.save(run.tokenizer, run.model.max_position_embeddings)


def _introduce(run: Run, settings: Settings, net: Ant) -> None:
    where = torch.cuda.get_device_name(net.device) if net.device.type == "cuda" else "the CPU"
    parameters, unique = sum(p.numel() for p in net.parameters()), run.data["train"]["tokens"]
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(
        f"{run.folder}: {run.config.model}, {parameters:,} parameters, on {where} in {settings.precision}\n"
        f"{settings.steps:,} steps of {settings.batch_size} x {settings.sequence_length:,} tokens = "
        f"{settings.tokens:,}, {count_epochs(settings.tokens, unique)} epochs of the {unique:,} in "
        f"{run.shards}\n{run.ran['kernels']}",
        markup=False,
    )


def _fit(run: Run, trainer: Trainer, stop: Stop) -> None:
    try:
        trainer.fit(stop)
    except NonFiniteLoss as error:
        good = latest_checkpoint(run.folder)
        rescue = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
        raise NonFiniteLoss(f"{error}; {rescue}. Start anew with a lower learning rate") from None


def _finish(run: Run, trainer: Trainer, data: TrainingData) -> Evaluation:
    with _interruptible(run, "the trained model is saved. Evaluate and export it"):
        evaluation = finish(run, trainer, data)
    if run.config.push:
        _push_model(run)
    return evaluation


def _push_model(run: Run) -> None:
    """Upload the finished model, as a Hugging Face folder, beside the last checkpoint."""
    assert run.config.push
    try:
        hub.push(run.folder / "hf", run.config.push)
    except Exception as error:  # the run is done, whatever the hub does
        what = str(error) if isinstance(error, UserError) else type(error).__name__
        again = f"ant5m push {run.folder} {run.config.push}"
        warnings.warn(f"the model is not on the hub: {what}. Again: {again}", stacklevel=2)


@contextlib.contextmanager
def _interruptible(run: Run, what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"{what} with: ant5m train --resume {run.folder}", markup=False)
        raise
