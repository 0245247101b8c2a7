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
