"""A table of wrong files: each is refused by the command that reads it, in one line, with nothing made.

`BAD_FILES` has (file, content, command): the content is written there, in the folder that `test_faults.stock`
makes; a dict is laid over the JSON object that is there, and None removes the file.
"""

import gzip
import io
import itertools
import json
import lzma
import os
import struct
import tarfile

import pyarrow
import pyarrow.parquet
import zstandard

PACK = "data pack {} --tokenizer tok --out bad --validation-fraction 0.1"
TRAIN = "train --model tiny.json --data {} --out bad --steps 1 --batch-size 2"
GENERATE = "generate run/hf --prompt the --max-new-tokens 2"
RESUME = "train --resume run"
ROWS = b"".join(b'{"text": "the ant carries leaf %d home"}\n' % number for number in range(60))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
NO_JSON = (b"", b"{", b"null", b"[]", b"5", b"\xff\xfe{\0", b"[" * 99_999, b'{"a":' * 3_000, LFS)

PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def _compressed():
    for ending, pack in PACKERS.items():
        whole = pack(ROWS)
        for content in (
            whole + b"garbage!",
            whole + pack(ROWS)[:-7],
            pack(b""),
            pack(pack(ROWS)),
            whole[: len(whole) // 2],
            whole[:5],
            ROWS,
            whole + b"\0" * 3 if ending != ".gz" else b"\x1f\x8b" + b"\0" * 30,
            next(other(ROWS) for other in PACKERS.values() if other is not pack),
        ):
            yield f"a.jsonl{ending}", content
        yield f"a.csv{ending}", pack(b'text\nhello there\n"unclosed')
        yield f"a.json{ending}", pack(b'[{"text":"a b c"},')
        yield f"a.tar{ending}", pack(b"x" * 600)
        yield f"a.parquet{ending}", whole
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(ROWS)
    yield "a.jsonl.zst", checked[:-1]
    yield "a.jsonl.zst", checked[:-1] + bytes([checked[-1] ^ 1])
    yield "a.jsonl.zst", struct.pack("<II", 0x184D2A50, 2**31 - 1) + b"skip"
    for ending in (".bz2", ".lz4", ".zip", ".7z", ".br", ".lzma"):
        yield f"a.jsonl{ending}", ROWS


def _texts():
    text = ROWS.decode()
    for name in ("a.txt", "a.jsonl", "a.csv", "a.json", "a.md"):
        yield name, text.encode("utf-16")
        yield name, text.encode("utf-32")
        yield name, text.encode("utf-16-be")
        yield name, b"caf\xe9 " * 50
        yield name, b""
    for line in (
        *(b'{"text": NaN}', b'{"text": ["a"]}', b'{"text": {"a": 1}}', b'{"text": 5}', b'{"Text": "a"}'),
        *(b'["a"]', b'"a"', b"null", b'{"text": "a"} {"text": "b"}', b"{'text': 'a'}", b'{"text": "\xff"}'),
        *(b'{"text": "a\x01"}', b'{"text": "\\u00"}', b'{"text": "a"', b"[", b"\xef\xbb\xbf\xef\xbb\xbf{}"),
    ):
        yield "a.jsonl", line + b"\n" + ROWS
    yield "a.jsonl", ROWS[:-10]
    yield "a.jsonl", ROWS.replace(b"\n", b"\r")
    yield "a.jsonl", b'{"text": ""}\n{"text": null}\n'
    for content in (
        b" \n\t\r\n",
        b"\xef\xbb\xbf",
        b"abc\0def",
        b"<|endoftext|>" * 9,
        b"\xed\xa0\x80",
        b"a\xe2\x82",
    ):
        yield "a.txt", content
    for content in (
        *(b"[]", b"{}", b"null", b"[1,2]", b'[{"text":"a"} {"text":"b"}]', b'[{"text":"a"}],[{"text":"b"}]'),
        *(b'{"data":[{"text":"a"}]}', b'[[{"text":"a"}]]', b"[" * 99_999, b'{"text":"a'),
    ):
        yield "a.json", content
    for content in (
        *(b"text\n", b"other\nhello\n", b'text,n\n"a\nb",1\nc\n', b'text\n"a"b\n', b'text\n"a\n'),
        *(b"text;n\na;1\n", b"text\nx\0y\n", b"text,text\na,b\n"),
    ):
        yield "a.csv", content
    for name in ("a.bin", "a", "a.html", "a.pkl", "a.arrow", "a.docx"):
        yield name, ROWS


def _tar(*names, kind=tarfile.REGTYPE, content=ROWS):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _tars():
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        yield "a.tar", _tar("a.jsonl", kind=kind)
    whole = _tar("a.jsonl")
    for content in (
        *(_tar(), _tar(".git/a.jsonl"), _tar("a.parquet"), _tar("b.tar"), _tar("a.jsonl", content=b"{")),
        *(_tar("a.jsonl.gz"), whole[:1_500], whole * 2, whole + b"garbage", b"PK\3\4" * 300, whole[1:]),
    ):
        yield "a.tar", content


def _parquet(column):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    return file.getvalue()


def _parquets():
    whole = _parquet([f"the ant {number}" for number in range(60)])
    for column in (
        *(pyarrow.nulls(9), [None] * 9, pyarrow.array([], pyarrow.string()), [["a"]] * 9, [{"a": "b"}] * 9),
        *([1] * 9, [1.5] * 9, [True] * 9, [b"\xff"] * 9, pyarrow.array([2**62] * 9, pyarrow.timestamp("us"))),
        *(pyarrow.array([1] * 9, kind) for kind in (pyarrow.date32(), pyarrow.time64("ns"))),
    ):
        yield "a.parquet", _parquet(column)
    for content in (
        *(whole[:99], b"PAR1", b"PAR1PAR1", whole[:-8], ROWS, whole[:-4] + b"PARE"),
        *(whole[:-8] + size + b"PAR1" for size in (b"\xff\xff\xff\x7f", b"\0\0\0\0")),
    ):
        yield "a.parquet", content


def _tokenizers():
    for kind in ("Unigram", "WordPiece", "WordLevel", "bpe"):
        yield {"model": {"type": kind, "vocab": {}}}
    for model in (None, 5, [], "BPE", {}, {"type": "BPE"}, {"type": "BPE", "vocab": {}, "merges": []}):
        yield {"model": model}
    for vocab in ([], {"a": -1}, {"a": 2**40}, {"a": "x"}):
        yield {"model": {"type": "BPE", "vocab": vocab, "merges": []}}
    for merges in (None, 5, [["a"]], [[1, 2]], [["no", "pe"]], "a b"):
        yield {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": merges}}
    prefixed = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "continuing_subword_prefix": "##"}
    yield {"model": {"type": "BPE", **prefixed}}
    drop_a = {"type": "Replace", "pattern": {"String": "a"}, "content": ""}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    for normalizer in (5, [], {"type": "Nope"}, drop_a, charsmap):
        yield {"normalizer": normalizer}
    for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "Nope"):
        yield {"pre_tokenizer": {"type": kind}}
    for pattern, behavior in (("(", "Isolated"), (r"\s", "Removed")):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
        yield {"pre_tokenizer": split}
    yield {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "a"}}
    for decoder in (
        {"type": "Fuse"},
        {"type": "ByteFallback"},
        [],
        {"type": "Strip", "content": "a", "start": 1, "stop": 0},
    ):
        yield {"decoder": decoder}
    token = {"id": 9, "content": "ant", "single_word": False, "lstrip": False, "rstrip": False}
    token |= {"normalized": False, "special": False}
    for added in ("a", {"a": 1}, ["a"], [{"id": 5}], [token | {"id": -1}], [token | {"id": 2**33}]):
        yield {"added_tokens": added}
    yield {"version": "9.9"}


CONFIGS = (
    *(
        {"rope_scaling": {"rope_type": kind, "factor": 2.0}}
        for kind in ("llama3", "yarn", "dynamic", "linear", "longrope")
    ),
    *(
        {"rope_parameters": {"rope_type": kind, "factor": 2.0}}
        for kind in ("llama3", "yarn", "dynamic", "linear", 5)
    ),
    *(
        {"rope_scaling": value}
        for value in ({"type": "su"}, "linear", [1], {"rope_theta": "x"}, {"rope_theta": 5e5})
    ),
    *(
        {"rope_parameters": value}
        for value in ({"full_attention": {}}, {"partial_rotary_factor": 0.5}, {"rope_theta": -1})
    ),
    *({"rope_theta": value} for value in ("1e4", 0, True, -1, [])),
    *({name: True} for name in ("attention_bias", "mlp_bias", "use_sliding_window")),
    *({"tie_word_embeddings": value} for value in ("yes", None, 1, False)),
    *({"head_dim": value} for value in (7, 10, 0, "8", 10**9)),
    *({"hidden_act": value} for value in ("gelu", None, 5)),
    *({"num_key_value_heads": value} for value in (None, 0, 3, "1")),
    *({"num_attention_heads": value} for value in (0, 3, 2.0)),
    *({"vocab_size": value} for value in (279, 281, -1, "280", 280.0, True)),
    *({"num_hidden_layers": value} for value in (0, 2, [1])),
    *({"max_position_embeddings": value} for value in (None, 0, 10**12)),
    *({"rms_norm_eps": value} for value in (0, "x", -1e-5)),
    *({"architectures": value} for value in (["GPT2LMHeadModel"], "LlamaForCausalLM", 5)),
    *({"model_type": value} for value in ("gpt2", "mistral", None, ["llama"])),
    {"hidden_size": 17},
    {"intermediate_size": None},
    {"pretraining_tp": 2},
    {"partial_rotary_factor": 0.5},
    {"quantization_config": {"quant_method": "gptq"}},
    {"auto_map": {"AutoModel": "x.py"}},
    {"layer_types": ["sliding_attention"]},
    {"layer_types": 5},
)
GENERATIONS = tuple({"eos_token_id": ids} for ids in (9_999, -1, "0", [0, 9_999], 1.5, [[0]], {"a": 1}))


def _safetensors(header, body=bytes(64)):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def _tensor(**changes):
    return {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | changes}


WEIGHTS = (
    *(b"", bytes(8), struct.pack("<Q", 2**40) + b"{}", b"\xff" * 8, b"\x80\x02}q\0.", b"PK\3\4" + bytes(100)),
    *(b"<!DOCTYPE html>", LFS, b"GGUF\3" + bytes(50), _safetensors(b"xxxx"), _safetensors(b'{"a":' * 9_999)),
    *(
        _safetensors(_tensor()),
        _safetensors(_tensor(dtype="F7")),
        _safetensors(_tensor(dtype="F8_E4M3", shape=[64])),
    ),
    *(_safetensors(_tensor(shape=shape)) for shape in ([-4], [2**62, 4], "x", [17])),
    *(_safetensors(_tensor(data_offsets=offsets)) for offsets in ([0, 999], [64, 0], [0], [-1, 63])),
)
INDEXES = tuple(
    json.dumps({"weight_map": {"model.norm.weight": name}}).encode()
    for name in ("../a", "/etc/passwd", "a\0", "", ".", "absent.safetensors", "config.json", 1, None)
)

RUNS = (
    *({"train": value} for value in (None, 5, {"data": 5}, {"nope": 1}, {"steps": -1})),
    *({"model": value} for value in (None, {}, 5)),
    *({"data": value} for value in ([], 5)),
    *({"shards": value} for value in (5, [])),
    *({"minutes": value} for value in ("x", [])),
    *({"mixture": value} for value in (5, {"a": 1}, {"sources": {"a": "shards"}, "phases": []})),
    {"mixture": {"sources": {"a": "shards"}, "phases": [{"from": 0, "weights": {"b": 1}}]}},
    {"mixture": {"sources": {"a": "shards"}, "phases": [{"from": "x", "weights": {"a": 1}}]}},
    {"mixture": {"sources": {"a": 5}, "phases": [{"from": 0, "weights": {"a": 1}}]}},
)
METAS = (
    *({"vocab_size": value} for value in (10, -1, "280")),
    *({"eos_token_id": value} for value in (279_000, -1, None)),
    *({"splits": value} for value in ({}, 5, {"train": 5})),
    *({"format": "x"}, {"tokenizer_fingerprint": "x"}, {"held_out": "x"}, {"sources": 5}),
)

A = '[sources.a]\ndata = "shards"\nweight = 1\n'
MIXTURES = (
    *("", "x", "sources = 5", "[sources]", "[sources.a]", '[sources.a]\ndata = "shards"', A + "x = 1"),
    *(A.replace("1", weight) for weight in ("0", "-1", "nan", "inf", '"1"')),
    *(A.replace("shards", data) for data in ("absent", "", "tok", "m.toml", r"a\u0000b")),
    *(A + A.replace(".a", ".b"), A.replace("a]", '"a/b"]'), "a = " + "[" * 50_000),
    *(f"{A}[[phases]]\n{phase}" for phase in ("from = 2\nweights = {a = 1}", "from = 0\nweights = {b = 1}")),
    *(
        f"{A}[[phases]]\n{phase}"
        for phase in ("from = 0\nweights = {a = 0}", "from = 0.5\nto = 0.5\nweights = {}")
    ),
)
SETTINGS = (
    *("x", "steps = 'x'", "steps = -1", "steps = 1.5", "steps = true", "nope = 1", "[steps]", "data = 5"),
    *("data = [1]", "betas = [0.9]", "betas = [0.9, 'x']", "betas = [1, 2, 3]", "model = 5", "out = 5"),
    *(
        "learning_rate = nan",
        "learning_rate = inf",
        "seed = -1",
        "push = 'x'",
        "eval_tasks = 5",
        "device = 5",
    ),
    *("resume = 'absent'", "optimizer = 'sgd'", "steps = 1979-05-27", "a = " + "[" * 50_000),
    *("steps = 1\nsteps = 2", "checkpoint_words = ['x']", r'data = ["a\u0000b"]', r'model = "a\u0000b"'),
)

PIQA = {"goal": "to feed the ant", "sol1": "give a leaf", "sol2": "give a stone", "label": 0}
ARC = {"question": "who", "choices": {"text": ["a leaf", "a stone"], "label": ["A", "B"]}, "answerKey": "A"}
ITEMS = (
    *(PIQA | {"label": label} for label in ("0", 2, -1, None, 1.5)),
    *(PIQA | {"sol1": answer} for answer in ("", " ", 5, None)),
    *({"goal": ""}, [PIQA], None, 5),
)
LETTERED = (
    *(ARC | {"answerKey": key} for key in ("C", 1, None)),
    *(ARC | {"choices": choices} for choices in ({"text": ["a", "b"], "label": ["A"]}, [], None)),
    *(ARC | {"choices": {"text": texts, "label": ["A", "B"]}} for texts in (["", "b"], ["a"], [1, 2])),
)


def _table():
    for name, content in itertools.chain(_compressed(), _texts(), _tars(), _parquets()):
        yield name, content, PACK.format(name)
    for change in _tokenizers():
        yield "tok/tokenizer.json", change, PACK.format("text.jsonl")
    for raw in NO_JSON:
        for file in ("tok/tokenizer.json", "tok/tokenizer_config.json"):
            yield file, raw, PACK.format("text.jsonl")
        for file in ("config.json", "generation_config.json"):
            yield f"run/hf/{file}", raw, GENERATE
        yield "m.json", raw, "doctor m.json"
        yield "m.json", raw, "train --model m.json --data shards --out bad"
        yield "run/config.json", raw, RESUME
        yield "run/config.json", raw, "runs run"
        yield "shards/meta.json", raw, TRAIN.format("shards")
        yield "shards/manifest.json", raw, TRAIN.format("shards")
        yield "items/piqa.jsonl", raw, "eval run --tasks piqa --data-dir items"
    for key in ("eos_token", "chat_template", "extra_special_tokens"):
        yield "tok/tokenizer_config.json", {key: 5}, PACK.format("text.jsonl")
    for change in CONFIGS:
        yield "run/hf/config.json", change, GENERATE
    for change in GENERATIONS:
        yield "run/hf/generation_config.json", change, GENERATE
    for content in WEIGHTS:
        yield "run/hf/model.safetensors", content, GENERATE
    for content in INDEXES:
        yield "run/hf/model.safetensors.index.json", content, GENERATE
    for file in ("tokenizer.json", "config.json", "model.safetensors"):
        yield f"run/hf/{file}", None, GENERATE
    for change in RUNS:
        yield "run/config.json", change, RESUME
    for change in METAS:
        yield "shards/meta.json", change, TRAIN.format("shards")
    for text in MIXTURES:
        yield "m.toml", text.encode(), TRAIN.format("m.toml")
    for text in SETTINGS:
        lines = [
            line
            for line in (
                "model = 'tiny.json'",
                "data = ['shards']",
                "out = 'bad'",
                "steps = 1",
                "batch_size = 2",
            )
            if line.split()[0] not in text
        ]
        yield "c.toml", "\n".join([*lines, text]).encode(), "train --config c.toml"
    for item in ITEMS:
        yield "items/piqa.jsonl", json.dumps(item).encode(), "eval run --tasks piqa --data-dir items"
    for item in LETTERED:
        yield "items/arc_easy.jsonl", json.dumps(item).encode(), "eval run --tasks arc_easy --data-dir items"


BAD_FILES = list(_table())


def place(folder, file, content):
    """Put one of them there."""
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    if file.endswith("index.json"):
        (path.parent / "model.safetensors").unlink()
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_bytes(content)


def make_pipe(path):
    """What nobody writes to: whoever opens it waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
