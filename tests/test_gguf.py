"""llama.cpp itself opens what is written: same ids, same text, same probabilities, defaults as said."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import tokenizers
import torch

from ant5m.cli import call
from ant5m.data.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.export.card import ModelCard
from ant5m.export.gguf import export_gguf
from ant5m.export.huggingface import export
from ant5m.model.ant import Ant
from ant5m.model.config import PRESETS, ModelConfig

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
HERE = Path(__file__).parent

AWKWARD = [
    "the ant carries a leaf",
    "def f(x):\n\n    return {'a': x_1 ** 2}  # ¬\t\n",
    "👩\u200d👩\u200d👧 🇩🇪 naïve café e\u0301 ﬁ",
    "中文字 ひらがな 한국어 עברית ไทย",
    "3.14159 12,345 1e-7 ½ ² ٣",
    "a  b   c    d     \n \n  \n\t\t x",
    "line\r\nline\r\n\r\n  \r\nit'll DON'T 'S we'Ve",
    "\ufeff\u00a0\u2028\u3000\x1b\x7f\x85 \ue000 \U0010ffff",
    f"{END_OF_TEXT} <s></s> <|im_start|>",
    *("".join(chr(i) for i in range(start, start + 64)) for start in range(1, 257, 64)),
]
SMALL = ModelConfig(
    vocab_size=600,
    hidden_size=64,
    intermediate_size=100,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([path.read_text() for path in Path(__file__).parent.glob("test_c*.py")], 600)


def changed(config: ModelConfig = SMALL, **values) -> ModelConfig:
    return ModelConfig(**{**config.to_dict(), **values})


def make_net(config: ModelConfig) -> Ant:
    torch.manual_seed(0)
    net = Ant(config).eval()
    for layer in net.model.layers:  # weights of 1 would hide whose they are
        for norm in layer.self_attn.norms or []:
            torch.nn.init.uniform_(norm, 0.5, 2)
    return net


class Server:
    """llama.cpp's server on a file, until it is forgotten."""

    def __init__(self, file: Path, context: int = 128):
        command = [sys.executable, HERE / "llama_server.py", file, str(context)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        lines = iter(self.process.stdout.readline, "")  # llama.cpp may print, too
        self.address = next(line.strip() for line in lines if line.startswith("http"))

    def __del__(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def ask(self, path: str, **values):
        data = json.dumps(values).encode() if values else None
        request = urllib.request.Request(f"{self.address}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def log_probabilities(self, ids: list[int], vocab_size: int) -> torch.Tensor:
        """Of the token behind `ids`; -inf where llama.cpp gives none."""
        answer = self.ask(
            "completion", prompt=ids, n_predict=1, n_probs=vocab_size, temperature=0, repeat_penalty=1.0
        )
        found = torch.full((vocab_size,), -torch.inf)
        for one in answer["completion_probabilities"][0]["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found


def expected_log_probabilities(net: Ant, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return net(torch.tensor([ids]))[0, -1].log_softmax(-1)


def test_ids_and_text_are_the_same(tokenizer, tmp_path):
    server = Server(export_gguf(make_net(SMALL), tokenizer, tmp_path / "gguf", "small", "f16"))
    for text in AWKWARD:
        ids = server.ask("tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert ids == tokenizer.encode(text), repr(text)
        assert server.ask("detokenize", tokens=ids)["content"] == text
    assert (tmp_path / "gguf" / "small-F16.gguf").exists()


SHAPES = {
    "tied": SMALL,
    "untied, padded": changed(tie_word_embeddings=False, vocab_size=640),
    "other head size": changed(head_dim=32, num_key_value_heads=4, rope_theta=5e5),
    "QK-norm": changed(qk_norm=True, head_dim=32, num_attention_heads=6),
}


NAMES = [*SHAPES, *PRESETS]


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow if one == "ant-100m" else ()) for one in NAMES]
)
def test_probabilities_equal_ours(name, tokenizer, tmp_path):
    net = make_net(SHAPES[name] if name in SHAPES else changed(PRESETS[name], initializer_range=0.05))
    server = Server(export_gguf(net, tokenizer, tmp_path / "gguf", "any", "f32"))
    ids = tokenizer.encode(AWKWARD[1])
    ours = expected_log_probabilities(net, ids)
    theirs = server.log_probabilities(ids, net.config.vocab_size)
    assert torch.isfinite(theirs).all()
    assert (theirs - ours).abs().max() < 1e-3


def test_eight_bits_are_close(tokenizer, tmp_path):
    # 100 numbers a row: no multiple of 32, so ffn_down stays in f16.
    net = make_net(changed(initializer_range=0.08))
    server = Server(export_gguf(net, tokenizer, tmp_path / "gguf", "small", "q8_0"))
    ids = tokenizer.encode(AWKWARD[1])
    ours = expected_log_probabilities(net, ids)
    assert ours.argmax() != tokenizer.eos_token_id  # llama.cpp gives no probabilities then
    theirs = server.log_probabilities(ids, 600)
    divergence = (ours.exp() * (ours - theirs)).sum()
    assert 0 < divergence < 1e-3


def test_chat_is_the_raw_text_and_defaults_are_as_written(tokenizer, tmp_path):
    server = Server(export_gguf(make_net(SMALL), tokenizer, tmp_path / "gguf", "small"))
    messages = [{"role": "user", "content": "the ant "}, {"role": "assistant", "content": "walks"}]
    assert server.ask("apply-template", messages=messages)["prompt"] == "the ant walks"
    defaults = server.ask("props")["default_generation_settings"]["params"]
    assert defaults["temperature"] == pytest.approx(0.8)
    assert defaults["repeat_penalty"] == pytest.approx(1.1)
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text()
    assert modelfile.splitlines() == [
        "FROM ./small-F16.gguf",
        'TEMPLATE "{{ .Prompt }}"',
        "PARAMETER temperature 0.8",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER repeat_last_n -1",
        "PARAMETER num_ctx 128",
    ]


def test_every_end_id_of_the_model_ends_its_text(tokenizer, tmp_path):
    net = make_net(SMALL)
    ids = tokenizer.encode("the ant")
    first = int(expected_log_probabilities(net, ids).argmax())
    own = Tokenizer(tokenizer.backend)
    own.end_ids = (own.eos_token_id, first)
    server = Server(export_gguf(net, own, tmp_path / "gguf", "small", "f32"))
    answer = server.ask("completion", prompt=ids, n_predict=5, temperature=0, repeat_penalty=1.0)
    assert (answer["tokens_predicted"], answer["stop_type"]) == (1, "eos")


def with_parts(tokenizer: Tokenizer, **parts) -> Tokenizer:
    content = json.loads(tokenizer.backend.to_str())
    for name, value in parts.items():
        (content["model"] if name == "ignore_merges" else content)[name] = value
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = {**BYTE_LEVEL, "use_regex": False}
SPLIT_BY_X = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"normalizer": {"type": "NFC"}}, "its normalizer NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "add_prefix_space"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT_BY_X, BYTES_ONLY]}},
            "its split 'x'",
        ),
        ({"ignore_merges": True}, "ignore_merges"),
    ],
)
def test_a_tokenizer_without_an_equal_is_refused_by_name(parts, message, tokenizer, tmp_path):
    with pytest.raises(UserError, match=message):
        export_gguf(make_net(SMALL), with_parts(tokenizer, **parts), tmp_path / "gguf", "small")
    assert not (tmp_path / "gguf").exists()


def test_gpt2_split_is_known(tokenizer, tmp_path):
    gpt2 = with_parts(tokenizer, pre_tokenizer=BYTE_LEVEL)
    server = Server(export_gguf(make_net(SMALL), gpt2, tmp_path / "gguf", "small"))
    for text in AWKWARD:
        ids = server.ask("tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert ids == gpt2.encode(text), repr(text)


def test_a_weight_beyond_f16_is_refused(tokenizer, tmp_path):
    net = make_net(SMALL)
    with torch.no_grad():
        net.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="--type f32"):
        export_gguf(net, tokenizer, tmp_path / "gguf", "small", "f16")


def test_the_command(tokenizer, tmp_path, monkeypatch, capsys):
    export(make_net(SMALL), tokenizer, tmp_path / "my model", ModelCard("test"))
    monkeypatch.chdir(tmp_path)
    assert call(["export", "my model", "--format", "gguf", "--type", "q8_0"]) == 0
    assert (tmp_path / "my-model-gguf" / "my-model-Q8_0.gguf").stat().st_size > 10_000
    assert call(["export", "my model", "--format", "gguf"]) == 2
    assert call(["export", "my model", "--type", "q8_0"]) == 2
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert call(["export", "my model", "other", "--format", "gguf"]) == 2
    errors = capsys.readouterr().err
    for message in ("my-model-gguf exists already", "not for --format hf", "pip install 'ant5m[gguf]'"):
        assert message in errors
    assert not (tmp_path / "other").exists()
