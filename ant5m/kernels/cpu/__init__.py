"""The ops in C++ (csrc/cpu): fp32 on the CPU, one source compiled for AVX-512, AVX2 and anything else.

bf16 tensors are widened on the way in and rounded on the way out. What lies between is fp32, but the factors
of products are rounded to bf16 where the processor multiplies it, as they are for fp32 tensors in
`bf16_products`; sums are in fp32.

Each op is an `autograd.Function` around calls of `ant5m._cpu`, in a file of its own. What the C++ takes for
granted of strides is made true here: a last dimension without gaps. What shapes fit is checked before, by
`ant5m.kernels.ops`. The number of threads is torch's; results do not depend on it.
"""

import sys

from ant5m._cpu import release_memory
from ant5m.kernels.cpu.attention import attention, tree_attention
from ant5m.kernels.cpu.bf16 import bf16_products, multiplies_bf16
from ant5m.kernels.cpu.linear import linear
from ant5m.kernels.cpu.linear_cross_entropy import linear_cross_entropy
from ant5m.kernels.cpu.logsumexp_argmax import logsumexp_argmax
from ant5m.kernels.cpu.mlp import mlp
from ant5m.kernels.cpu.post_attention import fused_post_attention
from ant5m.kernels.cpu.qk_norm_rope import qk_norm_rope
from ant5m.kernels.cpu.qkv_rope import qkv_rope
from ant5m.kernels.cpu.rms_norm import rms_norm
from ant5m.kernels.cpu.rms_norm_linear import rms_norm_linear
from ant5m.kernels.cpu.rope import rope
from ant5m.kernels.cpu.support import (
    needs_fp32_products,
    needs_no_gradients,
    unsupported_reason,
)
from ant5m.kernels.cpu.swiglu import swiglu
from ant5m.kernels.cpu.threads import share_threads
from ant5m.kernels.dispatch import Implementation

__all__ = [
    "IMPLEMENTATIONS",
    "attention",
    "bf16_products",
    "fused_post_attention",
    "linear",
    "linear_cross_entropy",
    "logsumexp_argmax",
    "mlp",
    "multiplies_bf16",
    "qk_norm_rope",
    "qkv_rope",
    "release_memory",
    "rms_norm",
    "rms_norm_linear",
    "rope",
    "swiglu",
    "tree_attention",
    "unsupported_reason",
]


def implementations(platform: str) -> dict[str, Implementation]:
    """On Apple's processors torch multiplies with Accelerate, which may use units that no instruction set
    shows: there the ops that are products above all are used where they are timed to be faster."""
    by_clock = platform == "darwin"
    return {
        "rms_norm": Implementation(rms_norm),
        "rope": Implementation(rope),
        "qk_norm_rope": Implementation(qk_norm_rope),
        "qkv_rope": Implementation(qkv_rope, needs_fp32_products),
        "attention": Implementation(attention),
        "tree_attention": Implementation(lambda q, k, v, mask: tree_attention(q, k, v, mask.ends)),
        "swiglu": Implementation(swiglu),
        "mlp": Implementation(mlp, needs_fp32_products, timed=by_clock),
        "linear": Implementation(linear, needs_fp32_products, timed=by_clock),
        "rms_norm_linear": Implementation(rms_norm_linear, needs_no_gradients),
        "fused_post_attention": Implementation(fused_post_attention, needs_no_gradients),
        "linear_cross_entropy": Implementation(linear_cross_entropy, timed=by_clock),
        "logsumexp_argmax": Implementation(logsumexp_argmax),
    }


IMPLEMENTATIONS = implementations(sys.platform)

share_threads()
