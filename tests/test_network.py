"""Two machines that train one model, of which one is lost: network namespaces of this one. Needs root."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_train import config, material  # noqa: F401  (fixtures)

from ant5m.train.metrics import read_metrics

ADDRESSES = {"a": "10.213.77.1", "b": "10.213.77.2"}


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture
def machines():
    """{name: its network namespace}, joined by a cable."""
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("needs root and ip")
    spaces = {name: f"ant5m-{os.getpid()}-{name}" for name in ADDRESSES}
    if ip("netns", "add", spaces["a"], check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    ip("netns", "add", spaces["b"])
    try:
        ip("-n", spaces["a"], "link", "add", "cable", "type", "veth", "peer", "cable", "netns", spaces["b"])
        for name, space in spaces.items():
            ip("-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", space, "link", "set", device, "up")
        yield spaces
    finally:
        for space in spaces.values():
            ip("netns", "del", space)


def start(spaces, name, words, log):
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES['a']}:29511"),
        *("--rdzv-conf", f"is_host={int(name == 'a')}", "--rdzv-id", "test", "--local-addr", ADDRESSES[name]),
        *("-m", "ant5m", "train", *words),
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "cable",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return subprocess.Popen(
        ["ip", "netns", "exec", spaces[name], *torchrun],
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill(process):
    """With all that it started: a machine without power."""
    for pid in (*_descendants(process.pid), process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _descendants(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []
    return [one for child in children for one in (*_descendants(child), child)]


@pytest.mark.slow
def test_a_machine_is_cut_off_and_the_run_goes_on_when_it_is_back(
    config,  # noqa: F811
    machines,
    tmp_path,
):
    config = dataclasses.replace(config, steps=400, eval_every=400, checkpoint_every=20)
    out = config.out
    names = ("model", "steps", "batch_size", "eval_every", "eval_tokens", "checkpoint_every")
    words = ["--out", str(out), "--device", "cpu", "--sample-every", "0", "--data", str(config.data[0])]
    for name in names:
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    with open(tmp_path / "a.log", "wb") as a_log, open(tmp_path / "b.log", "wb") as b_log:
        a, b = start(machines, "a", words, a_log), start(machines, "b", words, b_log)
        try:
            while not (out / "checkpoints" / "step-00000040").exists():
                assert a.poll() is None and b.poll() is None, (tmp_path / "a.log").read_text()
                time.sleep(0.02)
            ip("-n", machines["b"], "link", "set", "cable", "down")
            kill(b)
            time.sleep(2)
            ip("-n", machines["b"], "link", "set", "cable", "up")
            b = start(machines, "b", words, b_log)
            assert (a.wait(timeout=240), b.wait(timeout=60)) == (0, 0), (tmp_path / "a.log").read_text()
        finally:
            for process in (a, b):
                kill(process)
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 401))
