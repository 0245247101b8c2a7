"""The ops of a Llama: of each its signature, what fits it, its composition, samples and cost.

The five of a training step (`core`) are in every backend. The others stand for a few ops one after the other,
or for torch's: a backend has them where that is faster, and anywhere else their composition runs. See
`ant5m.kernels.dispatch` for who decides, and CONTRIBUTING.md for how an op is added.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ant5m.kernels import reference
from ant5m.kernels.dispatch import Cost, op
from ant5m.kernels.packed_views import join, split
from ant5m.kernels.samples import Draw
from ant5m.kernels.tree_mask import TreeMask

__all__ = [
    "attention",
    "fused_post_attention",
    "linear",
    "linear_cross_entropy",
    "logsumexp_argmax",
    "mlp",
    "qk_norm_rope",
    "qkv_rope",
    "rms_norm",
    "rms_norm_linear",
    "rope",
    "rope_packed",
    "swiglu",
    "tree_attention",
]

_LOGIT_ROWS = 256
"""rows of logits alive at once"""


@op(
    shapes="x [..., D], weight [D] and residual of x's shape",
    fits=lambda x, weight, eps, residual: (
        x.ndim > 0 and weight.shape == x.shape[-1:] and (residual is None or residual.shape == x.shape)
    ),
    samples=lambda draw: [
        (draw.stream(draw.sizes.hidden), draw.vector(draw.sizes.hidden), 1e-5, None),
        (
            *(draw.activations(draw.sizes.hidden), draw.vector(draw.sizes.hidden), 1e-5),
            draw.stream(draw.sizes.hidden),
        ),
    ],
    sizes=lambda x, *_: {"hidden": x.shape[-1]},
    cost=lambda x, weight, eps, residual: _normed(x, residual),
    core=True,
)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x [..., D] with `weight` [D]: x / sqrt(mean(x^2) + eps) * weight, statistics in fp32.

    With `residual` [..., D] the sum s = x + residual is normalized, and (normalized s, s) is returned. Under
    autocast the first comes in its dtype, as products take it (in fp32, and cast by the product, it would be
    5 times the bytes), s in the wider one of x's and residual's.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    return reference.rms_norm(x, weight, eps, residual)


@op(
    shapes="q [B, T, H, D], k [B, T, KV, D] of one dtype, D even, and cos, sin [T, D/2]",
    fits=lambda q, k, cos, sin: (
        q.ndim == k.ndim == 4
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] == k.shape[3]
        and q.dtype == k.dtype
        and _rotates(cos, sin, q.shape[1], q.shape[3])
    ),
    samples=lambda draw: [(*draw.query_key_value()[:2], *draw.angles())],
    sizes=lambda q, k, cos, sin: {
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "head_size": q.shape[3],
    },
    cost=lambda q, k, cos, sin: _moved(2, 2, q, k),
    core=True,
)
def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of q [B, T, H, D] and k [B, T, KV, D]; cos and sin are fp32 [T, D/2].

    Half-rotate layout, as Llama's in Hugging Face: dimension j is rotated with j + D/2. No gradient reaches
    cos and sin.
    Source: Su et al., "RoFormer", 2021.
    """
    return reference.rope(q, k, cos, sin)


@op(
    shapes="q [B, T, H, D], k [B, T, KV, D] of one dtype, D even, cos, sin [T, D/2] and two norms [D]",
    fits=lambda q, k, cos, sin, norms, eps: (
        q.ndim == k.ndim == 4
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] == k.shape[3]
        and q.dtype == k.dtype
        and _rotates(cos, sin, q.shape[1], q.shape[3])
        and _are_norms(norms, q.shape[3])
    ),
    samples=lambda draw: [(*draw.query_key_value()[:2], *draw.angles(), _norms(draw), 1e-5)],
    sizes=lambda q, k, *_: {
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "head_size": q.shape[3],
    },
    cost=lambda q, k, *_: _moved(2, 3, q, k),
)
def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: Sequence[torch.Tensor],
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope` of the `rms_norm` of each head of q [B, T, H, D] and of k [B, T, KV, D]: QK-norm.

    `norms` are the weights [D] of q's norm and of k's; all heads share them. The results have q's dtype.
    Source: Henry et al., "Query-Key Normalization for Transformers", 2020, as in Qwen3.
    """
    normed = [rms_norm(x, norm, eps, backend=backend) for x, norm in zip((q, k), norms, strict=True)]
    q_normed, k_normed = (x.to(q.dtype) for x in normed if isinstance(x, torch.Tensor))
    return rope(q_normed, k_normed, cos, sin, backend=backend)


@op(
    shapes="qkv [B, T, (H + 2 KV) * D], D even, cos, sin [T, D/2] and two norms [D]; heads are H, KV, KV",
    fits=lambda qkv, cos, sin, heads, norms, eps: (
        qkv.ndim == 3
        and _are_heads(heads, qkv.shape[2])
        and _rotates(cos, sin, qkv.shape[1], qkv.shape[2] // sum(heads))
        and (norms is None or _are_norms(norms, qkv.shape[2] // sum(heads)))
    ),
    samples=lambda draw: [_packed_sample(draw, None), _packed_sample(draw, _norms(draw))],
    sizes=lambda qkv, cos, sin, heads, norms, eps: _head_sizes(qkv.shape[2], heads),
    cost=lambda qkv, cos, sin, heads, norms, eps: _moved(2, 2 if norms is None else 3, qkv),
)
def rope_packed(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Sequence[int],
    norms: Sequence[torch.Tensor] | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, T, heads, D] of packed qkv [B, T, sum(heads) * D], q and k rotated by `rope`, or with
    `norms` by `qk_norm_rope`; v is a view.

    A backend that has it makes qkv's gradient in one piece.
    """
    size = qkv.shape[-1] // sum(heads)
    parts = split(qkv, [count * size for count in heads])
    q, k, v = (part.unflatten(-1, (-1, size)) for part in parts)
    if norms is None:
        return *rope(q, k, cos, sin, backend=backend), v
    return *qk_norm_rope(q, k, cos, sin, norms, eps, backend=backend), v


@op(
    shapes="x [B, T, C], weight [(H + 2 KV) * D, C], D even, cos, sin [T, D/2] and two norms [D]; heads are "
    "H, KV, KV",
    fits=lambda x, weight, cos, sin, heads, norms, eps: (
        x.ndim == 3
        and _multiplies(x, weight)
        and _are_heads(heads, len(weight))
        and _rotates(cos, sin, x.shape[1], len(weight) // sum(heads))
        and (norms is None or _are_norms(norms, len(weight) // sum(heads)))
    ),
    samples=lambda draw: [_projection_sample(draw, None), _projection_sample(draw, _norms(draw))],
    sizes=lambda x, weight, cos, sin, heads, norms, eps: {
        "hidden": x.shape[-1],
        **_head_sizes(len(weight), heads),
    },
    cost=lambda x, weight, *_: _multiplied(x, weight),
)
def qkv_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Sequence[int],
    norms: Sequence[torch.Tensor] | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, T, heads, D]: x [B, T, C] @ weight^T split into so many heads, q and k rotated by `rope`,
    or with `norms` by `qk_norm_rope`.

    `weight` [sum(heads) * D, C] is q's, k's and v's above one another.
    """
    return rope_packed(linear(x, weight, backend=backend), cos, sin, heads, norms, eps, backend=backend)


@op(
    shapes="q [B, T, H, D] and k, v [B, T, KV, D] of one dtype, KV dividing H, and integer starts [B, T]",
    fits=lambda q, k, v, starts: (
        _attends(q, k, v)
        and (starts is None or (starts.shape == q.shape[:2] and not starts.is_floating_point()))
    ),
    samples=lambda draw: [(*draw.query_key_value(), None), (*draw.query_key_value(), draw.starts())],
    sizes=lambda q, k, v, starts: {
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "head_size": q.shape[3],
    },
    cost=lambda q, k, v, starts: _attended(q, k),
    core=True,
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal attention softmax(q k^T / sqrt(D)) v of q [B, T, H, D] and k, v [B, T, KV, D]: [B, T, H, D].

    Query head h uses key/value head h // (H / KV). `starts` [B, T] int64 keeps attention inside documents:
    position t sees positions starts[b, t]..t only. It must not decrease along T.
    """
    return reference.attention(q, k, v, starts)


@op(
    shapes="q [B, T, H, D] and k, v [B, T, KV, D] of one dtype, KV dividing H, and a mask of ends [B, T]",
    fits=lambda q, k, v, mask: (
        _attends(q, k, v) and mask.ends.shape == q.shape[:2] and mask.ends.device == q.device
    ),
    samples=lambda draw: [(*draw.query_key_value(), _comb(draw))],
    sizes=lambda q, k, v, mask: {
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "head_size": q.shape[3],
    },
    cost=lambda q, k, v, mask: _attended(q, k),
)
def tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask, backend: str | None = None
) -> torch.Tensor:
    """`attention` of q [B, T, H, D] and k, v [B, T, KV, D] along the branches of a forest: [B, T, H, D]."""
    group = q.shape[2] // k.shape[2]
    parts = zip(*(x.split(mask.sizes, 1) for x in (q, k, v)), mask.biases(group, q), strict=True)
    mixed = [
        attention(q, k, v, backend=backend) if bias is None else _masked_attention(q, k, v, bias)
        for q, k, v, bias in parts
    ]
    return torch.cat(mixed, 1)


def _masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    # The query heads of a group lie below one another, so that they share keys and mask without copies.
    group = q.shape[2] // k.shape[2]
    folded = q.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2), bias)
    return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


@op(
    shapes="gate and up of one shape and dtype",
    fits=lambda gate, up: gate.ndim > 0 and gate.shape == up.shape and gate.dtype == up.dtype,
    samples=lambda draw: [tuple(draw.activations(2 * _whole(draw)).chunk(2, -1))],
    sizes=lambda gate, up: {"intermediate": gate.shape[-1]},
    cost=lambda gate, up: _moved(3, 5, gate),
    core=True,
)
def swiglu(gate: torch.Tensor, up: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * up, elementwise on two tensors of one shape. Source: Shazeer, "GLU Variants", 2020."""
    return reference.swiglu(gate, up)


@op(
    shapes="x [..., D], gate, up [W, D] and down [D, W], W > 0",
    fits=lambda x, gate, up, down: _is_mlp(x, gate, up, down),
    samples=lambda draw: [(draw.activations(draw.sizes.hidden), *_mlp_weights(draw))],
    sizes=lambda x, gate, up, down: {"hidden": gate.shape[1], "intermediate": len(gate)},
    cost=lambda x, gate, up, down: _multiplied(x, gate, times=3),
)
def mlp(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """down (silu(gate x) * (up x)) of x [..., D] with weights gate, up [W, D] and down [D, W]: [..., D]."""
    gate, up, down = _whole_vectors(x, gate, up, down)
    gated, up = split(linear(x, join(gate, up), backend=backend), [len(gate)] * 2)
    return linear(swiglu(gated, up, backend=backend), down, backend=backend)


def _whole_vectors(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights, widened by zeros to a multiple of 8 where x is in 16 bits on a GPU: its fastest products
    take rows of whole 16 bytes, and those of 516 numbers are not. silu(0) * 0 = 0, and so are all gradients
    of it."""
    more = -len(gate) % 8 if x.is_cuda and x.itemsize == 2 else 0
    if more == 0:
        return gate, up, down
    return F.pad(gate, (0, 0, 0, more)), F.pad(up, (0, 0, 0, more)), F.pad(down, (0, more))


@op(
    shapes="x [..., D] and weight [R, D]",
    fits=lambda x, weight: _multiplies(x, weight),
    samples=lambda draw: [
        (draw.activations(draw.sizes.hidden), draw.matrix(draw.sizes.intermediate, draw.sizes.hidden))
    ],
    sizes=lambda x, weight: {"hidden": weight.shape[1], "intermediate": len(weight)},
    cost=lambda x, weight: _multiplied(x, weight),
)
def linear(x: torch.Tensor, weight: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """x [..., D] @ weight [R, D]^T: [..., R]."""
    return F.linear(x, weight)


@op(
    shapes="x [..., D], norm [D] and weights [R_i, D]",
    fits=lambda x, norm, eps, weights: (
        x.ndim > 0 and norm.shape == x.shape[-1:] and all(_multiplies(x, weight) for weight in weights)
    ),
    samples=lambda draw: [
        (
            *(draw.stream(draw.sizes.hidden), draw.vector(draw.sizes.hidden), 1e-5),
            [draw.matrix(rows, draw.sizes.hidden) for rows in (40, 24, 24)],
        )
    ],
    sizes=lambda x, *_: {"hidden": x.shape[-1]},
    cost=lambda x, norm, eps, weights: _multiplied(x, *weights),
    differentiable=False,
)
def rms_norm_linear(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weights: Sequence[torch.Tensor],
    backend: str | None = None,
) -> torch.Tensor:
    """`rms_norm` of x [..., D] with the weight `norm` [D], times weights [R_i, D]^T side by side.

    For inference: a backend may give no gradients.
    """
    normed = rms_norm(x, norm, eps, backend=backend)
    assert isinstance(normed, torch.Tensor)
    return linear(normed, join(*weights), backend=backend)


@op(
    shapes="residual [..., D], attn_out [..., R], weight [D, R], norm [D], gate, up [W, D] and down [D, W]",
    fits=lambda residual, attn_out, weight, norm, eps, gate, up, down: (
        _multiplies(attn_out, weight)
        and residual.shape == (*attn_out.shape[:-1], len(weight))
        and norm.shape == residual.shape[-1:]
        and _is_mlp(residual, gate, up, down)
    ),
    samples=lambda draw: [
        (
            draw.stream(draw.sizes.hidden),
            draw.activations(draw.sizes.heads * draw.sizes.head_size),
            draw.matrix(draw.sizes.hidden, draw.sizes.heads * draw.sizes.head_size),
            *(draw.vector(draw.sizes.hidden), 1e-5, *_mlp_weights(draw)),
        )
    ],
    sizes=lambda residual, attn_out, weight, norm, eps, gate, *_: {
        "hidden": len(norm),
        "intermediate": len(gate),
    },
    cost=lambda residual, attn_out, weight, norm, eps, *mlp: _multiplied(
        residual, weight.T, *mlp[:2], mlp[0]
    ),
    differentiable=False,
)
def fused_post_attention(
    residual: torch.Tensor,
    attn_out: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """What follows attention in a layer: total + `mlp` of the `rms_norm` of total [..., D].

    total = residual [..., D] + attn_out [..., R] @ weight [D, R]^T; `norm` [D] is the norm's weight. For
    inference: a backend may give no gradients.
    """
    out = linear(attn_out, weight, backend=backend)
    normed, total = rms_norm(out, norm, eps, residual, backend=backend)
    return total + mlp(normed, gate, up, down, backend=backend)


@op(
    shapes="hidden [N, D], weight [V, D], V > 0, and int64 targets [N]",
    fits=lambda hidden, weight, targets, ignore_index, z_loss: (
        hidden.ndim == 2
        and _multiplies(hidden, weight)
        and len(weight) > 0
        and targets.shape == hidden.shape[:1]
        and targets.dtype == torch.int64
    ),
    samples=lambda draw: [
        (
            draw.activations(draw.sizes.hidden).flatten(0, 1),
            draw.matrix(draw.sizes.vocab, draw.sizes.hidden),
            *(draw.targets(), -100, z_loss),
        )
        for z_loss in (1e-2, None)
    ],
    sizes=lambda hidden, weight, *_: {"hidden": weight.shape[1], "vocab": len(weight)},
    cost=lambda hidden, weight, *_: _multiplied(hidden, weight),
    core=True,
)
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    z_loss: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Mean cross-entropy in nats of the logits hidden [N, D] @ weight [V, D]^T against `targets` [N] int64.

    Targets equal to `ignore_index` do not count; when none counts the loss is 0 and so are the gradients. The
    result is a 0-dim fp32 tensor (float64 for float64 inputs). The N x V logits never exist as a whole.

    `z_loss` is a weight: the gradients then are those of the loss + z_loss * mean of log(sum(exp(logits)))^2,
    which keeps logits from drifting, while the result stays the cross-entropy, so that losses compare.
    Source: Chowdhery et al., "PaLM", 2022, section 5, with 1e-4.
    """
    return reference.linear_cross_entropy(hidden, weight, targets, ignore_index, z_loss)


@op(
    shapes="hidden [N, D] and weight [V, D], V > 0",
    fits=lambda hidden, weight: hidden.ndim == 2 and _multiplies(hidden, weight) and len(weight) > 0,
    samples=lambda draw: [
        (
            draw.activations(draw.sizes.hidden).flatten(0, 1),
            draw.matrix(draw.sizes.vocab, draw.sizes.hidden),
        )
    ],
    sizes=lambda hidden, weight: {"hidden": weight.shape[1], "vocab": len(weight)},
    cost=lambda hidden, weight: _multiplied(hidden, weight),
    differentiable=False,
)
def logsumexp_argmax(
    hidden: torch.Tensor, weight: torch.Tensor, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the logits hidden [N, D] @ weight [V, D]^T: log(sum(exp)) [N] fp32 and the first largest entry [N].

    For inference: a backend may give no gradients.
    """
    log_sums, largest = [], []
    for rows in hidden.split(_LOGIT_ROWS):
        logits = F.linear(rows, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_sums.append(logits.logsumexp(-1))
        largest.append(logits.argmax(-1))
    return torch.cat(log_sums), torch.cat(largest)


def _multiplies(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.ndim > 0 and weight.ndim == 2 and x.shape[-1:] == weight.shape[1:]


def _is_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> bool:
    return _multiplies(x, gate) and gate.shape == up.shape == down.shape[::-1] and len(gate) > 0


def _attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    return (
        q.ndim == k.ndim == 4
        and k.shape == v.shape
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] == k.shape[3]
        and k.shape[2] > 0
        and q.shape[2] % k.shape[2] == 0
        and q.dtype == k.dtype == v.dtype
    )


def _rotates(cos: torch.Tensor, sin: torch.Tensor, length: int, size: int) -> bool:
    return size % 2 == 0 and cos.shape == sin.shape == (length, size // 2)


def _are_heads(heads: Sequence[int], width: int) -> bool:
    return len(heads) == 3 and heads[1] == heads[2] > 0 and heads[0] > 0 and width % sum(heads) == 0


def _are_norms(norms: Sequence[torch.Tensor], size: int) -> bool:
    return len(norms) == 2 and all(norm.shape == (size,) for norm in norms)


def _head_sizes(width: int, heads: Sequence[int]) -> dict[str, int]:
    return {"heads": heads[0], "kv_heads": heads[1], "head_size": width // sum(heads)}


def _norms(draw: Draw) -> list[torch.Tensor]:
    return [draw.vector(draw.sizes.head_size) for _ in range(2)]


def _packed_sample(draw: Draw, norms: list[torch.Tensor] | None) -> tuple:
    packed, heads = draw.packed()
    return packed, *draw.angles(), heads, norms, 1e-5


def _projection_sample(draw: Draw, norms: list[torch.Tensor] | None) -> tuple:
    heads = [draw.sizes.heads, draw.sizes.kv_heads, draw.sizes.kv_heads]
    weight = draw.matrix(sum(heads) * draw.sizes.head_size, draw.sizes.hidden)
    return draw.activations(draw.sizes.hidden), weight, *draw.angles(), heads, norms, 1e-5


def _mlp_weights(draw: Draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # gate above up, as a training step lays them.
    width, size = _whole(draw), draw.sizes.hidden
    gate, up = draw.matrix(2 * width, size).split(width)
    return gate, up, draw.matrix(size, width)


def _whole(draw: Draw) -> int:
    """The width of gate and up: in 16 bits a training step makes it a multiple of 8."""
    return draw.sizes.intermediate + (-draw.sizes.intermediate % 8 if draw.dtype.itemsize == 2 else 0)


def _comb(draw: Draw) -> TreeMask:
    """A trunk of every second position, whose others are leaves."""
    positions = torch.arange(draw.sizes.length)
    ends = torch.where(positions % 2 == 0, draw.sizes.length, positions + 1)
    return TreeMask(ends.repeat(draw.sizes.batch, 1), device=draw.device)


def _moved(forward: int, backward: int, *tensors: torch.Tensor) -> tuple[Cost, Cost]:
    """As many times the bytes of these tensors."""
    size = _bytes(*tensors)
    return Cost(0, forward * size), Cost(0, backward * size)


def _normed(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[Cost, Cost]:
    if residual is None:
        return _moved(2, 3, x)
    forward, backward = _moved(2, 2, x, residual)
    # Of different dtypes, x and residual have a gradient each.
    more = 0 if x.dtype == residual.dtype else _bytes(residual)
    return forward, backward._replace(bytes=backward.bytes + more)


def _multiplied(x: torch.Tensor, *weights: torch.Tensor, times: int = 1) -> tuple[Cost, Cost]:
    """x times each of the weights, `times` each; both gradients take twice that."""
    flops = 2 * x.numel() // x.shape[-1] * times * sum(weight.numel() for weight in weights)
    size, weight_size = _bytes(x), times * _bytes(*weights)
    return Cost(flops, 2 * size + weight_size), Cost(2 * flops, 3 * size + 2 * weight_size)


def _attended(q: torch.Tensor, k: torch.Tensor) -> tuple[Cost, Cost]:
    """What causality asks for: two products forward, five backward."""
    flops = 2 * q.numel() * (q.shape[1] + 1)
    size = 2 * _bytes(q, k)
    return Cost(flops, size), Cost(2.5 * flops, 2 * size)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)
