"""Trackers get what metrics.jsonl gets, also after a resume, and are never in the way."""

import dataclasses
import glob
import json
import signal
import sqlite3
import struct
import sys
import threading
import types

import pytest
from test_resume import fingerprint, interrupt  # noqa: F401  (fixture)
from test_train import config, material  # noqa: F401  (fixtures)

from ant5m.errors import UserError
from ant5m.train import TrainConfig, pretrain, tracker
from ant5m.train.metrics import read_metrics


def expected(run):
    """{(step, name): value} of metrics.jsonl."""
    return {
        (line["step"], f"{line['kind']}/{name}"): value
        for line in read_metrics(run / "metrics.jsonl")
        for name, value in line.items()
        if name not in ("kind", "step") and isinstance(value, int | float)
    }


@pytest.fixture
def fake(monkeypatch):
    """A package that remembers what it is told, under the name of trackio."""
    package = types.ModuleType("trackio")
    package.__spec__ = types.SimpleNamespace()
    package.inits, package.logged, package.finished = [], {}, 0

    def log(metrics, step):
        for name, value in metrics.items():
            assert (step, name) not in package.logged
            package.logged[step, name] = value

    def finish():
        package.finished += 1

    package.init, package.log, package.finish = lambda **given: package.inits.append(given), log, finish
    monkeypatch.setitem(sys.modules, "trackio", package)
    return package


def test_a_resumed_run_goes_on_under_the_same_id(config, fake, interrupt):  # noqa: F811
    interrupt(signal.SIGTERM, 5)
    pretrain(dataclasses.replace(config, steps=8, track="trackio"))
    pretrain(TrainConfig(resume=config.out))
    assert fake.logged == expected(config.out) and max(fake.logged)[0] == 8
    first, second = fake.inits
    assert first["name"] == second["name"] and first["resume"] == "allow" and fake.finished == 2


@pytest.mark.parametrize("place", ["init", "log", "finish"])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_broken_tracker_changes_nothing(config, fake, place, hangs, monkeypatch, tmp_path):  # noqa: F811
    released = threading.Event()

    def broken(*_, **__):
        if hangs:
            released.wait(60)
        raise SystemExit("no network")

    setattr(fake, place, broken)
    monkeypatch.setattr(tracker, "WAIT_SECONDS", 0.2)
    with pytest.warns(UserWarning, match="does not answer" if hangs else "SystemExit: no network"):
        pretrain(dataclasses.replace(config, steps=3, track="trackio"))
    released.set()
    pretrain(dataclasses.replace(config, steps=3, out=tmp_path / "alone"))
    assert fingerprint(config.out)[1] == fingerprint(tmp_path / "alone")[1]


def test_a_package_that_is_missing(config, monkeypatch):  # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        pretrain(dataclasses.replace(config, track="wandb"))
    assert not config.out.exists()


def test_trackio_itself(config, interrupt, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    interrupt(signal.SIGTERM, 3)
    pretrain(dataclasses.replace(config, steps=5, track="trackio"))
    pretrain(TrainConfig(resume=config.out))
    (file,) = glob.glob(str(tmp_path / "**" / "ant5m.db"), recursive=True)
    rows = sqlite3.connect(file).execute("select run_name, step, metrics from metrics").fetchall()
    found = {(step, name): value for _, step, line in rows for name, value in json.loads(line).items()}
    assert found == expected(config.out) and len({name for name, _, _ in rows}) == 1


def records(data):
    """Of a .wandb file: LevelDB's log format, behind a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield whole
            whole = b""


def test_wandb_itself_offline(config, interrupt, monkeypatch):  # noqa: F811
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupt(signal.SIGTERM, 3)
    pretrain(dataclasses.replace(config, steps=5, track="wandb"))
    pretrain(TrainConfig(resume=config.out))
    found, ids = {}, set()
    for file in (config.out / "wandb").glob("offline-run-*/*.wandb"):
        for raw in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(raw)
            ids |= {record.run.run_id} - {""}
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            found |= {(items["_step"], name): value for name, value in items.items() if name[0] != "_"}
    assert found == expected(config.out) and len(ids) == 1
