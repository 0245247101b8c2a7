"""The dynamic loss scale that fp16 needs."""

import torch

# 2^16, the usual start, overflows on the first steps of a small model, and every overflow is a lost step.
FIRST_SCALE = 2.0**13
GROWTH_INTERVAL = 2_000


class LossScaler:
    """Dynamic loss scale for fp16: halves after an overflow, doubles after `GROWTH_INTERVAL` good steps.

    Its state (`scale` fp32 and `good_steps` int64, 0-dim) is on `device`, where it is also decided, so that
    no step waits for the host. Source: Micikevicius et al., "Mixed Precision Training", 2017.
    """

    def __init__(self, device: torch.device | str = "cpu", scale: float = FIRST_SCALE, good_steps: int = 0):
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.good_steps = torch.tensor(good_steps, device=device)

    def unscale(self, gradients: list[torch.Tensor]) -> None:
        """Divide the gradients by the scale, in place."""
        torch._foreach_mul_(gradients, 1 / self.scale)

    def update(self, finite: torch.Tensor) -> None:
        """Learn whether the last step's gradients were finite: 1 or 0, 0-dim."""
        # Arithmetic instead of `where`: no constant has to come over from the host.
        self.good_steps.add_(1).mul_(finite.to(self.good_steps.dtype))
        grown = self.good_steps == GROWTH_INTERVAL
        self.scale.mul_(0.5 + 0.5 * finite).mul_(1 + grown)
        self.good_steps.mul_(~grown)

    def state_dict(self) -> dict[str, float]:
        """Plain values for JSON, which are also arguments of a new scaler."""
        return {"scale": self.scale.item(), "good_steps": int(self.good_steps)}
