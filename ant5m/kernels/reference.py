"""The ops in plain PyTorch: their specification, and the backend that runs everywhere.

Written to be read, and to keep in memory only what the backward pass needs. Every op takes float64 too: that is
the truth that the other backends are measured against.
"""

import torch
import torch.nn.functional as F

# Rows of logits alive at once in the head. 512 x 16,384 fp32 logits are 32 MiB.
HEAD_CHUNK_BYTES = 32 << 20


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """The reference runs everywhere."""
    return None


class _RMSNorm(torch.autograd.Function):
    # Keeps x and one number a row; autograd through the plain formula would keep three tensors of x's size.
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(_statistics_dtype(x))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
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
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x, cos, sin):
    wide = _statistics_dtype(x)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    first, second = x.to(wide).chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, -1)
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))
    return out


def rope(q, k, cos, sin):
    return _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)


def attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


class _SwiGLU(torch.autograd.Function):
    # Keeps its two inputs and nothing else.
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        # d silu / d gate = sigmoid * (1 + gate - silu)
        grad_gate = (gate + 1).sub_(silu).mul_(sigmoid).mul_(up).mul_(grad)
        return grad_gate, silu.mul_(grad)


def swiglu(gate, up):
    return _SwiGLU.apply(gate, up)


class _LinearCrossEntropy(torch.autograd.Function):
    # The gradients are computed beside the loss, chunk by chunk, so that the logits are made once and never kept.
    # They stay unscaled (softmax - one-hot, at most 1 in size) until backward, so fp16 needs no loss scale here.
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index):
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = (x.to(_compute_dtype(hidden)) for x in (hidden, weight))
        wide = _statistics_dtype(hidden)
        counted = targets != ignore_index
        count = counted.sum().clamp(min=1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows = max(1, HEAD_CHUNK_BYTES // (weight.shape[0] * wide.itemsize))
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            mask = counted[chunk]
            index = torch.where(mask, targets[chunk], 0)[:, None]
            log_prob = torch.log_softmax(torch.mm(hidden[chunk], weight.T).to(wide), -1)
            total -= log_prob.gather(-1, index).squeeze(-1).masked_fill_(~mask, 0).sum()
            if not (need_hidden or need_weight):
                continue
            delta = log_prob.exp_()
            delta.scatter_add_(-1, index, torch.full_like(index, -1, dtype=wide))
            delta = delta.masked_fill_(~mask[:, None], 0).to(hidden.dtype)
            if need_hidden:
                torch.mm(delta, weight, out=grad_hidden[chunk])
            if need_weight:
                grad_weight += (delta.T @ hidden[chunk]).to(wide)
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(ctx.dtypes[0])
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100):
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index)


def _compute_dtype(hidden):
    # Autocast does not reach products that write into a given tensor, so its dtype is applied by hand.
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _statistics_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32
