"""The run folder: where everything of one training run lies, and its config.json."""

import contextlib
import dataclasses
import itertools
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ant5m.errors import UserError
from ant5m.files import is_unused, lock, read_json, remove_asides, write_json
from ant5m.model.config import ModelConfig
from ant5m.model.config_file import load_config
from ant5m.ranks import Ranks
from ant5m.train.config import TrainConfig
from ant5m.train.settings import override


@dataclass
class Run:
    """One run: its folder, what it was asked to do, and the model's shape."""

    folder: Path
    config: TrainConfig
    model: ModelConfig
    data: dict[str, Any]
    """what is known of the training data, once it is there"""
    ran: dict[str, str] = dataclasses.field(default_factory=dict)
    """the device with its precision, the kernels, and what a stopwatch chose among them; of the last call"""
    _held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack, repr=False)
    _claimed: bool = False

    @classmethod
    def create(cls, config: TrainConfig) -> "Run":
        """A run that is not on the disk yet. Raises `UserError` when `config.out` has other content."""
        model = load_config(config.model)
        if config.sequence_length is not None:
            # A model's context is what it was trained on.
            model = dataclasses.replace(model, max_position_embeddings=config.sequence_length)
        folder = config.out or next_folder(config.model)
        _refuse_content(folder)
        return cls(folder, _absolute(config), model, {})

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
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        run = cls(folder, _absolute(config), model, values.data)
        run._hold()
        return run

    def claim(self) -> None:
        """Make the folder, before the first thing is written to it, and keep other processes out of it until
        `release`.

        Where another run has taken it meanwhile the next number is taken, or `UserError` is raised if it was
        named. A folder in which a killed process left nothing whole is taken over.
        """
        while not self._claimed:
            try:
                self._hold()
                _refuse_content(self.folder)
            except UserError:
                self.release()
                if self.config.out is not None:
                    raise
                self.folder = next_folder(self.config.model)

    def _hold(self) -> None:
        self._held.enter_context(lock(self.folder))
        self._claimed = True
        remove_asides(self.folder)

    def release(self) -> None:
        """Let other processes have the folder."""
        self._held.close()
        self._claimed = False

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
        """Given by the user, or made from the built-in text inside the run folder."""
        return self.config.data or self.folder / "data"

    def write(self) -> None:
        """Write config.json: everything needed to repeat the run."""
        write_json(self.folder / "config.json", {**self.to_dict(), "versions": versions()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the folder is not among them."""
        return {
            "model": self.model.to_dict(),
            "train": self.config.to_dict(),
            "data": self.data,
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
        return cls(Path(values["folder"]), config, model, values["data"], values["ran"])


@dataclass
class _RunFile:
    """The parts of a run's config.json that a resumed run needs."""

    model: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


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
    return next(folder for n in itertools.count(1) if not (folder := Path("runs") / f"{name}-{n}").exists())


def _refuse_content(folder: Path) -> None:
    if not is_unused(folder):
        raise UserError(
            f"{folder} exists already: continue it with --resume {folder}, or choose another --out"
        )


def _absolute(config: TrainConfig) -> TrainConfig:
    """With data and tokenizer where they lie, so that the run can be used from another folder."""
    paths = {name: path.absolute() for name in ("data", "tokenizer") if (path := getattr(config, name))}
    return dataclasses.replace(config, **paths)
