"""The command line is a promise: its flags, its exit codes, one line for what a user got wrong."""

import errno
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from ant5m import cli
from ant5m.cli import COMMANDS, call
from ant5m.cli.doctor import Doctor
from ant5m.data.tokenizer import train_tokenizer
from ant5m.errors import UserError
from ant5m.export.card import ModelCard
from ant5m.export.huggingface import export
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.train.forecast import describe_duration

SURFACE = {
    "tokenizer train": "out vocab-size sample-mb max-documents text-column on-error",
    "tokenizer health": "tokenizer preset compare sample-mb max-documents text-column on-error picture json",
    "data contamination": "TEXT_OR_SHARDS against json text-column",
    "data pack": "allow-loss chat exclude-items filters group-column max-documents max-tokens on-error out "
    "parts seed shard-tokens text-column tokenizer validation-fraction workers",
    "train": "model data tokenizer out resume steps tokens max-minutes batch-size micro-batch-size "
    "sequence-length document-mask optimizer learning-rate muon-learning-rate betas eps weight-decay "
    "grad-clip schedule warmup decay final-rate z-loss loop-loss loop-loss-weight loop-loss-share seed "
    "device processes precision kernels eval-every eval-tokens early-stop eval-tasks eval-items "
    "eval-tasks-every eval-data-dir checkpoint-words sample-every checkpoint-every keep-last "
    "push push-every track text-column config print-config ema init keep-optimizer "
    "group-column max-documents max-tokens rope-theta short-context short-share",
    "runs": "FOLDER plot by",
    "average": "CHECKPOINT out",
    "generate": "MODEL device json max-new-tokens prompt repetition-penalty seed temperature top-k top-p",
    "chat": "MODEL device max-new-tokens repetition-penalty seed system temperature top-k top-p",
    "eval": "MODEL allow-loss batch-size data data-dir device json limit output repository tasks text-column",
    "autopsy": "RUN data device json out prompts text-column tokens",
    "doctor": "MODEL device-memory json max-params",
    "compare": "study arms data out cache tokens seeds sequence-length batch-size optimizer learning-rate "
    "muon-learning-rate rate-factors validation-fraction workers device precision kernels",
    "push": "MODEL REPO license language public",
    "completion": "SHELL",
    "export": "MODEL OUT format type name license language",
}

TEXT = "the ant carries a leaf along the path and the other ants follow it to the nest by the old tree"


def run(words: list[str]) -> int | str | None:
    """The exit code, also where the flag parser leaves on its own."""
    try:
        return call(words)
    except SystemExit as leaving:
        return leaving.code


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder of a tiny untrained model."""
    folder = tmp_path_factory.mktemp("cli") / "hf"
    words = TEXT.split()
    tokenizer = train_tokenizer(
        [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 20, vocab_size=300
    )
    config = ModelConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    export(Ant(config), tokenizer, folder, ModelCard("tiny"))
    return str(folder)


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "ants.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*command.split(), "--help"]) == 0
    _, rest = capsys.readouterr().out.split("\n", 1)  # the usage is one line, which the terminal breaks
    assert [line for line in rest.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_surface_is_frozen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run([*command.split(), "--help"]) == 0
    page = capsys.readouterr().out
    flags = set(re.findall(r"^[│\s]*--([a-z][\w-]*)", page, re.MULTILINE))
    usage = page.splitlines()[0]
    words = SURFACE[command].split()
    assert flags == {word for word in words if word.islower()}
    assert all(f" {word}" in usage for word in words if word.isupper())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*command.split(), "--help"]) == 0
    long = [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]
    assert all(line.startswith(("    ant5m", "usage: ")) for line in long), "only an example may be longer"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run([*command.split(), "--help"]) == 0
    page = capsys.readouterr().out
    usage, rest = page.split("\n", 1)
    assert f"ant5m {command}" in usage
    assert f"ant5m {command}" in rest or f"ant5m-{command}" in rest, "no example in the help"
    assert "None" not in page and "(default: )" not in page


def test_a_reader_who_has_seen_enough():
    command = [sys.executable, "-c", "from ant5m.cli import main_train; main_train()", "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_needs_no_torch():
    code = "import sys; from ant5m.cli import call\ntry: call(['%s', '--help'])\nexcept SystemExit: pass\n"
    for command in ("doctor", "generate", "eval", "autopsy", "export", "compare"):
        program = code % command + "assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_version(capsys):
    assert run(["--version"]) == 0
    assert re.fullmatch(r"ant5m \d+\.\d+.*\n", capsys.readouterr().out)


def test_overview(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert run(words) == 0
        page = capsys.readouterr().out
        assert all(f"ant5m {command}" in page for command in COMMANDS)
    for words in (["tokenizer", "--help"], ["tokenizer"], ["help", "tokenizer"]):
        assert run(words) == 0
        page = capsys.readouterr().out
        assert "tokenizer train" in page and "doctor" not in page
    assert run(["help"]) == 0
    assert "ant5m doctor" in capsys.readouterr().out
    run(["help", "doctor"])
    assert "--device-memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("trian --model x", "train"),
        ("tokeniser train", "tokenizer train"),
        ("data pak", "data pack"),
        ("tokenzier", "tokenizer"),
        ("pack books", "data pack"),
        ("health runs/a", "tokenizer health"),
    ],
)
def test_a_slip_is_understood(words, meant, capsys):
    assert run(words.split()) == 2
    assert f"did you mean 'ant5m {meant}'?" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("tr", "train"),
        ("tokenizer |", "train health"),
        ("train --mi", "--micro-batch-size"),
        ("data pack x --see", "--seed"),
        ("generate --mo", ""),
    ],
)
def test_completion(typed, completed, capsys):
    assert run(["completion", "bash"]) == 0
    words = " ".join(f"'{word.strip('|')}'" for word in ["ant5m", *typed.split()])
    asked = f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _ant5m; echo ${{COMPREPLY[*]}}"
    script = capsys.readouterr().out + asked
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == completed


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_completion_as_one_types_it_in_zsh(capsys, tmp_path):
    """In a terminal, without a ~/.zshrc; the tab key asks."""
    assert run(["completion", "zsh"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    terminal, other = pty.openpty()
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "dumb"}
    files = dict.fromkeys(("stdin", "stdout", "stderr"), other)
    zsh = subprocess.Popen(
        ["zsh", "-f", "-i"], **files, cwd=tmp_path, env=environment, start_new_session=True
    )
    try:
        for typed, expected in (
            ("source ./script && echo rea''dy\n", "ready"),
            ("ant5m da\t", "ant5m data "),
            ("pa\t", "pack "),
            ("x --tokeni\t", "--tokenizer "),
            ("\x15ant5m tokenizer \t\t", "health  train"),
        ):
            os.write(terminal, typed.encode())
            shown = ""
            while expected not in shown:
                assert select.select([terminal], [], [], 60)[0], (typed, shown)
                shown += os.read(terminal, 4096).decode()
    finally:
        zsh.kill()
        zsh.wait()
        os.close(terminal)
        os.close(other)


@pytest.mark.parametrize("words", [["no"], ["no", "--help"], ["tokenizer", "no"], ["--model", "x"]])
def test_unknown_commands(words, capsys):
    assert run(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "error: there is no command" in captured.err


@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "no-such-preset"],
        ["doctor", "no-such-file.json"],
        ["doctor", "ant-5m", "--max-params", "many"],
        ["doctor", "ant-5m", "--device-memory", "much"],
        ["generate", "no-such-folder"],
        ["generate", "MODEL", "--temperature", "-1"],
        ["generate", "MODEL", "--max-new-tokens", "0"],
        ["generate", "MODEL", "--seed", "99999999999999999999999"],
        ["generate", "MODEL", "--prompt"],
        ["tokenizer", "train", "TEXT", "--out", "tok", "--max-documents", "-1"],
        ["tokenizer", "train", "TEXT", "--out", "tok", "--sample-mb", "0"],
        ["tokenizer", "health", "TEXT", "--tokenizer", "MODEL", "--picture", "health.xyz"],
        ["data", "pack", "TEXT", "--tokenizer", "TEXT", "--out", "packed"],
        ["data", "pack", "TEXT", "--tokenizer", "MODEL", "--out", "packed", "--seed", f"{10**43}"],
        ["data", "pack", "hf:", "--tokenizer", "MODEL", "--out", "packed"],
        ["generate", "MODEL", "--prompt", "ant " * 40],
        ["generate", "MODEL", "--device", "cuda:77"],
        ["generate", "MODEL", "--device", "abacus"],
        ["eval", "MODEL"],
        ["eval", "MODEL", "--data", "no-such-text.txt"],
        ["eval", "MODEL", "--data", "TEXT", "--batch-size", "0"],
        ["export", "MODEL", "MODEL"],
        ["export", "no-such-folder", "new"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(words, model, text_file, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run([{"MODEL": model, "TEXT": text_file}.get(word, word) for word in words]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in captured.err and captured.out.strip() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words", [["doctor"], ["doctor", "ant-5m", "--no-such-flag"], ["generate", "x", "--seed", "y"]]
)
def test_bad_flags(words, capsys):
    assert run(words) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_value_of_the_wrong_kind_is_told_the_right_one(capsys):
    assert run(["train", "--steps", "x"]) == 2
    message = capsys.readouterr().err
    assert "--steps" in message and "INT" in message and "None" not in message


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "file"),
            2,
            "no room left on the disk while writing file",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), 2, "gone"),
        (
            OSError(errno.EROFS, "Read-only file system", "cd"),
            2,
            "cd: Read-only file system: name another place",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "file"), 2, "file: File exists"),
        (OSError(errno.EFBIG, "File too large"), 2, "no room left on the disk while writing a file"),
        (OSError(errno.EIO, "Input/output error"), 2, "Input/output error"),
        (MemoryError(), 2, "not enough memory"),
        (UserError("a\nb\x1b[0m [/red] \udce9"), 2, r"error: a\nb\x1b[0m [/red] \udce9" + "\n"),
    ],
)
def test_what_interrupts_a_command(error, code, line, capsys, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(Doctor, "run", fail)
    assert run(["doctor", "ant-5m"]) == code
    captured = capsys.readouterr()
    assert line in captured.err and "Traceback" not in captured.err


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Doctor, "run", fail)
    with pytest.raises(RuntimeError):
        run(["doctor", "ant-5m"])


def test_the_program_itself():
    done = subprocess.run(
        [sys.executable, "-c", "from ant5m.cli import main; main()", "doctor", "nothing"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert cli.main_train.__doc__


MANY = """
import json, sys
from ant5m.cli import call

for words in json.loads(sys.argv[1]):
    code = call(words)
    print(code)
"""


def test_names_and_terminals_of_any_encoding(tmp_path, model):
    """Not UTF-8, markup, control characters: in names of files and folders, in prompts, on the way out."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/[/red] caf\xe9\n\x1b[31m \xe4\xb8\xad")
    os.makedirs(folder)
    with open(folder + os.fsdecode(b"/[bold]\xff.txt"), "w", encoding="utf-8") as file:
        file.write("<|endoftext|>".join(f"{i} {TEXT} \u4e2d" for i in range(30)))
    tok, shards = folder + "/tok", folder + "/shards"
    commands = [
        (["tokenizer", "train", folder, "--vocab-size", "270", "--out", tok], 0),
        (["data", "pack", folder, "--tokenizer", tok, "--out", shards], 0),
        (["data", "pack", folder, "--tokenizer", tok, "--out", shards], 2),
        (["eval", str(model), "--data", folder], 0),
        (["generate", str(model), "--prompt", "the \u4e2d", "--max-new-tokens", "4"], 0),
        (["generate", str(model), "--prompt", "the caf\udce9", "--max-new-tokens", "4"], 2),
        (["train", "--resume", folder], 2),
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", MANY, json.dumps([words for words, _ in commands])]
    done = subprocess.run(program, capture_output=True, env=environment)
    assert b"Traceback" not in done.stderr, done.stderr[-500:]
    codes = [int(line) for line in done.stdout.decode("ascii").splitlines() if line in ("0", "2")]
    assert codes == [code for _, code in commands]


def test_an_interrupt_during_the_imports_is_no_traceback():
    code = "import ant5m.cli; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "interrupted\n" and done.returncode != 0


def test_doctor_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert run(["doctor", "ant-5m-wide", "--max-params", "5M", "--device-memory", "16GB"]) == 0
    page = capsys.readouterr().out
    assert "9,817,856 parameters" in page and "published correction" in page
    assert run(["doctor", "ant-5m", "--device-memory", "8GB", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert sum(values["parameters"].values()) == 4_730_240
    assert values["config"]["hidden_size"] == 128 and values["memory"]["device"] > 0
    assert {finding["severity"] for finding in values["findings"]} == {"warning", "note"}
    assert values["training"] is None


def test_doctor_reads_files(model, capsys):
    assert run(["doctor", model, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["config"]["hidden_size"] == 16
    speed, runs = values["training"]["tokens_per_second"], values["training"]["runs"]
    optimal = 20 * sum(values["parameters"].values())
    assert [row["tokens"] for row in runs] == sorted([optimal, 10**7, 10**8, 10**9])
    for row in runs:
        assert row["seconds"] == pytest.approx(row["tokens"] / speed)
        assert row["batch_size"] % row["micro_batch_size"] == 0
    assert run(["doctor", model]) == 0
    page = capsys.readouterr().out
    assert "tokens/s, measured now" in page and f"{optimal:,} *" in page


def test_durations():
    told = [describe_duration(seconds) for seconds in (1, 89, 90, 5_399, 5_400, 129_599, 129_600)]
    assert told == ["1 s", "89 s", "2 min", "90 min", "1.5 hours", "36.0 hours", "1.5 days"]


def test_generate_command(model, capsys):
    assert run(["generate", model, "--prompt", "the ant", "--seed", "3", "--max-new-tokens", "12"]) == 0
    streamed = capsys.readouterr().out
    assert streamed.startswith("the ant") and streamed.endswith("\n")
    words = ["generate", model, "--prompt", "the ant", "by", "--seed", "3", "--max-new-tokens", "12"]
    assert run(words) == 0
    assert streamed.strip() in capsys.readouterr().out
    assert run([*words, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert "the ant" + first["text"] == streamed[:-1]
    assert (first["prompt"], second["prompt"]) == ("the ant", "by") and 0 < first["tokens"] <= 12


def test_generated_text_is_left_as_it_is(model, capsys):
    for more in ([], ["by"]):
        words = ["generate", model, "--prompt", "a:key:\t[bold]b", *more, "--max-new-tokens", "2"]
        assert run(words) == 0
        assert capsys.readouterr().out.startswith("a:key:\t[bold]b")


def test_generate_warns_of_loops_and_of_a_full_context(model, tmp_path, capsys):
    llama = transformers.AutoModelForCausalLM.from_pretrained(model)
    torch.nn.init.zeros_(llama.model.embed_tokens.weight)
    llama.model.embed_tokens.weight.data[120:] = 1.0
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    llama.save_pretrained(tmp_path / "loop")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "loop" / name).write_text((tmp_path / model / name).read_text())
    prompt = ["--prompt", "leaf", "--max-new-tokens", "100", "--temperature", "0"]
    assert run(["generate", str(tmp_path / "loop"), *prompt]) == 0
    error = capsys.readouterr().err
    assert "context of 32 tokens is full" in error
    assert "the text loops" in error and "repetition penalty" in error


def test_eval_command(model, text_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert run(["eval", model, "--data", text_file]) == 0
    page = capsys.readouterr().out
    assert all(
        word in page
        for word in (
            "nats per token",
            "word perplexity",
            "bits per byte",
            f"{len(TEXT.split())} words",
            f"{len(TEXT)} bytes",
        )
    )
    assert run(["eval", model, "--data", text_file, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["words"] == len(TEXT.split()) and values["loss"] > 0 and values["text"] == text_file


def test_export_command(model, tmp_path, capsys):
    assert run(["export", model, str(tmp_path / "again"), "--name", "My ants"]) == 0
    assert "again" in capsys.readouterr().out
    assert (tmp_path / "again" / "README.md").read_text().count("# My ants") == 1
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (model, tmp_path / "again")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
