"""Work that is shared out to processes of this machine: one process a job, so many at a time.

The processes are started by name, not by `multiprocessing`, which would run the caller's script in each of
them, and fails where that does not expect it. What pickle reads comes through a pipe from a process of this
program, never from a file.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import IO, Any

from ant5m.errors import UserError

LOOK_SECONDS = 0.5
"""between two calls of `meanwhile`"""
_MAIN = """
import pickle, sys
sys.path = pickle.load(sys.stdin.buffer)
from ant5m.data.workers import work
work()
"""


def share_out(
    work: Callable[[int], None],
    next_job: Callable[[], int | None],
    workers: int,
    meanwhile: Callable[[], None],
) -> None:
    """Call `work(number)` for each number that `next_job` gives, until it gives None.

    `work` must be a function that pickle knows; `meanwhile` is called here now and then. Raises what `work`
    raises of `UserError`, `OSError` and `MemoryError`, and `UserError` when a process dies; all others are
    killed then, as they are when this process ends, however it ends.
    """
    running: dict[IO[bytes], subprocess.Popen[bytes]] = {}
    try:
        while True:
            while len(running) < workers and (number := next_job()) is not None:
                process = _start(work, number)
                assert process.stdout
                running[process.stdout] = process
            if not running:
                return
            ended: list[Any] = wait(list(running), LOOK_SECONDS)  # type: ignore[arg-type]
            for result in ended:
                _end(running.pop(result))
            meanwhile()
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def _start(job: Callable[[int], None], number: int) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Of many processes none needs threads of its own.
        env={**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for this process alone
    )
    assert process.stdin
    for value in (sys.path, (job, number)):
        pickle.dump(value, process.stdin)
    process.stdin.flush()
    return process  # its input stays open: where it ends, this process has ended


def work() -> None:
    """What a process does that was started here."""
    job, number = pickle.load(sys.stdin.buffer)
    result = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no result
    threading.Thread(target=_end_with_parent, daemon=True).start()
    error = None
    try:
        job(number)
    except (UserError, OSError, MemoryError) as raised:
        error = raised
    with result:
        pickle.dump(error, result)


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Raise what the process raised."""
    assert process.stdout
    told = process.stdout.read()
    process.wait()
    process.communicate()  # not before: it closes the input, which would end the process
    if process.returncode:
        code = process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise UserError(
            f"one of the processes died ({how}): repeat the command, it goes on from there. With fewer "
            "--workers it needs less memory"
        )
    error = pickle.loads(told)
    if error is not None:
        raise error
