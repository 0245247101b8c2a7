"""What a training step asks of a device: products, other arithmetic, exponentials, bytes of memory.

`ours` counts the fused ops: what the records of the ops say (`ant5m/kernels/ops.py`), and from formulas what
the kernels do besides or otherwise. `traced` counts a step of plain PyTorch (transformers' Llama, or
our `reference` backend) as it is: operation by operation, on tensors without memory.

A multiply-add is 2 FLOPs; attention counts the scores that causality asks for. Bytes are those of every
tensor that a kernel reads or writes, once each: nothing stays in a cache from one kernel to the next.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from peers import transformers_llama, transformers_loss
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from ant5m import kernels
from ant5m.kernels.cuda import SIZES as CUDA_MLP_SIZES
from ant5m.kernels.dispatch import Cost
from ant5m.kernels.registry import OPS as OPS_OF_KERNELS
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.model.costs import count_parameters

OPS = ("embedding", "rms_norm", "linears", "rope", "attention", "swiglu", "head", "update")
"""rms_norm with the residual's addition; rope with QK-norm, where there is one; head: its products and the
loss; update: clipping and optimizer"""

# Instructions of the compiled sm_75 attention kernels for each score, without products and exponentials:
# scale, maximum, sum, conversion; backward in two kernels.
_ATTENTION_OPS = {"forward": 5, "backward": 9}


@dataclass(frozen=True)
class Kernel:
    """What one launch asks for, or `launches` alike all together."""

    op: str
    direction: str
    """forward, backward, or update"""
    flops: float = 0
    """in matrix products"""
    ops: float = 0
    """other arithmetic on single numbers, in fp32"""
    exps: float = 0
    """exponentials"""
    bytes: float = 0
    launches: float = 1

    def times(self, count: float) -> "Kernel":
        numbers = {
            name: getattr(self, name) * count for name in ("flops", "ops", "exps", "bytes", "launches")
        }
        return dataclasses.replace(self, **numbers)


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    config: ModelConfig
    batch_size: int
    sequence_length: int
    half: bool
    """activations in 16 bits, and the residual stream in fp32 (autocast); else all in fp32"""
    optimizer: str = "adamw"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def queries(self) -> int:
        return self.config.num_attention_heads * self.config.head_size

    @property
    def keys(self) -> int:
        return self.config.num_key_value_heads * self.config.head_size

    @property
    def scores(self) -> int:
        """of all heads in one layer"""
        length = self.sequence_length
        return self.batch_size * self.config.num_attention_heads * length * (length + 1) // 2

    @property
    def itemsize(self) -> int:
        """of activations"""
        return 2 if self.half else 4


def ours(step: Step, backend: str = "triton") -> list[Kernel]:
    """The five fused ops between products, as the `triton`, `cuda` or `cpu` backend has them.

    On a GPU attention's backward pass is two kernels, so that no sum depends on an order, and the head's
    gradients of logits are written and read by chunks; `triton` makes the logits twice and stores none. The
    `cpu` backend makes each score and each logit once for both directions, and uses them up where they are.
    The MLP of `cpu`, and that of `cuda` for its sizes, is one op, which counts as linears. That of `triton`
    is not counted: no device has timed it yet.
    """
    config, layers = step.config, step.config.num_hidden_layers
    width = config.hidden_size
    layer = [
        *_norm(step),
        *_product(step, width, step.queries + 2 * step.keys),
        *_rope(step),
        *_attention(step, cpu=backend == "cpu"),
        *_product(step, step.queries, width),
        *_norm(step),
        *_mlp(step, backend),
    ]
    # The first norm has nothing to add, the last one stands behind the layers: together as many bytes.
    return [
        *_embedding(step),
        *(kernel.times(layers) for kernel in layer),
        *_norm(step),
        *_head(step, backend),
        *update(step),
    ]


def _cost(step: Step, name: str, *shapes: tuple[int, ...], rest: tuple = ()) -> tuple[Cost, Cost]:
    """(forward, backward) of an op by its record, of activations and weights [tokens, ..] of such shapes."""
    dtype = torch.bfloat16 if step.half else torch.float32
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    return OPS_OF_KERNELS[name].cost(*tensors, *rest)


def _embedding(step: Step) -> list[Kernel]:
    row = 4 * step.tokens * step.config.hidden_size
    table = 4 * step.config.vocab_size * step.config.hidden_size
    return [
        Kernel("embedding", "forward", bytes=2 * row),
        Kernel("embedding", "backward", ops=row / 4, bytes=3 * row + 2 * table, launches=2),
    ]


def _norm(step: Step) -> list[Kernel]:
    shape = step.tokens, step.config.hidden_size
    stream = torch.empty(shape, device="meta")
    forward, backward = _cost(step, "rms_norm", shape, shape[1:], rest=(1e-5, stream))
    n = stream.numel()
    return [
        Kernel("rms_norm", "forward", ops=5 * n, bytes=forward.bytes),
        Kernel("rms_norm", "backward", ops=9 * n, bytes=backward.bytes),
    ]


def _product(step: Step, inputs: int, outputs: int) -> list[Kernel]:
    """x W^T of x [N, inputs], W [outputs, inputs]; backward dy W and dy^T x."""
    c, weight = step.itemsize, inputs * outputs
    flops = _cost(step, "linear", (step.tokens, inputs), (outputs, inputs))[0].flops
    x, y = step.tokens * inputs * c, step.tokens * outputs * c
    return [
        Kernel("linears", "forward", flops, bytes=x + y + weight * c),
        Kernel("linears", "backward", flops, bytes=x + y + weight * c),
        Kernel("linears", "backward", flops, bytes=x + y + weight * 4),
    ]


def _rope(step: Step) -> list[Kernel]:
    """With QK-norm both in one pass, whose norms are counted here, too."""
    n = step.tokens * (step.queries + step.keys)
    q, k, joined = ((step.tokens, size) for size in (step.queries, step.keys, step.queries + 2 * step.keys))
    normed = step.config.qk_norm
    forward, _ = _cost(step, "qk_norm_rope" if normed else "rope", q, k, rest=(None, None))
    # The gradients of q, k and v become one tensor, for one product.
    _, backward = _cost(step, "rope_packed", joined, rest=(None, None, None, normed or None, None))
    return [
        Kernel("rope", "forward", ops=(3 + 4 * normed) * n, bytes=forward.bytes),
        Kernel("rope", "backward", ops=(3 + 8 * normed) * n, bytes=backward.bytes),
    ]


def _attention(step: Step, cpu: bool) -> list[Kernel]:
    """Forward 2 products a score; backward 5 in one kernel, or 3 + 4 in two, which both make the score."""
    product, scores, c = 2 * step.config.head_size * step.scores, step.scores, step.itemsize
    q, k = step.tokens * step.queries * c, step.tokens * step.keys * c
    rows = 4 * step.tokens * step.config.num_attention_heads
    ops = {way: count * scores for way, count in _ATTENTION_OPS.items()}
    heads = step.batch_size, step.sequence_length
    queries = *heads, step.config.num_attention_heads, step.config.head_size
    keys = *heads, step.config.num_key_value_heads, step.config.head_size
    costs = _cost(step, "attention", queries, keys, keys, rest=(None,))
    # The logarithm of each row's sum is written and read.
    forward, backward = (
        Kernel("attention", way, cost.flops, ops["forward"], scores, cost.bytes + rows)
        for way, cost in zip(("forward", "backward"), costs, strict=True)
    )
    if cpu:
        return [forward, backward]
    ops = ops["backward"] / 2
    return [
        forward,
        Kernel("attention", "backward", 3 * product, ops, scores, 4 * q + 2 * k + rows),
        Kernel("attention", "backward", 4 * product, ops, scores, 2 * q + 4 * k + 2 * rows),
    ]


def _swiglu(step: Step) -> list[Kernel]:
    shape = step.tokens, step.config.intermediate_size
    n = math.prod(shape)
    forward, backward = _cost(step, "swiglu", shape, shape)
    return [
        Kernel("swiglu", "forward", ops=4 * n, exps=n, bytes=forward.bytes),
        Kernel("swiglu", "backward", ops=9 * n, exps=n, bytes=backward.bytes),
    ]


def _mlp(step: Step, backend: str) -> list[Kernel]:
    width, wide = step.config.hidden_size, step.config.intermediate_size
    if backend == "cpu":
        return _cpu_mlp(step)
    if backend == "cuda" and step.half and width in CUDA_MLP_SIZES:
        return _cuda_mlp(step)
    return [*_product(step, width, 2 * wide), *_swiglu(step), *_product(step, wide, width)]


def _cuda_mlp(step: Step) -> list[Kernel]:
    """Keeps nothing but its input: the backward pass makes gate and up again, and leaves what the products
    for the gradients of the weights take."""
    width, wide, c = step.config.hidden_size, step.config.intermediate_size, step.itemsize
    product, n = 2 * step.tokens * width * wide, step.tokens * wide
    x, weights = step.tokens * width * c, 3 * width * wide * c
    return [
        Kernel("linears", "forward", 3 * product, 4 * n, n, 2 * x + weights),
        Kernel("linears", "backward", 5 * product, 9 * n, n, 3 * x + 3 * n * c + weights),
        Kernel("linears", "backward", 2 * product, bytes=x + 2 * n * c + 8 * width * wide),
        Kernel("linears", "backward", product, bytes=x + n * c + 4 * width * wide),
    ]


def _cpu_mlp(step: Step) -> list[Kernel]:
    """Keeps gate and up; what else lies between the three products stays in a cache."""
    width, wide = step.config.hidden_size, step.config.intermediate_size
    n = step.tokens * wide
    kept = 8 * n  # which the record of the op knows nothing of
    whole = dataclasses.replace(step, half=False)
    forward, backward = _cost(whole, "mlp", (step.tokens, width), (wide, width), (wide, width), (width, wide))
    return [
        Kernel("linears", "forward", forward.flops, 4 * n, n, forward.bytes + kept),
        Kernel("linears", "backward", backward.flops, 9 * n, n, backward.bytes + kept),
    ]


def _head(step: Step, backend: str) -> list[Kernel]:
    """Logits, softmax - one-hot, and both gradients, all made in the forward pass."""
    vocab, width, c = step.config.vocab_size, step.config.hidden_size, step.itemsize
    numbers = step.tokens * vocab
    logits = 0 if backend == "cpu" else c * numbers
    hidden, weight = step.tokens * width, vocab * width
    rest = (None, -100)
    flops = _cost(step, "linear_cross_entropy", (step.tokens, width), (vocab, width), rest=rest)[0].flops
    # With 512 MiB of logits at once; each chunk's dW is added to the sum in fp32.
    chunks = max(1, math.ceil(logits / (512 << 20)))
    inputs = (hidden + weight) * c
    if backend == "triton" and step.half:
        softmax = [
            Kernel("head", "forward", flops, 4 * numbers, numbers, bytes=inputs),
            Kernel("head", "forward", flops, 5 * numbers, numbers, bytes=logits + inputs, launches=chunks),
        ]
    else:
        softmax = [
            Kernel("head", "forward", flops, bytes=logits + inputs, launches=chunks),
            Kernel("head", "forward", 0, 6 * numbers, numbers, bytes=2 * logits, launches=chunks),
        ]
    return [
        *softmax,
        Kernel("head", "forward", flops, bytes=logits + hidden * 4 + weight * c, launches=chunks),
        Kernel(
            "head", "forward", flops, bytes=logits + hidden * c + 16 * weight * chunks, launches=2 * chunks
        ),
        Kernel("head", "backward", ops=hidden + weight, bytes=(4 + c) * hidden + 8 * weight, launches=2),
    ]


def update(step: Step) -> list[Kernel]:
    """Clipping, AdamW in one launch, and Muon's Newton-Schulz iterations on the layers' matrices if it is
    the optimizer (`ant5m.train.optimizer`)."""
    counted = count_parameters(step.config)
    total = sum(counted.values())
    hidden = counted["attention"] + counted["mlp"] if step.optimizer == "muon" else 0
    rest = total - hidden
    kernels_ = [
        Kernel("update", "update", ops=3 * total, bytes=12 * total, launches=4),
        Kernel("update", "update", ops=12 * rest, bytes=28 * rest),
    ]
    return kernels_ + (_muon(step) if hidden else [])


def _muon(step: Step) -> list[Kernel]:
    config = step.config
    width, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries, keys = step.queries, step.keys
    matrices = {(width, queries): 2, (keys, width): 2, (wide, width): 2, (width, wide): 1}
    found, c, iterations = [], step.itemsize, 5
    for (rows, columns), count in matrices.items():
        small, large, number = min(rows, columns), max(rows, columns), count * layers
        product = 2 * small * small * large * number
        square, whole = small * small * number, rows * columns * number
        found += [
            # momentum, look-ahead, stacking, norm, scale, decay and step: passes over all of them
            Kernel("update", "update", ops=8 * whole, bytes=22 * 4 * whole, launches=12),
            Kernel("update", "update", product, bytes=c * (whole + square)).times(iterations),
            Kernel("update", "update", 2 * small**3 * number, bytes=2 * c * square).times(iterations),
            Kernel("update", "update", product, bytes=c * (2 * whole + square)).times(iterations),
        ]
    return found


def traced(variant: str, step: Step) -> list[Kernel]:
    """The kernels of a step of `variant`, "transformers" or "reference", one for each PyTorch operation."""
    # All layers but the first are alike.
    config = dataclasses.replace(step.config, num_hidden_layers=min(2, step.config.num_hidden_layers))
    shape = step.batch_size, step.sequence_length
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _Trace(config, step) as trace,
        warnings.catch_warnings(),
    ):
        # Our model looks where tensors lie, and one without memory lies at 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        tokens = torch.zeros(shape, dtype=torch.int64)
        loss_of = _loss_of(variant, config)
        with trace.modules, torch.autocast("cpu", torch.bfloat16, enabled=step.half):
            trace.direction = "forward"
            loss = loss_of(tokens, tokens)
        trace.direction = "backward"
        loss.backward()
    return [*trace.kernels, *update(step)]


def _loss_of(variant: str, config: ModelConfig) -> Callable:
    if variant == "reference":
        net, chosen = Ant(config), kernels.selected()

        def loss(tokens, targets):
            kernels.select("reference")
            try:
                return net(tokens, targets)
            finally:
                kernels.select(chosen)

        return loss
    peer = transformers_llama(config)
    return lambda tokens, targets: transformers_loss(peer, tokens, targets)


# They move nothing: views, and memory that is not written yet.
_FREE = {
    "device",
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "detach",
    "lift_fresh",
}
# Positions of tensors that are not read, or hardly: what is gathered from, what is overwritten.
_UNREAD = {
    "copy_": {0},
    "embedding": {0},
    "gather": {0},
    "index_select": {0},
    "nll_loss_forward": {0},
    "nll_loss_backward": {1},
    "scatter_add_": {0},
    "ones_like": {0},
    "zeros_like": {0},
    "full_like": {0},
    "new_ones": {0},
    "new_zeros": {0},
}
_UNWRITTEN = {"scatter_add_"}
_EXPONENTIAL = {
    "exp",
    "softmax",
    "_softmax",
    "_log_softmax",
    "_log_softmax_backward_data",
    "sigmoid",
    "silu",
    "silu_backward",
}


class _Trace(TorchDispatchMode):
    """Notes each operation with what it moves and computes, under the op that its module belongs to."""

    def __init__(self, config: ModelConfig, step: Step):
        super().__init__()
        self.kernels: list[Kernel] = []
        self.direction: str | None = None
        self.modules = ModuleTracker()
        self._step = step
        self._repeats = step.config.num_hidden_layers - 1 if config.num_hidden_layers > 1 else 1
        self._made_by: dict[int, str] = {}
        self._module = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        module = self._current_module()
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if self.direction is None or func.is_view or packet.__name__ in _FREE:
            return out
        kernel = self._kernel(packet, module, args, kwargs or {}, out)
        self.kernels.append(kernel.times(self._repeats) if ".layers.1" in module else kernel)
        return out

    def _current_module(self):
        # A node of the graph is numbered just before its operation runs, and keeps the number for its way
        # back.
        if self.direction == "forward":
            number = torch.autograd._get_sequence_nr() - 1
            self._module = max(self.modules.parents, key=len)
            self._made_by.setdefault(number, self._module)
        elif (node := torch._C._current_autograd_node()) is not None:
            self._module = self._made_by.get(node._sequence_nr(), self._module)
        return self._module

    def _kernel(self, packet, module, args, kwargs, out):
        name = packet.__name__
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        numbers = sum(x.numel() for x in outs)
        given = [x for i, x in enumerate(args) if i not in _UNREAD.get(name, ())]
        others = [value for key, value in kwargs.items() if key not in ("out", "grad_input")]
        read = [x for x in tree_leaves([given, others]) if isinstance(x, torch.Tensor)]
        moved = _bytes(read) + (_bytes(read[-1:]) if name in _UNWRITTEN else _bytes(outs))
        if "scaled_dot_product" in name:
            return self._attention(moved)
        # A product added in place counts like any other.
        counter = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))
        flops = counter(*args, **kwargs, out_val=out) if counter else 0
        return Kernel(
            _op(module, bool(flops)),
            str(self.direction),
            flops,
            0 if flops else numbers,
            numbers if name in _EXPONENTIAL else 0,
            moved,
        )

    def _attention(self, moved):
        forward = self.direction == "forward"
        products, scores = 2 if forward else 5, self._step.scores
        flops = 2 * products * self._step.config.head_size * scores
        ops = _ATTENTION_OPS["forward"] * scores
        return Kernel("attention", str(self.direction), flops, ops, scores, moved)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What is behind them: a dimension of stride 0 counts once."""
    sizes = ((x, zip(x.shape, x.stride(), strict=True)) for x in tensors)
    return sum(x.itemsize * math.prod(n for n, stride in pairs if stride) for x, pairs in sizes)


def _op(module: str, product: bool) -> str:
    last = module.rsplit(".", 1)[-1]
    if ".model" not in module:
        return "head"
    if "norm" in last:
        return "rms_norm"
    if last == "embed_tokens":
        return "embedding"
    if product or last.endswith("_proj"):
        return "linears"
    if last == "mlp" or last == "act_fn":
        return "swiglu"
    # What the layer itself does is adding to the residual stream.
    return "rope" if last in ("self_attn", "rotary_emb", "model") else "rms_norm"
