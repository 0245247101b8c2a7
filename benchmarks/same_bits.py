"""Does a refactor change what is computed? Trains a small model with two commits and compares the loss and
the gradient norm of every step, to the last bit.

    python benchmarks/same_bits.py main .                 # main beside the working tree
    python benchmarks/same_bits.py HEAD~3 HEAD --only fp16
    python benchmarks/same_bits.py main . --model ant-5m --steps 5

Each commit runs in a checkout of its own, through the command line and `metrics.jsonl`, which stay what they
are while everything behind them may change. Runs on the CPU; seconds a case and commit with the model that is
the default. Exits with 1 where anything differs.
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
TINY = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 68,  # not a multiple of 8, as in ant-5m
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
USUAL = ("--batch-size", "8", "--micro-batch-size", "4")
CASES = {
    "fp32": ("--precision", "fp32"),
    "fp32 adamw": ("--precision", "fp32", "--optimizer", "adamw", "--schedule", "cosine"),
    # Without the project's ops: what differs here comes from the training flow, not from a kernel.
    "fp32 reference": ("--precision", "fp32", "--kernels", "reference"),
    "bf16 reference": ("--precision", "bf16", "--kernels", "reference", "--document-mask"),
    "fp16 reference": ("--precision", "fp16", "--kernels", "reference", "--optimizer", "adamw"),
    # Multiplied by the processor where it can, else by torch's autocast.
    "bf16": ("--precision", "bf16"),
    "bf16 documents": ("--precision", "bf16", "--document-mask", "--schedule", "wsd"),
    # With a loss scale, which a step on the CPU decides as one on a GPU does.
    "fp16": ("--precision", "fp16"),
    "fp16 unlikelihood": ("--precision", "fp16", "--loop-loss", "unlikelihood", "--loop-loss-share", "0.5"),
    "fp32 ditto": ("--precision", "fp32", "--loop-loss", "ditto", "--loop-loss-share", "0.5"),
}
PROBE = """
import json, sys
from pathlib import Path
import ant5m
from ant5m.cli import call
assert Path(ant5m.__file__).parent.parent == Path.cwd(), f"this is not the checkout: {ant5m.__file__}"
for words in json.loads(sys.argv[1]):
    code = call(words)
    if code:
        sys.exit(code)
"""
Steps = list[tuple[float, float]]
"""loss and gradient norm"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", help="a commit, or . for the working tree as it is")
    parser.add_argument("after", nargs="?", default=".", help="the same (default: .)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", help="preset or config file (default: three tiny layers)")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="cases whose name has one of these")
    flags = parser.parse_args()
    cases = {name: c for name, c in CASES.items() if not flags.only or any(w in name for w in flags.only)}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = flags.model or _write_tiny(work)
        with checkout(flags.before, work) as tree:
            pack(tree, work, model)
            before = train(tree, work / "before", work / "data", model, flags.steps, cases)
        with checkout(flags.after, work) as tree:
            after = train(tree, work / "after", work / "data", model, flags.steps, cases)
    verdicts = {name: difference(before[name], after[name]) for name in cases}
    for name, verdict in verdicts.items():
        print(f"{name:20} {verdict or f'{len(before[name])} steps, every bit the same'}")
    sys.exit(any(verdicts.values()))


def difference(before: Steps, after: Steps) -> str:
    """The first step that differs, or nothing."""
    for number, (one, other) in enumerate(zip(before, after, strict=False), 1):
        if one != other:
            pairs = (f"{a!r} and {b!r}" for a, b in zip(one, other, strict=True))
            return "DIFFERS at step {}: loss {}, norm {}".format(number, *pairs)
    return "" if len(before) == len(after) else f"DIFFERS: {len(before)} and {len(after)} steps"


@contextlib.contextmanager
def checkout(commit: str, work: Path) -> Iterator[Path]:
    """A folder with that commit and its C++ kernels."""
    if commit == ".":
        yield HERE
        return
    tree = work / "tree"
    _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        if _git("diff", "--quiet", commit, "--", "csrc", "setup.py", check=False).returncode == 0:
            for extension in (HERE / "ant5m").glob("_cpu*"):
                shutil.copy(extension, tree / "ant5m")
        else:
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", "build"]
            subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
        yield tree
    finally:
        _git("worktree", "remove", "--force", str(tree))


def pack(tree: Path, work: Path, model: str) -> None:
    """A tokenizer and shards of random words, for both commits."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(3_000)]
    documents = [" ".join(draw.choices(words, k=draw.randint(5, 150))) for _ in range(1_500)]
    rows = (json.dumps({"text": document}) + "\n" for document in documents)
    (work / "text.jsonl").write_text("".join(rows))
    size = str(TINY["vocab_size"])  # also of a larger model: it only has rows that are never used
    text, tokenizer, data = (str(work / name) for name in ("text.jsonl", "tokenizer", "data"))
    probe(
        tree,
        ["tokenizer", "train", text, "--out", tokenizer, "--vocab-size", size],
        ["data", "pack", text, "--tokenizer", tokenizer, "--out", data, "--validation-fraction", "0.05"],
    )


def train(
    tree: Path, out: Path, data: Path, model: str, steps: int, cases: dict[str, tuple[str, ...]]
) -> dict[str, Steps]:
    """{case: its steps} of one commit, all in one process."""
    rest = ("--data", str(data), "--device", "cpu", "--steps", str(steps), "--sample-every", "0", *USUAL)
    folders = {name: out / name.replace(" ", "-") for name in cases}
    commands = [
        ["train", "--model", model, "--out", str(folders[name]), *rest, *flags]
        for name, flags in cases.items()
    ]
    probe(tree, *commands)
    return {name: read(folder / "metrics.jsonl") for name, folder in folders.items()}


def probe(tree: Path, *commands: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE, json.dumps(commands)],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{tree}: a command failed\n{done.stdout}")


def read(metrics: Path) -> Steps:
    lines = map(json.loads, metrics.read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]


def _write_tiny(work: Path) -> str:
    path = work / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def _git(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=HERE, check=check, text=True, capture_output=True)


if __name__ == "__main__":
    main()
