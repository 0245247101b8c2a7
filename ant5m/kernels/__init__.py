"""The five ops of a Llama training step, each with the same signature in every backend.

`reference` (plain PyTorch) is their specification, `cpu` is C++, `triton` and `cuda` are for NVIDIA GPUs. A
backend is a module of this package with a function for each op that it has, and one
`why_not(op, *tensors) -> str | None`: None when it can run the op (on these tensors), else the reason. A
backend asked for by name that cannot run raises; `auto` takes the first of `_PREFERENCE` that can.

Further ops (`mlp`, `rope_qkv`, `qkv_rope`, `linear`, `rms_norm_linear`, `fused_post_attention`,
`tree_attention`, `logsumexp_argmax`) are for backends that have something better than a few ops one after the
other, or than torch's; elsewhere they give None.
"""

import contextlib
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch

from ant5m.errors import UserError
from ant5m.kernels.tracing import constant_when_traced

OPS = ("rms_norm", "rope", "attention", "swiglu", "linear_cross_entropy")
BACKENDS = ("reference", "cpu", "triton", "cuda")
# Fastest first, by kind of device and, for a GPU, by the compute capability from which on it holds. On 7.5
# Triton has no tensor cores, and so no attention; the kernels of `cuda` are written for it.
_PREFERENCE = (
    ("cpu", (0, 0), ("cpu", "reference")),
    ("cuda", (8, 0), ("triton", "cuda", "reference")),
    ("cuda", (7, 5), ("cuda", "triton", "reference")),
    ("cuda", (0, 0), ("triton", "reference")),
    ("any", (0, 0), ("reference",)),
)

_modules: dict[str, ModuleType] = {}
_selected = os.environ.get("ANT5M_KERNELS") or "auto"


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x [..., D] with the weight [D]: x / sqrt(mean(x^2) + eps) * weight, statistics in fp32.

    With `residual` [..., D] the sum s = x + residual is normalized, and (normalized s, s) is returned. Under
    autocast the first comes in its dtype, as products take it (in fp32, and cast by the product, it would be
    5 times the bytes), s in the wider one of x's and residual's.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    return _pick("rms_norm", backend, x, weight).rms_norm(x, weight, eps, residual)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of q [B, T, H, D] and k [B, T, KV, D]; cos and sin are fp32 [T, D/2].

    Half-rotate layout, as Llama's in Hugging Face: dimension j is rotated with j + D/2. No gradient
    reaches cos and sin.
    Source: Su et al., "RoFormer", 2021.
    """
    return _pick("rope", backend, q, k).rope(q, k, cos, sin)


def rope_qkv(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: list[int], backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """q, k, v [B, T, heads, d] of qkv [B, T, sum(heads) * d], q and k rotated by `rope`; v is a view.

    Its gradient is made in one piece. None where the backend has nothing better than `split` and `rope`, and
    while torch.compile traces, which joins gradients in its own way.
    """
    if torch.compiler.is_compiling() or not hasattr(_in_use(qkv.device, backend), "rope_qkv"):
        return None
    q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, -2)
    module = _faster("rope_qkv", backend, q, k, v)
    return None if module is None else module.rope_qkv(qkv, cos, sin, heads)


def qkv_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: list[int],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """q, k, v [B, T, heads, d]: x [B, T, D] @ weight^T split into so many heads, q and k rotated by `rope`.

    `weight` [sum(heads) * d, D] is q's, k's and v's above one another. None where the backend has nothing
    better than the product and `rope`.
    """
    module = _faster("qkv_rope", backend, x, weight, cos, sin)
    return None if module is None else module.qkv_rope(x, weight, cos, sin, heads)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal attention softmax(q k^T / sqrt(D)) v of q [B, T, H, D] and k, v [B, T, KV, D]: [B, T, H, D].

    Query head h uses key/value head h // (H / KV); KV must divide H. `starts` [B, T] int64 keeps attention
    inside documents: position t sees positions starts[b, t]..t only. It must not decrease along T.
    """
    inputs = (q, k, v) if starts is None else (q, k, v, starts)
    return _pick("attention", backend, *inputs).attention(*inputs)


def swiglu(gate: torch.Tensor, up: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * up, elementwise on two tensors of one shape. Source: Shazeer, "GLU Variants", 2020."""
    return _pick("swiglu", backend, gate, up).swiglu(gate, up)


def mlp(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, backend: str | None = None
) -> torch.Tensor | None:
    """down (silu(gate x) * (up x)) of x [..., D] with the weights gate, up [W, D] and down [D, W]: [..., D].

    None where the backend has nothing faster than three products around `swiglu`: none has to have this op.
    """
    module = _faster("mlp", backend, x, gate, up, down)
    return None if module is None else module.mlp(x, gate, up, down)


def rms_norm_linear(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weights: Sequence[torch.Tensor],
    backend: str | None = None,
) -> torch.Tensor | None:
    """`rms_norm` of x [..., D] with the weight `norm` [D], times weights [R_i, D]^T side by side.

    Without gradients. None where the backend has nothing faster than one after the other.
    """
    module = _faster("rms_norm_linear", backend, x, norm, *weights)
    return None if module is None else module.rms_norm_linear(x, norm, eps, weights)


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
) -> torch.Tensor | None:
    """What follows attention in a layer: total + `mlp` of the `rms_norm` of total [..., D].

    total = residual [..., D] + attn_out [..., R] @ weight [D, R]^T; `norm` [D] is the weight of `rms_norm`.
    Without gradients.
    None where the backend has nothing faster than one after the other.
    """
    module = _faster("fused_post_attention", backend, residual, attn_out, weight, norm, gate, up, down)
    if module is None:
        return None
    return module.fused_post_attention(residual, attn_out, weight, norm, eps, gate, up, down)


def tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, backend: str | None = None
) -> torch.Tensor | None:
    """`attention` where position t sees key s when s <= t < ends[b, s], of ends [B, T] integers.

    So a row may hold a forest, depth first: ends[b, s] lies behind the last descendant of s, and t sees its
    ancestors. None where the backend has nothing for it.
    """
    module = _faster("tree_attention", backend, q, k, v)
    return None if module is None else module.tree_attention(q, k, v, ends)


def logsumexp_argmax(
    hidden: torch.Tensor, weight: torch.Tensor, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of the logits hidden [N, D] @ weight [V, D]^T: log(sum(exp)) [N] fp32 and the first largest entry [N].

    Without gradients. None where the backend has nothing that keeps the logits in its caches.
    """
    module = _faster("logsumexp_argmax", backend, hidden, weight)
    return None if module is None else module.logsumexp_argmax(hidden, weight)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    backend: str | None = None,
) -> torch.Tensor:
    """Mean cross-entropy in nats of the logits hidden [N, D] @ weight [V, D]^T against `targets` [N] int64.

    Targets equal to `ignore_index` do not count; when none counts the loss is 0 and so are the gradients. The
    result is a 0-dim fp32 tensor (float64 for float64 inputs). The N x V logits never exist as a whole.
    Raises `ValueError` when the shapes do not fit.
    """
    if hidden.shape[:1] != targets.shape or hidden.shape[1:] != weight.shape[1:]:
        shapes = ", ".join(str(list(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"hidden, weight, targets {shapes} do not fit")
    return _pick("linear_cross_entropy", backend, hidden, weight).linear_cross_entropy(
        hidden, weight, targets, ignore_index
    )


def linear(x: torch.Tensor, weight: torch.Tensor, backend: str | None = None) -> torch.Tensor | None:
    """x [..., D] @ weight [R, D]^T: [..., R]. None where the backend has nothing faster than torch."""
    module = _faster("linear", backend, x, weight)
    return None if module is None else module.linear(x, weight)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether its products in bf16 are faster than those in fp32: compute capability 8.0, or AVX512-BF16."""
    if device.type == "cpu":
        return _load("cpu").multiplies_bf16()
    return device.type == "cuda" and _capability(device) >= (8, 0)


def bf16_products(device: torch.device) -> contextlib.AbstractContextManager | None:
    """A context in which the ops that train multiply in bf16 and sum in fp32, while tensors stay in fp32.

    None where the backend in use has no such products: then autocast is the way to bf16.
    """
    module = _in_use(device)
    has = hasattr(module, "bf16_products") and multiplies_bf16(device)
    return module.bf16_products() if has else None


def select(backend: str) -> None:
    """Make `backend` (or "auto") what `backend=None` means from now on; first set by ANT5M_KERNELS."""
    global _selected
    _check_name(backend)
    if backend != "auto":
        for op in OPS:
            _refuse(op, backend, _why_not(op, backend))
    _selected = backend


def selected() -> str:
    """The backend that `backend=None` means now: a name, or "auto"."""
    return _selected


def available() -> dict[str, dict[str, str]]:
    """{op: {backend: "ready" or the reason why not}} on this machine."""
    return {op: {backend: _why_not(op, backend) or "ready" for backend in BACKENDS} for op in OPS}


def describe(device: torch.device | str) -> str:
    """One line for people: which op runs where on this device, and why not where it would be faster."""
    order = _order(torch.device(device)) if _selected == "auto" else (_selected,)
    names, reasons = {}, set()
    for op in OPS:
        for names[op] in order:
            if _selected != "auto" or (reason := _why_not(op, names[op])) is None:
                break
            reasons.add(reason)
    chosen = sorted(set(names.values()))
    if len(chosen) == 1:
        where = f"all on {chosen[0]}"
    else:
        where = ", ".join(f"{op} on {name}" for op, name in names.items())
    return f"kernels ({_selected}): {where}" + (f" ({'; '.join(sorted(reasons))})" if reasons else "")


def _pick(op: str, backend: str | None, *tensors: torch.Tensor) -> ModuleType:
    name = backend or _selected
    if name != "auto":
        _check_name(name)
        _refuse(op, name, _why_not(op, name, *tensors))
        return _modules[name]
    for name in _order(tensors[0].device):
        if _why_not(op, name, *tensors) is None:
            return _modules[name]
    raise AssertionError("the reference runs everywhere")


def _faster(op: str, backend: str | None, *tensors: torch.Tensor) -> ModuleType | None:
    """The backend in use, if it has this op, which none has to have, and can run it."""
    module = _in_use(tensors[0].device, backend)
    return module if hasattr(module, op) and module.why_not(op, *tensors) is None else None


def _in_use(device: torch.device, backend: str | None = None) -> ModuleType:
    name = backend or _selected
    return _load(_order(device)[0] if name == "auto" else name)


def _order(device: torch.device) -> tuple[str, ...]:
    return _PREFERENCE[_place(device)][2]


@constant_when_traced  # a number, because torch.compile cannot compare such a tuple
def _place(device: torch.device) -> int:
    """Of the line of `_PREFERENCE` that holds for a device."""
    capability = _capability(device)
    lines = enumerate(_PREFERENCE)
    return next(i for i, (kind, oldest, _) in lines if kind in (device.type, "any") and capability >= oldest)


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) of anything else."""
    if device.type != "cuda" or not (torch.cuda.is_available() and torch.version.cuda):
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def _why_not(op: str, backend: str, *tensors: torch.Tensor) -> str | None:
    return _load(backend).why_not(op, *tensors)


def _load(backend: str) -> ModuleType:
    _check_name(backend)
    if backend not in _modules:
        _modules[backend] = importlib.import_module(f"ant5m.kernels.{backend}")
    return _modules[backend]


def _check_name(backend: str) -> None:
    if backend not in (*BACKENDS, "auto"):
        raise UserError(f"there is no kernel backend '{backend}' (use auto, {', '.join(BACKENDS)})")


def _refuse(op: str, backend: str, reason: str | None) -> None:
    if reason is not None:
        raise UserError(f"the kernel backend '{backend}' cannot run {op}: {reason}")
