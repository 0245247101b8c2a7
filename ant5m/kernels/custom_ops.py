"""The ops of a GPU backend as custom ops of torch, so that torch.compile and CUDA graphs take each as one
node.

What differs between backends is how kernels are launched. What does not stands here once: the schema, the
shapes and dtypes of results, and how the backward pass follows from the forward pass. A backend gives
functions that fill results.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ant5m.kernels.arguments import compute_dtype

Fill = Callable[..., None]


def make_rms_norm(name: str, forward: Fill, backward: Fill) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """`rms_norm`, registered as `name`.

    Args:
        forward: (x, weight, eps, residual, y, total, rstd) fills y, rstd [rows] and, with a residual, total.
        backward: (dy, dtotal, total, weight, rstd, residual_dtype, dx, dresidual, dweight) fills the last
            three; dtotal is None where no gradient reaches the sum itself, dresidual is empty unless it has
            another dtype than dx.
    """

    @torch.library.custom_op(name, mutates_args=())
    def norm(
        x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> y in `dtype`, x + residual (empty without one), 1 / root mean square of each row."""
        y, total, rstd = _norm_outputs(x, weight, eps, residual, dtype)
        forward(x, weight, eps, residual, y, total, rstd)
        return y, total, rstd

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def norm_backward(
        dy: Tensor,
        dtotal: Tensor | None,
        total: Tensor,
        weight: Tensor,
        rstd: Tensor,
        dtype: torch.dtype,
        residual_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> gradient of x, of the residual if its dtype is another one (else empty), of the weight."""
        outputs = _norm_gradients(dy, dtotal, total, weight, rstd, dtype, residual_dtype)
        backward(dy, dtotal, total, weight, rstd, residual_dtype, *outputs)
        return outputs

    def differentiate(ctx, dy, dtotal, _):
        total, weight, rstd = ctx.saved_tensors
        dtype, residual_dtype = ctx.dtypes
        if dy is None:
            dy = torch.zeros_like(total)
        dtotal = None if residual_dtype is None else dtotal
        dx, dresidual, dweight = norm_backward(dy, dtotal, total, weight, rstd, dtype, residual_dtype)
        if residual_dtype is None:
            return dx, dweight, None, None, None
        return dx, dweight, None, dx if dtype == residual_dtype else dresidual, None

    norm.register_fake(_norm_outputs)
    norm_backward.register_fake(_norm_gradients)
    norm.register_autograd(differentiate, setup_context=_save_norm)

    def rms_norm(x, weight, eps=1e-5, residual=None):
        wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        dtype = compute_dtype(x) if torch.is_autocast_enabled(x.device.type) else wide
        y, total, _ = norm(x, weight, eps, residual, dtype)
        return y if residual is None else (y, total)

    return rms_norm


def _norm_outputs(x, weight, eps, residual, dtype):
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = x.new_empty(0)
    if residual is not None:
        wide = torch.promote_types(x.dtype, residual.dtype)
        total = torch.empty(x.shape, dtype=wide, device=x.device)
    return y, total, torch.empty(x.numel() // max(1, x.shape[-1]), dtype=torch.float32, device=x.device)


def _norm_gradients(dy, dtotal, total, weight, rstd, dtype, residual_dtype):
    dx = torch.empty(dy.shape, dtype=dtype, device=dy.device)
    another = residual_dtype is not None and residual_dtype != dtype
    dresidual = torch.empty(dy.shape if another else 0, dtype=residual_dtype or dtype, device=dy.device)
    return dx, dresidual, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save_norm(ctx, inputs, output):
    x, weight, _, residual, _ = inputs
    _, total, rstd = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else total, weight, rstd)


def make_rope(name: str, rotate: Fill, rotate_back: Fill) -> tuple[Callable, Callable]:
    """`rope` and `rope_packed`, registered as `name`. The gradient of a rotation is the rotation back.

    Args:
        rotate: (q, k, cos, sin, back, q_out, k_out) fills the last two.
        rotate_back: (dq, dk, dv, cos, sin, out) fills out [B, T, H + 2 KV, D]: dq and dk rotated back, beside
            dv.
    """

    @torch.library.custom_op(name, mutates_args=())
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        """q and k rotated by the angles whose cosines and sines are given, or back by them."""
        outputs = _rope_outputs(q, k, cos, sin, back)
        rotate(q, k, cos, sin, back, *outputs)
        return outputs

    @torch.library.custom_op(f"{name}_back", mutates_args=())
    def unrotated(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """dq and dk rotated back beside dv: [B, T, H + 2 KV, D]."""
        out = _packed(dq, dk, dv, cos, sin)
        rotate_back(dq, dk, dv, cos, sin, out)
        return out

    def differentiate(ctx, dq, dk):
        return *rotated(dq, dk, *ctx.saved_tensors, not ctx.back), None, None, None

    rotated.register_fake(_rope_outputs)
    unrotated.register_fake(_packed)
    rotated.register_autograd(differentiate, setup_context=_save_rope)

    class RopePacked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, cos, sin, heads):
            q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, 2)
            ctx.shape = qkv.shape
            ctx.save_for_backward(cos, sin)
            return *rotated(q, k, cos, sin, False), v

        @staticmethod
        def backward(ctx, dq, dk, dv):
            return unrotated(dq, dk, dv, *ctx.saved_tensors).view(ctx.shape), None, None, None

    def rope(q, k, cos, sin):
        return rotated(q, k, cos, sin, False)

    def rope_packed(qkv, cos, sin, heads, norms=None, eps=1e-5):
        assert norms is None, "see `make_qk_norm_rope`"
        return RopePacked.apply(qkv, cos, sin, heads)

    return rope, rope_packed


def rope_packed_unsupported_reason(*_) -> str | None:
    """Of `rope_packed`, whatever its arguments."""
    return "torch.compile joins gradients in its own way" if torch.compiler.is_compiling() else None


def _rope_outputs(q, k, cos, sin, back):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


def _packed(dq, dk, dv, cos, sin):
    batch, length, heads, size = dq.shape
    return torch.empty(batch, length, heads + 2 * dk.shape[2], size, dtype=dq.dtype, device=dq.device)


def _save_rope(ctx, inputs, output):
    _, _, cos, sin, back = inputs
    ctx.back = back
    ctx.save_for_backward(cos, sin)


def make_qk_norm_rope(name: str, forward: Fill, backward: Fill) -> tuple[Callable, Callable]:
    """`qk_norm_rope`, and `rope_packed` with norms, registered as `name`.

    Args:
        forward: (q, k, q_norm, k_norm, eps, cos, sin, q_out, k_out) fills the last two.
        backward: (dq, dk, dv, q, k, q_norm, k_norm, eps, cos, sin, out, dnorms) fills out [B, T, heads, D],
            the gradients of q and k beside one another, and beside dv if it is not None; and dnorms [2, D],
            fp32, of both weights.
    """

    @torch.library.custom_op(name, mutates_args=())
    def normed(
        q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = _rope_outputs(q, k, cos, sin, False)
        forward(q, k, q_norm, k_norm, eps, cos, sin, *outputs)
        return outputs

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def normed_backward(
        dq: Tensor,
        dk: Tensor,
        dv: Tensor | None,
        q: Tensor,
        k: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        outputs = _normed_gradients(dq, dk, dv)
        backward(dq, dk, dv, q, k, q_norm, k_norm, eps, cos, sin, *outputs)
        return outputs

    def differentiate(ctx, dq, dk):
        q, k, q_norm, k_norm, cos, sin = ctx.saved_tensors
        out, dnorms = normed_backward(dq, dk, None, q, k, q_norm, k_norm, ctx.eps, cos, sin)
        grads = out.split([q.shape[2], k.shape[2]], 2)
        return *grads, *_weight_gradients(dnorms, q_norm, k_norm), None, None, None

    normed.register_fake(lambda q, k, q_norm, k_norm, eps, cos, sin: _rope_outputs(q, k, cos, sin, False))
    normed_backward.register_fake(lambda dq, dk, dv, *_: _normed_gradients(dq, dk, dv))
    normed.register_autograd(differentiate, setup_context=_save_normed)

    class NormRopePacked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, q_norm, k_norm, eps, cos, sin, heads):
            q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, 2)
            ctx.heads, ctx.eps = heads, eps
            ctx.save_for_backward(qkv, q_norm, k_norm, cos, sin)
            return *normed(q, k, q_norm, k_norm, eps, cos, sin), v

        @staticmethod
        def backward(ctx, dq, dk, dv):
            qkv, q_norm, k_norm, cos, sin = ctx.saved_tensors
            q, k, _ = qkv.unflatten(-1, (sum(ctx.heads), -1)).split(ctx.heads, 2)
            out, dnorms = normed_backward(dq, dk, dv, q, k, q_norm, k_norm, ctx.eps, cos, sin)
            grads = _weight_gradients(dnorms, q_norm, k_norm)
            return out.view(qkv.shape), *grads, None, None, None, None

    def qk_norm_rope(q, k, cos, sin, norms, eps=1e-5):
        return normed(q, k, *norms, eps, cos, sin)

    def norm_rope_packed(qkv, cos, sin, heads, norms, eps=1e-5):
        return NormRopePacked.apply(qkv, *norms, eps, cos, sin, heads)

    return qk_norm_rope, norm_rope_packed


def _normed_gradients(dq, dk, dv):
    batch, length, heads, size = dq.shape
    heads += dk.shape[2] * (1 if dv is None else 2)
    out = torch.empty(batch, length, heads, size, dtype=dq.dtype, device=dq.device)
    return out, torch.empty(2, size, dtype=torch.float32, device=dq.device)


def _weight_gradients(dnorms, *norms):
    return (dnorm.to(norm.dtype) for dnorm, norm in zip(dnorms, norms, strict=True))


def _save_normed(ctx, inputs, output):
    *tensors, ctx.eps, cos, sin = inputs
    ctx.save_for_backward(*tensors, cos, sin)


def make_swiglu(name: str, forward: Fill, backward: Fill) -> Callable[[Tensor, Tensor], Tensor]:
    """`swiglu`, registered as `name`.

    Args:
        forward: (gate, up, y) fills y.
        backward: (dy, gate, up, dboth) fills dboth [..., 2 D], both gradients side by side: the product that
            made gate and up gets its own whole.
    """

    @torch.library.custom_op(name, mutates_args=())
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        y = _like(gate, up)
        forward(gate, up, y)
        return y

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def gated_backward(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        dboth = _both(dy, gate, up)
        backward(dy, gate, up, dboth)
        return dboth

    def differentiate(ctx, dy):
        return gated_backward(dy, *ctx.saved_tensors).chunk(2, -1)

    gated.register_fake(_like)
    gated_backward.register_fake(_both)
    gated.register_autograd(differentiate, setup_context=_save_inputs)

    def swiglu(gate, up):
        return gated(gate, up)

    return swiglu


def _both(dy, gate, up):
    return torch.empty((*gate.shape[:-1], 2 * gate.shape[-1]), dtype=gate.dtype, device=gate.device)


def _like(x, *_):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def make_attention(
    name: str, forward: Fill, backward: Fill, kept: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Callable[..., Tensor]:
    """`attention`, registered as `name`.

    Args:
        forward: (q, k, v, starts, o, lse, more) fills the last three; starts are int32 and dense, or None.
        backward: (do, q, k, v, starts, o, lse, more, dq, dk, dv) fills the last three.
        kept: (q, k) -> empty tensors for what the backward pass needs beside o: lse, and whatever else.
    """

    def outputs(q, k, v, starts):
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), *kept(q, k)

    @torch.library.custom_op(name, mutates_args=())
    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        o, lse, more = outputs(q, k, v, starts)
        forward(q, k, v, starts, o, lse, more)
        return o, lse, more

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def attend_backward(
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor | None,
        o: Tensor,
        lse: Tensor,
        more: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> gradients of q, k and v."""
        dq, dk, dv = _attention_gradients(do, q, k, v)
        backward(do, q, k, v, starts, o, lse, more, dq, dk, dv)
        return dq, dk, dv

    def differentiate(ctx, do, *_):
        if do is None:
            return None, None, None, None
        return *attend_backward(do, *ctx.saved_tensors), None

    attend.register_fake(outputs)
    attend_backward.register_fake(_attention_gradients)
    attend.register_autograd(differentiate, setup_context=_save_attention)

    def attention(q, k, v, starts=None):
        return attend(q, k, v, None if starts is None else starts.to(torch.int32).contiguous())[0]

    return attention


def _attention_gradients(do, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save_attention(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def make_mlp(
    name: str, forward: Fill, backward: Fill, gradient_dtype: torch.dtype | None = None
) -> Callable[..., Tensor]:
    """`mlp`, registered as `name`.

    Args:
        forward: (x, gate, up, down, y) fills y.
        backward: (dy, x, gate, up, down, dx, dboth, ddown) fills dx, dboth [2 W, D], of gate above up, and
            ddown [D, W], where W is gate's width made a multiple of 8.
        gradient_dtype: of dboth and ddown; None: x's.
    """

    def gradients(dy, x, gate, up, down):
        width, size = gate.shape
        width += -width % 8
        shapes = (2 * width, size), (size, width)
        dtype = gradient_dtype or x.dtype
        return _like(x), *(torch.empty(shape, dtype=dtype, device=x.device) for shape in shapes)

    @torch.library.custom_op(name, mutates_args=())
    def block(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = _like(x)
        forward(x, gate, up, down, y)
        return y

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def block_backward(
        dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> gradients of x, of gate above up, and of down."""
        dx, dboth, ddown = gradients(dy, x, gate, up, down)
        backward(dy, x, gate, up, down, dx, dboth, ddown)
        return dx, dboth, ddown

    def differentiate(ctx, dy):
        x, gate, up, down = ctx.saved_tensors
        dx, dboth, ddown = block_backward(dy, x, gate, up, down)
        dgate, dup = (part[: len(gate)].to(gate.dtype) for part in dboth.chunk(2))
        return dx, dgate, dup, ddown[:, : len(gate)].to(down.dtype)

    block.register_fake(_like)
    block_backward.register_fake(gradients)
    block.register_autograd(differentiate, setup_context=_save_inputs)

    def mlp(x, gate, up, down):
        return block(x, gate, up, down)

    return mlp
