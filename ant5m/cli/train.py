"""`ant5m train`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ant5m.cli import PEER_LOST, field_texts, guarded
from ant5m.console import stderr
from ant5m.train.config import TrainConfig
from ant5m.train.config_file import read_config, write_config


@dataclass
class Train:
    """Pre-train a model, and leave a run folder with checkpoints, metrics, a Hugging Face export and a
    report.

    Without any flag it does everything on text that every machine has: it trains a tokenizer, packs the text
    and trains ant-5m for about ten minutes; with --data on your own text. Ctrl-C and SIGTERM save a
    checkpoint before they stop; --resume continues exactly there.

    Examples:

        ant5m train
        ant5m train --model ant-5m-best --data books/ --out runs/books
        ant5m train --model ant-5m-fit --data data/books --steps 10000
        ant5m train --data books/ more.jsonl.zst --max-minutes 60
        ant5m train --resume runs/books
        ant5m train --print-config > run.toml
        ant5m train --config run.toml --seed 2
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    config_file: Annotated[Path | None, tyro.conf.arg(name="config", metavar="PATH")] = None
    """TOML file with any of these settings, as --print-config writes it; flags go before it"""
    print_config: bool = False
    """write such a file, with these settings, to stdout, and train nothing"""

    @classmethod
    def defaults(cls, flags: list[str]) -> "Train":
        """What holds for the flags that are not among these: what the file that `--config` names says."""
        for number, flag in enumerate(flags):
            name, given, value = flag.partition("=")
            if name == "--config" and (given or number + 1 < len(flags)):
                path = Path(value if given else flags[number + 1])
                return cls(read_config(path), path)
        return cls()

    def run(self) -> None:
        if self.print_config:
            sys.stdout.write(write_config(self.config, field_texts(TrainConfig)))
            return
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
