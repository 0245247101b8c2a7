"""The emulated device: fragments against the tables of the PTX ISA, and what it must refuse."""

import re

import numpy as np
import pytest
import torch
from cuda_host import HostLibrary, compile_kernels, needs_compiler

pytestmark = needs_compiler

KERNELS = """
#include "ptx.h"

KERNEL(32, 1) mma(const unsigned* a, const unsigned* b, float* c) {
  const int lane = threadIdx.x;
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[4 * lane + i];
  mma_m16n8k8(sum, a[2 * lane], a[2 * lane + 1], b[lane]);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = sum[i];
}
LAUNCHER(mma)

KERNEL(32, 1) load(const uint4* rows, unsigned* plain, unsigned* trans) {
  const int lane = threadIdx.x;
  SHARED(uint4, tile, 32);
  tile[lane] = rows[lane];
  sync_threads();
  unsigned m[4];
  ldmatrix_x4(m, tile + lane);
  for (int i = 0; i < 4; ++i) plain[4 * lane + i] = m[i];
  ldmatrix_x4_trans(m, tile + lane);
  for (int i = 0; i < 4; ++i) trans[4 * lane + i] = m[i];
}
LAUNCHER(load)

KERNEL(64, 1) shuffle(float* x, int mask) { x[threadIdx.x] = shfl_xor(x[threadIdx.x], mask); }
LAUNCHER(shuffle)

KERNEL(32, 1) round_trip(const float* x, Half* nearest, float* back, unsigned* positive, unsigned* both) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  nearest[i] = to_half(x[i]);
  back[i] = to_float(nearest[i]);
  positive[i] = pack_positive(0.0f, x[i] * 0x1p-112f);
  both[i] = pack_signed(x[i] * 0x1p-112f, -x[i] * 0x1p-112f);
}
LAUNCHER(round_trip)

KERNEL(128, 1) reversed(const float* x, float* out, int barrier, int guard) {
  const int i = threadIdx.x;
  SHARED(float, tile, 128);
  tile[i + guard] = x[i];
  if (barrier) sync_threads();
  out[i] = tile[127 - i];
}
LAUNCHER(reversed)

KERNEL(128, 1) never_written(float* out, int) {
  SHARED(float, tile, 128);
  if (blockIdx.x == 0) tile[threadIdx.x] = 1;
  out[blockIdx.x * 128 + threadIdx.x] = tile[threadIdx.x];
}
LAUNCHER(never_written)

KERNEL(64, 1) diverge(float* x, int how) {
  if (how == 0 && threadIdx.x < 32) return;
  if (how == 1 && threadIdx.x % 2) x[0] = shfl_xor(1.0f, 1);
  if (how == 2 && threadIdx.x == 3) sync_threads();
  if (how == 2) x[0] = shfl_xor(1.0f, 1);
  if (how == 3) {
    unsigned m[4];
    ldmatrix_x4(m, x);
  }
  sync_threads();
}
LAUNCHER(diverge)
"""


@pytest.fixture(scope="module", params=[False, True], ids=["ascending", "descending"])
def device(request):
    return HostLibrary(compile_kernels(KERNELS), descending=request.param)


def halves(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def registers(elements):
    """Halves [lanes, n] as n / 2 registers a lane: element 2i is the low half of register i."""
    return torch.from_numpy(np.ascontiguousarray(elements).view(np.int32))


def pairs(registers):
    """Registers [...] as halves [..., 2]."""
    return registers.numpy().view(np.float16).reshape(*registers.shape, 2)


# PTX ISA, "Matrix Fragments for mma.m16n8k8" (.f16): groupID = lane >> 2, threadID_in_group = lane % 4.
LANE = np.arange(32)[:, None]
GROUP, IN_GROUP = LANE >> 2, LANE % 4
I4, I2 = np.arange(4)[None], np.arange(2)[None]
A_ROW = np.where(I4 < 2, GROUP, GROUP + 8)  # a0, a1: groupID; a2, a3: groupID + 8
A_COLUMN = IN_GROUP * 2 + (I4 & 1)
B_ROW = IN_GROUP * 2 + I2
B_COLUMN = GROUP + 0 * I2
C_ROW, C_COLUMN = A_ROW, A_COLUMN


def test_mma(device):
    a, b = halves((16, 8)), halves((8, 8), 1)
    c = np.random.default_rng(2).standard_normal((16, 8)).astype(np.float32)
    got = torch.from_numpy(c[C_ROW, C_COLUMN].copy())
    device.launch("mma", (1,), 32, registers(a[A_ROW, A_COLUMN]), registers(b[B_ROW, B_COLUMN]), got)
    right = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_allclose(got.numpy(), right[C_ROW, C_COLUMN], rtol=1e-6, atol=1e-6)


def test_ldmatrix(device):
    """Lane 8i + r gives row r of matrix i; lane l gets row l / 4, columns 2(l % 4) and + 1."""
    matrices = halves((4, 8, 8))
    plain, trans = (torch.empty(32, 4, dtype=torch.int32) for _ in range(2))
    device.launch("load", (1,), 32, torch.from_numpy(matrices), plain, trans)
    row, column = LANE // 4, 2 * (LANE % 4) + I2
    for i, matrix in enumerate(matrices):
        np.testing.assert_array_equal(
            plain.numpy().view(np.float16)[:, 2 * i : 2 * i + 2], matrix[row, column]
        )
        np.testing.assert_array_equal(
            trans.numpy().view(np.float16)[:, 2 * i : 2 * i + 2], matrix[column, row]
        )


@pytest.mark.parametrize("mask", [1, 2, 16, 31])
def test_shuffle(device, mask):
    x = torch.arange(64.0)
    device.launch("shuffle", (1,), 64, x, mask)
    np.testing.assert_array_equal(x.numpy(), np.arange(64) ^ mask)


def test_halves(device):
    """Conversions are IEEE's; packing by shifts rounds the same way, but for ties and what is subnormal."""
    bits = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # every finite half >= 0
    between = (bits[:-1] + bits[1:]) / 2
    x = np.concatenate([bits, between, between * np.float32(1.0001), between * np.float32(0.9999)])
    x = np.concatenate([x, [65519, 65520, 1e9, np.inf, np.nan]]).astype(np.float32)
    x = np.resize(x, -(-len(x) // 32) * 32)
    nearest, back = torch.empty(len(x), dtype=torch.half), torch.empty(len(x))
    positive, both = (torch.empty(len(x), dtype=torch.int32) for _ in range(2))
    device.launch("round_trip", (len(x) // 32,), 32, torch.from_numpy(x), nearest, back, positive, both)
    with np.errstate(over="ignore"):
        right = x.astype(np.float16)
    np.testing.assert_array_equal(nearest.numpy(), right)
    np.testing.assert_array_equal(back.numpy(), right.astype(np.float32))
    fits = x < 65520
    zero, same = pairs(positive)[fits].T
    plus, minus = pairs(both)[fits].T
    assert (zero == 0).all()
    for got, want in ((same, right[fits]), (plus, right[fits]), (minus, -right[fits])):
        off = np.abs(got.view(np.int16).astype(int) - want.view(np.int16).astype(int))
        tie = np.isin(x[fits], between)
        normal = np.abs(want) >= 2.0**-14
        assert off[normal & tie].max() == 1 and off[normal & ~tie].max() == 0


def test_barrier_and_guards(device):
    x, out = torch.randn(128), torch.empty(128)
    device.launch("reversed", (1,), 128, x, out, 1, 0)
    assert torch.equal(out, x.flip(0))
    device.launch("reversed", (1,), 128, x, out, 0, 0)
    assert not torch.equal(out, x.flip(0)), "a missing barrier must show"
    with pytest.raises(RuntimeError, match="beyond the end of an array in shared memory"):
        device.launch("reversed", (1,), 128, x, out, 1, 1)
    device.launch("reversed", (1,), 128, x, out, 1, 0)  # and not only until the guards are hurt


def test_shared_memory_starts_as_nan(device):
    out = torch.empty(256)
    device.launch("never_written", (2,), 128, out, 0)
    assert (out[:128] == 1).all() and out[128:].isnan().all()


@pytest.mark.parametrize(
    "how, message",
    [
        (0, "(sync_threads|the end of the kernel) while others wait at"),
        (1, "deadlock: thread 0 waits at sync_threads, thread 1 waits at shfl_xor"),
        (2, "thread 3 waits at sync_threads"),
        (3, "ldmatrix from outside of shared memory"),
    ],
)
def test_what_hangs_a_device_is_an_error(device, how, message):
    with pytest.raises(RuntimeError, match=message):
        device.launch("diverge", (1,), 64, torch.zeros(64), how)


def test_arguments_are_checked(device):
    with pytest.raises(AssertionError, match="shuffle takes pi, not pf"):
        device.launch("shuffle", (1,), 64, torch.zeros(64), 1.0)


RACES = """
#include "ptx.h"

// Where `safe`, with all the barriers that it takes.
KERNEL(64, 1) exchange(const float* x, float* out, int apart, int safe) {
  SHARED(float, tile, 64);
  const int i = threadIdx.x;
  tile[i] = x[i];
  if (safe) sync_threads();
  out[blockIdx.x * 64 + i] = tile[i ^ apart];
}
LAUNCHER(exchange)

KERNEL(64, 1) write_after_read(const float* x, float* out, int apart, int safe) {
  SHARED(float, tile, 64);
  const int i = threadIdx.x;
  tile[i] = x[i];
  sync_threads();
  const float other = tile[i ^ apart];
  if (safe) sync_threads();
  tile[i] = other;
  out[blockIdx.x * 64 + i] = tile[i];
}
LAUNCHER(write_after_read)

KERNEL(64, 1) same_value(const float* x, float* out, int, int safe) {
  SHARED(float, tile, 1);
  if (!safe || threadIdx.x == 0) tile[0] = x[0];
  sync_threads();
  out[blockIdx.x * 64 + threadIdx.x] = tile[0];
}
LAUNCHER(same_value)

KERNEL(64, 1) over_a_shuffle(const float* x, float* out, int apart, int safe) {
  SHARED(float, tile, 64);
  const int i = threadIdx.x;
  tile[i] = x[i];
  const float other = shfl_xor(x[i], apart);
  if (safe) sync_threads();
  out[blockIdx.x * 64 + i] = tile[i ^ apart] + other;
}
LAUNCHER(over_a_shuffle)

KERNEL(64, 1) matrices(const float*, float* out, int writer, int safe) {
  SHARED(uint4, tile, 64);
  const int i = threadIdx.x;
  if (i % 32 == writer)
    for (int row = 0; row < 32; ++row) tile[i / 32 * 32 + row] = make_uint4(1, 2, 3, 4);
  if (safe) sync_threads();
  unsigned m[4];
  ldmatrix_x4(m, tile + i);
  out[blockIdx.x * 64 + i] = m[0];
}
LAUNCHER(matrices)

KERNEL(64, 1) through_global(const float* x, float* out, int apart, int safe) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  out[i] = x[threadIdx.x];
  if (safe) sync_threads();
  const float other = out[i ^ apart];
  sync_threads();
  out[i] = other;
}
LAUNCHER(through_global)

KERNEL(64, 1) write_blocks(const float* x, float* out, int apart, int) {
  out[blockIdx.x * apart + threadIdx.x] = x[0];
}
LAUNCHER(write_blocks)

KERNEL(64, 1) read_block(const float* x, float* out, int apart, int) {
  if (threadIdx.x == 0) out[blockIdx.x * 64] = x[0] + out[blockIdx.x * apart];
}
LAUNCHER(read_block)

KERNEL(64, 1) highest(unsigned* out, int atomics) {
  if (atomics || threadIdx.x < 32) atomicMax(out, threadIdx.x);
  else if (threadIdx.x == 32) out[0] = threadIdx.x;
}
LAUNCHER(highest)
"""


@pytest.fixture(scope="module", params=[False, True], ids=["ascending", "descending"])
def race_detector(request):
    return HostLibrary(compile_kernels(RACES, races=True), descending=request.param)


def run(device, kernel, apart, safe=0, blocks=1):
    device.launch(kernel, (blocks,), 64, torch.ones(64), torch.zeros(64 * blocks), apart, safe)


@pytest.mark.parametrize(
    "kernel, apart, array",
    [
        ("exchange", 63, "tile"),  # with the other warp
        ("exchange", 1, "tile"),  # as if in lockstep
        ("over_a_shuffle", 1, "tile"),  # where the host's order gives the right numbers
        ("write_after_read", 1, "tile"),
        ("same_value", 0, "tile"),
        ("matrices", 0, "tile"),  # whichever lane arrives last, all read
        ("matrices", 31, "tile"),
        ("through_global", 63, "argument 1"),
    ],
)
def test_races_of_a_block(race_detector, kernel, apart, array):
    message = f"race: thread [0-9]+ (read|write)s byte [0-9]+ of {array}, "
    message += "and thread [0-9]+ (read|write)s it, with no barrier between"
    with pytest.raises(RuntimeError, match=message):
        run(race_detector, kernel, apart)
    for blocks in (1, 2):
        run(race_detector, kernel, apart, safe=1, blocks=blocks)


def test_a_thread_does_not_race_with_itself(race_detector):
    for kernel in ("exchange", "write_after_read", "through_global"):
        run(race_detector, kernel, apart=0)


@pytest.mark.parametrize("kernel, near", [("write_blocks", 63), ("read_block", 0)])
def test_races_between_blocks(race_detector, kernel, near):
    what = "writes" if kernel == "write_blocks" else "reads"
    message = f"{kernel}: block (1, 0, 0): race: thread 0 {what} byte {4 * near} of argument 1, "
    message += f"and thread {near} of block (0, 0, 0) writes it"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(race_detector, kernel, near, blocks=2)
    run(race_detector, kernel, 64, blocks=2)


def test_atomics_race_with_all_but_atomics(race_detector):
    out = torch.zeros(1, dtype=torch.int32)
    race_detector.launch("highest", (3,), 64, out, 1)
    assert out == 63
    with pytest.raises(RuntimeError, match=r"race: thread \d+ (atomically change|write)s"):
        race_detector.launch("highest", (1,), 64, out, 0)
