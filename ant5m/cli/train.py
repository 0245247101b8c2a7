"""`ant5m train`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ant5m.cli import PEER_LOST, guarded
from ant5m.console import stderr
from ant5m.train.config import TrainConfig


@dataclass
class Train:
    """Pre-train a model, and leave a run folder with checkpoints, metrics, a Hugging Face export and a
    report.

    Without any flag it does everything on text that every machine has: it trains a tokenizer, packs the text
    and trains ant-5m for about ten minutes. Ctrl-C, SIGTERM and --max-minutes save a checkpoint before they
    stop; --resume continues exactly there.

    Examples:

        ant5m train
        ant5m train --model ant-5m-fit --data data/books --steps 10000
        ant5m train --data data/books --max-minutes 60 --out runs/books
        ant5m train --resume runs/books
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def run(self) -> None:
        from ant5m.train.launch import count_processes, launch

        count = count_processes(self.config)
        code = launch(_work, self.config, count) if count > 1 else _train(self.config)
        if code:
            sys.exit(code)


def _work(config: TrainConfig) -> int:
    """`_train` as one of several processes. Its exit code is returned, and all is over; where it ends with an
    error because it lost another process, all are started again."""
    codes = []
    code = guarded(lambda: codes.append(_train(config)))
    if code == PEER_LOST:
        sys.exit(code)
    return code or codes[0]


def _train(config: TrainConfig) -> int:
    from ant5m.train.pretraining import pretrain
    from ant5m.train.stop import EXIT_CODES

    console = stderr()
    result = pretrain(config)
    if result.stopped:
        console.print(
            f"{result.stopped} at step {result.step:,} of {result.steps:,}, saved. Go on with: "
            f"ant5m train --resume {result.run}",
            markup=False,
        )
        return EXIT_CODES[result.stopped]
    assert result.evaluation
    numbers = f"validation loss {result.evaluation.loss:.4f}"
    if result.evaluation.bits_per_byte is not None:
        numbers += f", {result.evaluation.bits_per_byte:.4f} bits per byte"
    console.print(f"done: {numbers}. Read {result.run / 'report.md'}", markup=False)
    return 0
