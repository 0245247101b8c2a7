"""What the `config.json` of a run folder says, for whoever reads a run without training it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ant5m.files import read_json
from ant5m.schema import Count, CountOrZero, Share


@dataclass
class Asked:
    """Of the run's settings."""

    data: str | list[str] | None = None
    """text or a folder of shards; before ant5m 0.2 one name, of shards"""
    document_mask: bool = False
    init: str | None = None
    """the model that it began with"""
    model: str | None = None
    """its name"""
    steps: Count | None = None
    batch_size: Count | None = None
    sequence_length: Count | None = None
    short_context: CountOrZero = 0
    short_share: Share = 0.0


@dataclass
class Counts:
    """Of the training split."""

    tokens: Count
    words: CountOrZero
    bytes: Count


@dataclass
class Data:
    train: Counts | None = None


@dataclass
class Mixed:
    """Of a run on a mixture."""

    sources: dict[str, str]
    """the folder of shards of each"""


@dataclass
class Ran:
    device: str = ""


@dataclass
class Versions:
    ant5m: str = ""
    commit: str = ""


@dataclass
class RunFile:
    """What is relied upon, all of it optional: other programs' folders have a config.json, too."""

    model: dict[str, Any] = field(default_factory=dict)
    train: Asked | None = None
    data: Data = field(default_factory=Data)
    ran: Ran = field(default_factory=Ran)
    versions: Versions = field(default_factory=Versions)
    shards: str | None = None
    """their folder; None: in the run folder, or (before ant5m 0.2) among the settings"""
    mixture: Mixed | None = None

    def shards_folders(self, run: Path) -> list[Path]:
        """The folder of the shards of `run`, whose file this is; of a mixture that of each source."""
        if self.mixture:
            return [Path(folder) for folder in self.mixture.sources.values()]
        named = self.shards or (self.train.data if self.train else None)
        return [Path(named) if isinstance(named, str) else run / "data"]


def read_run_file(run: Path) -> RunFile | None:
    """None where the run has none. Raises `UserError` that names the field where it is damaged."""
    path = run / "config.json"
    return read_json(path, RunFile) if path.exists() else None
