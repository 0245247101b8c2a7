"""Which precision a device gets, devices that are not there, and the loss scaler."""

import contextlib

import pytest
import torch

from ant5m import kernels
from ant5m.device import (
    DTYPES,
    autocast,
    casts,
    choose_device,
    choose_precision,
    describe_device,
    peak_flops,
)
from ant5m.errors import UserError
from ant5m.kernels import dispatch
from ant5m.kernels.cpu import bf16
from ant5m.model.config_file import load_config
from ant5m.train.loss_scaler import FIRST_SCALE, GROWTH_INTERVAL, LossScaler
from ant5m.train.plan import micro_batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    def be(name, capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)

    return be


def test_capability_decides(gpu):
    gpu("Tesla T4", (7, 5))
    assert choose_precision("auto", CUDA) == "fp16"
    assert choose_precision("fp32", CUDA) == "fp32"
    with pytest.raises(UserError, match="Tesla T4 has no bf16"):
        choose_precision("bf16", CUDA)
    gpu("NVIDIA A100-SXM4-40GB", (8, 0))
    assert choose_precision("auto", CUDA) == "bf16"
    with pytest.raises(UserError, match="no precision 'int8'"):
        choose_precision("int8", CPU)


@pytest.mark.parametrize("inside", [None, contextlib.nullcontext()])
def test_a_cpu_takes_bf16_only_where_kernels_multiply_it(inside, monkeypatch):
    monkeypatch.setattr(kernels, "bf16_products", lambda device: inside)
    assert choose_precision("auto", CPU) == ("fp32" if inside is None else "bf16")
    assert choose_precision("fp32", CPU) == "fp32" and choose_precision("bf16", CPU) == "bf16"


def test_a_peak_is_never_guessed(gpu):
    gpu("Tesla T4", (7, 5))
    assert peak_flops(CUDA, "fp16") == 65e12
    assert peak_flops(CUDA, "fp32") is None
    gpu("NVIDIA T4000", (7, 5))
    assert peak_flops(CUDA, "fp16") is None
    assert peak_flops(CPU, "fp32") is None


def test_the_gpu_of_an_apple_computer_is_accepted_and_said_to_be_untried(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="'mps' is not there: it is the GPU of an Apple computer"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="nobody has tried the device 'mps' yet"):
        device = choose_device("mps")
    assert device == torch.device("mps") and choose_precision("auto", device) == "fp32"
    assert (
        dispatch.order(device) == ("reference",)
        and describe_device(device, "fp32") == "Apple GPU (mps), fp32"
    )
    assert kernels.describe(device) == "kernels (auto): all on reference"
    assert micro_batch(load_config("ant-5m"), 8, 1_024, device, "fp32") == 4


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU
    with pytest.raises(UserError, match="'cuda' is not there: no GPUs found"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:0").index == 0
    with pytest.raises(UserError, match="'cuda:1' is not there: 1 GPU found"):
        choose_device("cuda:1")
    for name in ("tpu", "meta", "cpu:x"):
        with pytest.raises(UserError, match=f"'{name}'"):
            choose_device(name)


def test_scaler_halves_and_doubles():
    finite, overflow = torch.tensor(1.0), torch.tensor(0.0)
    scaler = LossScaler()
    assert scaler.scale == FIRST_SCALE == 2**13
    scaler.update(overflow)
    assert scaler.state_dict() == {"scale": FIRST_SCALE / 2, "good_steps": 0}
    for _ in range(GROWTH_INTERVAL - 1):
        scaler.update(finite)
    assert scaler.state_dict() == {"scale": FIRST_SCALE / 2, "good_steps": GROWTH_INTERVAL - 1}
    scaler.update(finite)
    assert scaler.state_dict() == {"scale": FIRST_SCALE, "good_steps": 0}
    scaler.update(finite)
    scaler.update(overflow)
    assert LossScaler("cpu", **scaler.state_dict()).state_dict() == {
        "scale": FIRST_SCALE / 2,
        "good_steps": 0,
    }


def test_unscale():
    gradients = [torch.full((2,), 4.0 * FIRST_SCALE)]
    LossScaler().unscale(gradients)
    assert gradients[0].tolist() == [4.0, 4.0]


def test_autocast_dtype(monkeypatch):
    weight = torch.ones(2, 2)
    monkeypatch.setattr(kernels, "bf16_products", lambda device: None)
    for name, dtype in DTYPES.items():
        assert casts(name, CPU) == (name != "fp32")
        with autocast(name, CPU):
            assert (weight @ weight).dtype == dtype


@pytest.mark.skipif(not kernels.multiplies_bf16(CPU), reason="this processor does not multiply bf16")
def test_nothing_is_cast_where_the_kernels_round():
    weight = torch.ones(2, 2)
    assert not casts("bf16", CPU)
    with autocast("bf16", CPU):
        assert (weight @ weight).dtype == torch.float32 and bf16.enabled.get()
    assert not bf16.enabled.get()
    assert casts("fp16", CPU)
    kernels.select("reference")
    try:
        assert casts("bf16", CPU)
        with autocast("bf16", CPU):
            assert (weight @ weight).dtype == torch.bfloat16
    finally:
        kernels.select("auto")
