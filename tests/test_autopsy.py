"""An autopsy finds what was planted, and nothing where nothing was."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loops import WORDS, successor_net

from ant5m.cli import call
from ant5m.data.shards import Shards, Tokens
from ant5m.data.tokenizer import train_tokenizer
from ant5m.errors import UserError
from ant5m.eval.autopsy import embedding, evidence, forward, groups, heads, looping, report
from ant5m.eval.autopsy.embedding import Counts, effective_rank
from ant5m.eval.autopsy.evidence import Estimate
from ant5m.export.card import ModelCard
from ant5m.export.huggingface import export
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig

SYMBOLS, SIZE = 31, 32
LENGTH = 64
RING = ["ant", "leaf", "path"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small are not worth a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(what: str) -> None:
    pass


def tiny(**values) -> ModelConfig:
    shape = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "initializer_range": 0.3,
    }
    return ModelConfig(**{**shape, **values})


def split_of(tokens: np.ndarray, vocab_size: int) -> Shards:
    meta = {
        "vocab_size": vocab_size,
        "eos_token_id": 0,
        "tokenizer_fingerprint": "",
        "splits": {"validation": {"documents": 1, "bytes": 1, "words": 1, "tokens": len(tokens)}},
    }
    return Shards(Path("memory"), "validation", meta, Tokens([tokens.astype(np.uint16)]))


def sample_of(net: Ant, tokens: np.ndarray, length: int = LENGTH) -> evidence.Windows:
    with torch.inference_mode():
        windows = evidence.windows(split_of(tokens, net.config.vocab_size), length, len(tokens))
        return evidence.sample(net, *windows)


def counts_of(tokens: np.ndarray, vocab_size: int) -> Counts:
    return embedding.count_tokens(split_of(tokens, vocab_size), vocab_size, "this text")


def finding(section: evidence.Section, topic: str) -> evidence.Finding:
    return next(one for one in section.findings if one.topic == topic)


def copying_net(back: int) -> Ant:
    """Head 0 looks `back` positions back, by position alone, and the model says what stands there.

    Head 1 looks everywhere alike and writes nothing. Coordinates of the stream: the token, what was copied,
    and one that is always 1.
    """
    config = tiny(
        vocab_size=SYMBOLS,
        hidden_size=2 * SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=SIZE,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    net, always, copied = Ant(config), 2 * SIZE - 1, slice(SIZE, SIZE + SYMBOLS)
    layer = net.model.layers[0]
    rotated = forward.angles(config, torch.tensor([back]))[0].float()
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim == 2:
                weight.zero_()
        net.model.embed_tokens.weight[:, :SYMBOLS] = torch.eye(SYMBOLS)
        net.model.embed_tokens.weight[:, always] = 1
        layer.self_attn.q_proj.weight[: SIZE // 2, always] = 2
        layer.self_attn.k_proj.weight[:SIZE, always] = torch.cat((rotated.cos(), rotated.sin()))
        layer.self_attn.v_proj.weight[:SYMBOLS, :SYMBOLS] = torch.eye(SYMBOLS)
        layer.self_attn.o_proj.weight[copied, :SYMBOLS] = torch.eye(SYMBOLS)
        net.lm_head.weight[:, copied] = 1.3 * torch.eye(SYMBOLS)
    return net.eval()


def repeating(back: int, count: int = 3_000) -> np.ndarray:
    """Symbols; in a window each target is what stood `back` places before its input, after fresh ones."""
    tokens = np.random.default_rng(0).integers(0, SYMBOLS, count)
    for place in range(1, count):
        if (place - 1) % LENGTH >= back:
            tokens[place] = tokens[place - 1 - back]
    return tokens


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "tie_word_embeddings": False},
        {"head_dim": 6, "rope_theta": 500.0, "num_hidden_layers": 3},
        {"head_dim": 6, "num_attention_heads": 6, "qk_norm": True},
    ],
)
def test_the_open_forward_pass_is_the_models_own(values):
    torch.manual_seed(1)
    net = Ant(tiny(**values)).eval()
    for layer in net.model.layers:
        for weight in (layer.input_layernorm.weight, *(layer.self_attn.norms or [])):
            torch.nn.init.uniform_(weight, 0.5, 2)
    torch.nn.init.uniform_(net.model.norm.weight, 0.5, 2)
    ids, targets = torch.randint(90, (2, 3, 41))
    with torch.inference_mode():
        own = net(ids)
        read = forward.hidden(net, net.model.embed_tokens(ids), forward.Attention.of(net, 41))
        logits = read @ net.head_weight.T
        losses = forward.token_losses(net, read, targets)
        assert (logits - own).square().mean().sqrt() < 1e-5 * own.square().mean().sqrt()
        assert losses.mean().item() == pytest.approx(net(ids, targets).item(), rel=1e-5)
        whole = evidence.sample(net, ids, targets)  # from any layer on, the same
        again = forward.hidden(net, whole.streams[1], forward.Attention.of(net, 41), 1)
    torch.testing.assert_close(again, read)


def test_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    net, windows = Ant(tiny()), torch.randint(90, (3, 40))
    looks = heads.look(net, windows, quiet)
    for name, half in looks.halves.items():  # of each head over the windows
        each = torch.stack([getattr(heads.look(net, one[None], quiet), name) for one in windows])
        assert torch.allclose(half, evidence.half_widths(each), rtol=1e-3) and half.min() > 0
    assert looks.shifted.max() < 1e-4 < 0.3 < looks.shuffled.min()


def test_a_head_that_looks_back_is_seen():
    tokens = repeating(1)
    net = copying_net(1)
    sample = sample_of(net, tokens)
    assert sample.losses[:, 3:].mean() < 0.2
    looks = heads.look(net, sample.spread(4), quiet)
    middle = (LENGTH - 1) / 4  # mean over all positions of the distance of looking everywhere alike
    assert looks.distance[0, 0] * middle == pytest.approx(1, abs=0.2)
    assert looks.entropy[0, 0] < 0.2 and looks.shuffled[0, 0] > 1
    assert looks.entropy[0, 1] == pytest.approx(1) and looks.distance[0, 1] == pytest.approx(1)

    section = heads.examine(net, sample, counts_of(tokens, SYMBOLS), quiet)
    assert finding(section, "loss without positions").value > 0.5
    assert "uses the rotation" in finding(section, "loss without positions").meaning
    fast, slow = section.data["loss_without_pair"][0], section.data["loss_without_pair"][-1]
    assert fast["mean"] > fast["half"] > 0 and abs(slow["mean"]) < 0.01  # a pair that hardly turns
    assert abs(finding(section, "use of the far past").value) < 0.01
    by_position = section.data["loss_by_position"]
    assert by_position[0]["mean"] > 1 > 0.2 > by_position[-1]["mean"]
    assert by_position[0]["from"] == 0 and by_position[-1]["to"] == LENGTH
    share = (np.bincount(tokens, minlength=SYMBOLS) + 1) / (len(tokens) + SYMBOLS)
    expected = -np.log(share)[sample.targets[:, LENGTH // 2 :].numpy()].mean()
    assert section.data["unigram_loss_by_position"][-1]["mean"] == pytest.approx(expected)


def test_the_far_past_is_seen():
    tokens = repeating(40)
    net = copying_net(40)
    section = heads.examine(net, sample_of(net, tokens), counts_of(tokens, SYMBOLS), quiet)
    far = finding(section, "use of the far past")
    assert far.value > 1 and "help this model." in far.meaning


def test_rope_without_effect():
    torch.manual_seed(0)
    net = Ant(tiny())
    for layer in net.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    tokens = np.random.default_rng(0).integers(0, 90, 600)
    section = heads.examine(net, sample_of(net, tokens, 48), counts_of(tokens, 90), quiet)
    assert finding(section, "attention entropy").value == pytest.approx(1)
    assert finding(section, "loss without positions").value == pytest.approx(0, abs=1e-6)
    assert "not learned" in finding(section, "loss without positions").meaning
    assert finding(section, "rotation pairs that carry weight").value == 0


def test_energy_lies_in_the_pair_that_has_it():
    torch.manual_seed(0)
    net = Ant(tiny())
    for layer in net.model.layers:
        rows = layer.self_attn.q_proj.weight.data.unflatten(0, (4, 2, 4))  # head, half, pair
        rows[:, :, [0, 1, 3]] = 0
    pairs = heads.look(net, torch.randint(90, (2, 40)), quiet).pairs
    assert pairs.shape == (2, 4, 4) and torch.allclose(pairs[..., 2], torch.ones(2, 4))


def test_a_needed_kv_head_and_an_idle_one():
    net = copying_net(1)
    section = groups.examine(net, sample_of(net, repeating(1)), quiet)
    (needed, idle), *_ = section.data["loss_without_kv_head"]
    assert needed["mean"] > 2 and idle == {"mean": 0, "half": 0}
    assert finding(section, "loss without a KV head").value == needed["mean"]
    assert finding(section, "loss when heads are regrouped").value > 2


def test_duplicated_heads_and_interchangeable_groups():
    torch.manual_seed(0)
    net = Ant(tiny())
    ids = torch.randint(90, (2, 40))
    within, across = groups.split(groups.overlaps(net, ids).mean(0), 2)
    assert within.shape == (2, 2) and across.shape == (2, 4) and within.max() < 0.95
    for layer in net.model.layers:
        own = layer.self_attn
        queries = own.q_proj.weight.data.view(4, 8, 32)
        queries[1], queries[3] = queries[0], queries[2]
        for projection in (own.k_proj, own.v_proj):
            projection.weight.data[8:] = projection.weight.data[:8]
    sample = sample_of(net, np.random.default_rng(0).integers(0, 90, 600), 48)
    section = groups.examine(net, sample, quiet)
    likeness = finding(section, "likeness of heads that share keys")
    assert likeness.value == pytest.approx(1) and "4 of 4 pairs" in likeness.number
    assert finding(section, "likeness of query matrices").value == pytest.approx(1)
    assert finding(section, "loss when heads are regrouped").value == pytest.approx(0, abs=1e-6)


def test_one_kv_head_has_nothing_to_be_regrouped_with():
    net = Ant(tiny(num_key_value_heads=1, num_attention_heads=1))
    section = groups.examine(net, sample_of(net, np.arange(600) % 90, 48), quiet)
    assert [one.topic for one in section.findings] == ["loss without a KV head"]


def test_effective_rank():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)


def test_a_table_of_low_rank_and_rows_that_were_never_trained():
    torch.manual_seed(0)
    net = Ant(tiny(vocab_size=400, initializer_range=0.02))
    tokens = np.random.default_rng(0).integers(0, 300, 4_000)
    with torch.no_grad():
        net.model.embed_tokens.weight[:300] = torch.randn(300, 3) @ torch.randn(3, 32)
    section = embedding.examine(net, sample_of(net, tokens, 48), counts_of(tokens, 400), quiet)
    rank = finding(section, "effective rank of the token table")
    assert (
        1 < rank.value < 4 and effective_rank(torch.tensor(section.data["spectrum_of_a_random_table"])) > 30
    )
    assert finding(section, "overlap of frequent tokens").value > 2 * math.sqrt(2 / (32 * math.pi))
    never = finding(section, "rows that were never trained")
    assert never.value == pytest.approx(0.25)
    as_initialised = float(never.number.split(";")[1].split("%")[0])
    assert 23 < as_initialised <= 25


def test_a_healthy_table_is_near_chance():
    torch.manual_seed(0)
    net, tokens = Ant(tiny(vocab_size=400)), np.random.default_rng(0).integers(0, 400, 4_000)
    section = embedding.examine(net, sample_of(net, tokens, 48), counts_of(tokens, 400), quiet)
    assert finding(section, "effective rank of the token table").value > 30
    chance = math.sqrt(2 / (32 * math.pi))
    assert finding(section, "overlap of frequent tokens").value == pytest.approx(chance, rel=0.05)
    assert abs(finding(section, "length of rows against frequency").value) < 0.2
    assert finding(section, "rows that were never trained").value == 0


def saying_net(logits: torch.Tensor) -> Ant:
    """A model with these logits everywhere."""
    net = Ant(tiny(vocab_size=len(logits), tie_word_embeddings=False))
    with torch.no_grad():
        for layer in net.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        net.model.embed_tokens.weight.fill_(1)
        net.lm_head.weight.copy_(logits[:, None] / 32)
    return net


@pytest.mark.parametrize("sharper, meaning", [(1.0, "as much as"), (2.0, "more"), (0.5, "less")])
def test_collapse_to_frequent_tokens(sharper, meaning):
    frequency = 1 / torch.arange(3, 303).double()
    frequency /= frequency.sum()
    tokens = np.random.default_rng(0).choice(300, 6_000, p=frequency.numpy())
    net = saying_net(sharper * frequency.log().float())
    counts = Counts((frequency * 1e6).long(), "this text")
    section = embedding.examine(net, sample_of(net, tokens, 48), counts, quiet)
    found = finding(section, "mass on the 10 most frequent tokens")
    assert found.meaning.startswith(f"The model gives them {meaning}")
    expected = (sharper * frequency.log()).softmax(0)[:10].sum() - np.mean(tokens < 10)
    assert found.value == pytest.approx(expected.item(), abs=0.01)


def test_an_estimate_is_clear_when_zero_is_outside():
    assert Estimate(0.2, 0.1).clear and not Estimate(-0.1, 0.2).clear


def test_each_of_many_means_has_its_interval():
    values = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))
    halves = evidence.half_widths(values)
    assert halves.shape == (2, 3) and halves[1, 2].item() == pytest.approx(
        evidence.estimate(values[:, 1, [2]]).half
    )
    expected = 2.306 * values[:, 0, 0].std() / 3  # Student's t with 8 degrees of freedom
    assert halves[0, 0].item() == pytest.approx(expected.item(), rel=1e-3)
    assert evidence.half_widths(values[:1]).isinf().all()


def test_windows_are_spread_over_the_text():
    inputs, targets = evidence.windows(split_of(np.arange(101), 200), 10, 30)
    assert inputs[:, 0].tolist() == [0, 40, 90] and torch.equal(inputs + 1, targets)
    assert evidence.windows(split_of(np.arange(101), 200), 10, 10**6)[0].shape == (10, 10)
    with pytest.raises(UserError, match="two windows of 60 are the least"):
        evidence.windows(split_of(np.arange(101), 200), 60, 30)


@pytest.fixture(scope="module")
def ring_model(tmp_path_factory) -> tuple[str, str]:
    """A Hugging Face folder of a model that goes round three words whatever the prompt, and a text."""
    folder = tmp_path_factory.mktemp("autopsy")
    documents = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 2
    tokenizer = train_tokenizer(documents * 10, vocab_size=300)
    net = successor_net(list(range(tokenizer.vocab_size)), context=96)
    ring = [tokenizer.encode(" " + word)[-1] for word in RING]
    with torch.no_grad():
        net.lm_head.weight.zero_()
        net.lm_head.weight[ring[0]] = 1
        for token, following in zip(ring, ring[1:] + ring[:1], strict=True):
            net.lm_head.weight[:, token] = 0
            net.lm_head.weight[following, token] = 1
    export(net, tokenizer, folder / "hf", ModelCard("ring"))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in documents))
    return str(folder / "hf"), str(folder / "text.jsonl")


def test_the_command_leaves_a_report(ring_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(Path(ring_model[1]).parent)  # so that the length of the path does not matter
    out = tmp_path / "new" / "autopsy"
    words = ["autopsy", "hf", "--data", "text.jsonl", "--tokens", "512", "--prompts", "3"]
    assert call([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("Token table", "Heads and RoPE", "Grouped queries", "Loops"))
    summary = [line for line in shown.splitlines() if line.startswith("- ")]
    assert len(summary) == 9 and "dimensions of the token table are used" in shown
    assert max(len(line) for line in shown.splitlines() if str(out) not in line) <= 80
    for name in ("embedding", "heads", "rope", "groups", "loops"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in (out / "autopsy.md").read_text()
    written = json.loads((out / "autopsy.json").read_text())
    greedy = written["loops"]["findings"][0]
    assert greedy["topic"] == "loops, greedy" and greedy["value"] > 0.9
    assert set(written["loops"]["data"]["longest"]["cycle"].split()) == set(RING)
    assert str(tmp_path) not in (out / "autopsy.md").read_text()
    every = [
        one for section in ("embedding", "heads", "groups", "loops") for one in written[section]["findings"]
    ]
    assert all(one["number"] and one["comparison"] and one["meaning"] and one["limits"] for one in every)


def test_stretches_of_documents():
    tokens = np.ones(100, int)
    tokens[[0, 23, 26, 50]] = 0  # ends of documents: of 0, 22, 2, 23 and 49 tokens
    spans = looping.stretches(split_of(tokens, 2), 16)
    assert spans == [(1, 17), (17, 23), (27, 43), (43, 50), (51, 67), (67, 83), (83, 99)]


def test_json(ring_model, tmp_path, capsys, monkeypatch):
    model, text = ring_model
    monkeypatch.setattr(report, "write", lambda found, folder: None)  # pictures take the most time here
    flags = ["--data", text, "--tokens", "256", "--prompts", "2", "--out", str(tmp_path), "--json"]
    assert call(["autopsy", model, *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["loops"]["data"]["model"][0]["texts"] == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "say with --data"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--data", "TEXT", "--tokens", "0"], "--tokens must be above 0"),
        (["--data", "short.txt"], "too little text"),
        (["--data", "TEXT", "--out", "short.txt"], "short.txt"),
        (["--data", "short.txt", "--prompts", "9"], "leave --prompts out"),
    ],
)
def test_bad_input_is_one_line(ring_model, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("the ant")
    model, text = ring_model
    flags = [text if flag == "TEXT" else flag for flag in flags]
    assert call(["autopsy", model, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:") and message in error


def test_a_folder_without_a_model_and_weights_that_are_not_finite(ring_model, tmp_path, capsys):
    assert call(["autopsy", str(tmp_path), "--data", ring_model[1]]) == 2
    assert "holds no model" in capsys.readouterr().err
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300)
    net = Ant(tiny(vocab_size=300))
    net.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    export(net, tokenizer, tmp_path / "broken", ModelCard("broken"))
    assert call(["autopsy", str(tmp_path / "broken"), "--data", ring_model[1]]) == 2
    assert "holds NaN or infinity" in capsys.readouterr().err
