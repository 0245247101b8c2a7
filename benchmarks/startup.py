"""Processor seconds that commands take to start: what other work on the machine does not change much.

    python benchmarks/startup.py                    # the shortest of five tries each
    python benchmarks/startup.py --model runs/books

A row is a new process. `import torch` is the floor of all that compute; `generate` is a command up to its
first token.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ant5m.data.tokenizer import train_tokenizer
from ant5m.files import write_json
from ant5m.model.ant import Ant
from ant5m.model.config import PRESETS
from ant5m.model.weights import save_model

MAIN = "from ant5m.cli import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a trained model (default: ant-5m with random weights)")
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(flags.model or write_model(Path(folder)), flags.tries)
    if flags.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, seconds in figures.items():
            print(f"{name:24} {seconds:.2f} s")


def measure(model: str, tries: int) -> dict[str, float]:
    """{what: the least processor seconds} of each; they are interleaved."""
    token = ("generate", model, "--prompt", "the", "--max-new-tokens", "1", "--device", "cpu")
    commands = {
        "import torch": ("import torch",),
        "ant5m --help": (MAIN, "--help"),
        "ant5m train --help": (MAIN, "train", "--help"),
        "ant5m generate": (MAIN, *token),
    }
    tried = [{name: processor_seconds(*words) for name, words in commands.items()} for _ in range(tries)]
    return {name: min(one[name] for one in tried) for name in commands}


def processor_seconds(code: str, *words: str) -> float:
    """Of all threads of a process that runs `code`."""
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(words)} failed")
    return usage.ru_utime + usage.ru_stime


def write_model(folder: Path) -> str:
    torch.manual_seed(0)
    config = PRESETS["ant-5m"]
    save_model(Ant(config), folder)
    write_json(folder / "config.json", config.to_dict())
    train_tokenizer(["the ant carries the leaf home to the other ants"] * 9, vocab_size=270).save(folder)
    return str(folder)


if __name__ == "__main__":
    main()
