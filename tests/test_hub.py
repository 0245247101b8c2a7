"""Runs on the hub: pushed in the background, resumed elsewhere, and never in the way of the training."""

import dataclasses
import fnmatch
import shutil
import signal
import threading

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from test_resume import fingerprint, interrupt  # noqa: F401  (fixture)
from test_train import config, material  # noqa: F401  (fixtures)

from ant5m.cli import call
from ant5m.errors import UserError
from ant5m.export import hub
from ant5m.model.checkpoint import load
from ant5m.train import TrainConfig, pretrain, push

REPO = "ada/ants"


class LocalHub:
    """Folders in place of the hub, for the few calls that are made."""

    def __init__(self, root):
        self.root, self.created, self.uploads, self.fail = root, [], [], None

    def create_repo(self, repo, private, exist_ok):
        self._maybe_fail("create")
        self.created.append((repo, private, exist_ok))
        return f"hub/{repo}"

    def upload_folder(self, repo_id, folder_path, path_in_repo, commit_message, delete_patterns):
        self._maybe_fail("upload")
        target = self.root / repo_id / (path_in_repo or "")
        for old in [path for path in target.rglob("*") if path.is_file()]:
            if delete_patterns and fnmatch.fnmatch(str(old.relative_to(target)), delete_patterns):
                old.unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
        self.uploads.append(path_in_repo)

    def repo_info(self, repo):
        self._maybe_fail("info")

    def snapshot_download(self, repo, allow_patterns, local_dir):
        self._maybe_fail("download")
        if (self.root / repo).exists():
            place = allow_patterns.removesuffix("/**")
            shutil.copytree(self.root / repo / place, f"{local_dir}/{place}")

    def file_exists(self, repo, file):
        return (self.root / repo / file).exists()

    def _maybe_fail(self, what):
        if self.fail is not None:
            self.fail(what)


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    one = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "api", lambda: one)
    return one


def http_error(status):
    response = httpx.Response(status, request=httpx.Request("POST", "http://localhost/token=hf_secret"))
    return errors.HfHubHTTPError("hf_secret", response=response)


def raising(error, *places):
    def fail(what):
        if not places or what in places:
            raise error

    return fail


def test_a_pushed_run_goes_on_elsewhere_to_the_same_bits(
    config,  # noqa: F811
    local_hub,
    interrupt,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    whole = dataclasses.replace(config, out=tmp_path / "whole", steps=8)
    pretrain(whole)
    interrupt(signal.SIGTERM, 5)
    pretrain(dataclasses.replace(config, steps=8, checkpoint_every=3, push=REPO))
    assert local_hub.created == [(REPO, True, True)]
    pushed = local_hub.root / REPO / push.PLACE
    kept = {path.parent.name for path in (pushed / "checkpoints").glob("*/*")}
    assert kept == {"step-00000005"}
    shutil.rmtree(config.out)
    monkeypatch.chdir(tmp_path)
    pretrain(TrainConfig(resume=f"hub:{REPO}"))
    assert fingerprint(tmp_path / "runs" / "ants")[1:] == fingerprint(tmp_path / "whole")[1:]
    net, tokenizer = load(local_hub.root / REPO)
    assert tokenizer is not None and net.config.vocab_size == 300
    card = (local_hub.root / REPO / "README.md").read_text()
    assert f'from_pretrained("{REPO}")' in card
    assert not list((tmp_path / "runs" / "ants").glob(".push*"))
    with pytest.raises(UserError, match="exists already"):
        pretrain(TrainConfig(resume=f"hub:{REPO}"))


@pytest.mark.parametrize("error", [http_error(429), http_error(500), TimeoutError(), ValueError("x")])
def test_failures_change_nothing(config, local_hub, error, tmp_path):  # noqa: F811
    local_hub.fail = raising(error, "upload")
    with pytest.warns(UserWarning, match="upload to ada/ants failed") as seen:
        result = pretrain(dataclasses.replace(config, steps=4, checkpoint_every=2, push=REPO))
    assert result.step == 4 and "secret" not in "".join(str(one.message) for one in seen)
    # What was cut off is uploaded by the next call.
    local_hub.fail = None
    pretrain(TrainConfig(resume=config.out))
    assert (local_hub.root / REPO / push.PLACE / "checkpoints" / "step-00000004" / "state.json").exists()


def test_an_upload_that_hangs_stops_nothing(config, local_hub, monkeypatch):  # noqa: F811
    released = threading.Event()
    in_background = lambda: threading.current_thread() is not threading.main_thread()  # noqa: E731
    local_hub.fail = lambda what: released.wait(60) if what == "upload" and in_background() else None
    monkeypatch.setattr(push, "WAIT_SECONDS", 0.1)
    with pytest.warns(UserWarning, match="not on the hub yet"):
        result = pretrain(dataclasses.replace(config, steps=4, checkpoint_every=2, push=REPO))
    released.set()
    assert result.evaluation is not None


@pytest.mark.parametrize(
    "error, message",
    [
        (errors.LocalTokenNotFoundError("x"), "not logged in"),
        (http_error(401), "not logged in"),
        (http_error(403), "may not write to ada/ants"),
        (http_error(409), "is taken"),
    ],
)
def test_what_the_user_can_mend_is_said_before_the_training(
    config,  # noqa: F811
    local_hub,
    error,
    message,
    capsys,
):
    local_hub.fail = raising(error)
    with pytest.raises(UserError, match=message) as seen:
        pretrain(dataclasses.replace(config, push=REPO))
    assert "secret" not in str(seen.value) and "\n" not in str(seen.value)
    assert not config.out.exists()


def test_push_command(config, local_hub, tmp_path, capsys):  # noqa: F811
    run = pretrain(dataclasses.replace(config, steps=2)).run
    assert call(["push", str(run), REPO, "--license", "mit", "--public"]) == 0
    assert local_hub.created == [(REPO, False, True)]
    assert huggingface_hub.ModelCard.load(local_hub.root / REPO / "README.md").data.license == "mit"
    assert load(local_hub.root / REPO)[1] is not None
    capsys.readouterr()
    for words in ([str(run), "ants"], [str(run), "a/../b"], ["nowhere", REPO], [str(run), "x y/z"]):
        assert call(["push", *words]) == 2
    for error in (http_error(403), httpx.ConnectError("hf_secret"), errors.OfflineModeIsEnabled("x")):
        local_hub.fail = raising(error)
        assert call(["push", str(run), REPO]) == 2
    assert call(["train", "--resume", "hub:ada/ants", "--out", str(tmp_path / "new")]) == 2
    local_hub.fail = None
    assert call(["train", "--resume", "hub:ada/other", "--out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert "ada/other holds no run" in said and "secret" not in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call_hub", ["create", "push", "fetch", "has"])
def test_without_a_connection(call_hub, tmp_path, monkeypatch):
    """With the real client, whatever HTTP library it is built on; fetch into a folder that has something."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "api", lambda: huggingface_hub.HfApi("http://127.0.0.1:9", token="hf_secret"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
    (tmp_path / "kept.txt").write_text("kept")
    asked = {
        "create": lambda: hub.create(REPO),
        "push": lambda: hub.push(tmp_path, REPO),
        "fetch": lambda: hub.fetch(REPO, "last-checkpoint", tmp_path),
        "has": lambda: hub.has(REPO, "model.safetensors"),
    }
    with pytest.raises(hub.HubUnreachable, match="the hub cannot be reached") as raised:
        asked[call_hub]()
    assert "hf_secret" not in str(raised.value)
