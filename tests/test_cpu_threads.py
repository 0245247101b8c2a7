"""Many cores: enough tasks for 16 of them, and the same bits on any number of threads."""

import contextlib
import ctypes

import pytest
import torch

from ant5m import _cpu
from ant5m.kernels import cpu
from ant5m.kernels.cpu.threads import share_threads
from ant5m.kernels.samples import tensors_of
from ant5m.model.config_file import load_config
from ant5m.train.plan import micro_batch

CORES, TASKS_A_CORE = 16, 4
TOKENS = 4096

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_GOMP_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_()


def angles(length, half):
    angle = torch.arange(length)[:, None] * torch.logspace(0, -3, half)
    return angle.cos(), angle.sin()


def attention(batch, heads=8, kv_heads=2, dim=16):
    length = TOKENS // batch
    return [draw(batch, length, n, dim, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads))]


def documents(batch):
    """`attention` inside documents of 300 positions."""
    starts = torch.arange(TOKENS // batch) // 300 * 300
    return [*attention(batch), starts.expand(batch, -1)]


def matrix(rows, columns, seed=0):
    return (draw(rows, columns, seed=seed).detach() / columns**0.5).requires_grad_()


def mlp_weights(width, inner):
    return [matrix(inner, width), matrix(inner, width, seed=1), matrix(width, inner)]


def head(width, vocab):
    targets = torch.arange(TOKENS) * 7 % vocab
    return [draw(TOKENS, width), matrix(vocab, width), targets.where(targets % 5 != 0, -100)]


def layer(width, inner):
    """`fused_post_attention`'s arguments."""
    return [
        *(draw(TOKENS, width), draw(TOKENS, width, seed=1), matrix(width, width)),
        *(draw(width), 1e-5, *mlp_weights(width, inner)),
    ]


# At 4,096 tokens, of the shapes of ant-5m, in one sequence and in four; some of ant-5m-fit too, whose
# vocabulary is small, and of a model that is wide.
CASES = {
    "rms_norm": (cpu.rms_norm, lambda: [draw(TOKENS, 128), draw(128), 1e-5, draw(TOKENS, 128, seed=1)]),
    "rope": (cpu.rope, lambda: [draw(4, 1024, 8, 16), draw(4, 1024, 2, 16), *angles(1024, 8)]),
    "qk_norm_rope": (
        cpu.qk_norm_rope,
        lambda: [draw(4, 1024, 8, 16), draw(4, 1024, 2, 16), *angles(1024, 8), [draw(16), draw(16, seed=1)]],
    ),
    "attention, 1 sequence": (cpu.attention, lambda: attention(1)),
    "attention, 4 sequences": (cpu.attention, lambda: attention(4)),
    "attention, 1 key/value head": (cpu.attention, lambda: attention(1, 2, 1, 24)),
    "attention inside documents": (cpu.attention, lambda: documents(4)),
    "tree_attention": (
        cpu.tree_attention,
        lambda: [*attention(4), torch.full((4, 1024), 900).clamp_(min=torch.arange(1, 1025))],
    ),
    "swiglu": (cpu.swiglu, lambda: [draw(TOKENS, 516), draw(TOKENS, 516, seed=1)]),
    "linear, 128 channels": (cpu.linear, lambda: [draw(TOKENS, 128), matrix(128, 128)]),
    "linear, 512 channels": (cpu.linear, lambda: [draw(TOKENS, 512), matrix(192, 512)]),
    "qkv_rope": (
        cpu.qkv_rope,
        lambda: [draw(4, 1024, 128), matrix(192, 128), *angles(1024, 8), [8, 2, 2]],
    ),
    "mlp": (cpu.mlp, lambda: [draw(TOKENS, 128), *mlp_weights(128, 516)]),
    "mlp, 256 channels": (cpu.mlp, lambda: [draw(TOKENS, 256), *mlp_weights(256, 384)]),
    "mlp, 256 channels, wide": (cpu.mlp, lambda: [draw(TOKENS, 256), *mlp_weights(256, 704)]),
    "mlp, 384 channels": (cpu.mlp, lambda: [draw(TOKENS, 384), *mlp_weights(384, 200)]),
    "linear_cross_entropy": (cpu.linear_cross_entropy, lambda: head(32, 16_384)),
    "linear_cross_entropy, small vocabulary": (cpu.linear_cross_entropy, lambda: head(64, 4_096)),
}
FORWARD = {
    "logsumexp_argmax": (cpu.logsumexp_argmax, lambda: head(32, 4_096)[:2]),
    "rms_norm_linear": (
        cpu.rms_norm_linear,
        lambda: [draw(TOKENS, 128), draw(128), 1e-5, [matrix(128, 128), matrix(64, 128)]],
    ),
    "fused_post_attention": (cpu.fused_post_attention, lambda: layer(128, 516)),
}


def test_every_op_with_threads_is_here():
    names = {name.partition(",")[0].partition(" ")[0] for name in (*CASES, *FORWARD)}
    assert names == set(cpu.IMPLEMENTATIONS)


def run(op, inputs):
    """The outputs of `op`, and the gradients of what requires one, if it gives them."""
    out = op(*inputs)
    if not torch.is_grad_enabled():
        return out if isinstance(out, tuple) else (out,)
    outs = out if isinstance(out, tuple) else (out,)
    ramps = [torch.linspace(-1, 1 + i, o.numel()).view(o.shape) for i, o in enumerate(outs)]
    wanted = [x for x in tensors_of(inputs) if x.requires_grad]
    return [*outs, *torch.autograd.grad(outs, wanted, ramps)]


@pytest.fixture
def task_counts(monkeypatch):
    """Of every call of C++'s `parallel` from now on that has more than one task: how many it has."""
    counts = []

    @_GOMP_PARALLEL
    def pool(body, data, threads, _):
        counts.append(threads)  # as many as are wanted, but no more than there are tasks
        _BODY(body)(data)  # which takes one task after another until none is left

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 << 20)
    _cpu.use_openmp(ctypes.cast(pool, ctypes.c_void_p).value)
    yield counts
    share_threads()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("products", [contextlib.nullcontext, cpu.bf16_products])
def test_tasks_for_every_core(name, products, task_counts):
    op, inputs = CASES[name]
    with products():
        run(op, inputs())
    # Forward and backward.
    assert len(task_counts) >= 2 or "cross_entropy" in name
    assert min(task_counts) >= CORES * TASKS_A_CORE, task_counts


@pytest.mark.parametrize("name", FORWARD)
@torch.no_grad()
def test_tasks_for_every_core_in_inference(name, task_counts):
    op, inputs = FORWARD[name]
    run(op, inputs())
    assert min(task_counts) >= CORES * TASKS_A_CORE, task_counts


@pytest.fixture
def threads():
    """Sets torch's number of threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*CASES, *FORWARD])
def test_the_same_bits_on_1_to_32_threads(name, threads):
    op, inputs = (CASES | FORWARD)[name]
    with torch.set_grad_enabled(name in CASES):
        threads(1)
        alone = run(op, inputs())
        for count in (4, 16, 32):
            threads(count)
            for one, many in zip(alone, run(op, inputs()), strict=True):
                assert torch.equal(one, many)


@pytest.mark.parametrize(("threads", "rows"), [(1, 4), (16, 4), (32, 8), (64, 16)])
def test_the_micro_batch_grows_with_the_cores(monkeypatch, threads, rows):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert micro_batch(load_config("ant-5m"), 64, 1_024, torch.device("cpu"), "fp32") == rows
