"""Where files are cut into chunks: FastCDC's normalised cuts over a keyed, windowed gear hash.

The cut is after the first *hard* candidate at an offset in [min, avg), else after the first *easy* one in [avg, max),
else at max. Offsets count from the chunk's first byte, so a chunk that is not a file's last is longer than min. Which
positions are candidates depends on the 64 bytes before each alone (`_gear.pyx`).

Source: Xia et al., "FastCDC: a Fast and Efficient Content-Defined Chunking Approach for Data Deduplication", USENIX
ATC 2016. Pool workers import this module: it needs the kernel and blake3 only.
"""

from __future__ import annotations

from blake3 import blake3

from coffret.engine._gear import Gear
from coffret.engine.errors import Damaged, UnsupportedVersion

FASTCDC_GEAR64 = "fastcdc-gear64"
MIN_BYTES, MAX_BYTES = 64, 64 << 20
# How many high bits of a candidate's hash are zero, below and above avg, beside log2(avg). Measured on 600 MB of /usr
# with the default sizes, each edit an insertion, deletion or replacement at a random place; all in MiB:
#     bits                     mean chunk   stored anew for an edit of ≤ 200 bytes   of 30 KB to 3 MB
#      0, -2                      1.10                    1.13                          2.0
#     +1, -1                      1.43                    1.55                          2.3
#     +2, -2                      1.23                    1.22                          2.4
#     +3, -3                      1.11                    1.03                          3.4, back at old cuts too late
#      0,  0, not normalised      1.63                    2.05                          2.6
HARD_BITS, EASY_BITS = 0, -2


def check_parameters(name: str, min_bytes: int, avg_bytes: int, max_bytes: int) -> None:
    """Refuse a chunker that this program does not have, or sizes that no `create` writes.

    :raises UnsupportedVersion: if the name is not known
    :raises Damaged: if the sizes, in bytes, are absurd
    """
    if name != FASTCDC_GEAR64:
        raise UnsupportedVersion(f"the repository cuts files with {name!r}, which this version does not know")
    if not MIN_BYTES <= min_bytes < avg_bytes < max_bytes <= MAX_BYTES or avg_bytes & (avg_bytes - 1):
        raise Damaged(f"the repository's chunk sizes make no sense: {min_bytes}, {avg_bytes}, {max_bytes} bytes")


class Chunker:
    """Cuts streams into chunks. It has no state of its own, so one may serve many files and threads.

    `key` is the repository's chunker key, 32 bytes.

    :raises UnsupportedVersion, Damaged: as `check_parameters` does
    """

    def __init__(self, name: str, min_bytes: int, avg_bytes: int, max_bytes: int, key: bytes) -> None:
        check_parameters(name, min_bytes, avg_bytes, max_bytes)
        bits = avg_bytes.bit_length() - 1
        table = blake3(b"coffret gear table", key=key).digest(length=256 * 8)
        self._gear = Gear(table, bits + HARD_BITS, bits + EASY_BITS, min_bytes, avg_bytes, max_bytes)

    def cut(self, data: bytes | bytearray | memoryview, *, start: int = 0, final: bool) -> list[int]:
        """Lengths in bytes of the chunks in `data[start:]`, which begins at a chunk's first byte.

        Unless `final`, only those chunks that are certain whatever follows; the rest is to be given again, with more
        behind it. If `final`, the rest is the last chunk; no data has no chunks.
        """
        lengths = self._gear.lengths(data, start)
        if final and (rest := memoryview(data).nbytes - start - sum(lengths)):
            lengths.append(rest)
        return lengths
