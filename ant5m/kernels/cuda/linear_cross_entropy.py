"""The head by chunks (`lm_head_loss`) around the kernel of csrc/cuda/linear_cross_entropy.cu."""

import torch

from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.cuda.vectors import bits, vector
from ant5m.kernels.lm_head_loss import in_place, make_linear_cross_entropy

# Entries in 16 bits that a thread keeps in registers, and most threads. 64 take 32 registers.
_ENTRIES, _THREADS = 64, 1_024
MAX_VOCAB = _ENTRIES * _THREADS
"""entries in fp16; half as many in fp32"""


def softmax_gradient(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    vocab: int,
    ignore_index: int,
    scale: float,
    gradient: bool,
    z_loss: float,
) -> None:
    """See `ant5m.kernels.lm_head_loss.SoftmaxGradient`; without `z_loss`, which `IMPLEMENTATIONS` refuses."""
    kind = bits(logits.dtype)
    threads = 256
    while threads < _THREADS and logits.shape[1] * kind > threads * _ENTRIES * 16:
        threads *= 2
    launch(
        "linear_cross_entropy.cu",
        "softmax_gradient",
        {
            "VOCAB": vocab,
            "STRIDE": logits.stride(0) if len(logits) > 1 else logits.shape[1],
            "THREADS": threads,
            "X": kind,
            "GRADIENT": int(gradient),
            "SIZE": hidden.shape[1],
            "VECTOR": min(4, vector(hidden.shape[1], hidden, weight)),  # 8 would take more registers
        },
        (len(logits),),
        threads,
        *(logits, hidden, weight, targets, losses, ignore_index, scale),
    )


linear_cross_entropy = make_linear_cross_entropy(
    "ant5m_cuda::linear_cross_entropy", in_place(softmax_gradient)
)
