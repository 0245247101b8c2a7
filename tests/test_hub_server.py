"""Pushing and resuming with the hub's real client, over HTTP, against a server of the few calls it makes."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from test_resume import fingerprint, interrupt  # noqa: F401  (fixture)
from test_train import config, material  # noqa: F401  (fixtures)

from ant5m.export import hub
from ant5m.train import TrainConfig, pretrain, push

REPO = "ada/ants"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as one:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub, "api", lambda: HfApi(endpoint=one.url, token="hf_secret"))
        yield one


def checkpoints(server):
    """{name of a checkpoint: its files} in the repository."""
    found = {}
    for path in server.repos[REPO]:
        if path.startswith(f"{push.PLACE}/checkpoints/"):
            *_, name, file = path.split("/")
            found.setdefault(name, set()).add(file)
    return found


def test_a_run_goes_on_from_a_server_to_the_same_bits(
    config,  # noqa: F811
    server,
    interrupt,  # noqa: F811
    tmp_path,
    monkeypatch,
    capfd,
):
    whole = dataclasses.replace(config, out=tmp_path / "whole", steps=8)
    pretrain(whole)
    interrupt(signal.SIGTERM, 5)
    pretrain(dataclasses.replace(config, steps=8, checkpoint_every=3, push=REPO))
    assert server.private == {REPO} and checkpoints(server).keys() == {"step-00000005"}
    shutil.rmtree(config.out)
    monkeypatch.chdir(tmp_path)
    pretrain(TrainConfig(resume=f"hub:{REPO}"))
    assert fingerprint(tmp_path / "runs" / "ants")[1:] == fingerprint(tmp_path / "whole")[1:]
    assert checkpoints(server).keys() == {"step-00000008"} and "model.safetensors" in server.repos[REPO]
    assert not any("secret" in path for path in server.asked)
    assert "LFS files" not in capfd.readouterr().err, "the client's progress bars, among our own"


def test_a_killed_upload_leaves_what_was_there(config, server, tmp_path):  # noqa: F811
    """SIGKILL while a large file is on its way; the next call sends what is missing."""
    run = pretrain(dataclasses.replace(config, steps=2, checkpoint_every=2)).run
    hub.create(REPO)
    push.push_checkpoint(run, REPO)
    before = dict(server.repos[REPO])
    pretrain(dataclasses.replace(config, out=tmp_path / "longer", steps=4))
    began = []

    def kill():
        if not began:
            began.append(client.pid)
            client.kill()
            client.wait()

    server.before_object = kill
    code = "import sys; from ant5m.train.push import *; push_checkpoint(Path(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    environment |= {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_secret"}
    client = subprocess.Popen([sys.executable, "-c", code, tmp_path / "longer", REPO], env=environment)
    assert client.wait(120) == -signal.SIGKILL and began
    assert server.repos[REPO] == before and server.commits[REPO] == 1
    fetched = push.fetch_run(f"hub:{REPO}", tmp_path / "fetched")
    assert fingerprint(fetched)[0] == fingerprint(run)[0]
    push.push_checkpoint(tmp_path / "longer", REPO)
    assert checkpoints(server) == {
        "step-00000004": {path.name for path in (tmp_path / "longer/checkpoints/step-00000004").iterdir()}
    }


def test_a_connection_that_is_cut_is_tried_again(config, server):  # noqa: F811
    cut = []

    def once():
        if not cut:
            cut.append(True)
            raise ConnectionAbortedError

    server.before_object = once
    server.handle_error = lambda *_: None
    result = pretrain(dataclasses.replace(config, steps=2, checkpoint_every=2, push=REPO))
    assert result.step == 2 and cut and checkpoints(server).keys() == {"step-00000002"}
