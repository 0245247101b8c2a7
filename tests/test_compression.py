"""All of a compressed file is read, in bounded memory, or an error says that it is damaged."""

import gzip
import io
import lzma
import random
import subprocess
import sys

import pytest
import zstandard

from ant5m.data.compression import BLOCK, blocks
from ant5m.errors import UserError

PARTS = [b"first part\n" * 50, b"", random.Random(0).randbytes(300_000), b"last\n" * 400_000]
TEXT = b"".join(PARTS)
PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def read(suffix, raw):
    pieces = list(blocks(f"a.txt{suffix}", io.BytesIO(raw)))
    assert max(map(len, pieces), default=0) <= BLOCK
    return b"".join(pieces)


@pytest.mark.parametrize("suffix", PACK)
def test_every_stream_is_read(suffix):
    assert read(suffix, PACK[suffix](TEXT)) == TEXT
    assert read(suffix, b"".join(map(PACK[suffix], PARTS))) == TEXT


def test_plain():
    assert read("", TEXT) == TEXT


def test_padding_between_xz_streams():
    packed = [lzma.compress(part) for part in PARTS]
    for padding in (4, 8, 1 << 16, (1 << 17) + 4):
        zeros = bytes(padding)
        assert read(".xz", zeros.join(packed)) == TEXT
        assert read(".xz", b"".join(packed) + zeros) == TEXT
    assert read(".xz", lzma.compress(TEXT, lzma.FORMAT_ALONE)) == TEXT
    for padding in (1, 2, 3, 5):
        for raw in (bytes(padding).join(packed), packed[0] + bytes(padding)):
            with pytest.raises(UserError, match="damaged"):
                read(".xz", raw)


@pytest.mark.parametrize("suffix", PACK)
def test_damage_anywhere_is_noticed(suffix):
    """In any byte of any stream: the text comes back, or an error says so."""
    chance = random.Random(1)
    pack = (
        (lambda part: zstandard.ZstdCompressor(write_checksum=True).compress(part))
        if suffix == ".zst"
        else PACK[suffix]
    )
    packed = [pack(part) for part in (PARTS[0], PARTS[2][:2_000], PARTS[0])]
    text = PARTS[0] + PARTS[2][:2_000] + PARTS[0]
    raw = b"".join(packed)
    assert read(suffix, raw) == text
    noticed = 0
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        try:
            assert read(suffix, bytes(damaged)) == text  # a name or time in gzip's header
        except UserError:
            noticed += 1
    assert noticed > 280
    for length in range(1, len(raw)):
        if length in (len(packed[0]), len(packed[0] + packed[1])):
            continue
        with pytest.raises(UserError, match="damaged"):
            read(suffix, raw[:length])
    with pytest.raises(UserError, match="damaged"):
        read(suffix, raw + b"garbage")


BOMB = """
import resource, sys
from ant5m.data.compression import blocks
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), -1))
with open(sys.argv[1], "rb") as file:
    print(sum(map(len, blocks(sys.argv[1], file))))
"""


@pytest.mark.parametrize("suffix", PACK)
def test_a_bomb_takes_bounded_memory(tmp_path, suffix):
    size = 1 << 29
    path = tmp_path / f"bomb.txt{suffix}"
    if suffix == ".zst":
        # Blocks of one repeated byte, as small as the format allows. Source: RFC 8878, section 3.1.1.
        block = (2 | (128 * 1024) << 3).to_bytes(3, "little") + b"a"
        last = (3 | (128 * 1024) << 3).to_bytes(3, "little") + b"a"
        count = size >> 17
        path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x38" + block * (count - 1) + last)
    else:
        stream = PACK[suffix](b"a" * (size >> 4))
        path.write_bytes(stream * 16)
    assert path.stat().st_size < 1_000_000
    limit = 400 << 20
    done = subprocess.run([sys.executable, "-c", BOMB, str(path), str(limit)], capture_output=True, text=True)
    assert done.stdout == f"{size}\n", done.stderr[-500:]
