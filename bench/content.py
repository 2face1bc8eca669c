"""Seeded file contents: random bytes, and text that compresses about as source code does."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Counts the changes of what is generated here: a data set is built anew when it is of another.
GENERATOR = 2
_STEP_BYTES = 1 << 20
_SYLLABLES = [first + second for first in "bcdfghklmnprstvw" for second in "aeiou"]
_MARKS = ["(", ")", ":", " = ", ", ", ".", "[", "]", " + ", "    ", "self.", "return ", "if ", "for ", " in ", '"', "_"]
# One of four draws is a run of up to 16 lines from a fixed stock, the others are a line made afresh. So zstd level 1
# takes as long for it as for source trees, and makes it as small, in blocks of a MiB: 343 MB/s and a ratio of 4.2; in
# the same run crates had 366 and 4.4, /usr/include 346 and 4.0, Go modules 375 and 2.9. Drawing single lines took it
# 40 % longer.
_STOCK_LINES, _STOCK_SHARE, _STOCK_RUN = 4_000, 0.25, 16


def random_blocks(seed: str, size_bytes: int) -> Iterator[bytes]:
    """Incompressible bytes, `size_bytes` altogether."""
    generator = random.Random(seed)
    for start in range(0, size_bytes, _STEP_BYTES):
        yield generator.randbytes(min(_STEP_BYTES, size_bytes - start))


class SourceText:
    """An endless stream of source-like lines; the same seed gives the same text."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        words = ["".join(self._random.choices(_SYLLABLES, k=self._random.randint(1, 5))) for _ in range(3_000)]
        self._tokens = words + _MARKS * 30
        # Zipf's law: the n-th most frequent token has a weight of 1/n; marks are spread among them.
        self._random.shuffle(self._tokens)
        self._weights = list(itertools.accumulate(1 / rank for rank in range(3, len(self._tokens) + 3)))
        self._stock = [self._line() for _ in range(_STOCK_LINES)]
        self._rest = b""

    def take(self, size_bytes: int) -> bytes:
        """The next `size_bytes` of the stream; it may end amid a line."""
        parts, have = [self._rest], len(self._rest)
        while have < size_bytes:
            parts.append(b"".join(self._draw() for _ in range(200)))
            have += len(parts[-1])
        whole = b"".join(parts)
        self._rest = whole[size_bytes:]
        return whole[:size_bytes]

    def blocks(self, size_bytes: int) -> Iterator[bytes]:
        """The next `size_bytes`, in pieces."""
        for start in range(0, size_bytes, _STEP_BYTES):
            yield self.take(min(_STEP_BYTES, size_bytes - start))

    def _line(self) -> bytes:
        count = self._random.randint(1, 14)
        tokens = self._random.choices(self._tokens, cum_weights=self._weights, k=count)
        return ("    " * self._random.randint(0, 4) + "".join(tokens) + "\n").encode()

    def _draw(self) -> bytes:
        if self._random.random() >= _STOCK_SHARE:
            return self._line()
        at = self._random.randrange(_STOCK_LINES)
        return b"".join(self._stock[at : at + self._random.randint(1, _STOCK_RUN)])
