"""An exponential moving average of the weights, taken while they are trained."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ant5m.errors import UserError
from ant5m.model.ant import Ant
from ant5m.train.callback import Callback


class AverageWeights(Callback):
    """Keeps the average, fp32 beside the weights, behind every step that counts.

    Step n moves it by 1 - min(decay, (1 + n) / (10 + n)) of the way to the weights, so that in a short run it
    does not remember how they began. (The rule of TensorFlow's `ExponentialMovingAverage` with
    `num_updates`.)
    """

    name = "average"
    everywhere = True

    def __init__(self, net: Ant, decay: float):
        self._parameters = dict(net.named_parameters())
        self._decay = decay
        self.weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        """by the names of the parameters"""
        self._count = torch.zeros((), device=net.device)

    @torch.no_grad()
    def on_update(self, counted: Tensor) -> None:
        rate = counted * (1 - ((1 + self._count) / (10 + self._count)).clamp(max=self._decay))
        self._count += counted
        averages: list[Tensor] = list(self.weights.values())
        weights: list[Tensor] = list(self._parameters.values())
        if rate.device.type == "cpu":
            for average, weight in zip(averages, weights, strict=True):
                average.lerp_(weight, rate)  # one pass; the three below take 10 times as long here
            return
        # A few launches for all tensors; torch has no such lerp with a number on the device.
        differences = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(differences, rate)
        torch._foreach_add_(averages, differences)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights meanwhile. They are copied: a CUDA graph knows where the
        model's are."""
        trained = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._copy(self.weights)
        try:
            yield
        finally:
            self._copy(trained)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    def tensors(self) -> dict[str, Tensor]:
        return {"count": self._count, **self.weights}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        here = self.tensors()
        if {name: x.shape for name, x in tensors.items()} != {name: x.shape for name, x in here.items()}:
            raise UserError("the average of the weights is of another model: start a new run")
        for name, x in here.items():
            x.copy_(tensors[name])
