"""Every op in every backend that runs here, from its record: it computes what its composition does in
float64, and refuses what does not fit.

tests/test_kernels_triton.py and tests/test_kernels_cuda.py do the same for the backends of a GPU.
"""

import contextlib

import pytest
import torch
from accuracy import check_op
from hypothesis import given
from hypothesis import strategies as st

from ant5m import _cpu, kernels
from ant5m.errors import UserError
from ant5m.kernels import dispatch, registry
from ant5m.kernels.dispatch import Implementation
from ant5m.kernels.registry import OPS
from ant5m.kernels.samples import Draw, Sizes, tensors_of, with_tensors
from ant5m.kernels.tree_mask import TreeMask

fp32, fp16, bf16, fp64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SIZES = {
    "ones": Sizes(1, 1, 1, 1, 1, 1, 2, 1),
    "odd": Sizes(2, 33, 27, 20, 6, 2, 10, 50),
    "several tiles": Sizes(1, 131, 130, 70, 4, 4, 16, 257),
    "wide": Sizes(1, 40, 300, 36, 3, 1, 32, 33),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("backend, dtype", [("cpu", fp32), ("cpu", bf16), ("reference", fp32)])
@pytest.mark.parametrize("name", OPS)
def test_ops(name, backend, dtype, sizes):
    check_op(name, backend, Draw(SIZES[sizes], dtype))


@contextlib.contextmanager
def instruction_set(name):
    best = _cpu.instruction_set()
    try:
        yield _cpu.use(name)
    finally:
        _cpu.use(best)


def padded(x, gaps, last):
    """x's values among NaN: `gaps` of them around it in each dimension, `last` numbers apart in a row."""
    if x.ndim == 0:
        return x
    shape = [n + gaps for n in x.shape[:-1]] + [x.shape[-1] * last + gaps]
    memory = torch.full(shape, float("nan") if x.is_floating_point() else -7, dtype=x.dtype)
    inside = tuple(slice(gaps // 2, gaps // 2 + n) for n in x.shape[:-1])
    view = memory[(*inside, slice(gaps // 2, gaps // 2 + x.shape[-1] * last, last))]
    view.copy_(x)
    return view


@given(
    name=st.sampled_from(sorted(OPS)),
    sizes=st.builds(
        Sizes,
        batch=st.integers(0, 3),
        length=st.one_of(st.integers(0, 3), st.integers(4, 70)),
        hidden=st.integers(1, 70),
        intermediate=st.integers(1, 70),
        kv_heads=st.integers(1, 3),
        head_size=st.integers(1, 64).map(lambda half: 2 * half),
        vocab=st.integers(1, 140),
    ),
    group=st.integers(1, 5),
    gaps=st.integers(0, 5),
    last=st.integers(1, 2),
    variant=st.sampled_from(["avx512_bf16", "avx512", "avx2", "portable"]),
)
def test_any_sizes_and_strides(name, sizes, group, gaps, last, variant):
    """Few examples, always the same; `pytest --long` takes many. Nothing outside of a tensor is ever read."""
    sizes = Sizes(**{**vars(sizes), "heads": group * sizes.kv_heads})
    with instruction_set(variant):
        check_op(name, "cpu", Draw(sizes), layout=lambda x: padded(x, gaps, last))


def zeros(*shape, dtype=fp32):
    return torch.zeros(shape, dtype=dtype)


def long(*shape):
    return torch.zeros(shape, dtype=torch.int64)


HEADS = [2, 1, 1]
MISFITS = {
    "a short weight": ("rms_norm", zeros(3, 4), zeros(5)),
    "a residual of one row": ("rms_norm", zeros(4, 8), zeros(8), 1e-5, zeros(1, 8)),
    "angles of too few positions": ("rope", zeros(1, 3, 2, 4), zeros(1, 3, 1, 4), zeros(2, 2), zeros(2, 2)),
    "angles of one position": ("rope", zeros(1, 3, 2, 4), zeros(1, 3, 1, 4), zeros(1, 2), zeros(1, 2)),
    "an odd head size": ("rope", zeros(1, 3, 2, 5), zeros(1, 3, 1, 5), zeros(3, 2), zeros(3, 2)),
    "head sizes of q and k": ("rope", zeros(1, 3, 2, 4), zeros(1, 3, 1, 6), zeros(3, 2), zeros(3, 2)),
    "dtypes of q and k": ("rope", zeros(1, 3, 2, 4), zeros(1, 3, 1, 4).half(), zeros(3, 2), zeros(3, 2)),
    "a short norm of k": (
        *("qk_norm_rope", zeros(1, 3, 2, 4), zeros(1, 3, 1, 4), zeros(3, 2), zeros(3, 2)),
        [zeros(4), zeros(3)],
    ),
    "a norm alone": ("rope_packed", zeros(1, 3, 16), zeros(3, 2), zeros(3, 2), HEADS, [zeros(4)]),
    "norms of another size": (
        *("qkv_rope", zeros(1, 3, 4), zeros(16, 4), zeros(3, 2), zeros(3, 2), HEADS),
        [zeros(2), zeros(2)],
    ),
    "heads beside the width": ("rope_packed", zeros(1, 3, 17), zeros(3, 2), zeros(3, 2), HEADS),
    "other heads of k and v": ("rope_packed", zeros(1, 3, 16), zeros(3, 2), zeros(3, 2), [1, 1, 2]),
    "angles of a packed product": ("rope_packed", zeros(1, 3, 16), zeros(2, 2), zeros(2, 2), HEADS),
    "a narrow weight": ("qkv_rope", zeros(1, 3, 4), zeros(16, 5), zeros(3, 2), zeros(3, 2), HEADS),
    "angles of a projection": ("qkv_rope", zeros(1, 3, 4), zeros(16, 4), zeros(2, 2), zeros(2, 2), HEADS),
    "heads that are no groups": ("attention", zeros(1, 3, 3, 4), zeros(1, 3, 2, 4), zeros(1, 3, 2, 4)),
    "v of another batch": ("attention", zeros(2, 3, 2, 4), zeros(2, 3, 2, 4), zeros(1, 3, 2, 4)),
    "more queries than keys": ("attention", zeros(1, 3, 2, 4), zeros(1, 2, 2, 4), zeros(1, 2, 2, 4)),
    "starts too short": ("attention", *[zeros(1, 3, 2, 4)] * 3, long(1, 2)),
    "starts of one row": ("attention", *[zeros(2, 3, 2, 4)] * 3, long(1, 3)),
    "starts that are no integers": ("attention", *[zeros(1, 3, 2, 4)] * 3, zeros(1, 3)),
    "ends of one row": ("tree_attention", *[zeros(2, 3, 2, 4)] * 3, TreeMask(long(1, 3))),
    "up of one row": ("swiglu", zeros(4, 8), zeros(1, 8)),
    "dtypes of gate and up": ("swiglu", zeros(3), zeros(3, dtype=fp64)),
    "a down that is not transposed": ("mlp", zeros(3, 4), zeros(5, 4), zeros(5, 4), zeros(5, 4)),
    "no width": ("mlp", zeros(3, 4), zeros(0, 4), zeros(0, 4), zeros(4, 0)),
    "channels": ("linear", zeros(3, 4), zeros(9, 5)),
    "a weight of one dimension": ("linear", zeros(3, 4), zeros(4)),
    "one of several weights": ("rms_norm_linear", zeros(3, 4), zeros(4), 1e-5, [zeros(9, 4), zeros(9, 5)]),
    "what attention gives": (
        *("fused_post_attention", zeros(3, 4), zeros(3, 6), zeros(4, 5), zeros(4), 1e-5),
        *(zeros(5, 4), zeros(5, 4), zeros(4, 5)),
    ),
    "a residual of other rows": (
        *("fused_post_attention", zeros(1, 4), zeros(3, 5), zeros(4, 5), zeros(4), 1e-5),
        *(zeros(5, 4), zeros(5, 4), zeros(4, 5)),
    ),
    "a head of other channels": ("linear_cross_entropy", zeros(3, 4), zeros(9, 5), long(3)),
    "targets that are no int64": ("linear_cross_entropy", zeros(3, 4), zeros(9, 4), zeros(3)),
    "targets of other rows": ("linear_cross_entropy", zeros(3, 4), zeros(9, 4), long(1)),
    "no vocabulary": ("logsumexp_argmax", zeros(3, 4), zeros(0, 4)),
    "another device": ("swiglu", zeros(3, 4), torch.zeros(3, 4, device="meta")),
}


@pytest.mark.parametrize("backend", ["auto", *kernels.BACKENDS])
@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_an_error_in_every_backend(what, backend):
    """Nothing is broadcast, and no neighbouring memory is read."""
    name, *arguments = MISFITS[what]
    with pytest.raises(ValueError, match=f"^{name} takes .* do not fit$"):
        getattr(kernels, name)(*arguments, backend=backend)


def test_every_op_has_a_misfit():
    assert {name for name, *_ in MISFITS.values()} == set(OPS)


def test_an_error_names_what_was_given():
    with pytest.raises(ValueError) as error:
        kernels.rms_norm(zeros(2, 3), zeros(4), residual=zeros(2, 3).bfloat16())
    assert str(error.value).endswith(
        "given x float32 [2, 3] on cpu, weight float32 [4] on cpu, residual bfloat16 [2, 3] on cpu do not fit"
    )


def test_every_op_is_public_and_documented():
    for name, op in OPS.items():
        assert getattr(kernels, name) is op and name in kernels.__all__
        assert "[" in op.__doc__ or name == "swiglu", name


def test_an_op_falls_through_to_the_next_backend_and_then_to_its_composition(monkeypatch):
    """Those that no backend has to have, too."""
    (arguments,) = OPS["mlp"].samples(Draw(SIZES["odd"]))
    asked = []

    def backend(name, reason):
        def function(*given):
            asked.append(name)
            return OPS["mlp"].composition(*given, backend="reference")

        module = type(name, (), {"unsupported_reason": staticmethod(lambda tensors: None)})
        module.IMPLEMENTATIONS = {"mlp": Implementation(function, lambda *given: reason)}
        monkeypatch.setitem(registry._modules, name, module)
        registry.forget()

    monkeypatch.setattr(dispatch, "order", lambda device: ("triton", "cuda", "reference"))
    backend("triton", "not today"), backend("cuda", None)
    expected = kernels.mlp(*arguments, backend="reference")
    assert torch.equal(kernels.mlp(*arguments, backend="auto"), expected) and asked == ["cuda"]
    backend("cuda", "nor today")
    assert torch.equal(kernels.mlp(*arguments, backend="auto"), expected) and asked == ["cuda"]


def test_a_backend_by_name_runs_an_op_of_its_own_parts():
    """`rope_packed`, which `cpu` has not, is its `rope`; one of the core ops is an error."""
    for packed in OPS["rope_packed"].samples(Draw(SIZES["odd"])):
        assert kernels.rope_packed.unsupported_reason("cpu", *packed) == "it has no rope_packed"
        given = (kernels.rope_packed(*packed, backend=name) for name in ("cpu", "reference"))
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*given, strict=True))
    (arguments,) = OPS["mlp"].samples(Draw(SIZES["odd"]))
    wide = with_tensors(arguments, [x.double() for x in tensors_of(arguments)])
    with pytest.raises(UserError, match="'cpu' cannot run swiglu: it takes fp32 and bf16, not float64"):
        kernels.mlp(*wide, backend="cpu")


def test_costs_are_those_of_the_formulas():
    """Of `ant-5m`, 2 x 144 tokens: 6 N D W of the block, causal attention, three passes over SwiGLU."""
    draw, tokens = Draw(), 2 * 144

    def cost(name):
        return OPS[name].cost(*OPS[name].samples(draw)[-1])

    assert cost("mlp")[0].flops == 6 * tokens * 128 * 516 and cost("mlp")[1].flops == 2 * cost("mlp")[0].flops
    assert cost("attention")[0].flops == 2 * 2 * 8 * 16 * 144 * 145
    assert [part.bytes for part in cost("swiglu")] == [4 * 3 * tokens * 516, 4 * 5 * tokens * 516]
    assert [part.bytes for part in cost("rms_norm")] == [4 * 4 * tokens * 128] * 2
    assert all(min(cost(name)[0]) >= 0 and max(cost(name)[1]) > 0 for name in OPS)
