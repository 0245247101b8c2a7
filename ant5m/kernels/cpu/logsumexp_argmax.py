"""Of the head's logits, without gradients: log(sum(exp)) and the largest entry."""

import torch

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, gapless, stride


def logsumexp_argmax(hidden, weight):
    """Of the logits hidden [N, D] @ weight [V, D]^T: log(sum(exp)) [N], fp32, and the first
    largest entry [N]."""
    hidden, weight = hidden.detach().float(), weight.detach().float()
    hidden, weight = gapless(hidden), gapless(weight)
    logsumexp = hidden.new_empty(len(hidden))
    argmax = torch.empty_like(logsumexp, dtype=torch.int64)
    _cpu.logsumexp_argmax(
        tokens=hidden.shape[0],
        dim=hidden.shape[1],
        vocab=len(weight),
        hidden=address(hidden),
        hidden_row=stride(hidden),
        weight=address(weight),
        weight_row=stride(weight),
        logsumexp=address(logsumexp),
        argmax=address(argmax),
        threads=torch.get_num_threads(),
    )
    return logsumexp, argmax
