"""Items of a benchmark, read from files of somebody's own: `--data-dir`.

The folder holds one folder (or file) for each task, whose name begins with the task's, in any depth;
capitals, `-`, `_` and `.` do not matter, so that the names of the hub and of the original releases are found:

    benchmarks/
      piqa/piqa_validation.jsonl          .jsonl (also .gz, .xz, .zst) or .parquet, one item a row,
      arc/arc_easy_test.jsonl             with the field names of the hub's data set
      blimp/adjunct_island.jsonl.gz       BLiMP: one file for each of its 67 parts
      mmlu/mmlu_test.jsonl                MMLU: one file, with the subject in the field `subject`
      arithmark-3.jsonl
      supplement_filtered/hypernym.jsonl  BabyLM: one file for each part, in the folders of its pipeline

Where there are several splits, by the names of files or of the folders around them, the one that lm-eval
evaluates is taken; a training split never is. A split in shards (`validation-00000-of-00002`, or `0000` and
`0001` in a folder) is read whole.
"""

import codecs
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ant5m.data import compression, folders
from ant5m.errors import UserError, first_line
from ant5m.eval.benchmarks import BENCHMARKS, Benchmark
from ant5m.eval.schemas import Line, fault
from ant5m.files import parse_json

NO_TEXT = (
    *("answer", "answerKey", "label", "subject", "activity_label", "numops"),
    *("Domain", "ContextType", "ContextDiff", "TargetDiff"),
)
"""fields of items that say something about them"""
ENDING = re.compile(r"\.(jsonl(\.(gz|xz|zst))?|parquet)$")
LARGEST = 1 << 29
"""bytes of a .jsonl, all of which is held in memory"""
MOST_REPEATED = 0.01
"""share of items that may come twice without a warning"""
SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def find_files(data_dir: Path) -> list[Path]:
    """Every file below a folder that can hold items, sorted. Raises `UserError` when there is no folder; a
    warning says what was left out (see `ant5m.data.folders.find_files`)."""
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} is not a folder of benchmark files")
    found = folders.find_files(data_dir, lambda path: bool(ENDING.search(path.name)))
    found.warn()
    return found.files


def choose_files(
    files: Iterable[Path], data_dir: Path, names: Sequence[str], split: str, exact: bool = False
) -> list[Path]:
    """The files of a task that goes by these names, best split first: the one asked for, then files without a
    split in the name.

    `exact`: a folder or file has that very name (a split may follow), as BLiMP's parts do.
    """
    named = [
        path for path in files if any(_belongs(path.relative_to(data_dir), name, exact) for name in names)
    ]
    ranked = [(rank, path) for path in named if (rank := _rank(splits_of(path, data_dir), split)) is not None]
    return [path for _, path in sorted(ranked)]


def all_files(files: Sequence[Path], data_dir: Path, names: Sequence[str]) -> list[Path]:
    """Every file in the folders (or of the files) with the first of these names that is there."""
    for name in names:
        found = [path for path in files if _belongs(path.relative_to(data_dir), name, exact=True)]
        if found:
            return found
    return []


def _belongs(path: Path, name: str, exact: bool) -> bool:
    wanted = _plain(name)
    parts = [_plain(part) for part in (*path.parts[:-1], stem(path))]
    if exact:
        return any(re.fullmatch(rf"{wanted}(({'|'.join(SPLITS)}).*)?", part) for part in parts)
    return any(part.startswith(wanted) for part in parts)


def stem(path: Path) -> str:
    """The name of a file without what says its kind; a version in it keeps its dot."""
    return ENDING.sub("", path.name)


def _plain(name: str) -> str:
    return re.sub(r"[-_.\s]", "", name.lower())


def splits_of(path: Path, data_dir: Path) -> list[str]:
    """The splits that the name of a file, or of the folders around it, says it holds."""
    in_name = re.findall(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])", path.name.lower())
    folders = [part.lower() for part in path.relative_to(data_dir).parts[:-1]]
    return in_name or [part for part in folders if part in SPLITS]


def _rank(found: list[str], split: str) -> int | None:
    if split in found:
        return 0
    if not found:
        return 1
    return {"validation": 2, "valid": 2, "val": 2, "test": 3}.get(found[-1])


def shards_of(path: Path) -> list[Path]:
    """The files of the split that `path` is a shard of, or itself. `UserError` when one is missing."""
    if numbered := re.fullmatch(r"(.+-)(\d+)(-of-)(\d+)(\..+)", path.name):
        before, number, of, count, ending = numbered.groups()
        names = [f"{before}{i:0{len(number)}}{of}{count}{ending}" for i in range(int(count))]
        shards = [path.with_name(name) for name in names]
        if missing := [shard for shard in shards if not shard.exists()]:
            raise UserError(f"{missing[0]} is missing: it belongs to {path.name}")
        return shards
    if re.fullmatch(r"\d+\..+", path.name):
        ending = path.name.partition(".")[2]
        return sorted(
            other for other in path.parent.glob(f"*.{ending}") if other.name.partition(".")[0].isdigit()
        )
    return [path]


def read_rows(path: Path, schema: type[Struct]) -> list[dict[str, Any]]:
    """The items of a file, and of the other shards of its split, checked against their schema.

    Raises `UserError` that names file and item when a file is broken or missing, or an item is otherwise.
    """
    rows = [row for shard in shards_of(path) for row in _read_shard(shard, schema)]
    if schema is not Line:
        _warn_of_repeats(path, rows, schema)
    return rows


def _warn_of_repeats(path: Path, rows: Sequence[dict[str, Any]], schema: type[Struct]) -> None:
    """Published files have a few items twice; where more are, a file was put together twice."""
    first: dict[bytes, int] = {}
    again = list[tuple[int, int]]()
    for number, row in enumerate(rows, 1):
        same = first.setdefault(msgspec.json.encode([row[name] for name in schema.__struct_fields__]), number)
        if same != number:
            again.append((number, same))
    if len(again) > MOST_REPEATED * len(rows):
        warnings.warn(
            f"{path}: {len(again):,} of {len(rows):,} items were there before (item {again[0][0]:,} is the "
            f"same as item {again[0][1]:,}): they count more than once",
            stacklevel=3,
        )


def check_rows(where: str, rows: Iterable[Any], schema: type[Struct]) -> None:
    """Raises `UserError` that names the first item that is not as it should be."""
    for number, row in enumerate(rows, 1):
        if wrong := fault(row, schema):
            raise UserError(f"{where}, item {number}: {wrong}")


def _read_shard(path: Path, schema: type[Struct]) -> list[dict[str, Any]]:
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    if not rows:
        raise UserError(f"{path} holds no items")
    check_rows(str(path), rows, schema)
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} is not a readable parquet file ({first_line(error)})") from None


def _read_jsonl(path: Path) -> list[Any]:
    content = bytearray()
    try:
        with path.open("rb") as raw:
            for block in compression.blocks(path, raw):
                content += block
                if len(content) > LARGEST:
                    raise UserError(f"{path} holds more than {LARGEST >> 20:,} MiB: it is no file of items")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    text = bytes(content).removeprefix(codecs.BOM_UTF8)
    try:
        return msgspec.json.Decoder().decode_lines(text)
    except (ValueError, RecursionError):
        lines = text.split(b"\n")  # one by one, five times slower: which one is it?
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line and not line.isspace())
    return [parse_json(line, f"{path}, line {number}") for number, line in numbered]


def texts_by_task(data_dir: Path) -> dict[str, Iterator[list[str]]]:
    """The items of every task that a folder has files for, each as the texts that could stand in a training
    text: its fields, and what stands before the answers with each of them.

    Raises `UserError` when no task has a file, or a file is broken.
    """
    files = find_files(data_dir)
    found: dict[str, list[Path]] = {}
    for benchmark in BENCHMARKS.values():
        names = benchmark.files or (benchmark.name,)
        whole = benchmark.parts and benchmark.name != "mmlu"
        own = all_files(files, data_dir, names) if whole else choose_files(files, data_dir, names, "test")
        # Several protocols share the items of one benchmark.
        if own and own not in found.values():
            found[benchmark.name] = own
    if not found:
        raise UserError(f"{data_dir} has no items of a known task")
    return {name: _texts(paths, BENCHMARKS[name]) for name, paths in found.items()}


def _texts(paths: Sequence[Path], benchmark: Benchmark) -> Iterator[list[str]]:
    whole = benchmark.parts and benchmark.name != "mmlu"
    for path in paths if whole else [first_readable(paths, benchmark.schema)]:
        for row in read_rows(path, benchmark.schema):
            yield texts_of(row, benchmark.schema)


def first_readable(paths: Sequence[Path], schema: type[Struct]) -> Path:
    """The first file whose items are as they should be; the `UserError` of the first file where none has."""
    reasons = []
    for path in paths:
        try:
            read_rows(path, schema)
            return path
        except UserError as error:
            reasons.append(error)
    raise reasons[0]


def texts_of(row: dict[str, Any], schema: type[Struct]) -> list[str]:
    """What of an item could stand in a training text."""
    fields = [name for name in schema.__struct_fields__ if name not in NO_TEXT]
    single = [row[name] for name in fields if isinstance(row[name], str)]
    answers = [text for name in fields if not isinstance(row[name], str) for text in _strings(row[name])]
    before = " ".join(single)
    return [*single, *(f"{before} {answer}" for answer in answers)]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
