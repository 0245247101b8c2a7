"""A model with QK-norm is Hugging Face's Qwen3, both ways, and does all that a Llama does here."""

import json

import pytest
import torch
import transformers

from ant5m.data.tokenizer import train_tokenizer
from ant5m.errors import UserError
from ant5m.eval import scoring
from ant5m.eval.scoring import Request, score
from ant5m.export.card import ModelCard
from ant5m.export.huggingface import export
from ant5m.kernels import dispatch
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import load, save_model
from ant5m.model.config import ModelConfig
from ant5m.model.config_file import load_config
from ant5m.model.generation import generate
from ant5m.model.huggingface import config_from_huggingface, config_to_huggingface
from ant5m.train.half_precision_weights import half_precision_weights
from ant5m.train.optimizer import Optimizer

TEXT = "the ant carries a leaf along the path and the other ants follow it to the nest by the old tree"
# 6 heads of 10 in a width of 32: free of one another, as in Qwen3.
CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    initializer_range=0.3,
    qk_norm=True,
)
UNTIED = ModelConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": False, "num_key_value_heads": 6})


@pytest.fixture(scope="module")
def tokenizer():
    words = TEXT.split()
    return train_tokenizer([" ".join(words[i:] + words[:i]) for i in range(len(words))] * 20, vocab_size=300)


def with_uneven_norms(net):
    """Weights of 1 would hide that a norm has any, or whose they are."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(3)
    return with_uneven_norms(Ant(CONFIG))


def difference(net, qwen):
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        without = (net(ids) - qwen.eval()(ids).logits).abs().max().item()
    return max(without, (net(ids) - qwen(ids).logits).abs().max().item())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_logits_equal_transformers_both_ways(config, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "_selected", backend)
    torch.manual_seed(0)
    values = config_to_huggingface(config, eos_token_id=0)
    qwen = with_uneven_norms(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values)))
    qwen.save_pretrained(tmp_path / "theirs")
    net, _ = load(tmp_path / "theirs")
    assert net.config == config == load_config(tmp_path / "theirs")
    assert difference(net, qwen) < 1e-4
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
    save_model(net, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(back, transformers.Qwen3ForCausalLM) and difference(net, back) < 1e-4


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_export_generates_the_same(net, tokenizer, backend, tmp_path, monkeypatch):
    """Token by token over a cache, here and there."""
    monkeypatch.setattr(dispatch, "_selected", backend)
    export(net, tokenizer, tmp_path / "hf", ModelCard("test"))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "in the Qwen3 architecture" in card and "- qwen3" in card
    qwen = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for prompt in ("the ant", "nest by the old"):
        ids = torch.tensor([tokenizer.encode(prompt)])
        output = qwen.generate(ids, max_new_tokens=20, do_sample=False, repetition_penalty=1.1)
        (text,) = generate(net, tokenizer, [prompt], 20, temperature=0, repetition_penalty=1.1)
        assert tokenizer.decode(output[0, ids.shape[1] :]).split(tokenizer.eos_token)[0] == text


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_request_scores_as_it_does_alone(net, backend, monkeypatch):
    """Several answers to one context, and one's own beginnings: a tree of attention."""
    monkeypatch.setattr(dispatch, "_selected", backend)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 100)
    requests = [Request([7, 8, 9, n // 3], [5, 6, *range(n)][: 2 + n]) for n in range(9)]
    for request, found in zip(requests, score(net, requests), strict=True):
        ids = torch.tensor([*request.context, *request.continuation])
        with torch.inference_mode():
            log_probs = net(ids[None, :-1])[0].log_softmax(-1)[len(request.context) - 1 :]
        wanted = ids[len(request.context) :, None]
        assert found.log_likelihood == pytest.approx(log_probs.gather(1, wanted).sum().item(), abs=1e-4)


def test_norms_are_no_matrices_to_any_optimizer(net):
    """AdamW without decay, and fp32 in a step of half precision."""
    norms = {name for name, _ in net.named_parameters() if "q_norm" in name or "k_norm" in name}
    assert len(norms) == 4 and not norms & set(half_precision_weights(net, torch.bfloat16))
    for kind in ("adamw", "muon"):
        optimizer = Optimizer(net, kind)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        before = {name: p.clone() for name, p in net.named_parameters()}
        optimizer.step()
        stepped = {name.split("/")[0] for name in optimizer.tensors() if name.endswith("exp_avg_sq")}
        assert norms <= stepped
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters() if name in norms)


def test_other_models_are_written_as_before():
    """Runs, studies and checkpoints from before there were norms compare equal."""
    assert "qk_norm" not in ModelConfig().to_dict() and CONFIG.to_dict()["qk_norm"] is True
    assert ModelConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert "qk_norm" not in config_to_huggingface(CONFIG, 0)


QWEN = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}


def test_what_a_config_leaves_out_is_what_transformers_takes():
    ours, theirs = config_from_huggingface(QWEN), transformers.Qwen3Config(**QWEN)
    names = set(ModelConfig.__dataclass_fields__) - {"qk_norm", "rope_theta"}
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.qk_norm


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"attention_bias": True},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": "full_attention"},
        {"head_dim": 15},
        {"num_key_value_heads": 5},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_configs_that_cannot_be_represented(change):
    with pytest.raises(UserError) as error:
        config_from_huggingface({**QWEN, **change})
    name = next(iter(change))
    assert "\n" not in str(error.value) and name.split("_")[0] in str(error.value)


def test_a_width_without_whole_heads_needs_their_size():
    with pytest.raises(UserError, match=r"must divide hidden_size \(32\), or head_dim be given"):
        ModelConfig(hidden_size=32, num_attention_heads=6, qk_norm=True)
    with pytest.raises(UserError, match="qk_norm"):
        ModelConfig(qk_norm="yes")
