"""The ops in C++ (csrc/cpu): fp32 on the CPU, one source compiled for AVX-512, AVX2 and anything else.

bf16 tensors are widened on the way in and rounded on the way out. What lies between is fp32, but the factors
of products are rounded to bf16 where the processor multiplies it, as they are for fp32 tensors in
`bf16_products`; sums are in fp32.

Each op is an `autograd.Function` around calls of `ant5m._cpu` with addresses, shapes and strides. What the
C++ takes for granted is made true here: dtype, device, shapes, a last dimension without gaps. The number of
threads is torch's; results do not depend on it. A shape or dtype that does not fit raises `ValueError`.
"""

import contextlib
import contextvars
import ctypes
import math
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu

MLP_SIZE = 256
"""channels; above, the weights and their gradients leave L2, and products of whole matrices are faster"""


FEW_TOKENS = 32
"""what vectors hold at once; for fewer torch's products are faster"""

_FEWEST = 16
"""tokens; of fewer, products read the weights once and pack nothing (csrc/cpu/skinny_gemm.h)"""

_WITHOUT_GRADIENTS = ("norm_product", "finish_layer")

_bf16 = contextvars.ContextVar("bf16", default=False)

LARGE = _cpu.LARGE
"""numbers of a tensor for which memory is kept"""


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """None when `op` can run on these tensors, else the reason."""
    for x in tensors[:3] if op == "attention" else tensors:
        if x.device.type != "cpu":
            return f"the tensors are on {x.device.type}"
        if x.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes fp32 and bf16, not {str(x.dtype).removeprefix('torch.')}"
    if op in ("mlp", *_WITHOUT_GRADIENTS) and tensors and tensors[0].shape[-1] > MLP_SIZE:
        return f"it takes up to {MLP_SIZE} channels, not {tensors[0].shape[-1]}"
    if op == "linear" and tensors and _count(tensors[0]) < FEW_TOKENS and torch.is_grad_enabled():
        return f"for fewer than {FEW_TOKENS} tokens torch's products are faster"
    if op in ("mlp", "query_key_value", "linear", *_WITHOUT_GRADIENTS) and torch.is_autocast_enabled("cpu"):
        return "its products are in fp32, whatever autocast says"
    if op == "attention" and tensors and tensors[0].shape[1] != tensors[1].shape[1]:
        return f"it takes as many keys as queries, not {tensors[1].shape[1]} and {tensors[0].shape[1]}"
    return None


def multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 in the instruction set in use."""
    return _cpu.instruction_set() == "avx512_bf16"


@contextlib.contextmanager
def bf16_products():
    """Within it, ops with products that are to give gradients multiply in bf16. What comes in and goes out
    stays in fp32, and so do sums, softmax, norms and rotation."""
    token = _bf16.set(True)
    try:
        yield
    finally:
        _bf16.reset(token)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        ctx.set_materialize_grads(False)
        rows, weight = _matrix(x), weight.contiguous()
        out, scale = _empty(x, *x.shape), _empty(x, len(rows))
        total = None if residual is None else _empty(x, *x.shape)
        other = None if residual is None else _matrix(residual)
        _cpu.rms_norm_forward(
            *(*rows.shape, eps, *_rows(rows), *_rows(other), _address(weight)),
            *(_address(out), _address(total), _address(scale), torch.get_num_threads()),
        )
        ctx.save_for_backward(rows if total is None else total, weight, scale)
        return out if total is None else (out, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total=None):
        x, weight, scale = ctx.saved_tensors
        if grad is None:
            return grad_total, None, None, grad_total
        shape = grad.shape
        x, grad = _matrix(x), _matrix(grad)
        grad_total = None if grad_total is None else _matrix(grad_total)
        grad_x, grad_weight = _empty(x, *shape), _empty(x, *weight.shape)
        _cpu.rms_norm_backward(
            *(*x.shape, *_rows(x), _address(weight), _address(scale), *_rows(grad), *_rows(grad_total)),
            *(_address(grad_x), _address(grad_weight), torch.get_num_threads()),
        )
        return grad_x, grad_weight, None, grad_x if ctx.needs_input_grad[3] else None


def rms_norm(x, weight, eps=1e-5, residual=None):
    _check_dtypes(x, weight, *(() if residual is None else (residual,)))
    _check(weight.shape == x.shape[-1:], "weight {} does not fit x {}", weight, x)
    fits = residual is None or residual.shape == x.shape
    _check(fits, "residual {} does not fit x {}", residual, x)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if residual is None:
        return _RMSNorm.apply(x.float(), weight.float(), eps, None).to(dtype)
    out, total = _RMSNorm.apply(x.float(), weight.float(), eps, residual.float())
    return out.to(dtype), total.to(torch.promote_types(x.dtype, residual.dtype))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):
        cos, sin = ctx.saved_tensors
        return *_rotate(grad_q, grad_k, cos, sin, -1.0), None, None


def _rotate(q, k, cos, sin, sign):
    q, k = _gapless(q), _gapless(k)
    return _rotate_into(_empty(q, *q.shape), _empty(k, *k.shape), q, k, cos, sin, sign)


def _rotate_into(out_q, out_k, q, k, cos, sin, sign):
    _cpu.rope(
        *(_attention_shape(q, k), _heads(q), _heads(k), _address(cos), _address(sin), sign),
        *(_heads(out_q), _heads(out_k), torch.get_num_threads()),
    )
    return out_q, out_k


def rope(q, k, cos, sin):
    _check_dtypes(q, k, cos, sin)
    _check_heads(q, k)
    _check(q.shape[3] % 2 == 0, "the head dimension of q {} is not even", q)
    _check_angles(cos, sin, q.shape[1], q.shape[3])
    rotated = _Rope.apply(q.float(), k.float(), cos.float(), sin.float())
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


class _QueryKeyValue(torch.autograd.Function):
    # q, k and v share one tensor, in which q and k are turned where they lie: turned q and k beside the
    # product would be two thirds more to keep for the backward pass.
    @staticmethod
    def forward(ctx, x, weight, cos, sin, heads, bf16):
        rows, weight, cos, sin = _matrix(x), weight.contiguous(), cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(rows, weight, cos, sin)
        ctx.heads, ctx.bf16 = heads, bf16
        made = _product(rows, weight, ctx.bf16)
        q, k, v = made.view(*x.shape[:2], sum(heads), len(weight) // sum(heads)).split(heads, 2)
        _rotate_into(q, k, q, k, cos, sin, 1.0)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v):
        rows, weight, cos, sin = ctx.saved_tensors
        shape = grad_q.shape[:2]
        grad = _empty(rows, len(rows), len(weight))
        q, k, v = grad.view(*shape, sum(ctx.heads), grad_q.shape[-1]).split(ctx.heads, 2)
        _rotate_into(q, k, _gapless(grad_q), _gapless(grad_k), cos, sin, -1.0)
        v.copy_(grad_v)
        grad_x, grad_weight = _product_gradients(rows, weight, grad, ctx.bf16)
        return grad_x.view(*shape, rows.shape[1]), grad_weight, None, None, None, None


def query_key_value(x, weight, cos, sin, heads):
    """q, k and v, side by side in x [B, T, D] @ weight [sum(heads) * d, D]^T; q and k turned by `rope`."""
    _check_dtypes(x, weight, cos, sin)
    fit = x.ndim == 3 and weight.shape[1:] == x.shape[-1:] and len(weight) % (2 * sum(heads)) == 0
    _check(fit, f"x {{}} and weight {{}} do not fit {heads} heads", x, weight)
    _check_angles(cos, sin, x.shape[1], len(weight) // sum(heads))
    bf16 = _in_bf16(x, weight)
    made = _QueryKeyValue.apply(x.float(), weight.float(), cos.float(), sin.float(), heads, bf16)
    return tuple(part.to(x.dtype) for part in made)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bf16):
        rows, weight = _matrix(x), weight.contiguous()
        ctx.save_for_backward(rows, weight)
        ctx.bf16 = bf16
        return _product(rows, weight, bf16).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        grad_x, grad_weight = _product_gradients(rows, weight, _matrix(grad), ctx.bf16)
        return grad_x.view(*grad.shape[:-1], rows.shape[1]), grad_weight, None


def linear(x, weight):
    """x [..., D] @ weight [R, D]^T: [..., R]."""
    _check_dtypes(x, weight)
    _check(weight.shape[1:] == x.shape[-1:], "x {} and weight {} do not fit", x, weight)
    return _Linear.apply(x.float(), weight.float(), _in_bf16(x, weight)).to(x.dtype)


def _product(rows, weight, bf16):
    """rows [N, D] @ weight [R, D]^T."""
    out = _empty(rows, len(rows), len(weight))
    if len(rows) >= _FEWEST and _leave_to_torch(rows, bf16):
        return torch.mm(rows, weight.T, out=out)
    return _multiply(rows, weight, False, out, bf16)


def _product_gradients(rows, weight, grad, bf16):
    """Of `_product`, for the gradient `grad` [N, R] of its result: those of rows and weight."""
    grad_rows = _empty(rows, *rows.shape)
    if _leave_to_torch(rows, bf16):
        return torch.mm(grad, weight, out=grad_rows), grad.T @ rows
    grad_weight = _empty(weight, *weight.shape)
    _cpu.product_over_tokens(
        *(*grad.shape, rows.shape[1], *_rows(grad), *_rows(rows), _address(grad_weight)),
        *(bf16, torch.get_num_threads()),
    )
    return _multiply(grad, weight, True, grad_rows, bf16), grad_weight


def _leave_to_torch(rows, bf16):
    # MKL is 6 to 19 % slower than ours (on a Zen 4), but needs no weight in another order: much for few rows.
    return not bf16 and (len(rows) < FEW_TOKENS or _cpu.instruction_set() == "portable")


def _multiply(rows, weight, transposed, out, bf16):
    """rows @ weight^T, or `transposed` rows @ weight, in `out`, which it returns."""
    _cpu.product(
        *(*rows.shape, out.shape[1], *_rows(rows), _address(weight), transposed),
        *(_address(out), bf16, torch.get_num_threads()),
    )
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ends, bf16):
        q, k, v = (_gapless(x) for x in (q, k, v))
        out, ctx.bf16 = _empty(q, *q.shape), bf16
        lse = _empty(q, q.shape[0], q.shape[2], q.shape[1]) if any(ctx.needs_input_grad) else None
        _cpu.attention_forward(
            *(_attention_shape(q, k), _heads(q), _heads(k), _heads(v), _address(ends)),
            *(_address(out), _address(lse), ctx.bf16, torch.get_num_threads()),
        )
        ctx.save_for_backward(q, k, v, out, lse, ends)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, ends = ctx.saved_tensors
        grad = _gapless(grad)
        grads = [_empty(x, *x.shape) for x in (q, k, v)]
        _cpu.attention_backward(
            *(_attention_shape(q, k), *(_heads(x) for x in (q, k, v, out, grad)), _address(ends)),
            *(_address(lse), *(_address(x) for x in grads), ctx.bf16, torch.get_num_threads()),
        )
        return *grads, None, None


def attention(q, k, v, starts=None):
    ends = None
    if starts is not None:
        _check(starts.shape == q.shape[:2], "starts {} does not fit q {}", starts, q)
        # The first position behind s whose own start is behind s.
        positions = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape).contiguous()
        ends = torch.searchsorted(starts.contiguous(), positions, right=True)
    return attention_until(q, k, v, ends)


def attention_until(q, k, v, ends):
    """`attention` where position t sees key s when s <= t < ends[b, s], of ends [B, T] or None."""
    _check_dtypes(q, k, v)
    _check_heads(q, k)
    _check(k.shape == v.shape, "k {} and v {} differ in shape", k, v)
    _check(q.shape[2] % k.shape[2] == 0, "the heads of k {} do not divide those of q {}", k, q)
    if ends is not None:
        _check(ends.shape == q.shape[:2], "ends {} does not fit q {}", ends, q)
        ends = ends.to(torch.int32).contiguous()
    bf16 = _in_bf16(q, k, v)
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()
    return _Attention.apply(q.float(), k.float(), v.float(), ends, bf16).to(q.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        gate_rows, up_rows = _matrix(gate), _matrix(up)
        out = _empty(gate, *gate.shape)
        _cpu.swiglu_forward(
            *gate_rows.shape, *_rows(gate_rows), *_rows(up_rows), _address(out), torch.get_num_threads()
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        gate_rows, up_rows, grad_rows = _matrix(gate), _matrix(up), _matrix(grad)
        width = gate.shape[-1]
        # Side by side, so that the gradient of a product that made both is one tensor already.
        grad_gate, grad_up = _empty(grad, *gate.shape[:-1], 2 * width).split(width, -1)
        _cpu.swiglu_backward(
            *(*gate_rows.shape, *_rows(gate_rows), *_rows(up_rows), *_rows(grad_rows)),
            *(_address(grad_gate), _address(grad_up), 2 * width, torch.get_num_threads()),
        )
        return grad_gate, grad_up


def swiglu(gate, up):
    _check_dtypes(gate, up)
    _check(gate.shape == up.shape, "gate {} and up {} differ in shape", gate, up)
    return _SwiGLU.apply(gate.float(), up.float()).to(gate.dtype)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down, bf16):
        rows = _matrix(x)
        gate, up, down = (w.contiguous() for w in (gate, up, down))
        out = _empty(x, *x.shape)
        shape = (*rows.shape, len(gate))
        padded = -(-len(rows) // _cpu.MLP_TOKENS) * _cpu.MLP_TOKENS
        keep, ctx.bf16 = any(ctx.needs_input_grad), bf16
        gates, ups = (_empty(x, padded * len(gate)) if keep else None for _ in range(2))
        _cpu.mlp_forward(
            *(shape, *_rows(rows), _address(gate), _address(up), _address(down)),
            *(_address(out), _address(gates), _address(ups), ctx.bf16, torch.get_num_threads()),
        )
        ctx.save_for_backward(rows, gate, up, down, gates, ups)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *weights, gates, ups = ctx.saved_tensors
        grad_rows = _matrix(grad)
        grads = [_empty(x, *x.shape) for x in (grad, *weights)]
        _cpu.mlp_backward(
            *((*x.shape, len(weights[0])), *_rows(x), *(_address(w) for w in weights)),
            *(_address(gates), _address(ups), *_rows(grad_rows)),
            *(*(_address(g) for g in grads), ctx.bf16, torch.get_num_threads()),
        )
        return *grads, None


def mlp(x, gate, up, down):
    """down (silu(gate x) * (up x)) of x [..., D] with gate, up [W, D] and down [D, W]."""
    _check_dtypes(x, gate, up, down)
    fit = gate.shape == up.shape == down.shape[::-1] and x.shape[-1:] == gate.shape[1:] and len(gate)
    _check(fit, "x {}, gate {}, up {}, down {} do not fit", x, gate, up, down)
    bf16 = _in_bf16(x, gate, up, down)
    if not torch.is_grad_enabled():
        x, gate, up, down = (t.detach() for t in (x, gate, up, down))
    return _MLP.apply(x.float(), gate.float(), up.float(), down.float(), bf16).to(x.dtype)


def norm_product(x, norm, eps, weights):
    """rms_norm(x [..., D], norm [D], eps) times weights [R_i, D]^T side by side, without gradients."""
    _check_dtypes(x, norm, *weights)
    for weight in weights:
        fit = norm.shape == x.shape[-1:] == weight.shape[1:]
        _check(fit, "x {}, norm {} and weight {} do not fit", x, norm, weight)
    rows, norm, weights = _matrix(x.detach().float()), _dense(norm), [_dense(weight) for weight in weights]
    if len(rows) >= FEW_TOKENS:  # for fewer, joining them would take longer than the products
        weights = [torch.cat(weights)]
    width, first = sum(map(len, weights)), 0
    out = _empty(rows, len(rows), width)
    for weight in weights:
        part = out[:, first : first + len(weight)]
        _cpu.norm_product(
            *(*rows.shape, len(weight), *_rows(rows), eps, _address(norm), _address(weight)),
            *(*_rows(part), torch.get_num_threads()),
        )
        first += len(weight)
    return out.view(*x.shape[:-1], width).to(x.dtype)


def finish_layer(residual, mixed, weight, norm, eps, gate, up, down):
    """total + mlp(rms_norm(total, norm, eps), gate, up, down), total = residual + mixed @ weight^T.

    residual [..., D], mixed [..., R], weight [D, R]; without gradients.
    """
    _check_dtypes(residual, mixed, weight, norm, gate, up, down)
    fit = (
        weight.shape == (*residual.shape[-1:], *mixed.shape[-1:]) and residual.shape[:-1] == mixed.shape[:-1]
    )
    _check(fit, "residual {}, mixed {} and weight {} do not fit", residual, mixed, weight)
    fit = gate.shape == up.shape == down.shape[::-1] and gate.shape[1:] == norm.shape == residual.shape[-1:]
    _check(fit, "residual {}, norm {}, gate {}, up {}, down {} do not fit", residual, norm, gate, up, down)
    rows, others = _matrix(residual.detach().float()), _matrix(mixed.detach().float())
    weight, norm, gate, up, down = (_dense(w) for w in (weight, norm, gate, up, down))
    out = _empty(rows, *rows.shape)
    _cpu.finish_layer(
        *((*rows.shape, len(gate)), others.shape[1], *_rows(others), *_rows(rows), _address(weight), eps),
        *(*(_address(w) for w in (norm, gate, up, down)), _address(out), torch.get_num_threads()),
    )
    return out.view(residual.shape).to(residual.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    # The gradients are computed with the loss, because only then are the logits at hand.
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, bf16):
        hidden, weight, targets = _matrix(hidden), _matrix(weight), targets.contiguous()
        (tokens, dim), vocab = hidden.shape, len(weight)
        padded = -(-dim // 16) * 16
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = _empty(hidden, tokens, dim) if need_hidden else None
        grad_weight = _empty(hidden, vocab, padded) if need_weight else None
        if grad_weight is not None and not tokens:
            grad_weight.zero_()
        loss = hidden.new_empty(())
        _cpu.linear_cross_entropy(
            *(tokens, dim, vocab, *_rows(hidden), *_rows(weight), _address(targets), ignore_index),
            *(_address(loss), _address(grad_hidden), _address(grad_weight), padded),
            *(bf16, torch.get_num_threads()),
        )
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight[:, :dim])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = ctx.saved_tensors
        # Times 1, the usual case, is not worth another pass over both.
        if grad.item() != 1:
            grads = (None if x is None else x * grad for x in grads)
        return *grads, None, None, None


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100):
    _check_dtypes(hidden, weight)
    _check(targets.dtype == torch.int64, f"targets must be int64, not {targets.dtype}")
    fit = hidden.shape[1:] == weight.shape[1:] and hidden.ndim == 2 and targets.shape == hidden.shape[:1]
    fit = fit and len(weight) and targets.device == hidden.device
    _check(fit, "hidden {}, weight {}, targets {} do not fit", hidden, weight, targets)
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= len(weight)))
    if outside.any():
        raise IndexError(f"target {targets[outside][0].item()} is outside a vocabulary of {len(weight)}")
    bf16 = _in_bf16(hidden, weight)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden.float(), weight.float(), targets, ignore_index, bf16)


def logit_summary(hidden, weight):
    """log(sum(exp)) [N], fp32, of the logits hidden [N, D] @ weight [V, D]^T, and the likeliest entry [N]."""
    _check_dtypes(hidden, weight)
    fit = hidden.ndim == 2 and hidden.shape[1:] == weight.shape[1:] and len(weight)
    _check(fit, "hidden {} and weight {} do not fit", hidden, weight)
    hidden, weight = hidden.detach().float(), weight.detach().float()
    hidden, weight = _gapless(hidden), _gapless(weight)
    log_sum = hidden.new_empty(len(hidden))
    likeliest = torch.empty_like(log_sum, dtype=torch.int64)
    _cpu.logit_summary(
        *(*hidden.shape, len(weight), *_rows(hidden), *_rows(weight)),
        *(_address(log_sum), _address(likeliest), torch.get_num_threads()),
    )
    return log_sum, likeliest


def _in_bf16(*tensors):
    """Whether an op of these tensors multiplies in bf16."""
    if tensors[0].dtype == torch.bfloat16:
        return multiplies_bf16()
    return _bf16.get() and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _empty(like, *shape):
    """`like.new_empty(shape)`; a large one from memory that the ops use again (csrc/cpu/memory.h)."""
    size = math.prod(shape)
    if size < LARGE:
        return like.new_empty(shape)
    # `data`, because autograd refuses to change a view that an op returns, as `mul_` would.
    return torch.frombuffer(_cpu.Memory(size), dtype=torch.float32).view(shape).data


def _count(x):
    """Tokens of x [..., D]."""
    return math.prod(x.shape[:-1])


def _matrix(x):
    """x [..., D] as [rows, D] with gapless rows: a view where that is possible, else a copy."""
    return _gapless(x.reshape(-1, x.shape[-1]))


def _dense(weight):
    return weight.detach().float().contiguous()


def _gapless(x):
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


# The three below give away an address only: their argument must be a variable that outlives the call to C++.


def _address(x):
    return 0 if x is None else x.data_ptr()


def _rows(x):
    return _address(x), 0 if x is None else x.stride(0)


def _heads(x):
    return x.data_ptr(), *x.stride()[:3]


def _attention_shape(q, k):
    return *q.shape[:3], k.shape[2], q.shape[3]


def _check(good, message, *tensors):
    if not good:
        raise ValueError(message.format(*(list(x.shape) for x in tensors)))


def _check_dtypes(*tensors):
    for x in tensors:
        reason = why_not("", x)
        _check(reason is None, reason)


def _check_heads(q, k):
    fit = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    _check(fit, "q {} and k {} do not fit", q, k)


def _check_angles(cos, sin, length, dim):
    shape = [length, dim // 2]
    _check(list(cos.shape) == list(sin.shape) == shape, f"cos {{}} and sin {{}} must be {shape}", cos, sin)


def _share_threads():
    """Have C++ run on torch's own OpenMP pool: a second one would fight with it for the same cores.

    Where torch has none (some macOS wheels), C++ starts threads for each call.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        library = Path(torch.__file__).parent / "lib" / name
        if library.exists():
            # A symbol of a library is also looked for in the libraries that it was linked to.
            entry = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
            if entry is not None:
                _cpu.use_openmp(ctypes.cast(entry, ctypes.c_void_p).value)


_share_threads()
