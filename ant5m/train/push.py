"""Keeping a run on the Hugging Face hub while it trains, so that it survives the machine, and resuming it.

In the repository `last-checkpoint/` is a run folder with the newest checkpoint alone. It is replaced in one
commit: an upload that is cut off leaves the one before.
"""

import os
import queue
import shutil
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ant5m.errors import UserError
from ant5m.export import hub
from ant5m.files import new_folder
from ant5m.model.checkpoint import CHECKPOINTS, latest_checkpoint
from ant5m.train.callback import Periodic
from ant5m.train.run import Run

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer

PLACE = "last-checkpoint"
PREFIX = "hub:"
WAIT_SECONDS = 600.0
"""at the end of a run, for the upload of its last checkpoint"""


class PushCheckpoints(Periodic):
    """Uploads the newest checkpoint in the background, every `every` steps (0: never) and when the training
    ends or stops. Stands behind `SaveCheckpoints` in the list.

    A checkpoint that comes while another is under way waits, and gives way to a newer one. Whatever fails is
    a warning: the training goes on, and the next upload has everything again.
    """

    def __init__(self, run: Run, repo: str, every: int):
        super().__init__(every)
        self._run, self._repo = run, repo
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wanted = threading.Event()
        self._ending = False
        # Not the client's own pool: Python waits for that at its end, however long an upload hangs.
        self._thread = threading.Thread(target=self._work, daemon=True)

    def on_start(self, trainer: "Trainer") -> None:
        super().on_start(trainer)
        hub.hide_progress()
        self._thread.start()

    def run(self, trainer: "Trainer") -> None:
        self._tell_failures()
        self._wanted.set()

    def on_end(self, trainer: "Trainer") -> None:
        self._ending = True
        self._wanted.set()
        self._thread.join(WAIT_SECONDS)
        if self._thread.is_alive():
            warnings.warn(f"the last checkpoint is not on the hub yet: {self._retry}", stacklevel=2)
        self._tell_failures()

    @property
    def _retry(self) -> str:
        return f"ant5m train --resume {self._run.folder} uploads it again"

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            last = self._ending
            try:
                push_checkpoint(self._run.folder, self._repo)
            except UserError as error:
                self._failures.put(str(error))
            except Exception as error:
                self._failures.put(f"{type(error).__name__}")
            if last:
                return

    def _tell_failures(self) -> None:
        while not self._failures.empty():
            warnings.warn(f"the upload to {self._repo} failed: {self._failures.get()}", stacklevel=3)


def push_checkpoint(run: Path, repo: str) -> None:
    """Upload what it takes to resume a run elsewhere: its newest good checkpoint, settings, tokenizer and
    metrics, and its data where they lie in the run folder."""
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        return
    # Linked aside: the training may remove the checkpoint meanwhile.
    with tempfile.TemporaryDirectory(dir=run, prefix=".push.") as aside:
        folder = Path(aside)
        for name in ("config.json", "metrics.jsonl"):
            if (run / name).exists():
                shutil.copyfile(run / name, folder / name)
        for name in ("tokenizer", "data"):
            if (run / name).is_dir():
                _link(run / name, folder / name)
        _link(checkpoint, folder / CHECKPOINTS / checkpoint.name)
        hub.push(folder, repo, PLACE, delete=f"{CHECKPOINTS}/**")


def _link(source: Path, target: Path) -> None:
    """A copy of a folder whose files never change; linked where the disk can."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copyfile(one, other)

    shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns(".*"))


def fetch_run(name: str, out: Path | None) -> Path:
    """The folder of a run that was pushed to the hub (`hub:OWNER/NAME`), downloaded to `out` or runs/NAME."""
    repo = name.removeprefix(PREFIX)
    hub.check_name(repo)
    folder = out or Path("runs") / repo.partition("/")[2]
    if folder.exists():
        raise UserError(f"{folder} exists already: --resume {folder} continues that, or choose another --out")
    with new_folder(folder) as aside:
        hub.fetch(repo, PLACE, aside)
        if not (aside / PLACE / "config.json").is_file():
            raise UserError(f"{repo} holds no run: ant5m train --push puts one there, in {PLACE}/")
        for entry in (aside / PLACE).iterdir():
            entry.rename(aside / entry.name)
        (aside / PLACE).rmdir()
        shutil.rmtree(aside / ".cache", ignore_errors=True)  # the client's own
    return folder
