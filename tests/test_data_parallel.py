"""Several processes that train one model: they compute what one process does, and stop and fail together."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_ranks import free_port
from test_resume import fingerprint, interrupt  # noqa: F401  (a fixture)
from test_train import config, material  # noqa: F401  (fixtures)
from two_ranks import spoilt

from ant5m.data.conversations import PLAIN_TEMPLATE, ChatTemplate, Conversations
from ant5m.data.packing import pack
from ant5m.data.tokenizer import Tokenizer
from ant5m.model.checkpoint import latest_checkpoint
from ant5m.train import TrainConfig, pretrain
from ant5m.train.metrics import read_metrics
from ant5m.train.step import Step
from ant5m.train.stop import EXIT_CODES

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread():
    """Each rank has one, and torch's own sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def together(jobs, tmp_path, size=2):
    """What each rank printed for each job, and the ranks' stderr."""
    place = tmp_path / "jobs.json"
    place.write_text(json.dumps(jobs))
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "two_ranks.py", str(rank), str(size), str(port), place],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    out = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * size, out
    return [[json.loads(line) for line in text.splitlines()] for text, _ in out], [text for _, text in out]


VARIANTS = {
    "muon": {"optimizer": "muon"},
    "adamw-documents": {"optimizer": "adamw", "document_mask": True},
    "fp16-overflow": {"optimizer": "adamw", "precision": "fp16"},
    "unlikelihood": {"loop_loss": "unlikelihood", "loop_loss_share": 0.4, "early_stop": 2},
    "short-context": {"short_context": 8, "short_share": 0.5},
}


def chat_shards(config, tmp_path):  # noqa: F811
    """Shards in which the two ranks' sequences have unlike numbers of tokens that count."""
    tokenizer = Tokenizer.load(Path(config.data[0]) / "tokenizer")
    said = [{"role": "user", "content": "the ant"}, {"role": "assistant", "content": "a leaf"}]
    rows = [
        {"messages": [*said * (1 + i % 5), {"role": "user", "content": "the " * (i % 40)}]} for i in range(60)
    ]
    text = tmp_path / "chats.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Conversations.find([text], ChatTemplate(tokenizer, PLAIN_TEMPLATE))
    pack(corpus, tokenizer, tmp_path / "chats", validation_fraction=0.1)
    return tmp_path / "chats"


def test_two_ranks_compute_the_bits_of_one_process(config, tmp_path, monkeypatch):  # noqa: F811
    """20 steps; one process takes the two ranks' sequences as two micro-batches."""
    whole = {
        name: dataclasses.replace(
            config, steps=20, eval_every=6, checkpoint_every=8, out=tmp_path / name, **changes
        )
        for name, changes in VARIANTS.items()
    }
    chats = chat_shards(config, tmp_path)
    whole["masked"] = dataclasses.replace(whole["muon"], data=chats, out=tmp_path / "masked")
    mixture = tmp_path / "mixture.toml"
    mixture.write_text(
        f'[sources.text]\ndata = "{config.data[0]}"\nweight = 2\n'
        f'[sources.chats]\ndata = "{chats}"\nweight = 1\n'
        "[[phases]]\nfrom = 0.5\nweights = {text = 1, chats = 2}\n"
    )
    whole["mixture"] = dataclasses.replace(whole["muon"], data=mixture, out=tmp_path / "mixture")
    jobs = []
    for name, one in whole.items():
        two = dataclasses.replace(one, out=tmp_path / f"{name}-2")
        jobs.append({"config": two.to_dict(), "spoil": "overflow" if "overflow" in name else ""})
    jobs.append({"config": {**jobs[0]["config"], "out": str(tmp_path / "nan")}, "spoil": "nan"})
    eight = dataclasses.replace(
        config, steps=20, batch_size=8, micro_batch_size=1, precision="fp32", out=tmp_path / "eight"
    )
    jobs.append({"config": dataclasses.replace(eight, out=tmp_path / "eight-2").to_dict()})
    told, stderr = together(jobs, tmp_path)
    assert told[0] == told[1]
    for name, one in whole.items():
        with monkeypatch.context() as patch:
            if "overflow" in name:  # of the second micro-batch of the third step
                patch.setattr(Step, "_loss", spoilt(Step._loss, "overflow", call=6))
            result = pretrain(one)
        assert fingerprint(one.out) == fingerprint(tmp_path / f"{name}-2"), name
        ours, theirs = ((run / "eval.json").read_text() for run in (one.out, tmp_path / f"{name}-2"))
        assert ours.replace(str(one.out), "") == theirs.replace(str(tmp_path / f"{name}-2"), "")
        assert told[0][list(whole).index(name)] == [result.step, result.stopped, result.evaluation.nats]
    skipped = read_metrics(whole["fp16-overflow"].out / "metrics.jsonl")[-1]
    assert skipped["skipped"] >= 1
    assert told[0][-2].startswith("training diverged at step 3: the loss is nan")
    # More micro-batches are summed in another order: the losses differ by rounding only.
    pretrain(eight)
    one, two = (
        [line["loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl") if line["kind"] == "train"]
        for run in ("eight", "eight-2")
    )
    assert len(one) == 20 and one == pytest.approx(two, abs=2e-6)
    assert "step" in stderr[0] and stderr[1] == ""  # rank 0 alone speaks


def test_a_time_limit_ends_all_and_one_stopwatch_chooses_the_kernels(config, tmp_path):  # noqa: F811
    """The time of one rank alone is over; only on rank 0 the MLP is found to be the faster."""
    limited = dataclasses.replace(config, steps=12, checkpoint_every=50, out=tmp_path / "limited")
    timed = dataclasses.replace(config, steps=2, checkpoint_every=50, out=tmp_path / "timed")
    jobs = [
        {"config": limited.to_dict(), "stop_at": 4, "limit": True},
        {"config": timed.to_dict(), "clock": True},
    ]
    (first, second), stderr = together(jobs, tmp_path)
    assert first == second
    assert first[0] == [5, "time limit", None] and EXIT_CODES["time limit"] == 0
    assert [path.name for path in limited.out.glob("checkpoints/*")] == ["step-00000005"]
    assert stderr[1] == ""
    choices = first[1][-1]
    assert set(choices.values()) == {"faster"} and all("mlp" in name for name in choices)


def test_a_run_moves_between_two_processes_and_one(config, tmp_path, interrupt):  # noqa: F811
    """Stopped on two ranks by a signal to one of them, continued by one process, then by two again."""
    whole = dataclasses.replace(config, steps=12, checkpoint_every=5, out=tmp_path / "whole")
    pretrain(whole)
    moved = dataclasses.replace(whole, out=tmp_path / "moved")
    told, _ = together([{"config": moved.to_dict(), "stop_at": 4}], tmp_path)
    assert told == [[[5, "terminated", None]]] * 2  # a step that has begun is finished
    assert [path.name for path in moved.out.glob("checkpoints/*")] == ["step-00000005"]
    resumed = TrainConfig(resume=moved.out)
    interrupt(signal.SIGTERM, 7)
    assert pretrain(resumed).step == 7
    told, _ = together([{"config": resumed.to_dict()}], tmp_path)
    assert [result[:2] for (result,) in told] == [[12, None]] * 2
    assert fingerprint(whole.out) == fingerprint(moved.out)


def ant5m_train(*words, **more):
    """`ant5m train` as a process of its own."""
    command = [sys.executable, "-m", "ant5m", "train", *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def flags(config):  # noqa: F811
    """Of a run that would take minutes, in which a checkpoint comes at once."""
    long = {"steps": 20_000, "batch_size": 4, "checkpoint_every": 2, "sample_every": 0, "eval_every": 10_000}
    named = {"model": config.model, "data": config.data[0], "out": config.out, "device": "cpu", **long}
    return [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value)]


def to_the_launcher(launcher):
    launcher.send_signal(signal.SIGTERM)


def to_one_rank(launcher):
    os.kill(_children(launcher.pid)[-1], signal.SIGTERM)


def ctrl_c(launcher):
    """As a terminal sends it: to all that are in the group."""
    os.killpg(launcher.pid, signal.SIGINT)


@pytest.mark.parametrize("stop, code", [(to_the_launcher, 143), (to_one_rank, 143), (ctrl_c, 130), (None, 0)])
def test_all_processes_stop_at_one_step_and_save(config, stop, code):  # noqa: F811
    """None: the time limit."""
    limit = [] if stop else ["--max-minutes", 0.03]
    process = ant5m_train(*flags(config), *limit, "--processes", 2)
    if stop:
        wait_for(config.out / "checkpoints" / "step-00000002", process)
        stop(process)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert err.count("saved. Go on with: ant5m train --resume") == 1
    assert "Traceback" not in err and "error" not in err
    assert len(read_metrics(config.out / "metrics.jsonl")) == int(latest_checkpoint(config.out).name[5:])


@pytest.mark.slow
def test_processes_without_their_launcher_save_and_stop(config):  # noqa: F811
    process = ant5m_train(*flags(config), "--processes", 2)
    wait_for(config.out / "checkpoints" / "step-00000002", process)
    process.kill()
    _, err = process.communicate(timeout=60)  # it ends when all have ended
    assert err.count("terminated at step") == 1 and "Traceback" not in err
    assert len(read_metrics(config.out / "metrics.jsonl")) == int(latest_checkpoint(config.out).name[5:])


def test_a_dead_process_is_replaced_and_a_mistake_is_not_repeated(config, tmp_path):  # noqa: F811
    """Killed, a rank takes the others with it; all start again from the last checkpoint, to the same end."""
    config = dataclasses.replace(config, steps=60, sample_every=0)
    pretrain(config)
    killed = dataclasses.replace(config, out=tmp_path / "killed")
    named = {**killed.to_dict(), "data": config.data[0]}
    words = [word for name, value in named.items() if name in _KEPT for word in (_flag(name), value)]
    process = ant5m_train(*words, "--processes", 2)
    wait_for(killed.out / "checkpoints" / "step-00000004", process)
    workers = _children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert fingerprint(config.out) == fingerprint(killed.out)
    _, err = ant5m_train(*words, "--processes", 2).communicate(timeout=300)  # the folder is taken now
    assert err.count("exists already") == 1 and "Traceback" not in err


_KEPT = (
    "model",
    "data",
    "out",
    "steps",
    "batch_size",
    "eval_every",
    "eval_tokens",
    "checkpoint_every",
    "device",
)
_KEPT += ("sample_every",)


def _flag(name):
    return f"--{name.replace('_', '-')}"


def _children(pid):
    """The processes that compute: children of `pid` that were spawned with a pipe of multiprocessing."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found
