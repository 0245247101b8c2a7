"""Starts the processes of a run on one machine, one for each GPU, through torch's elastic launcher.

Inside torchrun nothing is started: whoever has several machines starts one process a GPU that way.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from ant5m import torchrun
from ant5m.device import installed_memory
from ant5m.errors import UserError
from ant5m.files import read_json
from ant5m.schema import Count
from ant5m.train.config import DEFAULT_MODEL, TrainConfig
from ant5m.train.run import latest_run, next_folder

MAX_RESTARTS = 3
PROCESS_BYTES = 300_000_000
"""of a process that has imported torch"""
STOPPED = "ANT5M_STOPPED"
"""environment variable that keeps a process from starting again when the launcher was stopped: its exit
code"""


def count_processes(config: TrainConfig) -> int:
    """How many processes `ant5m train` starts: one for each GPU of the machine, or `config.processes`; 1:
    none beside itself.

    Raises `UserError` when the GPUs differ, there are fewer than processes, or SLURM started several
    processes that know nothing of each other.
    """
    if torchrun.is_parent():
        return 1
    _refuse_lonely_tasks(config)
    device, count = _asked(config)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in ("auto", "cuda") or gpus == 0:
        count = count or 1
        if count > 1 and device not in ("auto", "cpu"):
            raise UserError(
                f"--device {device} is one device: leave out --processes {count}, or take --device cpu"
            )
        if count * PROCESS_BYTES > installed_memory():
            needed, there = count * PROCESS_BYTES / 1e9, installed_memory() / 1e9
            raise UserError(
                f"--processes {count:,} need {needed:,.1f} GB without a model, this machine has {there:,.1f}"
            )
        return count
    count = count or gpus
    if count > gpus:
        raise UserError(f"--processes {count} needs as many GPUs, and this machine has {gpus}")
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    if len(set(names)) > 1:
        listed = ", ".join(f"cuda:{number} is a {name}" for number, name in enumerate(names))
        raise UserError(
            f"the GPUs differ, and all would wait for the slowest ({listed}): choose one with --device "
            "cuda:0, or equal ones with CUDA_VISIBLE_DEVICES"
        )
    return count


@dataclass
class _Kept:
    device: str = "auto"
    processes: Count | None = None


@dataclass
class _RunFile:
    """What is relied upon of the config.json of a resumed run."""

    train: _Kept


def _asked(config: TrainConfig) -> tuple[str, int | None]:
    """Device and number of processes, of a resumed run those that it was begun with, where it says so."""
    device, count = config.device, config.processes
    folder = latest_run() if str(config.resume) == "latest" else config.resume
    if folder is None or not (folder / "config.json").is_file():
        return device, count
    kept = read_json(folder / "config.json", _RunFile).train
    return (kept.device if device == "auto" else device), (kept.processes if count is None else count)


def _refuse_lonely_tasks(config: TrainConfig) -> None:
    """Each would train a model of its own: nobody means that, unless each names its own folder."""
    tasks = torchrun.slurm_tasks()
    if tasks == 1:
        return
    told = (
        f"SLURM started {tasks} tasks, and each would train a model by itself: let srun start one torchrun "
        "on each machine (--ntasks-per-node 1), as docs/how-to/several-gpus.md shows"
    )
    if config.out is None and config.resume is None:
        raise UserError(told)
    warnings.warn(told, stacklevel=2)


def launch(train: Callable[[TrainConfig], int], config: TrainConfig, count: int) -> int:
    """Call `train` (a function of a module) in `count` processes, and return rank 0's exit code.

    Where one dies all are started again, `MAX_RESTARTS` times, and continue from the last checkpoint. A
    `train` that returns, with whatever code, is not called again.
    """
    if config.resume is None:
        config = dataclasses.replace(config, out=config.out or next_folder(config.model or DEFAULT_MODEL))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Each process would take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    plan = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
        signals_to_handle="SIGQUIT",
    )
    try:
        with _passing_signals_on():
            codes: dict[int, int] = elastic_launch(plan, _work)(train, config)
            return codes[0]
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        raise UserError(
            f"process {rank} of {count} died ({_describe(failure.exitcode)}), and again after {MAX_RESTARTS} "
            "restarts; what it wrote is above. Continue from the last checkpoint with: "
            f"ant5m train --resume {config.resume or config.out}"
        ) from None


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[None]:
    """Send SIGINT and SIGTERM to the processes, which save and return. torch's launcher would wait for them
    to end without taking what they return."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.environ[STOPPED] = str(128 + number)
        for process in multiprocessing.active_children():
            if process.pid:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        os.environ.pop(STOPPED, None)
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(train: Callable[[TrainConfig], int], config: TrainConfig) -> int:
    if STOPPED in os.environ:  # before this process was ready to save
        return int(os.environ[STOPPED])
    # A terminal sends Ctrl-C to its whole group, and the launcher passes it on: once is enough.
    os.setsid()
    # torch's own signal for a launcher that is gone is SIGINT, several times: that stops without saving.
    _prctl_pr_set_pdeathsig(signal.SIGTERM)
    done = threading.Event()
    threading.Thread(target=_stop_with_parent, args=(done,), daemon=True).start()
    try:
        return train(config)
    finally:
        done.set()


def _stop_with_parent(done: threading.Event) -> None:
    """A launcher that was killed, or whose terminal was closed, passes nothing on: save and stop then, and do
    not wait for it to take the result."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        done.wait()
        os._exit(1)


def _describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
