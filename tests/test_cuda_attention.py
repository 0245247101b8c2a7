"""The CUDA attention on the emulated device, against the plainest formula in float64."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_host import SOURCES, HostLibrary, compile_kernels, needs_compiler

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
SOURCE = SOURCES / "attention.cu"
NAN = float("nan")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The formula's products are small: a second thread would only spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(q, k, v, do, starts=None, descending=False, text=None):
    """-> o, dq, dk, dv of the kernels, as the header of attention.cu says how to launch them."""
    batch, length, heads, size = q.shape
    kv = k.shape[2]
    group = heads // kv
    defines = {"HEAD_SIZE": size, "GROUP": group, "STARTS": int(starts is not None)}
    device = HostLibrary(compile_kernels(text or SOURCE, **defines), descending)
    together = next(n for n in (4, 3, 2, 1) if group % n == 0)
    grid = -(-length // (4 // together * 32)), kv * group // together, batch
    keys = 64 if size == 64 else 128

    def empty(*shape, dtype=torch.float32):
        return torch.full(shape, NAN, dtype=dtype)

    norms = -(-length // 16)
    o, dq = (empty(batch, length, heads, size, dtype=torch.half) for _ in range(2))
    dk, dv = (empty(batch, length, kv, size, dtype=torch.half) for _ in range(2))
    lse, row_terms = empty(batch, heads, length), empty(batch, heads, length, 2)
    v_norm, do_norm = empty(batch, kv, norms), empty(batch, heads, norms)
    numbers = length, 1 / math.sqrt(size), *(s for x in (q, k, v) for s in x.stride()[:3])
    some = torch.zeros(1, dtype=torch.int32) if starts is None else starts
    device.launch("attention_forward", grid, 128, q, k, v, some, o, lse, v_norm, *numbers)
    device.launch(
        "attention_dq", grid, 128,
        q, k, v, some, o, do, lse, v_norm, row_terms, do_norm, dq, *numbers,
        *do.stride()[:3], *dq.stride()[:3],
    )  # fmt: skip
    device.launch(
        "attention_dkdv", (-(-length // keys), kv, batch), 128,
        q, k, v, some, do, row_terms, v_norm, do_norm, dk, dv, *numbers,
        *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
    )  # fmt: skip
    return o, dq, dk, dv


def attention(q, k, v, starts=None):
    """The formula, in the dtype of q."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[3])
    at = torch.arange(length)
    hidden = at > at[:, None]
    if starts is not None:
        hidden = hidden | (at < starts[:, :, None])[:, None]
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def gradients(q, k, v, do, starts, dtype):
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in (q, k, v))
    o = attention(q, k, v, starts)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do.to(dtype))


def error(got, truth, floor=0.0):
    """RMS of the difference over RMS, or over `floor` where that is more."""
    got, truth = got.double(), truth.double()
    return ((got - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=floor)).item()


def draw(batch, length, heads, kv, size, scale=1.0, seed=0):
    """q, k, v and a gradient; q and k times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, kv, kv, heads)
    return [
        (torch.randn(batch, length, h, size, generator=generator) * s).half()
        for h, s in zip(shapes, (scale, scale, 1, 1), strict=True)
    ]


def assert_right(got, q, k, v, do, starts=None):
    """Near float64, and not farther from it than the formula in fp16."""
    truth = gradients(q, k, v, do, starts, torch.float64)
    eager = gradients(q, k, v, do, starts, torch.half)
    for name, mine, right, plain in zip(("o", "dq", "dk", "dv"), got, truth, eager, strict=True):
        floor = 0.05 if name in ("dq", "dk") else 0.0  # a single key has no gradient of q and k but rounding
        assert error(mine, right, floor) <= min(5e-3, error(plain, right, floor) + 1e-4), name


SHAPES = [(4, 2, 16), (8, 1, 16), (2, 1, 16), (3, 1, 32), (1, 4, 64), (4, 1, 64)]  # group, kv, size


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("group, kv, size", SHAPES)
@needs_compiler
def test_attention(group, kv, size, descending):
    for length in (65, 130) if descending else (1, 15, 17, 63, 65, 130):
        x = draw(2, length, group * kv, kv, size)
        got = run(*x, descending=descending)
        assert_right(got, *x)
    if descending:  # no result depends on the order of the warps
        assert all(torch.equal(a, b) for a, b in zip(got, run(*x), strict=True))


@pytest.mark.parametrize("group, kv, size", [(4, 2, 16), (1, 4, 64)])
@needs_compiler
def test_views_of_one_tensor(group, kv, size):
    """q, k and v side by side in one tensor, and a gradient with the heads outside."""
    heads = group * kv
    q, k, v, do = draw(2, 70, heads, kv, size)
    joint = torch.cat([q, k, v], 2)
    views = joint.split([heads, kv, kv], 2)
    assert not any(x.is_contiguous() for x in views)
    apart = do.transpose(1, 2).contiguous().transpose(1, 2)
    for got, right in zip(run(*views, apart), run(q, k, v, do), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("scale", [4.0, 30.0, 300.0])
@needs_compiler
def test_peaked_scores(scale):
    """Up to scores of some 10,000, of which one takes all: no NaN, and still the right one."""
    x = draw(1, 130, 4, 1, 16, scale=scale)
    got = run(*x)
    truth = gradients(*x, None, torch.float64)
    assert error(got[0], truth[0]) < 1e-2 and error(got[3], truth[3]) < 1e-2
    assert all(g.isfinite().all() for g in got)
    if scale < 10:
        assert_right(got, *x)


@pytest.mark.parametrize("exponent", [-20, -12, 0, 9, 13])
@needs_compiler
def test_scaled_gradients(exponent):
    """dQ and dK lose nothing, however small or large the scale of the loss."""
    q, k, v, do = draw(1, 70, 4, 1, 16)
    do = (do.float() * 2.0**exponent).half()
    got = run(q, k, v, do)
    truth = gradients(q, k, v, do, None, torch.float64)
    for mine, right in zip(got[1:], truth[1:], strict=True):
        fits = right.abs() < 65000
        assert mine[right.abs() > 66000].isinf().all()
        mine, right = mine.double()[fits], right[fits]
        rounding = 2.0**-25 if exponent < -12 else 0.0  # of the subnormal halves that come out
        assert error(mine, right, rounding / 5e-3) < 5e-3


@pytest.mark.parametrize("bad", [math.inf, -math.inf, NAN])
@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
@needs_compiler
def test_overflow_is_not_lost(where, bad):
    """A number that is not finite makes all that depends on it not finite, and nothing of earlier tiles."""
    x = dict(zip(("q", "k", "v", "do"), draw(1, 130, 4, 1, 16), strict=True))
    x[where][0, 70, 0, 3] = bad
    o, dq, dk, dv = run(**x)
    truth = gradients(*x.values(), None, torch.float64)
    sees = torch.arange(130) >= 70  # the formula also multiplies what is hidden by 0, which makes NaN
    seen = torch.arange(130) <= 70 if where in ("q", "do") else torch.ones(130, dtype=torch.bool)
    for mine, right, concerned in zip((o, dq, dk, dv), truth, (sees, sees, seen, seen), strict=True):
        spoiled = ~right.isfinite() & concerned[:, None, None]
        assert not mine[spoiled].isfinite().any()
        assert spoiled.any() or (where == "do" and mine is o) or (where == "v" and mine is dv)
    assert o[:, :64].isfinite().all() and dq[:, :64].isfinite().all()
    if where in ("q", "do"):
        assert dk[:, 128:].isfinite().all() and dv[:, 128:].isfinite().all()


@needs_compiler
def test_largest_halves():
    """Gradients and values of 65,504: infinite or NaN where the results do not fit, right where they do."""
    q, k, v, do = draw(1, 70, 4, 1, 16)
    v, do = 65504 * v.sign(), 65504 * do.sign()
    got = run(q, k, v, do)
    for mine, right in zip(got, gradients(q, k, v, do, None, torch.float64), strict=True):
        rounding = 5e-3 * right.square().mean().sqrt()
        assert not mine[right.abs() > 66000 + rounding].isfinite().any()
        fits = mine.isfinite()
        assert ((mine[fits] - right[fits]).abs() < 3 * rounding + 40).all()


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("group, kv, size", [(4, 1, 16), (1, 2, 32)])
@needs_compiler
def test_documents(group, kv, size, descending):
    x = draw(2, 200, group * kv, kv, size)
    begins = torch.tensor([[0, 37, 64, 65, 131, 199], [0, 1, 2, 100, 160, 192]])
    at = torch.arange(200)
    index = torch.searchsorted(begins, at.expand(2, -1).contiguous(), right=True) - 1
    starts = begins.gather(1, index).int()
    assert_right(run(*x, starts, descending), *x, starts)
    alone = torch.zeros(2, 200, dtype=torch.int32)
    for got, right in zip(run(*x, alone), run(*x), strict=True):
        assert torch.equal(got, right)


MUTATIONS = [  # lines, what stands there instead, what must come out wrong
    ({"if (masked) mask_keys(score[s], row, key": "if (masked) mask_keys(score[s], row, -key"}, ["o"]),
    (
        {
            "if (masked) mask_keys(score, row, key": "if (masked) mask_keys(score, row, -key",
            "if (masked && (mine > query": "if (masked && (mine > 2 * query",
        },
        ["dq", "dk", "dv"],
    ),
    ({"const float c = scale * kLog2e;": "const float c = 2 * scale * kLog2e;"}, ["o"]),
    ({"    sync_threads();\n    const int next": "    const int next"}, ["o"]),
    ({"    sync_threads();\n    const int current": "    const int current"}, ["dk", "dv"]),
    ({"return ex2(4 - 0.5f *": "return ex2(4 - 0.0f *"}, ["dq", "dk"]),
]


@pytest.mark.parametrize("lines, spoiled", MUTATIONS)
@needs_compiler
def test_the_tests_can_fail(lines, spoiled):
    text = SOURCE.read_text()
    for line, instead in lines.items():
        assert line in text
        text = text.replace(line, instead)
    q, k, v, do = draw(1, 130, 4, 1, 16)
    x = q, k, v, do * 256
    names = ("o", "dq", "dk", "dv")
    truth = dict(zip(names, gradients(*x, None, torch.float64), strict=True))
    runs = [dict(zip(names, run(*x, descending=d, text=text), strict=True)) for d in (False, True)]
    for name in spoiled:
        assert not all(error(got[name], truth[name]) < 0.05 for got in runs), name


def nvcc(folder, architecture, *flags):
    """-> PTX or machine code of the kernels, and what ptxas reports by kernel."""
    out = folder / "attention"
    command = [NVCC, "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", *flags, SOURCE, "-o", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = re.split(r"Compiling entry function '(\w+)'", done.stderr)[1:]
    return out, dict(zip(reports[::2], reports[1::2], strict=True))


@needs_nvcc
@pytest.mark.parametrize(
    "architecture, size, group, starts",
    [
        ("sm_75", 16, 4, 0),
        ("sm_75", 16, 4, 1),
        ("sm_75", 32, 3, 0),
        ("sm_75", 64, 1, 0),
        ("sm_75", 64, 4, 0),
        ("sm_80", 16, 4, 0),
        ("sm_90", 64, 4, 0),
    ],
)
def test_resources(tmp_path, architecture, size, group, starts):
    """No spills; two blocks or more fit a multiprocessor of 64 Ki registers and, on 7.5, 64 KiB."""
    defines = [f"-DHEAD_SIZE={size}", f"-DGROUP={group}", f"-DSTARTS={starts}"]
    reports = nvcc(tmp_path, architecture, "-cubin", *defines)[1]
    assert set(reports) == {"attention_forward", "attention_dq", "attention_dkdv"}
    for kernel, report in reports.items():
        registers, shared = (int(re.search(p, report)[1]) for p in (r"(\d+) registers", r"(\d+) bytes smem"))
        blocks = min(65536 // (128 * (registers + 7 & ~7)), 65536 // shared)
        three = size == 16 and (not starts or kernel == "attention_dkdv")
        assert blocks >= (3 if three else 2) and shared <= 32 << 10, (kernel, registers, shared)
        assert "0 bytes spill stores, 0 bytes spill loads" in report, kernel


def disassembler():
    """cuobjdump of the toolkit, or of Triton."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="there is no cuobjdump")
        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found


@needs_nvcc
def test_tensor_cores_without_conversions(tmp_path):
    """Tensor cores on 7.5, and no conversion to half but of the results."""
    code, _ = nvcc(tmp_path, "sm_75", "-cubin", "-DHEAD_SIZE=16", "-DGROUP=4", "-DSTARTS=0")
    command = [disassembler(), "-sass", code]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kernel in listing.split("Function : ")[1:]:
        results = 32 if kernel.startswith("attention_dkdv") else 16
        assert kernel.count("HMMA.1688.F32") >= 96
        assert kernel.count("F2F.F16.F32") == results


@needs_nvcc
def test_one_ptx_for_newer_devices(tmp_path):
    code, _ = nvcc(tmp_path, "compute_75", "-ptx", "-DHEAD_SIZE=16", "-DGROUP=4", "-DSTARTS=0")
    text = code.read_text()
    assert text.count("mma.sync.aligned.m16n8k8") >= 96 and ".local" not in text
