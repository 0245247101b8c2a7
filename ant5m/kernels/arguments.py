"""What GPU kernels take for granted about tensors: rows without gaps, and autocast's dtype."""

import torch


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last dimension has no gaps, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as [N, D] without gaps inside a row; a view where the strides allow it."""
    return dense(x.reshape(-1, x.shape[-1]))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """x's, or that of an autocast, which does not reach into an op of our own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
