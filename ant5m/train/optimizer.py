"""AdamW, or Muon for the hidden matrices with AdamW for the rest, stepped as one optimizer."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from ant5m import kernels
from ant5m.errors import UserError


class Muon(torch.optim.Muon):
    """torch's Muon with the Newton-Schulz iteration run on all matrices of one shape together.

    torch's own step takes the matrices one by one and always in bfloat16. A tiny model has many small
    matrices, so that is thousands of launches on a GPU; and a processor without bfloat16 products needs 1.3 s
    a step where this takes 0.05 s. State and options are torch's; updates are scaled by
    sqrt(max(1, rows / columns)). Source: Jordan et al., "Muon", 2024.
    """

    product_dtype = torch.float32
    """of the iteration's products"""
    found_inf: torch.Tensor | None = None
    """As torch's AdamW takes it: 0-dim, 1 where this step must change nothing, else 0."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameters in _by_shape(group["params"]).values():
                self._step_together(group, parameters)

    def _step_together(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self._momentum(p) for p in parameters]
        rate = group["lr"]
        if self.found_inf is not None:
            # A mean of the momentum and itself is itself, and a rate of 0 leaves the weights.
            skipped = self.found_inf > 0
            gradients = [torch.where(skipped, m, g) for m, g in zip(momenta, gradients, strict=True)]
            rate = rate * (1 - self.found_inf)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        orthogonal = newton_schulz(
            torch.stack(updates).to(self.product_dtype),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
        ).to(parameters[0].dtype)
        rows, columns = parameters[0].shape
        orthogonal *= rate * -(max(1.0, rows / columns) ** 0.5)
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_add_(parameters, list(orthogonal.unbind()))

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: torch.Tensor = state["momentum_buffer"]
        return buffer


def newton_schulz(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Nearly orthogonal matrices U V^T of `matrices` [N, R, C] = U S V^T, one by one, in their dtype."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """One optimizer over all parameters of a model.

    Args:
        net: the model; 1-D parameters get no weight decay.
        kind: "adamw", or "muon": Muon on the matrices of the layers, AdamW on embedding, head and norms.
        learning_rate: of AdamW. muon_learning_rate: of Muon. weight_decay: decoupled, for both.
        precision: of the training; where it is not "fp32", Muon's iteration multiplies in bfloat16 if the
            device does, which takes half the time.

    States are fp32 and live beside their parameters.
    """

    def __init__(
        self,
        net: nn.Module,
        kind: str = "adamw",
        learning_rate: float = 4e-3,
        muon_learning_rate: float = 0.014,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        precision: str = "fp32",
    ):
        if kind not in ("adamw", "muon"):
            raise ValueError(f"there is no optimizer '{kind}' (use adamw or muon)")
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        hidden = {name for name, p in self.parameters.items() if kind == "muon" and is_hidden(name, p)}
        rest = [p for name, p in self.parameters.items() if name not in hidden]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=betas,
            eps=eps,
            fused=True,
            capturable=True,
        )
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if hidden:
            matrices = [self.parameters[name] for name in sorted(hidden)]
            muon = Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay)
            if precision != "fp32" and kernels.multiplies_bf16(matrices[0].device):
                muon.product_dtype = torch.bfloat16
            self.parts.append(muon)
        # On the device, as is the factor: a CUDA graph would keep a number of Python's for ever.
        device = next(iter(self.parameters.values())).device
        self._rates = [torch.tensor(part.param_groups[0]["lr"], device=device) for part in self.parts]

    def step(self, factor: float | torch.Tensor = 1.0, found_inf: torch.Tensor | None = None) -> None:
        """Update the parameters from their gradients, with every learning rate times `factor`.

        Args:
            factor: a number, or 0-dim fp32 on the parameters' device.
            found_inf: 0-dim fp32; 1: the gradients are NaN or infinite, and nothing may change; 0: an update
                as usual. None: the caller knows that it is one.
        """
        for part, rate in zip(self.parts, self._rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.found_inf = found_inf  # type: ignore[attr-defined]
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state, flat: "<parameter>/<state>" -> tensor."""
        states = {parameter: state for part in self.parts for parameter, state in part.state.items()}
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in states.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`. Raises `UserError` when they belong to another model or optimizer."""
        if not tensors:
            return  # saved before the first step
        states: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for label, value in tensors.items():
            name, _, key = label.rpartition("/")
            states[name][key] = value
        for part in self.parts:
            keys = {"momentum_buffer"} if isinstance(part, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            for group in part.param_groups:
                for parameter in group["params"]:
                    self._load_one(part, parameter, states, keys)
        if states:
            raise UserError(f"the optimizer state holds unknown parameters: {', '.join(sorted(states)[:3])}")

    def _load_one(
        self,
        part: torch.optim.Optimizer,
        parameter: torch.Tensor,
        states: dict[str, dict[str, torch.Tensor]],
        keys: set[str],
    ) -> None:
        name = next(name for name, p in self.parameters.items() if p is parameter)
        state = states.pop(name, {})
        moments = [value for key, value in state.items() if key != "step"]
        if state.keys() != keys or any(value.shape != parameter.shape for value in moments):
            raise UserError(f"the optimizer state does not fit {name}: it is of another model or optimizer")
        part.state[parameter] = {
            key: value.to(parameter.device, torch.float32) for key, value in state.items()
        }


def clip(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients to a joint 2-norm of at most `max_norm` (0: never); returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix of a layer."""
    return parameter.ndim == 2 and ".layers." in f".{name}"


def _by_shape(parameters: list[torch.Tensor]) -> dict[torch.Size, list[torch.Tensor]]:
    """The parameters that have a gradient."""
    same = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            same[parameter.shape].append(parameter)
    return same
