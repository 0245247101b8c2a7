"""What the processes of a run tell each other. Real processes, over gloo."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from ant5m import ranks, torchrun

TOGETHER = """
import os, sys, time, torch
import torch.distributed as dist
from ant5m import ranks
from ant5m.errors import PeerLost, UserError

def together(close):
    def closing(group=None):
        if group is None and sys.argv[1] != "silent":
            store.add("closing", 1)
            while store.add("closing", 0) < 2:
                time.sleep(0.01)
        close(group)
    return closing

# As beside GPUs: sums have a group of their own there, which ends only when all ranks end theirs.
begin = dist.init_process_group
dist.init_process_group = lambda backend, **more: begin({"nccl": "gloo"}[backend], **more)
dist.destroy_process_group = together(dist.destroy_process_group)
dist.distributed_c10d._abort_process_group = together(dist.distributed_c10d._abort_process_group)
torch.cuda.is_available = lambda: True

me = ranks.join()
store = me._store
print("rank", me.rank, "of", me.size, me.is_first, me.alone)
x = torch.tensor([1.0, 2.0]) * (me.rank + 1)
me.sum(x)
print("sum", x.tolist())
print("most", me.most(me.rank, -me.rank))
print("share", me.share({"text": "\\u00fc", "steps": 3} if me.is_first else None))
given = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16)} if me.is_first else {}
print("tensors", me.share_tensors(given))
print("agree", me.agree(7), me.agree(me.rank))

def refuse():
    raise UserError("no such file")

try:
    me.first(refuse)
except UserError as error:
    print("refused", error)
print("first", me.first(lambda: me.rank))
taken = [me.ticket("job")]
me.most(0)
print("other", me.ticket("other") in (0, 1))
print("ticket", taken[0])
me.most(0)
if me.rank == 1:
    if sys.argv[1] == "silent":
        sys.stdout.flush()
        os._exit(0)
    me.fail(UserError("the disk is full") if sys.argv[1] == "told" else OSError(28, "No space left"))
    me.leave()
    print("left", dist.is_initialized())
    sys.exit()
time.sleep(0.2)
try:
    me.most(1)
except (PeerLost, UserError) as error:
    print("lost", error)
    me.fail(error)
me.leave()
"""


ONCE = """
import os
from ant5m import ranks
me = ranks.join()
print("most", me.most(me.rank), me.ticket("job") < 2)
me.leave()
again = ranks.join()
print("again", again.most(again.rank))
os._exit(0)  # as if killed
"""


def test_ranks_meet_in_a_store_that_remembers_others(monkeypatch):
    """torchrun's store lives on when processes are started again; each machine counts its own restarts."""
    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    processes = []
    for rank, count in enumerate((1, 0)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        processes.append(_start(rank, 2, port, ONCE))
    for process in processes:
        assert dict(_lines(process)) == {"most": "[1] True", "again": "[1]"}
    del store


def _start(rank: int, size: int, port: int, code: str, *words: str) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("end", ["silent", "told", pytest.param("system", marks=pytest.mark.slow)])
def test_two_processes_agree(end):
    port = free_port()
    processes = [_start(rank, 2, port, TOGETHER, end) for rank in range(2)]
    first, second = (dict(_lines(process)) for process in processes)
    assert first["rank"] == "0 of 2 True False" and second["rank"] == "1 of 2 False False"
    assert first["sum"] == second["sum"] == "[3.0, 6.0]"
    assert first["most"] == second["most"] == "[1, 0]"
    assert first["share"] == second["share"] == "{'text': 'ü', 'steps': 3}"
    assert first["tensors"] == second["tensors"] and "dtype=torch.bfloat16" in second["tensors"]
    assert first["agree"] == second["agree"] == "True False"
    assert first["refused"] == second["refused"] == "no such file"
    assert first["first"] == second["first"] == "0"
    assert {first["ticket"], second["ticket"]} == {"0", "1"}
    assert first["other"] == second["other"] == "True"
    expected = {
        "silent": "another process of this run ended",
        "told": "the disk is full",
        "system": "rank 1: [Errno 28] No space left",
    }[end]
    assert first["lost"].startswith(expected)
    assert second.get("left") == (None if end == "silent" else "False")


def _lines(process: subprocess.Popen[str]) -> list[tuple[str, str]]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return [tuple(line.split(" ", 1)) for line in out.splitlines()]  # type: ignore[misc]


def test_a_process_by_itself_exchanges_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    me = ranks.join()
    x = torch.ones(2)
    me.sum(x)
    assert me.alone and me.is_first and me.size == 1
    assert x.tolist() == [1, 1] and me.most(3, 1) == [3, 1] and me.share({"a": 1}) == {"a": 1}
    assert [me.ticket("job"), me.ticket("job"), me.ticket("other")] == [0, 1, 0]
    me.leave()


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_torchrun_is_known_by_all_of_its_variables(monkeypatch, missing):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert torchrun.is_parent() and torchrun.size() == 2
    monkeypatch.delenv(missing)
    assert not torchrun.is_parent() and torchrun.size() == 1 and torchrun.rank() == 0
