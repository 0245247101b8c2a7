import numpy as np
import pytest

from ant5m import _cpu


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request):
    """Force one instruction set for a test."""
    before = _cpu.instruction_set()
    assert _cpu.use(request.param)
    yield request.param
    assert _cpu.use(before)


def test_the_emulation_is_never_chosen_by_itself():
    names = _cpu.instruction_sets()
    assert names[-1] == "bf16_emulated" and len(set(names)) == len(names) >= 2
    assert _cpu.instruction_set() == names[0]


def test_use_switches_and_refuses(instruction_set):
    assert _cpu.instruction_set() == instruction_set
    assert not _cpu.use("mmx")
    assert _cpu.instruction_set() == instruction_set


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 64, 1023, 1024])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gather_equals_numpy(instruction_set, rows, length):
    random = np.random.default_rng(length)
    tokens = random.integers(0, 65_536, 5_000, dtype=np.uint16)
    starts = random.integers(0, len(tokens) - length, rows)  # odd ones too: windows are not aligned
    starts[:1] = len(tokens) - length - 1  # the last window there is
    windows = tokens.ctypes.data + 2 * starts
    guarded = np.full((2, rows + 2, length), -1, np.int64)
    inputs, targets = guarded[:, 1:-1]
    _cpu.gather(windows.ctypes.data, rows, length, inputs.ctypes.data, targets.ctypes.data)
    for row, start in enumerate(starts):
        np.testing.assert_array_equal(inputs[row], tokens[start : start + length])
        np.testing.assert_array_equal(targets[row], tokens[start + 1 : start + 1 + length])
    assert (guarded[:, [0, -1]] == -1).all()  # nothing is written beside the batch
