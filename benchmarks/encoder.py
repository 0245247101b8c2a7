"""gigatoken reading a file by itself (`encode_files`) beside what packing does: read, encode, check, write.

    python benchmarks/encoder.py TEXT TOKENIZER [--megabytes 1000]

TEXT is what `ant5m data pack` takes, repeated until it has so many megabytes; it is written as .jsonl first.
Prints MB of text for each second of processor time, and of the clock, in one process and in two at once, and
whether the ids are the same.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ant5m.data.corpus import Corpus

DOCUMENT = 20_000
"""characters"""
FILES = """
import sys, gigatoken
fast = gigatoken.Tokenizer.from_json(open(sys.argv[1]).read())
for path in sys.argv[2:]:
    fast.encode_files(gigatoken.JsonlFileSource([path], field="text"), parallel=False)
"""
STRINGS = """
import sys, gigatoken, msgspec
fast = gigatoken.Tokenizer.from_json(open(sys.argv[1]).read())
decode, batch, size = msgspec.json.Decoder(dict[str, str]).decode, [], 0
for path in sys.argv[2:]:
    for line in open(path, "rb"):
        batch.append(decode(line)["text"])
        size += len(line)
        if size >= 1 << 22:
            fast.encode_batch(batch, parallel=False)
            batch, size = [], 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--megabytes", type=int, default=1_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write(asked.text, Path(folder), asked.megabytes * 1_000_000)
        plain = Path(folder) / "tokenizer.json"
        content = json.loads((asked.tokenizer / "tokenizer.json").read_text())
        plain.write_text(json.dumps({**content, "added_tokens": []}))  # as ant5m.data.tokenizer has it
        print("same ids:", same_ids(plain, files[0]))
        size = sum(len(json.loads(line)["text"].encode()) for file in files for line in file.open("rb"))
        for _ in range(2):
            for name, code in (("encode_files", FILES), ("read and encode_batch", STRINGS)):
                tell(f"{name}, one process", size, [[sys.executable, "-c", code, plain, *files]])
                halves = files[::2], files[1::2]
                tell(f"{name}, two", size, [[sys.executable, "-c", code, plain, *half] for half in halves])
            for parts in (1, 2):
                out = Path(folder) / f"packed-{time.monotonic_ns()}"
                words = ["data", "pack", *files, "--tokenizer", asked.tokenizer, "--out", out]
                command = [sys.executable, "-m", "ant5m", *words, "--parts", parts, "--workers", parts]
                tell(f"ant5m data pack --parts {parts}", size, [command])


def write(text: str, folder: Path, size: int) -> list[Path]:
    """Four files of documents that are `size` bytes together."""
    pieces = [
        document[start : start + DOCUMENT]
        for document in Corpus.open([text]).documents()
        for start in range(0, len(document), DOCUMENT)
    ]
    files = [folder / f"{number}.jsonl" for number in range(4)]
    for file in files:
        written = number = 0
        with file.open("w", encoding="utf-8") as out:
            while written < size // len(files):
                written += out.write(
                    json.dumps({"text": pieces[number % len(pieces)]}, ensure_ascii=False) + "\n"
                )
                number += 1
    return files


def same_ids(tokenizer: Path, file: Path) -> bool:
    import gigatoken

    texts = [json.loads(line)["text"] for line in file.open("rb")][:2_000]
    part = file.with_suffix(".part.jsonl")
    part.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    first, second = (gigatoken.Tokenizer.from_json(tokenizer.read_text()) for _ in range(2))
    source = gigatoken.JsonlFileSource([str(part)], field="text")
    found = first.encode_files(source, parallel=False).tolist()
    part.unlink()
    return bool(found == second.encode_batch(texts, parallel=False).tolist())


def tell(name: str, size: int, commands: list[list[object]]) -> None:
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    running = [
        subprocess.Popen(
            [*map(str, command)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for command in commands
    ]
    codes = [process.wait() for process in running]
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{name:32} {size / 1e6 / spent:6.1f} MB/s of processor time, {size / 1e6 / seconds:6.1f} of clock"
        f"{'' if set(codes) == {0} else ', failed'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
