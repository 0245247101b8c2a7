"""Kills, full disks, damage, two at once: nothing is lost or silently wrong, and errors are one line.

Tests have a short form, which samples, and a long one (`pytest --long`), which tries all. docs/promises.md
has the figures.
"""

import json
import random
import re
import shutil

import numpy as np
import pytest
import zstandard
from bad_inputs import BAD_FILES, make_pipe, place
from faults import Server

from ant5m.data.shards import Shards
from ant5m.errors import UserError

WORDS = [
    "the",
    "ant",
    "carries",
    "a",
    "leaf",
    "home",
    "while",
    "other",
    "ants",
    "build",
    "and",
    "sleep",
    "under",
    "green",
    "trees",
]
TINY = {
    "vocab_size": 280,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
COMMANDS = {
    "tokenizer": "tokenizer train text.jsonl --vocab-size 280 --out new-tok",
    "pack": "data pack text.jsonl --tokenizer tok --out new-shards --validation-fraction 0.1 "
    "--shard-tokens 2000",
    "train": "train --model tiny.json --data shards --out new-run --steps 6 --batch-size 2 --keep-last 2 "
    "--checkpoint-every 2 --eval-every 3",
    "export": "export run new-hf",
    "compare": "compare tiny.json other.json --data text.jsonl --out new-study --tokens 256 --seeds 1 "
    "--batch-size 2 --validation-fraction 0.1",
}
RESULTS = {
    "tokenizer": "new-tok/tokenizer.json new-tok/tokenizer_config.json",
    "pack": "new-shards/meta.json new-shards/manifest.json new-shards/tokenizer/tokenizer.json "
    "new-shards/train-00000.bin new-shards/train-00001.bin new-shards/validation-00000.bin",
    "train": "new-run/checkpoints/step-00000006/model.safetensors new-run/hf/model.safetensors "
    "new-run/checkpoints/step-00000006/optimizer.safetensors",
    "export": "new-hf/model.safetensors new-hf/config.json new-hf/tokenizer.json",
    "compare": "new-study/plan.json new-study/variants/tiny-seed1/hf/model.safetensors "
    "new-study/variants/other-seed1/hf/model.safetensors",
}
"""what must be the same, byte for byte, whatever befell the command"""
SAMPLES = {"tokenizer": 3, "pack": 8, "train": 8, "export": 3, "compare": 2}
"""kills and full disks of the short form"""


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def stock(server, tmp_path_factory):
    """A folder with text, tokenizer, shards, two models and a run; and what each command makes of it."""
    folder = tmp_path_factory.mktemp("stock")
    draw = random.Random(0)
    rows = [json.dumps({"text": " ".join(draw.choices(WORDS, k=40))}) for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "other.json").write_text(json.dumps(TINY | {"intermediate_size": 32}))
    for name, made in (("tokenizer", "tok"), ("pack", "shards"), ("train", "run")):
        outcome = server.run(COMMANDS[name].split(), folder)
        assert outcome.code == 0, outcome.err
        (folder / f"new-{made}").rename(folder / made)
    return folder


@pytest.fixture(scope="module")
def whole(server, stock, tmp_path_factory):
    """By command: what it leaves when nothing befalls it, and its file operations."""
    made = {}
    for name, words in COMMANDS.items():
        folder = copied(stock, tmp_path_factory.mktemp(name))
        outcome = server.run(words.split(), folder)
        assert outcome.code == 0, outcome.err
        made[name] = (
            {path: (folder / path).read_bytes() for path in RESULTS[name].split()},
            outcome.operations,
        )
    return made


def copied(stock, folder):
    shutil.copytree(stock, folder, dirs_exist_ok=True)
    return folder


def go_on(server, name, folder):
    """Repeat the command, as a user would who reads the message; a run is resumed once it is one."""
    words = COMMANDS[name].split()
    if name == "train" and (folder / "new-run" / "config.json").exists():
        words = ["train", "--resume", "new-run"]
    return server.run(words, folder)


def check(whole, name, folder):
    for path, content in whole[name][0].items():
        assert (folder / path).read_bytes() == content, path
    left = [path for path in folder.rglob(".*") if path.name != ".lock"]
    assert not left, left


def spread(number, count):
    """`count` of the numbers below `number`, evenly, the last among them."""
    return sorted({round((number - 1) * i / max(1, count - 1)) for i in range(count)})


PARTS = 4
"""of the long form of the kills, each a few minutes"""
SLOW = (pytest.mark.slow, pytest.mark.timeout(7_200))
SHORT = pytest.param(None, id="short")
LONG = [pytest.param(False, id="short"), pytest.param(True, marks=SLOW, id="long")]


@pytest.mark.parametrize("part", [SHORT, *(pytest.param(i, marks=SLOW) for i in range(PARTS))])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_before_a_file_operation_it_goes_on_to_the_same_bytes(
    server, stock, whole, tmp_path, name, part
):
    operations = whole[name][1]
    every = spread(operations, 40) if name == "compare" else range(operations)
    for kill_at in spread(operations, SAMPLES[name]) if part is None else every[part::PARTS]:
        folder = copied(stock, tmp_path / str(kill_at))
        killed = server.run(COMMANDS[name].split(), folder, kill_at=kill_at)
        assert killed.code == -9, killed
        after = go_on(server, name, folder)
        finished = (
            name in ("tokenizer", "export", "pack")
            and after.code == 2
            and re.search("exists already|packed already", after.err)
        )
        assert after.code == 0 or finished, (kill_at, after)
        check(whole, name, folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("long", LONG)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_of_any_size_is_one_line_and_no_loss(server, stock, whole, tmp_path, name, long):
    """By the largest size that a file may have: each kind of file meets its end somewhere."""
    largest = max(len(content) for content in whole[name][0].values())
    count = 25 if long else max(2, SAMPLES[name] // 2)
    for size in [int(largest ** ((i + 1) / (count + 1))) for i in range(count)]:
        folder = copied(stock, tmp_path / str(size))
        outcome = server.run(COMMANDS[name].split(), folder, file_size=size)
        assert outcome.is_clean and outcome.code in (0, 2), (size, outcome)
        after = go_on(server, name, folder)
        assert after.code == 0 or (outcome.code == 0 and after.code == 2), (size, after)
        check(whole, name, folder)
        shutil.rmtree(folder)


READERS = {
    "run": [
        "generate run --prompt the --max-new-tokens 4",
        "eval run",
        "export run hf-again",
        "train --resume run",
    ],
    "shards": ["eval run --data shards", "train --resume run --data shards", COMMANDS["train"]],
}


@pytest.mark.parametrize("long", LONG)
def test_a_file_cut_or_with_a_flipped_byte_is_noticed_or_harmless(server, stock, tmp_path, long):
    """Every kind of file of a run and of packed data: whatever reads it ends well or says what is damaged; a
    run that goes on gives the same model, bit for bit."""
    draw = random.Random(1)
    model = "checkpoints/step-00000006/model.safetensors"
    expected = (stock / "run" / model).read_bytes()
    files = [path.relative_to(stock) for name in READERS for path in sorted((stock / name).rglob("*"))]
    files = [
        path
        for path in files
        if (stock / path).is_file() and path.name != ".lock" and "tfevents" not in path.name
    ]
    chosen = files if long else draw.sample(files, 10)
    for path in chosen:
        for damage in (
            ("empty", "cut", "flip", "flip", "flip") if long else (draw.choice(["empty", "cut", "flip"]),)
        ):
            folder = copied(stock, tmp_path / "work")
            raw = bytearray((folder / path).read_bytes())
            if damage == "flip" and raw:
                raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            (folder / path).write_bytes(
                raw if damage == "flip" else raw[: 0 if damage == "empty" else len(raw) // 2]
            )
            commands = READERS[path.parts[0]]
            for words in commands if long else [commands[-1], draw.choice(commands)]:
                outcome = server.run(words.split(), folder)
                assert outcome.is_clean, (path, damage, words, outcome)
                if "train" in words and outcome.code == 0:
                    run = "new-run" if "new-run" in words else "run"
                    assert (folder / run / model).read_bytes() == expected, (path, damage, words)
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "words", [COMMANDS["pack"], COMMANDS["train"], COMMANDS["tokenizer"], "train --resume run --data shards"]
)
def test_two_at_once(server, stock, whole, tmp_path, words):
    folder = copied(stock, tmp_path)
    if "--resume" in words:
        shutil.rmtree(folder / "run" / "checkpoints" / "step-00000006")
    outcomes = server.run_all([words.split()] * 2, folder)
    assert all(outcome.is_clean for outcome in outcomes), outcomes
    assert 0 in [outcome.code for outcome in outcomes]
    name = next((name for name, command in COMMANDS.items() if command == words), None)
    if name:
        check(whole, name, folder)
    else:
        model = "checkpoints/step-00000006/model.safetensors"
        assert (folder / "run" / model).read_bytes() == (stock / "run" / model).read_bytes()


def test_bombs_in_bounded_memory(server, stock, tmp_path):
    """Small files that claim to hold gigabytes, 700 MB of memory above what the program itself has."""
    folder = copied(stock, tmp_path)
    block = (2 | (128 * 1024) << 3).to_bytes(
        3, "little"
    ) + b"a"  # 128 KiB of one byte. Source: RFC 8878, 3.1.1
    last = (3 | (128 * 1024) << 3).to_bytes(3, "little") + b"a"
    bomb = b"\x28\xb5\x2f\xfd\x00\x38" + block * 16_383 + last  # 2 GiB
    (folder / "bomb.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "') + bomb)
    (folder / "nested.jsonl").write_bytes(b'{"a":' * 2_000_000)
    (folder / "deep.json").write_bytes(b'{"a":' * 500_000)
    (folder / "tok2").mkdir()
    (folder / "tok2" / "tokenizer.json").write_bytes(b"[" * 3_000_000)
    pack = "data pack {} --tokenizer {} --out out"
    for words in (
        pack.format("bomb.jsonl.zst", "tok"),
        pack.format("nested.jsonl", "tok"),
        pack.format("text.jsonl", "tok2"),
        "tokenizer train bomb.jsonl.zst --out out",
        "eval run --data bomb.jsonl.zst",
        "doctor deep.json",
    ):
        outcome = server.run(words.split(), folder, memory=700 << 20)
        assert outcome.is_clean and outcome.code == 2, (words, outcome)


def test_a_folder_of_shards_is_good_or_refused_at_every_moment(server, stock, tmp_path, whole):
    for kill_at in spread(whole["pack"][1], 4):
        folder = copied(stock, tmp_path / str(kill_at))
        server.run(COMMANDS["pack"].split(), folder, kill_at=kill_at)
        try:
            tokens = Shards.open(folder / "new-shards").tokens[:]
        except UserError:
            continue
        assert np.array_equal(tokens, Shards.open(stock / "shards").tokens[:])


def numbers(flag, *good):
    """A flag with values that are not numbers, too small, too large."""
    bad = ["x", "", "nan", "-1", "1e400", "--", str(-(10**30)), str(10**30), "0x10", "1,5", "[]", "\udcff"]
    return [[flag, value] for value in bad if value not in good]


PATHS = [
    "/dev/null",
    "/proc/self/mem",
    "absent",
    "\udcff",
    "a" * 300,
    "tiny.json",
    "text.jsonl",
    "",
    ".",
]
TRAIN = ["train", "--model", "tiny.json", "--data", "shards", "--out", "bad"]
PACK = ["data", "pack", "text.jsonl", "--tokenizer", "tok", "--out", "bad"]
LEARN = ["tokenizer", "train", "text.jsonl", "--out", "bad"]
COMPARE = ["compare", "tiny.json", "other.json", "--data", "text.jsonl", "--out", "bad"]
GENERATE = ["generate", "run", "--prompt", "the"]
HUGE = str(10**30)  # is all right where a size only says "at most"
FLAGS = (
    (TRAIN, "steps tokens batch-size micro-batch-size sequence-length seed warmup", ()),
    (TRAIN, "grad-clip eps max-minutes", (HUGE,)),
    (TRAIN, "learning-rate muon-learning-rate weight-decay", (HUGE,)),
    (PACK, "validation-fraction seed", ("-1",)),
    (PACK, "shard-tokens", (HUGE,)),
    (LEARN, "vocab-size sample-mb max-documents", ()),
    (GENERATE, "temperature top-p seed repetition-penalty", (HUGE,)),
    (COMPARE, "tokens seeds workers batch-size validation-fraction", ()),
    (PACK, "parts workers max-documents max-tokens", ()),
    (TRAIN, "processes decay final-rate eval-tokens eval-items keep-last checkpoint-every", ()),
    (TRAIN, "z-loss ema loop-loss-share", ()),
    (["chat", "run"], "max-new-tokens temperature top-p", ()),
    (["autopsy", "run"], "tokens prompts", ()),
    (["eval", "run"], "limit batch-size", ()),
)
PLACES = (
    (["data", "pack", "?", "--tokenizer", "tok", "--out", "bad"], ("text.jsonl", ".")),
    (["data", "pack", "text.jsonl", "--tokenizer", "?", "--out", "bad"], ()),
    (["data", "pack", "text.jsonl", "--tokenizer", "tok", "--out", "?"], ("absent", "\udcff")),
    (["tokenizer", "train", "text.jsonl", "--vocab-size", "280", "--out", "?"], ("absent", "\udcff")),
    (["train", "--model", "?", "--data", "shards", "--out", "bad"], ("tiny.json",)),
    (["train", "--model", "tiny.json", "--data", "?", "--out", "bad"], ()),
    (
        ["train", "--model", "tiny.json", "--data", "shards", "--steps", "1", "--out", "?"],
        ("absent", "\udcff"),
    ),
    (["train", "--resume", "?"], ()),
    (["generate", "?"], ()),
    (["eval", "?"], ()),
    (["autopsy", "?"], ()),
    (["doctor", "?"], ("tiny.json",)),
    (["export", "?", "bad"], ()),
    (["export", "run", "?"], ("absent", "\udcff")),
    (["eval", "run", "--data", "?"], ("text.jsonl", ".")),
    (["compare", "?", "tiny.json", "--out", "bad"], ()),
    (["average", "?", "--out", "bad"], ()),
    (["average", "run", "--out", "?"], ("absent", "\udcff")),
    (["runs", "?"], (".",)),
    (["runs", "run", "--plot", "?"], ()),
    (["push", "?", "ada/ants"], ()),
    (["push", "run", "?"], ()),
    (["chat", "?"], ()),
    (["export", "?", "bad", "--format", "gguf"], ()),
    (["export", "run", "?", "--format", "html"], ("absent", "\udcff")),
    (["data", "contamination", "text.jsonl", "--against", "?"], ()),
    (["train", "--config", "?"], ()),
    ([*TRAIN, "--init", "?"], ()),
    ([*TRAIN, "--eval-tasks", "?"], ()),
    (["eval", "run", "--tasks", "?"], ()),
    ([*TRAIN, "--eval-tasks", "piqa", "--eval-data-dir", "?"], ()),
    ([*PACK, "--exclude-items", "?"], ()),
    ([*TRAIN, "--push", "?"], ()),
    ([*TRAIN, "--checkpoint-words", "?"], ()),
)
BAD = [
    [*words, *bad]
    for words, names, good in FLAGS
    for name in names.split(" ")
    for bad in numbers(f"--{name}", *good)
]
BAD += [
    [path if word == "?" else word for word in words]
    for words, good in PLACES
    for path in PATHS
    if path not in good
]


def test_the_tables_of_bad_inputs_are_long():
    assert len(BAD) >= 300 and len(BAD_FILES) >= 300


@pytest.mark.parametrize("long", LONG)
def test_bad_input_is_one_line(server, stock, tmp_path, long):
    folder = copied(stock, tmp_path)
    before = {path.name for path in folder.iterdir()}
    chosen = BAD if long else random.Random(2).sample(BAD, 20)
    wrong = []
    for words in chosen:
        outcome = server.run(words, folder)
        if not outcome.is_clean or outcome.code != 2:
            wrong.append((words, outcome.code, outcome.err[-300:]))
    assert not wrong, f"{len(wrong)} of {len(chosen)}: {wrong[:8]}"
    made = {path.name for path in folder.iterdir()} - before
    assert made <= {"bad"} and (not made or {p.name for p in (folder / "bad").iterdir()} <= {".lock"})


@pytest.mark.parametrize("long", LONG)
def test_a_bad_file_is_one_line(server, stock, tmp_path, long):
    """`data pack` alone keeps what it has packed: the same command goes on when the text is mended."""
    chosen = BAD_FILES if long else random.Random(3).sample(BAD_FILES, 15)
    wrong = []
    for number, (file, content, words) in enumerate(chosen):
        folder = copied(stock, tmp_path / str(number))
        place(folder, file, content)
        before = contents(folder)
        outcome = server.run(words.split(), folder, memory=1 << 30)
        made = contents(folder) - before
        allowed = ("bad/",) if words.startswith("data pack") else ("bad/.lock", "run/.lock", "ant5m-cache/")
        if not outcome.is_clean or outcome.code != 2 or not all(one.startswith(allowed) for one in made):
            wrong.append((file, str(content)[-99:], words, outcome.code, outcome.err[-300:], sorted(made)))
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(chosen)}: {wrong[:8]}"


def contents(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("run/hf/model.safetensors", "generate run/hf --prompt the"),
        ("run/hf/config.json", "generate run/hf --prompt the"),
        ("run/metrics.jsonl", "train --resume run"),
        ("shards/train-00000.bin", "train --model tiny.json --data shards --out bad --steps 1"),
        ("m.toml", "train --model tiny.json --data m.toml --out bad"),
        ("c.toml", "train --config c.toml"),
        ("p.jsonl", "data pack p.jsonl --tokenizer tok --out bad"),
    ],
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(server, stock, tmp_path, file, words):
    folder = copied(stock, tmp_path)
    make_pipe(folder / file)
    outcome = server.run(words.split(), folder)
    assert outcome.is_clean and outcome.code == 2, outcome


@pytest.mark.parametrize("error", ["EROFS", "EACCES", "EDQUOT", "EIO"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("export", "new-hf"),
        ("train", "new-run/hf"),
        ("train", "new-run/report.md"),
        ("train", "new-run/loss.png"),
        ("train", "new-run/tensorboard"),
        ("train", "new-run/checkpoints"),
        ("pack", "new-shards"),
        ("tokenizer", "new-tok"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line_and_no_loss(
    server, stock, whole, tmp_path, name, place, error
):
    folder = copied(stock, tmp_path)
    outcome = server.run(COMMANDS[name].split(), folder, refused=place, error=error)
    assert outcome.is_clean, outcome
    assert outcome.code == (0 if "tensorboard" in place else 2), outcome
    after = go_on(server, name, folder)
    assert after.code == 0, after
    check(whole, name, folder)


@pytest.mark.parametrize("empty", [True, pytest.param(False, marks=SLOW)])
def test_a_run_that_ended_before_its_first_checkpoint_is_told_of_as_that(server, stock, tmp_path, empty):
    """By every command that opens a run; resumed, it begins anew."""
    folder = copied(stock, tmp_path)
    shutil.rmtree(folder / "run" / "hf")
    shutil.rmtree(folder / "run" / "checkpoints")
    if empty:
        (folder / "run" / "checkpoints").mkdir()
    for words in (
        *(
            "generate run --prompt the",
            "eval run",
            "eval run --tasks piqa --data-dir items",
            "export run bad",
        ),
        *("autopsy run --data text.jsonl", "chat run", "push run ada/ants", "average run run --out bad"),
        *(f"export run bad --format {kind}" for kind in ("gguf", "html")),
        "train --init run --data shards --out bad --steps 1",
    ):
        outcome = server.run(words.split(), folder)
        assert outcome.is_clean and outcome.code == 2 and "run has no good checkpoint yet" in outcome.err, (
            words,
            outcome,
        )
    assert server.run(["runs", "run"], folder).code == 0
    assert server.run(["train", "--resume", "run"], folder).code == 0
    model = "checkpoints/step-00000006/model.safetensors"
    assert (folder / "run" / model).read_bytes() == (stock / "run" / model).read_bytes()


@pytest.mark.parametrize("target", ["elsewhere", "absent"])
def test_hf_may_be_a_link_to_another_place(server, stock, whole, tmp_path, target):
    """The export goes there, also when the run is finished once more; what is there and is none stays."""
    folder = copied(stock, tmp_path)
    (folder / "run" / "hf").rename(folder / "elsewhere")
    (folder / "run" / "hf").symlink_to(folder / target)
    outcome = server.run(["train", "--resume", "run"], folder)
    assert outcome.code == 0, outcome
    assert (folder / "run" / "hf").is_symlink()
    model = whole["train"][0]["new-run/hf/model.safetensors"]
    assert (folder / target / "model.safetensors").read_bytes() == model


def test_hf_that_is_a_file_or_a_link_in_a_circle_is_one_line(server, stock, tmp_path):
    folder = copied(stock, tmp_path)
    shutil.rmtree(folder / "run" / "hf")
    for make in (lambda hf: hf.write_text("mine"), lambda hf: hf.symlink_to(hf)):
        make(folder / "run" / "hf")
        outcome = server.run(["train", "--resume", "run"], folder)
        assert outcome.code == 2 and outcome.is_clean, outcome
        (folder / "run" / "hf").unlink()


ABSURD = [
    {"num_hidden_layers": 10**8},
    {"num_hidden_layers": 1_001},
    {"vocab_size": 10**12},
    {"vocab_size": 10**7},
    {"hidden_size": 10**7},
    {"intermediate_size": 10**7},
    {"num_attention_heads": 10**7, "hidden_size": 10**7},
    {"head_dim": 10**9},
    {"head_dim": 10**6},
    {"max_position_embeddings": 10**12},
    {"hidden_size": 10**4, "head_dim": 10**4, "max_position_embeddings": 10**7},
    {"num_hidden_layers": 10**30},
    {"num_hidden_layers": 1e8},
]


@pytest.mark.parametrize("size", ABSURD, ids=str)
def test_an_absurd_size_is_refused_by_what_it_would_need(server, stock, tmp_path, size):
    """Also in the config.json of a model whose file is small; in 600 MB of memory."""
    (tmp_path / "absurd.json").write_text(json.dumps(TINY | size))
    shutil.copytree(stock / "run" / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | size))
    for words in (
        f"train --model absurd.json --data {stock / 'shards'} --out new --steps 1 --batch-size 10000000000",
        "generate hf --prompt the --max-new-tokens 2",
        "export hf out",
        f"eval hf --data {stock / 'text.jsonl'}",
    ):
        outcome = server.run(words.split(), tmp_path, memory=600 << 20)
        assert outcome.is_clean and outcome.code == 2 and "not enough memory" not in outcome.err, outcome
    outcome = server.run(["doctor", "absurd.json"], tmp_path, memory=600 << 20)
    assert outcome.is_clean, outcome
    assert {path.name for path in tmp_path.iterdir()} == {"absurd.json", "hf"}


@pytest.mark.parametrize(
    "words",
    [
        "train --model tiny.json --data shards --out new --steps 1000000000",
        "train --model tiny.json --data shards --out new --tokens 1000000000000000000",
        "train --model tiny.json --data shards --out new --steps 1 --batch-size 1000000000000",
        "train --model tiny.json --data shards --out new --steps 1 --seed 18446744073709551616",
        "train --model tiny.json --data shards --out new --steps 1 --sequence-length 1000000000000",
        "train --model tiny.json --data shards --out new --steps 1 --processes 1000000000",
        "generate run --seed 18446744073709551616",
        "data pack text.jsonl --tokenizer tok --out new --parts 10000000000",
        "data pack text.jsonl --tokenizer tok --out new --seed 18446744073709551616",
        "tokenizer train text.jsonl --out new --vocab-size 1000000000000",
        "compare tiny.json other.json --data text.jsonl --out new --tokens 1000000000000000000 --seeds 1",
        "compare tiny.json other.json --data text.jsonl --out new --tokens 256 --seeds 1000000000000",
    ],
)
def test_an_absurd_number_is_refused_by_what_it_would_need(server, stock, tmp_path, words):
    folder = copied(stock, tmp_path)
    outcome = server.run(words.split(), folder, memory=600 << 20)
    assert outcome.is_clean and outcome.code == 2 and "not enough memory" not in outcome.err, outcome
    assert not (folder / "new").exists() or [path.name for path in (folder / "new").iterdir()] == [".lock"]
