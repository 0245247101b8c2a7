"""Training: the loop and what it owns."""

from typing import TYPE_CHECKING, Any

from ant5m.train.config import TrainConfig

if TYPE_CHECKING:
    from ant5m.train.pretraining import Result, pretrain

__all__ = ["Result", "TrainConfig", "pretrain"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line needs TrainConfig only, and not torch, to print its help.
    if name not in ("pretrain", "Result"):
        raise AttributeError(f"module 'ant5m.train' has no attribute {name!r}")
    from ant5m.train import pretraining

    return getattr(pretraining, name)
