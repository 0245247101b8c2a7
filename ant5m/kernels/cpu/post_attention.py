"""What follows attention in a layer, in one piece and without gradients."""

import torch

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, dense, empty, matrix, stride


def fused_post_attention(residual, attn_out, weight, norm, eps, gate, up, down):
    """total + mlp(rms_norm(total, norm, eps), gate, up, down), total = residual + attn_out @ weight^T.

    residual [..., D], attn_out [..., R], weight [D, R]; without gradients.
    """
    rows, attn_rows = matrix(residual.detach().float()), matrix(attn_out.detach().float())
    weight, norm, gate, up, down = (dense(w) for w in (weight, norm, gate, up, down))
    out = empty(rows, *rows.shape)
    _cpu.fused_post_attention(
        shape=(*rows.shape, len(gate)),
        inner=attn_rows.shape[1],
        attn_out=address(attn_rows),
        attn_out_row=stride(attn_rows),
        residual=address(rows),
        residual_row=stride(rows),
        weight=address(weight),
        eps=eps,
        norm=address(norm),
        gate=address(gate),
        up=address(up),
        down=address(down),
        out=address(out),
        threads=torch.get_num_threads(),
    )
    return out.view(residual.shape).to(residual.dtype)
