"""What the processes of a packing in parts do in tests. Imports little: each of them imports it.

`python part_processes.py TOKENIZER OUT slow|fast TEXT...` packs in three parts, also as one of torchrun's.
"""

import itertools
import os
import signal
import sys
import time

from ant5m.data import joint_packing, packing
from ant5m.data.corpus import Corpus
from ant5m.data.tokenizer import Tokenizer
from ant5m.ranks import join

OPTIONS = {"validation_fraction": 0.1, "shard_tokens": 1_000}
_pack_part = joint_packing._pack_part
_write = packing._write


def fast_part(*arguments):
    """Many batches and journals in a small text."""
    packing.BATCH_BYTES, packing.JOURNAL_BYTES = 2_000, 5_000
    os.fsync = lambda _: None
    _pack_part(*arguments)


def slow_part(*arguments):
    packing._write = lambda *args: time.sleep(0.1) or _write(*args)
    fast_part(*arguments)


def deadly_part(place, *arguments):
    """The process is killed at the sixth batch of part 1, once."""
    calls = itertools.count()

    def write(*args):
        if arguments[-1] == 1 and next(calls) == 5 and not place.exists():
            place.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        _write(*args)

    packing._write = write
    fast_part(*arguments)


def main(tokenizer, out, how, *texts):
    joint_packing._pack_part = {"slow": slow_part, "fast": fast_part}[how]
    os.fsync = lambda _: None
    ranks = join()
    joint_packing.pack_jointly(
        Corpus.open(texts), Tokenizer.load(tokenizer), out, 3, 2, ranks=ranks, **OPTIONS
    )
    ranks.leave()


if __name__ == "__main__":
    import part_processes  # whose functions pickle finds in other processes

    part_processes.main(*sys.argv[1:])
