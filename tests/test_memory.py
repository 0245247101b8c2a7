"""What the C++ ops keep of the memory that is given back to them."""

import subprocess
import sys
import threading

import torch

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import LARGE, empty

LIKE = torch.zeros(1)


def large(scale: int) -> torch.Tensor:
    return empty(LIKE, scale, LARGE)


def test_a_tensor_is_its_own_until_it_is_gone():
    tensors = [large(1 + i % 3).fill_(i) for i in range(9)]
    views = [x.view(-1)[5:] for x in tensors]
    del tensors
    assert all((view == i).all() for i, view in enumerate(views))
    assert len({view.data_ptr() for view in views}) == 9


def test_memory_is_used_again():
    x = large(2)
    address = x.data_ptr()
    assert address % 64 == 0
    del x
    assert large(2).data_ptr() == address


HELD = """
import torch
from ant5m import _cpu
from ant5m.kernels.cpu.arguments import LARGE, empty

like = torch.zeros(1)
keep = [empty(like, 40, LARGE) for _ in range(2)]
most = sum(_cpu.held())
del keep
for scale in range(1, 60):  # sizes that never come again
    empty(like, scale, LARGE)
    assert sum(_cpu.held()) <= most + (32 << 20), scale
"""


def test_hardly_more_is_held_than_was_in_use_at_once():
    """In a process of its own, where nothing else was in use."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_from_many_threads():
    wrong = []

    def work(number):
        for i in range(50):
            x = large(1 + (number + i) % 3).fill_(number)
            if not (x == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_small_tensors_are_torchs():
    before = _cpu.held()
    x = empty(LIKE, 3, 5)
    assert x.shape == (3, 5) and _cpu.held() == before and empty(LIKE, 0, 9).shape == (0, 9)
