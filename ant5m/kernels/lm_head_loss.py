"""The head's loss on a GPU: logits = hidden weight^T, their cross-entropy and both gradients, by chunks of
rows.

The products with the gradients of logits are cuBLAS's, which uses the tensor cores of every device. The
gradients, softmax - one-hot, come from the backend: one kernel puts them in the place of a chunk of cuBLAS's
logits (`in_place`), or makes them from the rows and the weight without stored logits. So the gradients are
computed beside the loss, and no logits are kept. They are divided by the number of targets only in the
backward pass (softmax - one-hot is at most 1 in size), so fp16 needs no loss scale here; both are summed in
fp32. Nothing is skipped, and nothing waits for the device.

Counted for a T4 (24 TFLOP/s, 250 GB/s) and a step of `ant-5m`, 65,536 tokens, 128 wide, 16,384 entries:
each product of all tokens is 275 GFLOP or 11.5 ms. Chunks take three and the kernel's pass over the logits
and back, 4.3 GB or 17.2 ms: 52 ms. One fused kernel without logits would take five (logits for the
softmax's sum, again for each gradient, and the gradients): 57 ms, and only above 24 TFLOP/s less than that.
"""

from collections.abc import Callable, Iterator

import torch

from ant5m.kernels.arguments import compute_dtype

# Logits alive at once. Few large chunks: 16,384 rows of 16,384 entries in 16 bits. On an H200, the step of
# `ant-5m` spends 5.1 ms here with 64 MiB, 3.9 with 128, 3.7 with 256, 3.4 with 512.
CHUNK_BYTES = 512 << 20
# As it is, fp16 would lose probabilities below 2^-24. A power of two, so that it changes nothing else.
_FP16_SCALE = 2.0**12
# Rows of logits have room for a whole number of these, so that vectors of entries are read and written.
_ALIGN = 64

SoftmaxGradient = Callable[..., None]
"""softmax_gradient(logits [N, stride], hidden [N, D], weight [vocab, D], targets [N], losses [N], vocab,
ignore_index, scale, gradient, z_loss): the loss of each row, and if `gradient` scale * (softmax - one-hot) in
the place of its `vocab` entries, the softmax times 1 + 2 z_loss log(sum(exp)). What lies behind them may
become anything. Rows whose target is `ignore_index` become 0; one that is no entry makes the loss NaN.
`hidden` and `weight`, both dense, are what the logits were made of, for whoever needs some of them in more
digits.
"""
Gradients = Callable[..., Iterator[tuple[slice, torch.Tensor]]]
"""gradients(hidden [N, D], weight [V, D], targets [N], losses [N], ignore_index, scale, gradient, z_loss):
fills the losses, and yields some rows after others the gradients of their logits [n, V], as `SoftmaxGradient`
makes them, which last until the next are asked for. Without `gradient` what is yielded means nothing.
"""


def in_place(softmax_gradient: SoftmaxGradient) -> Gradients:
    """A chunk's logits by cuBLAS, in the dtype of the products, and in their place their gradients."""

    def gradients(hidden, weight, targets, losses, ignore_index, scale, gradient, z_loss):
        vocab = len(weight)
        hidden, weight = hidden.contiguous(), weight.contiguous()
        buffer = chunk_buffer(hidden, vocab)
        for part in chunks(len(hidden), len(buffer)):
            x = hidden[part]
            rows = buffer[: len(x)]
            logits = torch.mm(x, weight.T, out=rows[:, :vocab])
            tensors = rows, x, weight, targets[part], losses[part]
            softmax_gradient(*tensors, vocab, ignore_index, scale, gradient, z_loss)
            yield part, logits

    return gradients


def chunk_buffer(hidden: torch.Tensor, vocab: int) -> torch.Tensor:
    """Room for the logits of a chunk of rows, each a whole number of vectors long."""
    stride = vocab + -vocab % _ALIGN
    count = max(1, min(len(hidden), CHUNK_BYTES // (stride * hidden.itemsize)))
    return torch.empty(count, stride, dtype=hidden.dtype, device=hidden.device)


def chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, rows, chunk))


def make_linear_cross_entropy(name: str, gradients: Gradients) -> Callable[..., torch.Tensor]:
    """`linear_cross_entropy` with these gradients of its logits, registered as the custom op `name`."""

    @torch.library.custom_op(name, mutates_args=())
    def forward(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        dtype: torch.dtype,
        need_hidden: bool,
        need_weight: bool,
        z_loss: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> loss; fp32 gradients times count * _scale(dtype), empty where not needed; count of targets."""
        needs = need_hidden, need_weight
        loss, grad_hidden, grad_weight, count = _outputs(
            hidden, weight, targets, ignore_index, dtype, *needs, z_loss
        )
        hidden, weight, targets = hidden.to(dtype), weight.to(dtype), targets.contiguous()
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        if need_weight:
            grad_weight.zero_()
        inputs = hidden, weight, targets, losses, ignore_index
        made = gradients(*inputs, _scale(dtype), any(needs), z_loss)
        for part, gradient in made:
            if need_hidden:
                product(gradient, weight, grad_hidden[part])
            if need_weight:
                grad_weight += product(gradient.T, hidden[part])
        torch.sum((targets != ignore_index).float(), 0, out=count).clamp_(min=1)
        torch.div(losses.sum(), count, out=loss)
        return loss, grad_hidden, grad_weight, count

    forward.register_fake(_outputs)
    forward.register_autograd(_differentiate, setup_context=_save)

    def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, z_loss=None):
        grad = torch.is_grad_enabled()
        needs = grad and hidden.requires_grad, grad and weight.requires_grad
        return forward(hidden, weight, targets, ignore_index, compute_dtype(hidden), *needs, z_loss or 0.0)[0]

    return linear_cross_entropy


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a b in fp32, written to `out` if given: tensor cores sum 16-bit products in fp32, and so it stays."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":
        a, b = a.float(), b.float()
        return torch.mm(a, b, out=out if out is not None else a.new_empty(a.shape[0], b.shape[1]))
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _outputs(hidden, weight, targets, ignore_index, dtype, need_hidden, need_weight, z_loss):
    loss, count = (torch.empty((), dtype=torch.float32, device=hidden.device) for _ in range(2))
    grad_hidden = torch.empty(hidden.shape if need_hidden else 0, dtype=torch.float32, device=hidden.device)
    grad_weight = torch.empty(weight.shape if need_weight else 0, dtype=torch.float32, device=hidden.device)
    return loss, grad_hidden, grad_weight, count


def _save(ctx, inputs, output):
    hidden, weight, _, _, ctx.dtype, *ctx.needs, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx, grad, *_):
    *grads, count = ctx.saved_tensors
    scale = grad / (count * _scale(ctx.dtype))
    scaled = (
        torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype)) if need else None
        for x, dtype, need in zip(grads, ctx.dtypes, ctx.needs, strict=True)
    )
    return *scaled, None, None, None, None, None, None


def _scale(dtype: torch.dtype) -> float:
    return _FP16_SCALE if dtype == torch.float16 else 1.0
