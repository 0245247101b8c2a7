"""From a `TrainConfig` to a trained model: data, settings, training, evaluation, export, report."""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ant5m import kernels, torchrun
from ant5m.console import stderr
from ant5m.data.tokenizer import Tokenizer
from ant5m.device import choose_device, describe_device, peak_flops
from ant5m.errors import UserError, first_line
from ant5m.eval.perplexity import Evaluation
from ant5m.export import hub
from ant5m.files import write_file
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import STATE, checkpoints, latest_checkpoint
from ant5m.model.costs import count_flops
from ant5m.ranks import Ranks, join
from ant5m.train.average import AverageWeights
from ant5m.train.callback import Callback
from ant5m.train.checkpoint import SaveCheckpoints, load_checkpoint
from ant5m.train.config import TrainConfig
from ant5m.train.data import TrainingData
from ant5m.train.devices import take_device, take_precision
from ant5m.train.early_stop import EarlyStop
from ant5m.train.initial import Initial
from ant5m.train.losses import AddLoopLoss
from ant5m.train.metrics import MetricsFile, TensorBoard, read_metrics
from ant5m.train.optimizer import Optimizer
from ant5m.train.pace import Pace, recorded_positions
from ant5m.train.plan import check_memory, measure_speed
from ant5m.train.preparation import prepare
from ant5m.train.progress import TrainingProgress
from ant5m.train.push import PREFIX, PushCheckpoints, fetch_run
from ant5m.train.report import count_epochs, finish
from ant5m.train.run import Run, latest_run
from ant5m.train.samples import WriteSamples
from ant5m.train.scores import ScoreTasks
from ant5m.train.settings import OVERRIDABLE, Settings, resolve
from ant5m.train.short_context import ShortContext
from ant5m.train.stop import Stop
from ant5m.train.tracker import Tracker, check_tracker
from ant5m.train.trainer import NonFiniteLoss, Trainer
from ant5m.train.validation import Validate, bytes_per_token
from ant5m.train.word_budgets import ExportAtWords


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


def pretrain(config: TrainConfig, ranks: Ranks | None = None) -> Result:
    """Start a run, or continue the one that `config.resume` names, and leave a run folder behind.

    Inside torchrun all processes train one model together, except where `ranks` says who takes part.

    Raises `UserError` when something asked for is impossible or not there (nothing is written then), and when
    the training diverges (the last good checkpoint stays); `PeerLost` when another process died.
    """
    started = time.monotonic()
    ranks = ranks or join()
    run = None
    try:
        (restarts,) = ranks.most(torchrun.restarts())
        run = Run.of_rank_0(lambda: _open(config, restarts > 0), ranks)
        device = take_device(run.config.device, ranks)
        with _selected(run.config.kernels):
            return _pretrain(run, device, started, ranks)
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        if run is not None:
            run.release()
        ranks.leave()


def _open(config: TrainConfig, restarted: bool) -> Run:
    """The run, with all that can be refused checked, and its text packed where it was given text or none."""
    from_hub = str(config.resume).startswith(PREFIX)
    if restarted and (config.resume is None or from_hub):
        config = _restarted(config)
    elif from_hub:
        config = dataclasses.replace(config, resume=fetch_run(str(config.resume), config.out), out=None)
    elif str(config.resume) == "latest":
        config = dataclasses.replace(config, resume=latest_run())
    run = Run.open(config.resume, config) if config.resume else _create(config)
    try:
        if run.config.init and run.initial is None and latest_checkpoint(run.folder) is None:
            run.initial = Initial.open(run.config.init)  # it was stopped before its first checkpoint
        check_tracker(run.config.track)
        if run.config.push:
            _claim_repository(run.config.push)
        rows = max(run.config.batch_size or 1, run.config.micro_batch_size or 1)
        check_memory(run.model, rows, choose_device(run.config.device))
        with _interruptible(run, "stopped while the text was prepared"):
            chosen = (config.resume, config.model, config.init) != (None, None, None)
            prepare(run, model_chosen=chosen)
        if run.initial is not None:
            run.model = run.initial.fit(run.model, Tokenizer.load(run.tokenizer_source))
    except BaseException:
        run.release()
        raise
    return run


def _create(config: TrainConfig) -> Run:
    if config.init is None:
        return Run.create(config)
    initial = Initial.open(config.init)
    return Run.create(initial.inherit(config) if config.keep_optimizer else config, initial)


def _restarted(config: TrainConfig) -> TrainConfig:
    """What to do when torchrun starts the processes again: continue the run that they began."""
    if config.out is None:
        raise UserError("torchrun starts a run again after a crash: name its folder with --out")
    if not (config.out / "config.json").exists():
        return config
    given = {name: getattr(config, name) for name in OVERRIDABLE}
    return TrainConfig(resume=config.out, **given)


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


def _pretrain(run: Run, device: torch.device, started: float, ranks: Ranks) -> Result:
    limit = run.config.max_minutes
    deadline = started + 60 * limit if limit else None
    if run.config.steps is None and run.config.tokens is None:
        run.minutes = limit
    precision = take_precision(run.config.precision, device, ranks)
    data = TrainingData.open(run, verify=torchrun.local_rank() == 0)
    torch.manual_seed(run.config.seed)
    net = Ant(run.model).to(device)
    if run.config.init:
        _fill(run, net, ranks)
    num_tokens = data.train.num_tokens
    measure = functools.partial(_measure_speed, net, run.config, precision, ranks)
    held_out = data.validation.num_tokens
    settings = resolve(
        run.config, run.model, num_tokens, device, precision, measure, deadline, ranks, held_out
    )
    trainer = _make_trainer(run, settings, net, data, ranks)
    if run.config.keep_optimizer:
        _branch(run, trainer)
    _resume(run, trainer, data.tokenizer)
    if run.minutes is not None:
        end = deadline or started + 60 * run.minutes - trainer.seconds
        recorded = ranks.first(lambda: list(_recorded(run).items()))  # other machines may not see the folder
        trainer.pace = Pace(settings.steps, end, held_out, dict(recorded))
        deadline = None
    if ranks.is_first:
        _write_run(run, settings, data)
        _introduce(run, settings, net, ranks)
        data.introduce(settings)
    with Stop(deadline) as stop:
        stopped = _fit(run, trainer, stop)
    if ranks.is_first:
        run.ran |= kernels.choices()
        run.write()
    evaluation = _finish(run, trainer, data) if trainer.complete else None
    return Result(
        run.folder,
        trainer.step,
        settings.steps,
        stopped,
        evaluation,
        describe_device(settings.device, settings.precision),
    )


def _fill(run: Run, net: Ant, ranks: Ranks) -> None:
    """Give the model of all ranks the weights that rank 0 begins with."""
    if run.initial is not None:
        run.initial.fill(net)
    weights = ranks.share_tensors(dict(net.state_dict()))
    if not ranks.is_first:
        net.load_state_dict(weights)


def _branch(run: Run, trainer: Trainer) -> None:
    """Go on with the optimizer that rank 0 begins with; and where its data stood, if they are the same."""
    initial = run.initial
    position = trainer.ranks.first(
        lambda: initial.load_optimizer(trainer.optimizer, trainer.callbacks) if initial else None
    )
    if position is None:
        return  # the run has a checkpoint of its own
    _share_moments(trainer)
    try:
        trainer.loader.load_state_dict(position)
    except UserError:
        if trainer.ranks.is_first:
            stderr().print("other data, seed or sequence length: they are read from the beginning")


def _share_moments(trainer: Trainer) -> None:
    """Give all ranks the optimizer's state, and the callbacks' tensors, that rank 0 has."""
    ranks = trainer.ranks
    holders: list[Optimizer | Callback] = [trainer.optimizer]
    for one in (*holders, *(callback for callback in trainer.callbacks if callback.tensors())):
        shared = ranks.share_tensors(one.tensors())
        if not ranks.is_first:
            one.load_tensors(shared)


def _recorded(run: Run) -> dict[int, int]:
    return recorded_positions(read_metrics(run.folder / "metrics.jsonl"))


def _measure_speed(net: Ant, config: TrainConfig, precision: str, ranks: Ranks) -> float:
    """Seconds per training token of all ranks together; the slowest decides."""
    if ranks.alone:
        return measure_speed(net, config, precision)
    share = None if config.batch_size is None else max(1, config.batch_size // ranks.size)
    seconds = measure_speed(net, dataclasses.replace(config, batch_size=share), precision)
    (slowest,) = ranks.most(round(seconds * 1e15))
    return slowest / 1e15 / ranks.size


def _make_trainer(run: Run, settings: Settings, net: Ant, data: TrainingData, ranks: Ranks) -> Trainer:
    loader = data.make_loader(settings, net.device, ranks)
    eos_token_id = data.train.eos_token_id if settings.document_mask else None
    callbacks = _make_callbacks(run, settings, net, data, ranks.size)
    return Trainer(settings, net, loader, eos_token_id, callbacks, ranks)


def _make_callbacks(
    run: Run, settings: Settings, net: Ant, data: TrainingData, devices: int
) -> list[Callback]:
    """In the order in which they act; the checkpoint comes behind all that have a state."""
    peak = peak_flops(net.device, settings.precision)
    config = run.config
    track = [Tracker(run, config.track)] if config.track != "none" else []
    every = settings.checkpoint_every if config.push_every == "save" else 0
    push = [PushCheckpoints(run, config.push, every)] if config.push else []
    scores = [_score_tasks(config, settings, net, data)] if config.eval_tasks else []
    counts = data.train.counts
    average = AverageWeights(net, settings.ema) if settings.ema else None
    words_per_token = counts["words"] / counts["tokens"]
    words = ExportAtWords(
        run.folder / "babylm", config.checkpoint_words, settings, words_per_token, data.tokenizer
    )
    return [
        AddLoopLoss(settings),
        ShortContext(settings),
        *([average] if average else []),
        *track,
        MetricsFile(run),
        TensorBoard(run),
        TrainingProgress(
            settings.steps,
            lambda context: 3 * sum(count_flops(net.config, context).values()),
            None if peak is None else peak * devices,
            None if data.mixture else bytes_per_token(data.train),
        ),
        Validate(settings, data.held_out, average),
        EarlyStop(settings.early_stop),
        *scores,
        words,
        WriteSamples(settings, data.tokenizer, data.validation),
        SaveCheckpoints(settings, run, data.tokenizer.fingerprint),
        *push,
    ]


def _score_tasks(config: TrainConfig, settings: Settings, net: Ant, data: TrainingData) -> ScoreTasks:
    return ScoreTasks(
        net,
        data.tokenizer,
        config.eval_tasks,
        config.eval_data_dir,
        config.eval_items,
        config.eval_tasks_every,
        settings.steps,
    )


def _resume(run: Run, trainer: Trainer, tokenizer: Tokenizer) -> None:
    """Load the run's newest good checkpoint, where it has any. Rank 0 reads it: other machines may not see
    it."""

    def load() -> dict[str, Any] | None:
        folder = latest_checkpoint(run.folder)
        if folder is None:
            if checkpoints(run.checkpoints):
                raise UserError(f"no checkpoint in {run.checkpoints} is good: start a new run")
            return None
        state = load_checkpoint(folder, trainer.net, trainer.optimizer, trainer.callbacks)
        if not tokenizer.has_fingerprint(state["tokenizer"]):
            raise UserError(f"{folder} was trained with another tokenizer than {run.tokenizer}")
        return state

    ranks = trainer.ranks
    state = ranks.first(load)
    if state is None:
        return
    if not ranks.alone:
        weights = ranks.share_tensors(dict(trainer.net.state_dict()))
        if not ranks.is_first:
            trainer.net.load_state_dict(weights)
        _share_moments(trainer)
    try:
        trainer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # of a state.json without a manifest
        raise UserError(f"the {STATE} of {run.folder} is damaged ({first_line(error)})") from None


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
    copy = run.folder / "mixture.toml"
    if run.mixture and not copy.exists():
        write_file(copy, Path(run.config.data[0]).read_bytes())
    if not run.has_tokenizer:
        data.tokenizer.save(run.tokenizer, run.model.max_position_embeddings)


def _introduce(run: Run, settings: Settings, net: Ant, ranks: Ranks) -> None:
    where = {"cpu": "the CPU", "mps": "Apple's GPU, untried,"}.get(
        net.device.type
    ) or torch.cuda.get_device_name(net.device)
    where = where if ranks.alone else f"{ranks.size} x {where}"
    limit = f", within {run.minutes:g} minutes" if run.minutes else ""
    parameters, unique = sum(p.numel() for p in net.parameters()), run.data["train"]["tokens"]
    console = stderr()
    if run.initial is not None:
        console.print(run.initial.describe(run.model), markup=False)
    console.print(
        f"{run.folder}: {run.config.model}, {parameters:,} parameters, on {where} in {settings.precision}\n"
        f"{settings.steps:,} steps of {settings.batch_size} x {settings.sequence_length:,} tokens = "
        f"{settings.tokens:,}{limit}, {count_epochs(settings.tokens, unique)} epochs of the {unique:,} in "
        f"{', '.join(run.config.data) if run.mixture else run.shards}\n{run.ran['kernels']}",
        markup=False,
    )


def _fit(run: Run, trainer: Trainer, stop: Stop) -> str | None:
    try:
        return trainer.fit(stop)
    except NonFiniteLoss as error:
        good = latest_checkpoint(run.folder)
        rescue = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
        raise NonFiniteLoss(f"{error}; {rescue}. Start again with a lower learning rate") from None


def _finish(run: Run, trainer: Trainer, data: TrainingData) -> Evaluation:
    with _interruptible(run, "the trained model is saved"):
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
        again = f"ant5m train --resume {run.folder}" if run.claimed else "the same command"
        stderr().print(f"{what}. Go on with: {again}", markup=False)
        raise
