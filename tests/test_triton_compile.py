"""The Triton kernels compiled for devices that are not here: what they need fits, and tensor cores are used.

benchmarks/triton_resources.py does the same for every preset and dtype.
"""

import os
import sys

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from ant5m.kernels import triton as ops
from ant5m.kernels.triton.resources import SHARED_MEMORY, compile_only, of_training_step

ANT_5M = {"hidden": 128, "intermediate": 516, "heads": 8, "kv_heads": 2, "head_size": 16, "vocab": 16_384}
WIDE = {"hidden": 256, "intermediate": 704, "heads": 4, "kv_heads": 4, "head_size": 64, "vocab": 16_384}
FIT = {**WIDE, "intermediate": 384, "vocab": 4_096}
KERNELS = {
    "rms_norm_fwd_kernel",
    "rms_norm_bwd_kernel",
    "rope_kernel",
    "swiglu_fwd_kernel",
    "swiglu_bwd_kernel",
    "rms_norm_weight_kernel",
}
PRODUCTS = {
    "attention_fwd_kernel",
    "attention_bwd_dq_kernel",
    "attention_bwd_dkdv_kernel",
    "head_loss_kernel",
    "head_gradient_kernel",
    "mlp_fwd_kernel",
    "mlp_bwd_kernel",
}


@pytest.mark.parametrize(
    "capability, dtype, sizes",
    [
        pytest.param(75, torch.float16, ANT_5M, id="ant-5m-75"),
        pytest.param(75, torch.float16, WIDE, id="ant-5m-wide-75"),
        pytest.param(75, torch.float16, FIT, id="ant-5m-fit-75"),
        pytest.param(80, torch.bfloat16, ANT_5M, id="ant-5m-80"),
        pytest.param(90, torch.bfloat16, ANT_5M, id="ant-5m-90"),
        pytest.param(80, torch.bfloat16, WIDE, id="ant-5m-wide-80"),
        pytest.param(90, torch.bfloat16, WIDE, id="ant-5m-wide-90"),
        pytest.param(80, torch.bfloat16, FIT, id="ant-5m-fit-80"),
        pytest.param(90, torch.bfloat16, FIT, id="ant-5m-fit-90"),
        pytest.param(80, torch.bfloat16, {**ANT_5M, "documents": True}, id="ant-5m-documents-80"),
        pytest.param(90, torch.bfloat16, {**ANT_5M, "documents": True}, id="ant-5m-documents-90"),
        pytest.param(75, torch.float16, {**ANT_5M, "qk_norm": True}, id="ant-5m-qk-norm-75"),
        pytest.param(80, torch.bfloat16, {**FIT, "qk_norm": True}, id="ant-5m-fit-qk-norm-80"),
        pytest.param(90, torch.bfloat16, {**FIT, "qk_norm": True}, id="ant-5m-fit-qk-norm-90"),
    ],
)
def test_kernels_fit_the_device(capability, dtype, sizes):
    found = of_training_step(capability, dtype, **sizes)
    expected = KERNELS | (PRODUCTS if capability >= 80 else {"softmax_gradient_kernel"})
    if sizes.get("qk_norm"):
        expected = expected - {"rope_kernel"} | {"qk_norm_rope_fwd_kernel", "qk_norm_rope_bwd_kernel"}
    assert {kernel.kernel for kernel in found} == expected
    for kernel in found:
        assert kernel.spill_bytes == 0, kernel
        assert 0 < kernel.registers <= 255 and kernel.shared_bytes <= SHARED_MEMORY[capability], kernel
        assert (kernel.tensor_instructions > 0) == (kernel.kernel in PRODUCTS), kernel
        # The softmax kernel reads and writes the target's logit alone; all else goes by vectors, even 516
        # wide.
        assert kernel.narrow_accesses == (2 if kernel.kernel == "softmax_gradient_kernel" else 0), kernel


def test_what_does_not_fit_is_seen(monkeypatch):
    """A tile that no thread has registers for spills; fp32 leaves the tensor cores idle."""
    module = sys.modules["ant5m.kernels.triton.attention"]
    x = torch.zeros(1, 256, 1, 64)
    with compile_only(80) as found:
        ops.attention(x, x, x)
        monkeypatch.setattr(module, "_tile", lambda *_: module._Tile(128, 128, 4, 2))
        x = x.half()
        ops.attention(x, x, x)
    plain, spilling = found
    assert plain.tensor_instructions == 0 and plain.spill_bytes == 0
    assert spilling.tensor_instructions > 0 and spilling.spill_bytes > 0


def test_too_much_shared_memory_is_refused():
    x = torch.zeros(1, 256, 1, 64, dtype=torch.bfloat16)
    with compile_only(90, shared_memory=16 << 10), pytest.raises(OutOfResources, match="shared memory"):
        ops.attention(x, x, x)
