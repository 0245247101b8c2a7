"""How long a training will take on a device, from a few steps that are measured now."""

from dataclasses import dataclass

import torch

from ant5m.device import choose_precision, describe_device
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.train.config import TrainConfig
from ant5m.train.plan import measure_speed


@dataclass(frozen=True)
class Forecast:
    device: str
    """with its precision, for people"""
    precision: str
    tokens_per_second: float

    @classmethod
    def measure(cls, model: ModelConfig, device: torch.device, config: TrainConfig) -> "Forecast":
        """Of a model with random weights, trained as `config` says; takes seconds."""
        precision = choose_precision(config.precision, device)
        net = Ant(model).to(device)
        seconds = measure_speed(net, config, precision)
        return cls(describe_device(device, precision), precision, 1 / seconds)

    def seconds(self, tokens: int) -> float:
        """Of so many training tokens, without validation and checkpoints."""
        return tokens / self.tokens_per_second


def describe_duration(seconds: float) -> str:
    """40 s, 12 min, 3.5 hours, 2.1 days."""
    for unit, size, digits in (("days", 86_400, 1), ("hours", 3_600, 1), ("min", 60, 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.{digits}f} {unit}"
    return f"{seconds:.0f} s"
