"""The head and its loss."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, empty, matrix, stride
from ant5m.kernels.cpu.bf16 import in_bf16


class _LinearCrossEntropy(torch.autograd.Function):
    # The gradients are computed with the loss, because only then are the logits at hand.
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, z_loss, bf16):
        hidden, weight, targets = matrix(hidden), matrix(weight), targets.contiguous()
        (tokens, dim), vocab = hidden.shape, len(weight)
        padded = -(-dim // 16) * 16
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = empty(hidden, tokens, dim) if need_hidden else None
        grad_weight = empty(hidden, vocab, padded) if need_weight else None
        if grad_weight is not None and not tokens:
            grad_weight.zero_()
        loss = hidden.new_empty(())
        _cpu.linear_cross_entropy(
            tokens=tokens,
            dim=dim,
            vocab=vocab,
            hidden=address(hidden),
            hidden_row=stride(hidden),
            weight=address(weight),
            weight_row=stride(weight),
            targets=address(targets),
            ignore_index=ignore_index,
            z_loss=z_loss,
            loss=address(loss),
            grad_hidden=address(grad_hidden),
            grad_weight=address(grad_weight),
            grad_weight_row=padded,
            bf16=bf16,
            threads=torch.get_num_threads(),
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
        return *grads, None, None, None, None


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, z_loss=None):
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= len(weight)))
    if outside.any():
        raise IndexError(f"target {targets[outside][0].item()} is outside a vocabulary of {len(weight)}")
    bf16 = in_bf16(hidden, weight)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    settings = ignore_index, z_loss or 0.0, bf16
    return _LinearCrossEntropy.apply(hidden.float(), weight.float(), targets, *settings)
