"""One text packed by many processes: in parts, which are joined when all are packed.

A part is a packing of its own, with its own journal and lock, in a folder inside the data set's. To join them
is to rename their shards, so the text is written once. The journal of the whole folder says what all parts
have in common; so any number of processes may go on, on one machine or several, and the bytes are the same.
"""

import contextlib
import dataclasses
import functools
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant5m import torchrun
from ant5m.data.contamination import ItemIndex
from ant5m.data.corpus import REPORTED, Corpus
from ant5m.data.filters import FilterName
from ant5m.data.packing import (
    COUNTED,
    SHARD_FILES,
    SHARD_TOKENS,
    Journal,
    Task,
    begin,
    finish,
    full_disk_explained,
    pack,
    pack_to_end,
    part_folder,
    read_journal,
    refuse_content,
    remove_parts,
    shard_name,
    start_over,
)
from ant5m.data.parts import cut
from ant5m.data.shards import PROGRESS
from ant5m.data.tokenizer import Tokenizer
from ant5m.data.workers import share_out
from ant5m.errors import UserError
from ant5m.files import fsync, lock, remove_asides
from ant5m.ranks import Ranks

if TYPE_CHECKING:
    from rich.progress import Progress

ORPHAN_SECONDS = 10.0
"""in which the processes of a packing that was killed notice it, and let go of their parts"""


def pack_jointly(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out: str | Path,
    parts: int,
    workers: int | None = None,
    validation_fraction: float | None = None,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    progress: "Progress | None" = None,
    filters: Sequence[FilterName] = (),
    allow_loss: bool = False,
    exclude: ItemIndex | None = None,
    max_tokens: int | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """`ant5m.data.packing.pack` by `workers` processes at a time (default: one for each core), which the
    processes of torchrun share where `ranks` says so: a collective then, and `out` is seen by all.

    The text is cut into `parts` (see `ant5m.data.parts`). Tokens and counts are those of `pack`, in the same
    order; only the shard files are others, because each part ends with one that is not full. The bytes depend
    on `parts`, never on `workers` or `ranks`. Whether gigatoken can be trusted each part finds out by itself.

    Raises `UserError` as `pack` does, and when the text cannot be cut into so many parts or a process died.
    From a script, call it under `if __name__ == "__main__":`, as the processes import the script.
    """
    ranks = ranks or Ranks()
    try:
        if workers is not None and workers < 1:
            raise UserError(f"at least one process must work, not {workers}")
        options = (validation_fraction, seed, shard_tokens, progress, filters, allow_loss, exclude)
        if parts == 1:
            return ranks.first(lambda: pack(corpus, tokenizer, out, *options, max_tokens))
        if max_tokens or corpus.max_documents:
            raise UserError("--max-tokens and --max-documents count from the beginning: leave out --parts")
        workers = workers or max(1, _count_cores() // torchrun.local_size())
        task = Task.check(corpus, tokenizer, *options)
        task = dataclasses.replace(task, plan=task.plan | {"parts": parts})
        return _pack(task, cut(corpus, parts), Path(out), ranks, workers, progress)
    except BaseException as error:
        ranks.fail(error)
        raise


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pack(
    task: Task,
    parts: Sequence[Corpus],
    out: Path,
    ranks: Ranks,
    workers: int,
    progress: "Progress | None",
) -> dict[str, Any]:
    ranks.first(lambda: refuse_content(out))
    with full_disk_explained(out), lock(out) if ranks.is_first else contextlib.nullcontext():
        joint = _Joint(task, parts, out, ranks)
        while not joint.is_joined:
            with _bar(joint, progress) as show:
                joint.pack(workers, show)
            joint.join()
        return ranks.first(joint.finish)


class _Joint:
    """A packing in parts. Every method but those that read is a collective of `ranks`."""

    def __init__(self, task: Task, parts: Sequence[Corpus], out: Path, ranks: Ranks) -> None:
        self._task, self._out, self._ranks = task, out, ranks
        self._parts = [_task_of(task, number, part) for number, part in enumerate(parts)]
        self._round = 0
        self._common = self._shared(self._begin)
        """what all parts must have in common: `limit` and `by_piece`; in the end the journal of all"""
        if not ranks.agree(zlib.crc32(json.dumps([part.plan for part in self._parts]).encode())):
            raise UserError("the processes see other files, or were given other options: all need the same")

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def size(self) -> int:
        """As `Corpus.size`."""
        return self._task.corpus.size

    @property
    def is_joined(self) -> bool:
        return self._common.complete

    def pack(self, workers: int, meanwhile: Callable[[], None]) -> None:
        """Pack all parts that are not packed as they must be, `workers` at a time."""
        work = functools.partial(
            _pack_part, self._out, self._parts, self._common.limit, self._common.by_piece
        )
        share_out(work, self._next, workers, meanwhile)
        self._ranks.most(0)  # the others have come so far
        self._round += 1

    def journals(self) -> dict[int, Journal]:
        """Of the parts that were begun, by their numbers."""
        folders = {number: part_folder(self._out, number) for number in range(len(self))}
        return {
            number: read_journal(folder) for number, folder in folders.items() if (folder / PROGRESS).exists()
        }

    def join(self) -> None:
        """Make one data set of the parts, unless all of them have to be packed in another way: see
        `ant5m.data.packing.start_over`."""
        self._common = self._shared(self._join)

    def finish(self) -> dict[str, Any]:
        """Write what a data set has beside its shards. For rank 0 alone."""
        remove_parts(self._out)
        told: Counter[str] = Counter()
        for note in dict.fromkeys(self._common.notes):
            kind = note.partition(":")[0]
            told[kind] += 1
            if told[kind] <= REPORTED:
                warnings.warn(note, stacklevel=2)
        return finish(self._common, self._task, self._out)

    def _shared(self, make: Callable[[], Journal]) -> Journal:
        return Journal(**self._ranks.first(lambda: dataclasses.asdict(make())))

    def _begin(self) -> Journal:
        remove_asides(self._out)
        journal = begin(self._out, self._task.plan)
        journal.write(self._out)
        return journal

    def _next(self) -> int | None:
        while (number := self._ranks.ticket(f"part, round {self._round}")) < len(self):
            folder = part_folder(self._out, number)
            if not (folder / PROGRESS).exists():
                return number
            journal = read_journal(folder)
            if not journal.complete or not _fits(journal, self._common.limit, self._common.by_piece):
                return number
        return None

    def _join(self) -> Journal:
        journals = list(self.journals().values())
        joined = _joined(
            Journal(self._task.plan, self._common.limit, by_piece=self._common.by_piece), journals
        )
        again = start_over(joined)
        if again is None:
            self._rename_shards(journals, joined)
            joined.complete = True
        (again or joined).write(self._out)
        return again or joined

    def _rename_shards(self, journals: Sequence[Journal], joined: Journal) -> None:
        """Repeated after a stop, it does what is left to do."""
        for split in joined.splits:
            shards = [
                (part_folder(self._out, number), shard)
                for number, journal in enumerate(journals)
                for shard in journal.splits[split]["shards"]
            ]
            for (folder, before), after in zip(shards, joined.splits[split]["shards"], strict=True):
                for name in SHARD_FILES & before.keys():
                    path, target = folder / before[name], self._out / after[name]
                    if path.exists():
                        path.replace(target)
                    elif not target.exists():
                        raise UserError(f"{path} is missing: remove {self._out} and pack again")
        fsync(self._out)


def _task_of(task: Task, number: int, corpus: Corpus) -> Task:
    sources = [[source.name, source.size, source.span] for source in corpus.sources]
    return dataclasses.replace(task, corpus=corpus, plan=task.plan | {"part": number, "sources": sources})


def _fits(journal: Journal, limit: int, by_piece: bool) -> bool:
    """Whether what a part packed so far is as if it had been told these."""
    same = journal.limit == limit or (journal.complete and journal.lowest > max(limit, journal.limit))
    return same and journal.by_piece == by_piece


def _pack_part(out: Path, parts: Sequence[Task], limit: int, by_piece: bool, number: int) -> None:
    """In a process of its own."""
    task, folder = parts[number], part_folder(out, number)
    with full_disk_explained(out), lock(folder, ORPHAN_SECONDS):
        remove_asides(folder)
        journal = Journal(task.plan, limit, by_piece=by_piece)
        if (folder / PROGRESS).exists():
            before = read_journal(folder)
            journal.trusted = before.trusted
            journal = before if _fits(before, limit, by_piece) else journal
        journal.write(folder)
        notes = journal.notes
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: notes.append(str(message))
            journal = pack_to_end(journal, task, folder)
        journal.complete = True
        journal.write(folder)


def _joined(joined: Journal, journals: Sequence[Journal]) -> Journal:
    """The journal of all parts, in which `joined` is filled in."""
    for journal in journals:
        for name, split in joined.splits.items():
            part = journal.splits[name]
            for count in COUNTED:
                split[count] += part[count]
            for shard in part["shards"]:
                path = Path(shard_name(name, len(split["shards"])))
                names = {"name": path.name, "mask": path.with_suffix(".mask").name}
                split["shards"].append(shard | {file: names[file] for file in SHARD_FILES & shard.keys()})
        joined.lowest = min(joined.lowest, journal.lowest)
        joined.highest = max(joined.highest, journal.highest)
        joined.cut |= journal.cut
        joined.trusted &= journal.trusted
        joined.removed = dict(Counter(joined.removed) + Counter(journal.removed))
        joined.left_out = dict(Counter(joined.left_out) + Counter(journal.left_out))
        joined.notes += journal.notes
    return joined


@contextlib.contextmanager
def _bar(joint: _Joint, progress: "Progress | None") -> Iterator[Callable[[], None]]:
    """One line for all parts; what it yields brings the line up to date."""
    if progress is None:
        yield lambda: None
        return

    def state() -> dict[str, Any]:
        journals = joint.journals().values()
        done = sum(journal.complete for journal in journals)
        size = sum(journal.bytes_read if joint.size else journal.packed for journal in journals)
        return {"completed": size, "description": f"packing, {done} of {len(joint)} parts done"}

    bar = progress.add_task(total=joint.size or None, **state())
    yield lambda: progress.update(bar, **state())
    progress.update(bar, **state())
