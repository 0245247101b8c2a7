"""What the C++ ops keep of the memory that is given back to them."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from ant5m import _cpu, kernels
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


FORKED = """
import os, signal, threading
from ant5m import _cpu

def keep_the_lock_busy():
    while True:
        pieces = [_cpu.Memory(_cpu.LARGE) for _ in range(50)]
        del pieces
        _cpu.release_memory()  # without the interpreter's lock, which the fork below waits for

threading.Thread(target=keep_the_lock_busy, daemon=True).start()
for _ in range(20):
    child = os.fork()
    if not child:
        signal.alarm(10)
        _cpu.Memory(_cpu.LARGE)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child waited for a lock of a thread that it does not have"
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_child_forked_while_a_thread_has_the_lock():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_small_tensors_are_torchs():
    before = _cpu.held()
    x = empty(LIKE, 3, 5)
    assert x.shape == (3, 5) and _cpu.held() == before and empty(LIKE, 0, 9).shape == (0, 9)


def test_what_is_kept_is_given_back_when_asked():
    x = large(7)
    del x
    used, kept = _cpu.held()
    assert kept >= 7 * 4 * LARGE
    assert kernels.release_memory() == kept and _cpu.held() == (used, 0) and kernels.release_memory() == 0


REFUSED = """
import resource
from ant5m import _cpu
import torch
from ant5m.kernels.cpu.arguments import LARGE, empty

like = torch.zeros(1)
large = [empty(like, 25, LARGE) for _ in range(4)]
del large
assert _cpu.held() == (0, 100 * 4 * LARGE)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), -1))
x = empty(like, 20, LARGE).fill_(1)  # there is no room beside what is kept
assert _cpu.held() == (20 * 4 * LARGE, 0), _cpu.held()
try:
    empty(like, 200, LARGE)
except MemoryError:
    assert _cpu.held() == (20 * 4 * LARGE, 0), _cpu.held()
else:
    raise AssertionError("it has more than there is")
"""


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends without memory")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_what_is_kept_is_given_back_when_the_system_refuses():
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
