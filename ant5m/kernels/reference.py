"""The ops in plain PyTorch: their specification, and the backend that runs everywhere.

Written to be read, and to keep in memory only what the backward pass needs. Every op takes float64 too: that
is the truth that the other backends are measured against.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Logits alive at once in the head. On two CPU cores 16 MiB (256 rows of 16,384 entries) was fastest.
HEAD_CHUNK_BYTES = 16 << 20
# A GPU would wait for the launches: 65,536 rows are 256 such chunks.
GPU_HEAD_CHUNK_BYTES = 128 << 20


class _RMSNorm(torch.autograd.Function):
    # Keeps x and one number a row; autograd through the plain formula would keep three tensors of x's size.
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(_statistics_dtype(x))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(_compute_dtype(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit = x.to(scale.dtype) * scale
        grad = grad.to(scale.dtype)
        grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad_unit = grad * weight
        along = (grad_unit * unit).mean(-1, keepdim=True)
        return grad_unit.sub_(unit.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


def rms_norm(x, weight, eps=1e-5, residual=None):
    if residual is None:
        return _RMSNorm.apply(x, weight, eps)
    total = x + residual
    return _RMSNorm.apply(total, weight, eps), total


class _Rope(torch.autograd.Function):
    # A rotation's gradient is the rotation back, so nothing of q's size is kept.
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x, cos, sin):
    wide = _statistics_dtype(x)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    first, second = x.to(wide).chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, -1)
    torch.addcmul(first * cos, second, sin, value=-1, out=out_first)
    torch.addcmul(second * cos, first, sin, out=out_second)
    return out


def rope(q, k, cos, sin):
    return _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)


def attention(q, k, v, starts=None):
    seen = None if starts is None else _seen(starts)
    if q.is_cuda and q.shape[2] != k.shape[2]:
        # Else there is a T x T matrix where torch has no flash attention: in fp32, on a T4 before mid-2026.
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def _seen(starts):
    """[B, 1, T, T]: whether a position (row) sees another (column)."""
    position = torch.arange(starts.shape[1], device=starts.device)
    return ((position <= position[:, None]) & (position >= starts[:, :, None]))[:, None]


class _SwiGLU(torch.autograd.Function):
    # Keeps its two inputs and nothing else.
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        # Side by side, so that the gradient of a product that made both is one tensor already.
        grad_gate, grad_up = grad.new_empty(*grad.shape[:-1], 2 * grad.shape[-1]).chunk(2, -1)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up)
        return grad_gate, grad_up.mul_(grad)


def swiglu(gate, up):
    return _SwiGLU.apply(gate, up)


class _LinearCrossEntropy(torch.autograd.Function):
    # The gradients are computed beside the loss, chunk by chunk, so that the logits are made once and never
    # kept. They stay unscaled (softmax - one-hot, at most 1 in size) until backward, so fp16 needs no loss
    # scale here.
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, z_loss):
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = (x.to(_compute_dtype(hidden)) for x in (hidden, weight))
        wide = _statistics_dtype(hidden)
        counted = targets != ignore_index
        count = counted.sum().clamp(min=1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        chunk_bytes = GPU_HEAD_CHUNK_BYTES if hidden.is_cuda else HEAD_CHUNK_BYTES
        rows = max(1, min(hidden.shape[0], chunk_bytes // (weight.shape[0] * wide.itemsize)))
        buffer = hidden.new_empty(rows, weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            mask = counted[chunk]
            index = torch.where(mask, targets[chunk], 0)[:, None]
            logits = torch.mm(hidden[chunk], weight.T, out=buffer[: len(mask)]).to(wide)
            # logsumexp = max - log(softmax at the max): exact however small the target's probability is.
            m, where = logits.max(-1, keepdim=True)
            target_logit = logits.gather(-1, index)
            delta = torch.softmax(logits, -1, out=logits)
            lse = m - delta.gather(-1, where).log_()
            losses = lse - target_logit
            total += losses.squeeze(-1).masked_fill_(~mask, 0).sum()
            if not (need_hidden or need_weight):
                continue
            if z_loss:
                delta *= 1 + 2 * z_loss * lse
            delta.scatter_add_(-1, index, torch.full_like(losses, -1))
            delta = delta.to(hidden.dtype)
            # Ignored rows are zeroed in the narrow [rows, D] factors, not in the wide [rows, V] one.
            if grad_hidden is not None:
                torch.mm(delta, weight, out=grad_hidden[chunk]).mul_(mask[:, None])
            if grad_weight is not None:
                _add_product(grad_weight, delta.T, hidden[chunk] * mask[:, None])
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(ctx.dtypes[0])
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None, None


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, z_loss=None):
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, z_loss)


def _add_product(total, a, b):
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def _compute_dtype(x):
    # Autocast does not reach into an op of our own, so its dtype is applied by hand.
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _statistics_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32
