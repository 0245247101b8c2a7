"""RMSNorm and the products with what it gives, without gradients."""

import torch

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, dense, empty, matrix, stride

_FEW_TOKENS = 32
"""what vectors hold at once: for fewer, joining weights takes longer than their products"""


def rms_norm_linear(x, norm, eps, weights):
    """rms_norm(x [..., D], norm [D], eps) times weights [R_i, D]^T side by side, without gradients."""
    rows, norm, weights = matrix(x.detach().float()), dense(norm), [dense(weight) for weight in weights]
    if len(rows) >= _FEW_TOKENS:
        weights = [torch.cat(weights)]
    width, first = sum(map(len, weights)), 0
    out = empty(rows, len(rows), width)
    for weight in weights:
        part = out[:, first : first + len(weight)]
        _cpu.rms_norm_linear(
            tokens=rows.shape[0],
            dim=rows.shape[1],
            rows=len(weight),
            x=address(rows),
            x_row=stride(rows),
            eps=eps,
            norm=address(norm),
            weight=address(weight),
            out=address(part),
            out_row=stride(part),
            threads=torch.get_num_threads(),
        )
        first += len(weight)
    return out.view(*x.shape[:-1], width).to(x.dtype)
