"""The doctor counts exactly what the model has and does, and says what is weak."""

import dataclasses
import random
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ant5m import kernels
from ant5m.errors import UserError
from ant5m.model import costs, doctor
from ant5m.model.ant import Ant
from ant5m.model.config import PRESETS, ModelConfig

SMALL = ModelConfig(
    vocab_size=500,
    hidden_size=48,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
)


@pytest.fixture
def reference():
    """The backend that the doctor's formula for activations describes."""
    before = kernels.selected()
    kernels.select("reference")
    yield
    kernels.select(before)


def random_config(seed: int) -> ModelConfig:
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 4, 6, 8])
    return ModelConfig(
        vocab_size=draw.randint(2, 3000),
        hidden_size=heads * 2 * draw.randint(1, 20),
        intermediate_size=draw.randint(1, 500),
        num_hidden_layers=draw.randint(1, 6),
        num_attention_heads=heads,
        num_key_value_heads=draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        head_dim=draw.choice([None, 2, 10, 32]),
        tie_word_embeddings=draw.random() < 0.5,
        qk_norm=draw.random() < 0.5,
    )


CONFIGS = [*PRESETS.values(), *(random_config(seed) for seed in range(20))]


@pytest.mark.parametrize("config", CONFIGS, ids=[*PRESETS, *(f"random{n}" for n in range(20))])
def test_parameters_equal_the_model(config):
    with torch.device("meta"):
        net = Ant(config)
    counted = costs.count_parameters(config)
    assert sum(counted.values()) == sum(weight.numel() for weight in net.parameters())
    names = {
        "embedding": "embed_tokens",
        "attention": "self_attn",
        "mlp": "mlp",
        "norms": "norm",
        "head": "lm_head",
    }
    for part, name in names.items():
        # "norm" is in the names of all norms, those of the heads (self_attn.q_norm) too, and in no other's.
        mine = {full for full, _ in net.named_parameters() if name in full}
        mine = mine if part == "norms" else {full for full in mine if "norm" not in full}
        there = sum(weight.numel() for full, weight in net.named_parameters() if full in mine)
        assert counted[part] == there, part


def test_published_sizes():
    total = {name: sum(costs.count_parameters(config).values()) for name, config in PRESETS.items()}
    assert total["ant-5m"] == 4_730_240
    assert total["ant-5m-fit"] == 4_951_808
    assert total["ant-5m-best"] == 4_937_280
    assert total["ant-5m-wide"] > 9_800_000
    assert round(total["archaea-74m"] / 1e6, 1) == 74.0
    larger = [total[f"ant-{millions}m"] for millions in (10, 25, 50, 100)]
    assert larger == [9_966_848, 24_192_384, 49_691_136, 99_802_240]


def test_published_work_per_token():
    # The published 36.9 MFLOP (head 34 %, attention 23 %, linears 42 %) are those of a SwiGLU of 512.
    config = dataclasses.replace(PRESETS["ant-5m"], intermediate_size=512)
    work = doctor.examine(config).flops_training
    total = sum(work.values())
    assert round(total / 1e6, 1) == 36.9
    assert {part: int(100 * flops / total) for part, flops in work.items()} == {
        "linears": 42,
        "attention": 23,
        "head": 34,
    }
    assert round(sum(doctor.examine(PRESETS["ant-5m"]).flops_training.values()) / 1e6, 1) == 37.0


def test_flops_equal_those_torch_counts(reference):
    net, length = Ant(SMALL), 32
    # The counter sees attention only as the two products of the plain formula.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        net(torch.zeros(1, length, dtype=torch.int64))
    forward = costs.count_flops(SMALL, length)
    # torch counts attention without its causal mask: T positions instead of (T + 1) / 2.
    unmasked = forward["attention"] * 2 * length // (length + 1)
    assert counter.get_total_flops() == length * (forward["linears"] + forward["head"] + unmasked)


def saved_bytes(net: Ant, rows: int, length: int, half: bool) -> int:
    """Bytes that autograd keeps of a forward pass, parameters and buffers apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that no address comes twice
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        net(ids, ids)
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("preset", ["ant-5m", "ant-5m-fit"])
def test_activations_are_what_autograd_keeps(preset, half, reference):
    config = dataclasses.replace(PRESETS[preset], num_hidden_layers=3)
    net = Ant(config)
    measured = (saved_bytes(net, 3, 64, half) - saved_bytes(net, 1, 64, half)) / 128
    assert costs.count_activations(config, half) == pytest.approx(measured, rel=0.02)


def test_what_fits_grows_with_memory_and_is_whole_sequences():
    config = PRESETS["ant-5m"]
    tokens = [costs.fitting_tokens(config, gigabytes * 10**9) for gigabytes in (0, 1, 4, 16)]
    assert tokens[0] == 0 and tokens == sorted(tokens) and tokens[1] > 0
    assert all(count % config.max_position_embeddings == 0 for count in tokens)
    assert costs.fitting_tokens(config, 16 * 10**9, half=True) > tokens[3]


def findings(config, **arguments):
    return {finding.topic: finding for finding in doctor.examine(config, **arguments).findings}


def test_the_published_correction_exceeds_its_envelope():
    found = findings(PRESETS["ant-5m-wide"], max_params=5_000_000)["envelope"]
    assert found.severity == "failure" and found.value == 9_817_856
    assert "published correction" in found.why and "4,817,856" in found.why
    assert "ant-5m-fit" in found.remedy and "ant-5m-wide" not in found.remedy
    assert findings(PRESETS["ant-5m-fit"], max_params=5_000_000)["envelope"].severity == "ok"
    assert "envelope" not in findings(PRESETS["ant-5m-fit"])


def test_ways_into_the_envelope_keep_it():
    config = PRESETS["ant-5m"]
    remedy = findings(config, max_params=4_000_000)["envelope"].remedy
    changes = {
        name: int(size.replace(",", ""))
        for name, size in re.findall(r"(vocab_size|intermediate_size) ([\d,]*\d)", remedy)
    }
    assert set(changes) == {"vocab_size", "intermediate_size"}
    for name, value in changes.items():
        assert sum(costs.count_parameters(dataclasses.replace(config, **{name: value})).values()) <= 4_000_000
    assert "tie_word_embeddings" in findings(PRESETS["archaea-74m"], max_params=50_000_000)["envelope"].remedy


def test_what_is_weak_in_the_presets():
    weak = {
        name: {topic for topic, finding in findings(config).items() if finding.severity == "warning"}
        for name, config in PRESETS.items()
    }
    assert weak["ant-5m"] == {"embedding share", "vocabulary against width", "head size"}
    assert weak["ant-5m-wide"] == {"embedding share"}
    assert weak["ant-5m-fit"] == weak["ant-5m-best"] == set()
    assert weak["archaea-74m"] == {"embedding share"}


@pytest.mark.parametrize("millions", [10, 25, 50, 100])
def test_the_larger_presets_keep_their_names_and_the_doctors_advice(millions):
    config = PRESETS[f"ant-{millions}m"]
    found = findings(config, max_params=millions * 1_000_000)
    assert found["envelope"].value > 0.96 * millions * 1_000_000
    assert {topic for topic, finding in found.items() if finding.severity != "ok"} == {"RoPE base"}
    widths = config.hidden_size, config.intermediate_size
    assert config.head_size == 64 and not any(width % 64 for width in widths) and not config.vocab_size % 128


@pytest.mark.parametrize(
    "topic, values, severity",
    [
        ("queries per key/value head", {"num_key_value_heads": 8}, "ok"),
        ("queries per key/value head", {"num_key_value_heads": 2}, "note"),
        ("queries per key/value head", {"num_key_value_heads": 1}, "warning"),
        ("depth against width", {"num_hidden_layers": 5}, "ok"),
        ("depth against width", {"num_hidden_layers": 11}, "note"),
        ("depth against width", {"num_hidden_layers": 20}, "warning"),
        ("depth against width", {"num_hidden_layers": 1}, "note"),
        ("embedding share", {"vocab_size": 4_096}, "ok"),
        ("vocabulary against width", {"vocab_size": 8_192}, "note"),
        ("head size", {"num_attention_heads": 4}, "ok"),
        ("RoPE base", {"rope_theta": 300.0}, "ok"),
    ],
)
def test_severity_follows_the_number(topic, values, severity):
    found = findings(dataclasses.replace(PRESETS["ant-5m"], head_dim=None, **values))[topic]
    assert found.severity == severity
    assert bool(found.remedy) == (severity != "ok")


def test_rotations_are_those_of_the_models_own_table():
    config = PRESETS["ant-5m"]
    net = Ant(dataclasses.replace(config, num_hidden_layers=1, vocab_size=2))
    # cos of the last position's angle, unwrapped: count full rotations by summing the steps between.
    angle = torch.atan2(net.sin, net.cos).double()
    step = torch.remainder(angle[1:] - angle[:-1], 2 * torch.pi).mean(0)
    rotations = step * config.max_position_embeddings / (2 * torch.pi)
    assert doctor.rope_rotations(config) == pytest.approx(rotations.tolist(), rel=1e-3)
    assert findings(config)["RoPE base"].value == 3
    base = doctor.largest_rotating_base(config)
    assert base == pytest.approx(337, abs=1)
    assert min(doctor.rope_rotations(dataclasses.replace(config, rope_theta=base))) == pytest.approx(1)


@pytest.mark.parametrize(
    "shape", [(128, 8, 2, 16), (96, 6, 3, 16), (128, 8, 8, 16), (40, 5, 5, 8), (64, 2, 1, 32)]
)
def test_remedies_hold(shape):
    hidden, heads, keys, size = shape
    config = dataclasses.replace(
        PRESETS["ant-5m"],
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=size,
    )
    found = findings(config)
    if named := re.search(
        r"heads: (\d+) of 32, (\d+) of them .* cost (none|[\d,]+)", found["head size"].remedy
    ):
        larger = dataclasses.replace(
            config, num_attention_heads=int(named[1]), num_key_value_heads=int(named[2]), head_dim=32
        )
        more = sum(costs.count_parameters(larger).values()) - sum(costs.count_parameters(config).values())
        assert more == (0 if named[3] == "none" else int(named[3].replace(",", "")))
    else:
        assert size >= 32 or found["head size"].remedy == "Heads of 32 or more, if the width allows."
    base = re.search(r"rope_theta ([\d,]+) every", found["RoPE base"].remedy)
    turning = dataclasses.replace(config, rope_theta=float(base[1].replace(",", "")))
    assert findings(turning)["RoPE base"].value == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_gets_every_verdict(config):
    diagnosis = doctor.examine(config, max_params=1, device_memory=10**9)
    assert len(diagnosis.findings) == 7
    assert all("\n" not in finding.why + finding.remedy for finding in diagnosis.findings)


@pytest.mark.parametrize(
    "text, count",
    [
        ("5M", 5_000_000),
        ("4_950_000", 4_950_000),
        ("4,950,000", 4_950_000),
        ("4.95m", 4_950_000),
        ("1B", 10**9),
    ],
)
def test_counts(text, count):
    assert doctor.parse_count(text) == count


@pytest.mark.parametrize(
    "text, count", [("16GB", 16 * 10**9), ("15GiB", 15 << 30), ("800 MB", 8 * 10**8), ("2t", 2 * 10**12)]
)
def test_amounts_of_memory(text, count):
    assert doctor.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "five", "5X", "-5M", "0", "5MM", "1e6"])
def test_what_is_no_count(text):
    with pytest.raises(UserError):
        doctor.parse_count(text)
    with pytest.raises(UserError):
        doctor.parse_bytes(text)
