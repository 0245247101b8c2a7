"""A model is the same here and in transformers, both ways; what cannot be the same is refused in one line."""

import json
import os

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ant5m.cli.generate import Generate
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.eval.results import TaskResult
from ant5m.export.card import ModelCard
from ant5m.export.huggingface import export
from ant5m.files import file_sha256
from ant5m.model import weights
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import find_run, latest_checkpoint, load, save_model, verify_checkpoint
from ant5m.model.config import PRESETS, ModelConfig
from ant5m.model.config_file import load_config
from ant5m.model.generation import generate
from ant5m.model.huggingface import config_from_huggingface, config_to_huggingface
from ant5m.model.weights import load_model

TEXT = "the ant carries a leaf along the path and the other ants follow it to the nest by the old tree"
SMALL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
UNTIED = ModelConfig(**{**SMALL.to_dict(), "tie_word_embeddings": False})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = TEXT.split()
    return train_tokenizer([" ".join(words[i:] + words[:i]) for i in range(len(words))] * 20, vocab_size=300)


def to_transformers(config: ModelConfig) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**config_to_huggingface(config, eos_token_id=0))


def small_net(config: ModelConfig = SMALL, seed: int = 0) -> Ant:
    torch.manual_seed(seed)
    return Ant(config).eval()


def largest_difference(net: Ant, llama: torch.nn.Module, length: int = 32) -> float:
    torch.manual_seed(1)
    ids = torch.randint(0, net.config.vocab_size, (2, length))
    with torch.inference_mode():
        return (net(ids) - llama.eval()(ids).logits).abs().max().item()


# The two that take more than a few seconds.
LARGE = {name: pytest.mark.slow for name in ("ant-50m", "ant-100m")}


@pytest.mark.parametrize("preset", [pytest.param(name, marks=LARGE.get(name, ())) for name in PRESETS])
def test_logits_equal_transformers_both_ways(preset, tmp_path):
    # Larger initial weights than usual: with small ones attention is flat, and a wrong rotation would hardly
    # show.
    config = ModelConfig(**{**PRESETS[preset].to_dict(), "initializer_range": 0.05})
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(to_transformers(config))
    llama.save_pretrained(tmp_path / "theirs")
    net, tokenizer = load(tmp_path / "theirs")
    assert tokenizer is None
    assert net.config == config
    assert largest_difference(net, llama) < 1e-4
    del llama
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config_to_huggingface(config, 0)))
    save_model(net, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert largest_difference(net, back) < 1e-4


@pytest.mark.parametrize("config", [SMALL, UNTIED])
def test_export_opens_offline_and_generates_the_same(config, tokenizer, tmp_path):
    net = small_net(config)
    export(net, tokenizer, tmp_path / "hf", ModelCard("test", data="a sentence about ants"))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert ("lm_head.weight" in weights) is not config.tie_word_embeddings
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert largest_difference(net, llama) < 1e-4
    assert theirs.model_max_length == 64
    # Else transformers 4 also makes token_type_ids, at which its Llama's generate() stops.
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    for prompt in ("the ant", "nest by the old"):
        assert theirs(prompt)["input_ids"] == tokenizer.encode(prompt)
        inputs = theirs(prompt, return_tensors="pt")
        output = llama.generate(**inputs, max_new_tokens=20, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        (text,) = generate(net, tokenizer, [prompt], max_new_tokens=20, temperature=0)
        assert theirs.decode(output, skip_special_tokens=True) == text
    again, same = load(tmp_path / "hf")
    assert same is not None and same.fingerprint == tokenizer.fingerprint
    assert again.config == config and largest_difference(again, llama) < 1e-4
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "a sentence about ants" in card and f"{sum(p.numel() for p in net.parameters()):,}" in card
    assert "No evaluation was recorded" in card


def test_card_says_what_is_known():
    card = ModelCard(
        "x", "docstrings", 1_500_000, {"loss": 4.2, "bits_per_byte": 1.9, "text": "books"}, [("A", " b")]
    )
    text = card.text(SMALL, 12_345)
    for expected in (
        "1,500,000 tokens of docstrings",
        "4.2000 nats",
        "1.9000 bits per byte",
        "books",
        "A b",
        "12,345",
    ):
        assert expected in text


def test_the_hub_reads_the_card_whatever_its_name():
    result = TaskResult("blimp", {"acc": (0.61, 0.01)}, 100, 0.5, {})
    for name in ("ants: 'a' \"b\" # c", "---\nlicense: none\n---", "- [x]: {y}", "\N{ANT} \u2028", "  "):
        samples = [("A", " ```\n# b\n````\n c")]
        card = ModelCard(
            name,
            "text",
            datasets=["owner/data"],
            validation={"loss": 4.2},
            samples=samples,
            results=[result],
            license="apache-2.0",
            language="en",
            repo="owner/ants",
        )
        text = card.text(SMALL, 1)
        read = huggingface_hub.ModelCard(text).data
        assert (read.license, read.language, read.datasets) == ("apache-2.0", "en", ["owner/data"])
        values = {one.metric_type: (one.dataset_name, one.metric_value) for one in read.eval_results}
        assert values == {"loss": ("validation split", 4.2), "acc": ("blimp", 0.61)}
        assert 'from_pretrained("owner/ants")' in text and "\n`````text\nA ```\n# b\n````\n c\n`````" in text
    assert huggingface_hub.ModelCard(ModelCard("x").text(SMALL, 1)).data.eval_results is None


def test_export_refuses_an_existing_folder_and_a_foreign_tokenizer(tokenizer, tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export(small_net(), tokenizer, tmp_path / "hf", ModelCard("test"))
    narrow = small_net(ModelConfig(**{**SMALL.to_dict(), "vocab_size": 299}))
    with pytest.raises(UserError, match=r"300 entries, the model 299"):
        export(narrow, tokenizer, tmp_path / "new", ModelCard("test"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_become_fp32(dtype, tmp_path):
    llama = transformers.LlamaForCausalLM(to_transformers(SMALL)).to(dtype)
    llama.save_pretrained(tmp_path)
    net, _ = load(tmp_path)
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert largest_difference(net, llama) < 1e-4


def test_loading_draws_nothing_and_gives_a_model_that_can_be_trained(tmp_path):
    net = Ant(SMALL)
    save_model(net, tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    loaded = load_model(SMALL, tmp_path)
    assert torch.equal(torch.rand(2), expected) and torch.equal(loaded.cos, net.cos)
    ids = torch.arange(8)[None]
    loaded(ids, ids).backward()
    assert all(p.requires_grad and p.grad is not None for p in loaded.parameters())


def test_shards_with_an_index(tmp_path):
    llama = transformers.LlamaForCausalLM(to_transformers(UNTIED))
    llama.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    net, _ = load(tmp_path)
    assert largest_difference(net, llama) < 1e-4
    next(tmp_path.glob("model-00001*")).unlink()
    with pytest.raises(UserError, match="is missing though"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(UserError, match="not a file of that folder"):
        load(tmp_path)


def write_folder(folder, weights, config=SMALL):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(config, 0)))
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def test_a_tied_table_under_either_name_or_both(tmp_path):
    weights = small_net().state_dict()
    table = weights["model.embed_tokens.weight"]
    both = {**weights, "lm_head.weight": table}
    head_only = {name: tensor for name, tensor in both.items() if name != "model.embed_tokens.weight"}
    for number, variant in enumerate((weights, both, head_only)):
        net = load_model(SMALL, write_folder(tmp_path / str(number), variant))
        assert torch.equal(net.head_weight, table) and "lm_head.weight" not in net.state_dict()
    with pytest.raises(UserError, match=r"lm_head.weight differs"):
        load_model(SMALL, write_folder(tmp_path / "apart", {**weights, "lm_head.weight": table + 1}))


def changed(**changes):
    weights = {**small_net().state_dict(), **changes}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.mark.parametrize(
    "weights, message",
    [
        (changed(**{"model.norm.weight": None}), "lacks model.norm.weight"),
        (
            changed(**{"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "unexpected model.layers.0.self_attn.q_pr",
        ),
        (
            changed(**{"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight is \(31,\), its config says \(32,\)",
        ),
        (changed(**{"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "only floating-point"),
        (changed(**{"model.norm.weight": torch.full((32,), torch.nan)}), "NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit(weights, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        load(write_folder(tmp_path, weights))
    assert "\n" not in str(error.value)


def test_old_rope_buffers_are_ignored(tmp_path):
    load(write_folder(tmp_path, changed(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_in_place_of_a_file_is_named(tokenizer, tmp_path, name):
    export(small_net(), tokenizer, tmp_path / "hf", ModelCard("test"))
    (tmp_path / "hf" / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n"
    )
    with pytest.raises(UserError, match=f"{name} is only a git-lfs pointer.*git lfs pull"):
        load(tmp_path / "hf")


def test_a_weight_that_two_files_hold_is_refused(tokenizer, tmp_path):
    folder = tmp_path / "hf"
    export(small_net(), tokenizer, folder, ModelCard("test"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (first, tensor), *_ = weights.items()
    files = {"a.safetensors": weights, "b.safetensors": {first: tensor + 1}}
    for name, held in files.items():
        save_file(held, folder / name)
    index = {"weight_map": dict.fromkeys(weights, "a.safetensors") | {first: "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"b\.safetensors holds {first}, which another file"):
        load(folder)


def test_damaged_and_missing_weights(tmp_path):
    write_folder(tmp_path, small_net().state_dict())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="may run code"):
        load(tmp_path)
    for bad in (tmp_path / "nothing", tmp_path / "config.json"):
        with pytest.raises(UserError):
            load(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        load(tmp_path / "empty")


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_config_layouts_of_transformers_4_and_5():
    old = config_from_huggingface(
        {**LLAMA, "rope_theta": 500.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    )
    new = config_from_huggingface({**LLAMA, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}})
    assert old == new
    assert old.rope_theta == 500.0 and old.num_key_value_heads == 4
    theirs = transformers.LlamaConfig(**LLAMA)
    for name in (
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "initializer_range",
        "head_dim",
    ):
        assert getattr(old, name) == getattr(theirs, name), name
    assert config_from_huggingface(LLAMA).rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}, "rope_theta": 5e5},
        {"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {}, "rope_parameters": {"type": "default"}, "rope_theta": 5e5},
    ],
)
def test_rope_base_is_read_wherever_transformers_reads_it(rope):
    theirs = transformers.LlamaConfig(**json.loads(json.dumps({**LLAMA, **rope})))
    assert config_from_huggingface({**LLAMA, **rope}).rope_theta == 5e5
    assert theirs.rope_parameters["rope_theta"] == 5e5


def set_json(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def test_generation_ends_with_the_ids_of_the_model_folder(tokenizer, tmp_path):
    net, folder = small_net(), tmp_path / "hf"
    export(net, tokenizer, folder, ModelCard("test"))

    def both(**arguments):
        ours, same = load(folder)
        ids = []
        generate(ours, same, ["the ant"], 12, temperature=0, on_token=lambda _, token: ids.append(token))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        prompt = torch.tensor([tokenizer.encode("the ant")])
        out = theirs.generate(prompt, max_new_tokens=12, do_sample=False, **arguments)[0, prompt.shape[1] :]
        return ids, [token for token in out.tolist() if token not in same.end_ids]

    whole, theirs = both()
    assert whole == theirs and len(whole) > 3
    stop = whole[2]
    set_json(folder / "generation_config.json", eos_token_id=[tokenizer.eos_token_id, stop])
    assert both() == (whole[: whole.index(stop)],) * 2
    again, same = load(folder)
    export(again, same, tmp_path / "again", ModelCard("test"))
    ends = json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.eos_token_id, stop]
    assert load_config(tmp_path / "again") == net.config
    (folder / "generation_config.json").unlink()
    set_json(folder / "config.json", eos_token_id=stop)
    with pytest.warns(UserWarning, match=f"ends a text with id {stop}"):
        assert both(repetition_penalty=1.1) == (whole[: whole.index(stop)],) * 2
    for bad in (300, -1, "0", [0, None], True):
        set_json(folder / "config.json", eos_token_id=bad)
        with pytest.raises(UserError, match=r"config\.json: eos_token_id.*(from 0 to 299|expected int)"):
            load(folder)


def test_an_export_samples_by_default_as_generate_does(tokenizer, tmp_path):
    export(small_net(), tokenizer, tmp_path / "hf", ModelCard("test"))
    defaults = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    command = Generate(tmp_path)
    assert (defaults.do_sample, defaults.temperature, defaults.repetition_penalty) == (True, 0.8, 1.1)
    assert (command.temperature, command.repetition_penalty) == (0.8, 1.1)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    rows = theirs(["the ant", "the ant carries a leaf"], padding=True)
    assert rows["attention_mask"][0][0] == 0 and rows["input_ids"][0][0] == tokenizer.eos_token_id


@pytest.mark.parametrize("preset", PRESETS)
def test_config_there_and_back(preset, tmp_path):
    values = config_to_huggingface(PRESETS[preset], 7)
    assert config_from_huggingface(values) == PRESETS[preset]
    (tmp_path / "config.json").write_text(json.dumps(transformers.LlamaConfig(**values).to_dict()))
    assert load_config(tmp_path) == PRESETS[preset]


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"pretraining_tp": 2},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoModelForCausalLM": "own.Code"}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_theta": 1e4}, "rope_theta": 5e4},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": "default"},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e4}},
        {"num_attention_heads": 5},
        {"hidden_size": None},
        {"vocab_size": "many"},
    ],
)
def test_configs_that_cannot_be_represented(change):
    with pytest.raises(UserError) as error:
        config_from_huggingface({**LLAMA, **change})
    assert "\n" not in str(error.value) and next(iter(change)).split("_")[0] in str(error.value)


def write_checkpoint(run, step, net, **changes):
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    save_model(net, folder)
    state = {
        "format": "ant5m-checkpoint",
        "version": 1,
        "step": step,
        "model": net.config.to_dict(),
        "files": {"model.safetensors": file_sha256(folder / "model.safetensors")},
        **changes,
    }
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_run_gives_its_newest_good_checkpoint(tokenizer, tmp_path):
    run = tmp_path / "run"
    tokenizer.save(run / "tokenizer")
    old, new = small_net(seed=1), small_net(seed=2)
    first = write_checkpoint(run, 5, old, tokenizer=tokenizer.fingerprint)
    second = write_checkpoint(run, 10, new, tokenizer=tokenizer.fingerprint)
    (run / "checkpoints" / ".step-00000015.abc").mkdir()
    unfinished = run / "checkpoints" / "step-00000020"
    unfinished.mkdir()
    for path, expected in ((first, old), (second, new)):
        net, same = load(path)
        assert torch.equal(net.head_weight, expected.head_weight) and same is not None
        assert find_run(path) == run == find_run(run)
    with pytest.warns(UserWarning, match="step-00000020 has no state.json"):
        net, _ = load(run)
    assert torch.equal(net.head_weight, new.head_weight)
    unfinished.rmdir()
    weights = second / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.warns(UserWarning, match="its hash differs"):
        assert latest_checkpoint(run) == first
    (first / "state.json").write_text("{")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no good checkpoint"):
        load(run)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, "not a checkpoint of ant5m"),
        ({"version": 2}, "checkpoint version 2"),
        ({"files": {}}, "has no hash of model.safetensors: the checkpoint is damaged"),
        ({"files": {"model.safetensors": "0", "../x": "0"}}, "its hash differs"),
        ({"model": {"hidden_size": 1}}, "missing in a model config"),
        ({"tokenizer": "0" * 64}, "not the tokenizer"),
    ],
)
def test_foreign_and_damaged_checkpoints(change, message, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    folder = write_checkpoint(tmp_path, 5, small_net(), **change)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_name_in_the_hashes_never_leaves_the_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path, 5, small_net(), files={"../../secret": "0", "model.safetensors": "0"})
    (tmp_path / "secret").write_text("x")
    with pytest.raises(UserError, match="secret, which is no file of the folder"):
        verify_checkpoint(folder)


def test_a_file_of_weights_cut_while_it_is_loaded_does_not_kill_the_process(tmp_path, monkeypatch):
    """A mapped file would: SIGBUS at the next look at a weight."""
    save_model(small_net(SMALL), tmp_path)
    real = weights._check_size

    def cut(*given):
        os.truncate(tmp_path / "model.safetensors", 10)
        real(*given)

    monkeypatch.setattr(weights, "_check_size", cut)
    loaded = load_model(SMALL, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), small_net(SMALL).parameters(), strict=True)
    )
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or not a safetensors file"):
        load_model(SMALL, tmp_path)
