"""A model's shape by the name of a preset, or from a JSON file of any of three kinds."""

from pathlib import Path
from typing import Any

from ant5m.errors import UserError
from ant5m.files import read_json
from ant5m.model.config import PRESETS, ModelConfig
from ant5m.model.huggingface import config_from_huggingface


def load_config(name: str | Path) -> ModelConfig:
    """A preset by its name, or a config by its JSON file (ours, a run's `config.json`, or Hugging Face's).

    Raises `UserError` when there is no such preset or file, or when its values are not possible.
    """
    if str(name) in PRESETS:
        return PRESETS[str(name)]
    path = Path(name)
    if not path.exists() and path.suffix != ".json":
        raise UserError(f"there is no preset or config file '{name}' (presets: {', '.join(PRESETS)})")
    if path.is_dir():
        path = path / "config.json"
    values = read_json(path, dict[str, Any])
    try:
        return config_from_json(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def config_from_json(values: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` from any of the three kinds of file that `load_config` reads."""
    if "model_type" in values:
        return config_from_huggingface(values)
    if isinstance(values.get("model"), dict):
        return ModelConfig.from_dict(values["model"])
    return ModelConfig.from_dict(values)
