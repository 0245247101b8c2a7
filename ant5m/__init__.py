"""Ant-5M: train tiny language models fast, and say honestly what came out."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ant5m.model.ant import Ant
    from ant5m.model.checkpoint import load
    from ant5m.model.config import ModelConfig
    from ant5m.model.config_file import load_config

__version__ = "0.1.0"
__all__ = ["Ant", "ModelConfig", "load", "load_config"]

_HOME = {
    "Ant": "ant5m.model.ant",
    "ModelConfig": "ant5m.model.config",
    "load_config": "ant5m.model.config_file",
    "load": "ant5m.model.checkpoint",
}


def __getattr__(name: str):
    # Imported on first use, so that the command line can print its help without waiting for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'ant5m' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
