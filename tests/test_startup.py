"""What a start does not pay for: modules that take longer to import than everything else."""

import subprocess
import sys

import pytest
import torch

from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.model.weights import load_model, save_model

TINY = ModelConfig(97, 16, 22, 2, 2, 1)
SLOW = ("torch._dynamo", "sympy", "triton", "transformers", "datasets", "matplotlib", "pandas")


def imported(code):
    told = f"{code}; import sys; print(*(name for name in {SLOW} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", told], stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize("tied", [True, False])
def test_loading_a_model_imports_nothing_slow_and_draws_nothing(tied, tmp_path):
    config = ModelConfig.from_dict({**TINY.to_dict(), "tie_word_embeddings": tied})
    net = Ant(config)
    save_model(net, tmp_path)
    state = torch.get_rng_state()
    loaded = load_model(config, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(net.cos, loaded.cos) and torch.equal(net.sin, loaded.sin)
    code = "from ant5m.model.config import ModelConfig; from ant5m.model.weights import load_model; "
    code += f"from pathlib import Path; load_model({config!r}, Path({str(tmp_path)!r}))"
    assert imported(code).strip() == ""


def test_packing_does_not_wait_for_torch():
    code = (
        "import ant5m.data.joint_packing, ant5m.ranks, sys; ant5m.ranks.join(); print('torch' in sys.modules)"
    )
    assert imported(code).split() == ["False"]
