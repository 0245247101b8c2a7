"""Which device each process takes, and how many processes there are. The GPUs are pretended."""

import json
from types import SimpleNamespace

import pytest
import torch

from ant5m.errors import UserError
from ant5m.ranks import Ranks
from ant5m.train import TrainConfig
from ant5m.train.devices import take_device, take_precision
from ant5m.train.launch import count_processes

T4, P100 = "Tesla T4", "Tesla P100-PCIE-16GB"


@pytest.fixture
def gpus(monkeypatch):
    """Sets what this process sees: names of GPUs; `taken`: the one that it made its own."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def see(*names):
        def properties(device):
            index = torch.device(device).index or 0
            return SimpleNamespace(name=names[index], uuid=f"{index}-of-{len(names)}")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: names[number])
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(str(device)))

    taken = []
    return SimpleNamespace(see=see, taken=taken)


class Second(Ranks):
    """Rank 1 of 2; rank 0 has `theirs`, and took the GPU of that uuid."""

    def __init__(self, theirs="", uuid=""):
        super().__init__(1, 2)
        self.theirs, self.uuid = theirs, uuid

    def share(self, value=None):
        return self.theirs

    def ticket(self, name):
        return int(name == f"GPU {self.uuid}")


def as_rank_1(monkeypatch):
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_sees(gpus, monkeypatch):
    as_rank_1(monkeypatch)
    gpus.see(T4, T4)
    assert take_device("auto", Second(T4, "0-of-2")) == torch.device("cuda:1") and gpus.taken == ["cuda:1"]
    gpus.see(T4)
    assert take_device("cuda", Second(T4, "of another one")) == torch.device("cuda")
    gpus.see(T4, T4)
    assert take_device("cpu", Second("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    "seen, name, theirs, told",
    [
        ([T4], "auto", Second(T4, "0-of-1"), "two of the 2 processes have the same Tesla T4"),
        ([T4, T4], "auto", Second(P100), "the devices differ"),
        ([T4, T4], "auto", Second("cpu"), "the devices differ"),
        ([T4, T4], "cuda:1", Second(T4), "--device cuda:1 is one device, and 2 processes train"),
        ([T4, T4, T4], "cuda:7", Second(T4), "the device 'cuda:7' is not there"),
    ],
)
def test_devices_that_cannot_train_together_are_refused(gpus, monkeypatch, seen, name, theirs, told):
    as_rank_1(monkeypatch)
    gpus.see(*seen)
    with pytest.raises(UserError, match=told):
        take_device(name, theirs)


def test_processors_that_multiply_in_unlike_precisions_are_refused():
    with pytest.raises(UserError, match=r"unlike precisions .bf16 on rank 0"):
        take_precision("fp32", torch.device("cpu"), Second("bf16"))


def test_one_process_for_each_gpu(gpus):
    gpus.see(T4, T4)
    assert count_processes(TrainConfig()) == count_processes(TrainConfig(device="cuda")) == 2
    assert count_processes(TrainConfig(device="cuda:1")) == count_processes(TrainConfig(processes=1)) == 1
    assert count_processes(TrainConfig(device="cpu", processes=3)) == 3
    with pytest.raises(UserError, match="needs as many GPUs, and this machine has 2"):
        count_processes(TrainConfig(processes=3))
    with pytest.raises(UserError, match="--device cuda:1 is one device"):
        count_processes(TrainConfig(device="cuda:1", processes=2))
    gpus.see(T4, P100)
    with pytest.raises(UserError, match="cuda:0 is a Tesla T4, cuda:1 is a Tesla P100"):
        count_processes(TrainConfig())
    gpus.see()
    assert count_processes(TrainConfig()) == 1


def test_a_resumed_run_has_the_processes_of_its_own_settings(gpus, tmp_path):
    gpus.see(T4, T4)
    kept = TrainConfig(device="cuda:1").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"train": kept}))
    resumed = TrainConfig(resume=tmp_path)
    assert count_processes(resumed) == 1
    assert count_processes(TrainConfig(resume=tmp_path, device="cuda")) == 2
    (tmp_path / "config.json").write_text(json.dumps({"train": {**kept, "device": "cpu", "processes": 3}}))
    assert count_processes(resumed) == 3


def test_tasks_of_slurm_without_torchrun_do_not_train_side_by_side(gpus, monkeypatch, tmp_path):
    gpus.see(T4)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a batch script itself is one process
    assert count_processes(TrainConfig()) == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UserError, match=r"SLURM started 8 tasks, .* let srun start one torchrun"):
        count_processes(TrainConfig())
    with pytest.warns(UserWarning, match="SLURM started 8 tasks"):  # a folder of each task's own, perhaps
        assert count_processes(TrainConfig(out=tmp_path / "run")) == 1
    as_rank_1(monkeypatch)
    assert count_processes(TrainConfig()) == 1
