"""The head: logits = hidden weight^T, their cross-entropy and both gradients, a chunk of rows at a time.

The products are cuBLAS's, which uses the tensor cores of every device; between them one kernel turns a chunk
of logits in place into softmax - one-hot. So the gradients are computed beside the loss, from logits that are
made once and never kept. They are divided by the number of targets only in the backward pass (softmax -
one-hot is at most 1 in size), so fp16 needs no loss scale here; both are summed in fp32. Nothing is skipped,
and nothing waits for the device.
"""

import torch
import triton
import triton.language as tl

from ant5m.kernels.triton.layout import compute_dtype

# Logits alive at once. Few large chunks: 4,096 rows of 16,384 entries in 16 bits.
CHUNK_BYTES = 128 << 20
# As it is, fp16 would lose probabilities below 2^-24. A power of two, so that it changes nothing else.
_FP16_SCALE = 2.0**12


@triton.jit
def _load(p_row, o, V, stride):
    b_z = tl.load(p_row + o, mask=o < stride, other=0.0).to(tl.float32)
    return tl.where(o < V, b_z, -float("inf"))


@triton.jit
def _store(p_row, o, stride, b_delta):
    tl.store(p_row + o, b_delta.to(p_row.dtype.element_ty), mask=o < stride)


@triton.jit
def softmax_gradient_kernel(
    p_logits,
    p_targets,
    p_losses,
    V,
    stride,
    ignore_index,
    scale,
    GRADIENT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of logits -> its loss, and in its place scale * (softmax - one-hot); 0 where it does not count.

    A row has room for `stride` entries, a multiple of 16, so that vectors of entries are read and written;
    what lies behind entry V is never used. A target that is no entry makes the loss NaN.
    """
    i_n = tl.program_id(0).to(tl.int64)
    target = tl.load(p_targets + i_n)
    p_row = p_logits + i_n * stride
    o = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(p_losses + i_n, 0.0)
        if GRADIENT:
            for first in range(0, V, BLOCK):
                _store(p_row, first + o, stride, tl.zeros((BLOCK,), tl.float32))
    else:
        known = (target >= 0) & (target < V)
        # Read before the first reduction: its barrier comes before what other threads write there.
        at_target = tl.load(p_row + target, mask=known, other=float("nan")).to(tl.float32)
        if WHOLE:
            b_z = _load(p_row, o, V, stride)
            highest = tl.max(b_z, 0)
            b_exp = tl.exp(b_z - highest)
            total = tl.sum(b_exp, 0)
            if GRADIENT:
                _store(p_row, o, stride, b_exp * (scale / total))
        else:
            b_max = tl.full((BLOCK,), -1e30, tl.float32)
            b_sum = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, V, BLOCK):
                b_z = _load(p_row, first + o, V, stride)
                b_new = tl.maximum(b_max, b_z)
                b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_z - b_new)
                b_max = b_new
            highest = tl.max(b_max, 0)
            total = tl.sum(b_sum * tl.exp(b_max - highest), 0)
            if GRADIENT:
                for first in range(0, V, BLOCK):
                    b_z = _load(p_row, first + o, V, stride)
                    _store(p_row, first + o, stride, tl.exp(b_z - highest) * (scale / total))
        tl.store(p_losses + i_n, highest - at_target + tl.log(total))
        if GRADIENT:
            tl.debug_barrier()
            delta = (tl.exp(at_target - highest) / total - 1.0) * scale
            tl.store(p_row + target, delta.to(p_logits.dtype.element_ty), mask=known)


@torch.library.custom_op("ant5m_triton::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss; fp32 gradients times count * _scale(dtype), empty where not needed; count of targets."""
    loss, grad_hidden, grad_weight, count = _outputs(
        hidden, weight, targets, ignore_index, dtype, need_hidden, need_weight
    )
    hidden, weight, targets = hidden.to(dtype), weight.to(dtype), targets.contiguous()
    tokens, vocab = len(hidden), len(weight)
    padded = triton.cdiv(vocab, 64) * 64
    chunk = max(1, min(tokens, CHUNK_BYTES // (padded * dtype.itemsize)))
    buffer = torch.empty(chunk, padded, dtype=dtype, device=hidden.device)
    losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    if need_weight:
        grad_weight.zero_()
    tile = _tile(padded)
    with torch.cuda.device_of(hidden):
        for start in range(0, tokens, chunk):
            x = hidden[start : start + chunk]
            logits = torch.mm(x, weight.T, out=buffer[: len(x), :vocab])
            softmax_gradient_kernel[(len(x),)](
                logits,
                targets[start:],
                losses[start:],
                vocab,
                padded,
                ignore_index,
                _scale(dtype),
                GRADIENT=need_hidden or need_weight,
                **tile,
            )
            if need_hidden:
                _product(logits, weight, grad_hidden[start : start + chunk])
            if need_weight:
                grad_weight += _product(logits.T, x)
    torch.sum((targets != ignore_index).float(), 0, out=count).clamp_(min=1)
    torch.div(losses.sum(), count, out=loss)
    return loss, grad_hidden, grad_weight, count


@_forward.register_fake
def _outputs(hidden, weight, targets, ignore_index, dtype, need_hidden, need_weight):
    loss, count = (torch.empty((), dtype=torch.float32, device=hidden.device) for _ in range(2))
    grad_hidden = torch.empty(hidden.shape if need_hidden else 0, dtype=torch.float32, device=hidden.device)
    grad_weight = torch.empty(weight.shape if need_weight else 0, dtype=torch.float32, device=hidden.device)
    return loss, grad_hidden, grad_weight, count


def _save(ctx, inputs, output):
    hidden, weight, _, _, ctx.dtype, *ctx.needs = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx, grad, *_):
    *grads, count = ctx.saved_tensors
    scale = grad / (count * _scale(ctx.dtype))
    scaled = (
        (x * scale).to(dtype) if need else None
        for x, dtype, need in zip(grads, ctx.dtypes, ctx.needs, strict=True)
    )
    return *scaled, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100):
    grad = torch.is_grad_enabled()
    needs = grad and hidden.requires_grad, grad and weight.requires_grad
    return _forward(hidden, weight, targets, ignore_index, compute_dtype(hidden), *needs)[0]


def _tile(padded: int) -> dict[str, int | bool]:
    # 32 entries a thread, so that a row stays in registers; what no block has threads for is read twice.
    if padded <= 32_768:
        block = triton.next_power_of_2(padded)
        return {"WHOLE": True, "BLOCK": block, "num_warps": max(4, block // 1_024)}
    return {"WHOLE": False, "BLOCK": 8_192, "num_warps": 16}


def _product(a, b, out=None):
    """a b in fp32, written to `out` if given: tensor cores sum 16-bit products in fp32, and so it stays."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":
        a, b = a.float(), b.float()
        return torch.mm(a, b, out=out if out is not None else a.new_empty(a.shape[0], b.shape[1]))
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _scale(dtype):
    return _FP16_SCALE if dtype == torch.float16 else 1.0
