"""The run folder: where everything of one training run lies, and its config.json."""

import contextlib
import dataclasses
import itertools
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ant5m.data.corpus import is_no_path
from ant5m.data.mixture import Mixture
from ant5m.errors import UserError
from ant5m.files import is_unused, lock, read_json, remove_asides, write_json
from ant5m.model.checkpoint import find_run
from ant5m.model.config import ModelConfig
from ant5m.model.config_file import load_config
from ant5m.ranks import Ranks
from ant5m.train.config import DEFAULT_MODEL, TrainConfig
from ant5m.train.initial import Initial
from ant5m.train.settings import override

RUNS = Path("runs")
"""where run folders are made when nobody names one"""


@dataclass
class Run:
    """One run: its folder, what it was asked to do, and the model's shape."""

    folder: Path
    config: TrainConfig
    model: ModelConfig
    data: dict[str, Any]
    """what is known of the training data, once it is there"""
    packed: Path | None = None
    """folder of the shards; None: not made yet, or made of the built-in text inside the run folder"""
    minutes: float | None = None
    """time limit of the whole run, which has to end with a finished model; None: its length was asked for
    otherwise"""
    mixture: Mixture | None = None
    """what is mixed, each source with the folder of its shards, in place of `packed`"""
    ran: dict[str, str] = dataclasses.field(default_factory=dict)
    """the device with its precision, the kernels, and what a stopwatch chose among them; of the last call"""
    initial: Initial | None = None
    """what it begins with; None: random weights, or it has begun, or rank 0 knows"""
    _held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack, repr=False)
    claimed: bool = False
    """whether this process holds the folder"""

    @classmethod
    def create(cls, config: TrainConfig, initial: Initial | None = None) -> "Run":
        """A run that is not on the disk yet. Raises `UserError` when `config.out` has other content."""
        model = load_config(config.model or DEFAULT_MODEL)
        if initial is not None and config.model is None:
            model = initial.net.config
        name = DEFAULT_MODEL if initial is None else (find_run(initial.folder) or initial.folder).name
        config = dataclasses.replace(config, model=config.model or name)
        if config.rope_theta is not None:
            model = dataclasses.replace(model, rope_theta=config.rope_theta)
        if config.sequence_length is not None:
            # A model's context is what it was trained on.
            model = dataclasses.replace(model, max_position_embeddings=config.sequence_length)
        folder = config.out or next_folder(config.model or DEFAULT_MODEL)
        _refuse_content(folder)
        return cls(folder, _absolute(config), model, {}, initial=initial)

    @classmethod
    def open(cls, folder: Path, flags: TrainConfig) -> "Run":
        """The run in `folder`, with what `flags` override."""
        if not folder.is_dir():
            raise UserError(f"{folder} is not a run folder: it does not exist")
        file = folder / "config.json"
        try:
            values = read_json(file, _RunFile)
        except UserError as error:
            raise UserError(f"{error}: --resume takes a folder made by ant5m train") from None
        try:
            config = override(TrainConfig.from_dict(values.train), flags)
            model = ModelConfig.from_dict(values.model)
            mixture = Mixture.from_dict(values.mixture) if values.mixture and not flags.data else None
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        packed = Path(values.shards) if values.shards and not flags.data else None
        run = cls(folder, _absolute(config), model, values.data, packed, values.minutes, mixture)
        run._hold()
        return run

    def claim(self) -> None:
        """Make the folder, before the first thing is written to it, and keep other processes out of it until
        `release`.

        Where another run has taken it meanwhile the next number is taken, or `UserError` is raised if it was
        named. A folder in which a killed process left nothing whole is taken over.
        """
        while not self.claimed:
            try:
                self._hold()
                _refuse_content(self.folder)
            except UserError:
                self.release()
                if self.config.out is not None:
                    raise
                self.folder = next_folder(self.config.model or DEFAULT_MODEL)

    def _hold(self) -> None:
        self._held.enter_context(lock(self.folder))
        self.claimed = True
        remove_asides(self.folder)

    def release(self) -> None:
        """Let other processes have the folder."""
        self._held.close()
        self.claimed = False

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def has_tokenizer(self) -> bool:
        """Whether all of it is there: after a kill or a full disk it may be a part."""
        return all((self.tokenizer / f"{name}.json").exists() for name in ("tokenizer", "tokenizer_config"))

    @property
    def shards(self) -> Path:
        """The folder of the training data."""
        return self.packed or self.folder / "data"

    @property
    def tokenizer_source(self) -> Path:
        """The folder of the tokenizer: the run's own, once there is one, else the one to copy."""
        if self.has_tokenizer:
            return self.tokenizer
        shards = Path(self.mixture.data[0]) if self.mixture else self.shards
        return self.config.tokenizer or shards / "tokenizer"

    def write(self) -> None:
        """Write config.json: everything needed to repeat the run."""
        write_json(self.folder / "config.json", {**self.to_dict(), "versions": versions()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the folder is not among them."""
        return {
            "model": self.model.to_dict(),
            "train": self.config.to_dict(),
            "data": self.data,
            "shards": str(self.packed) if self.packed else None,
            "mixture": self.mixture.to_dict() if self.mixture else None,
            "minutes": self.minutes,
            "ran": self.ran,
        }

    @classmethod
    def of_rank_0(cls, make: "Callable[[], Run]", ranks: Ranks) -> "Run":
        """The run that rank 0 makes."""
        made: list[Run] = []

        def describe() -> dict[str, Any]:
            made.append(make())
            return {"folder": str(made[0].folder.absolute()), **made[0].to_dict()}

        values = ranks.first(describe)
        if made:
            return made[0]
        config, model = TrainConfig.from_dict(values["train"]), ModelConfig.from_dict(values["model"])
        packed = Path(values["shards"]) if values["shards"] else None
        mixture = Mixture.from_dict(values["mixture"]) if values["mixture"] else None
        folder, data, minutes = Path(values["folder"]), values["data"], values["minutes"]
        return cls(folder, config, model, data, packed, minutes, mixture, values["ran"])


@dataclass
class _RunFile:
    """The parts of a run's config.json that a resumed run needs."""

    model: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    shards: str | None = None
    minutes: float | None = None
    mixture: dict[str, Any] | None = None


def versions() -> dict[str, str]:
    """Versions of what took part, and the commit where the package lies in a git checkout."""
    from importlib.metadata import version

    import ant5m

    found = {"ant5m": ant5m.__version__, "python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "tokenizers", "numpy")}
    commit = _commit(Path(ant5m.__file__).parent)
    return found | ({"commit": commit} if commit else {})


def _commit(folder: Path) -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # An installed package may lie inside somebody else's checkout.
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent.resolve():
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def next_folder(model: str) -> Path:
    """runs/MODEL-NUMBER, the first that is not there."""
    name = re.sub(r"[^\w.-]", "-", Path(model).stem if model.endswith(".json") else Path(model).name)
    return next(folder for n in itertools.count(1) if not (folder := RUNS / f"{name}-{n}").exists())


def find_runs(folder: Path) -> list[Path]:
    """The run folders right below `folder`, the one that was written to last at the end."""
    runs = [path.parent for path in folder.glob("*/config.json") if not path.parent.name.startswith(".")]
    return sorted(runs, key=_written)


def latest_run(folder: Path = RUNS) -> Path:
    """Raises `UserError` where there is none."""
    runs = find_runs(folder)
    if not runs:
        raise UserError(f"there is no run in {folder}: name the one to continue, --resume FOLDER")
    return runs[-1]


def _written(run: Path) -> float:
    files = (run / name for name in ("config.json", "metrics.jsonl"))
    return max(path.stat().st_mtime for path in files if path.exists())


def _refuse_content(folder: Path) -> None:
    if not is_unused(folder):
        raise UserError(
            f"{folder} exists already: continue it with --resume {folder}, or choose another --out"
        )


def _absolute(config: TrainConfig) -> TrainConfig:
    """With data and tokenizer where they lie, so that the run can be used from another folder."""
    data = tuple(name if is_no_path(name) else os.path.abspath(name) for name in config.data)
    tokenizer = config.tokenizer.absolute() if config.tokenizer else None
    init = os.path.abspath(config.init) if config.init else None
    return dataclasses.replace(config, data=data, tokenizer=tokenizer, init=init)
