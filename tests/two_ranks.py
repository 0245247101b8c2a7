"""One of several processes that train together, for tests: `python two_ranks.py RANK SIZE PORT JOBS.json`.

A job is {"config": ..., "spoil": how, "stop_at": step}: "nan" makes the loss of rank 1 NaN at its third step,
"overflow" makes its gradients overflow fp16 there; at `stop_at` rank 1 gets SIGTERM; "seconds": of a step, by
each rank's clock, which moves in no other way; with "limit" it is no signal that comes at `stop_at`, but the
time of rank 1 is over; with "clock" rank 1, unlike rank 0, finds the MLP to be too slow.
Prints one JSON line for each job: the result, or the error.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from ant5m import kernels
from ant5m.errors import UserError
from ant5m.kernels import check, registry
from ant5m.train import TrainConfig, pretrain, pretraining
from ant5m.train.step import Step
from ant5m.train.trainer import Trainer

now = [1_000.0]


def main(rank: int, size: int, port: int, jobs: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    for number, job in enumerate(json.loads(jobs.read_text())):
        os.environ["MASTER_PORT"] = str(port + number)
        Step._loss = spoilt(Step._loss, job.get("spoil", ""), call=3 if rank == 1 else 0)
        seconds = job["seconds"][rank] if "seconds" in job else 0.0
        if seconds:
            time.monotonic = lambda: now[0]
            pretraining.measure_speed = lambda *_: 1 / 128
        stop_at = job.get("stop_at") if rank == 1 else None
        Trainer._train_step = disturbed(Trainer._train_step, stop_at, seconds, "limit" in job)
        if "clock" in job:
            time_the_mlp("it takes longer" if rank == 1 else None)
        try:
            result = pretrain(TrainConfig.from_dict(job["config"]))
            told = [result.step, result.stopped, result.evaluation and result.evaluation.nats]
            told += [kernels.choices()] if "clock" in job else []
        except UserError as error:
            told = str(error)
        Step._loss, Trainer._train_step = Step._loss.original, Trainer._train_step.original
        print(json.dumps(told), flush=True)


def spoilt(original, how, call):
    """`Step._loss` that goes wrong the `call`-th time."""
    factor = {"": 1.0, "nan": float("nan"), "overflow": 1e30}[how]
    calls = []

    def loss(self, *arguments):
        calls.append(0)
        return original(self, *arguments) * (factor if len(calls) == call else 1.0)

    loss.original = original
    return loss


def time_the_mlp(found):
    """As if it were used on the CPU only where a stopwatch, which says this, finds it faster."""
    implementations = registry.load("cpu").IMPLEMENTATIONS
    implementations["mlp"] = dataclasses.replace(implementations["mlp"], timed=True)
    check.Trial.too_slow = lambda trial: found


def disturbed(original, step, seconds, limit):
    """`Trainer._train_step` that takes so long by `now`, and during which SIGTERM comes at this step, or with
    `limit` the end of its time."""

    def train_step(self, stop):
        now[0] += seconds
        if self.step + len(self._unread) == step:
            if limit:
                stop.deadline = time.monotonic()
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, stop)

    train_step.original = original
    return train_step


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
