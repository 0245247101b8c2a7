"""The settings of a run in a TOML file."""

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

from ant5m.errors import UserError
from ant5m.files import read_toml
from ant5m.train.config import TrainConfig

WIDTH = 100


def read_config(path: Path) -> TrainConfig:
    """The settings that a TOML file has: those of the flags, with underscores; the rest is at its default.

    Raises `UserError` when it cannot be read, or names or holds something impossible.
    """
    values = read_toml(path)
    try:
        return TrainConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def write_config(config: TrainConfig, texts: dict[str, str]) -> str:
    """The content of a file that `read_config` reads: every setting below its text, and what is left open as
    a comment."""
    lines = []
    for field in dataclasses.fields(config):
        lines += [f"# {line}" for line in textwrap.wrap(texts[field.name], WIDTH)]
        value = config.to_dict()[field.name]
        lines += [f"# {field.name} =" if value is None else f"{field.name} = {_toml(value)}", ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """JSON spells strings, numbers, truths and lists of them as TOML does, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
