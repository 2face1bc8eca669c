"""Types of the compiled inner loop; what they mean is in `_scan.pyx`."""

import os
from collections.abc import Iterable, Iterator

from coffret.engine.catalog import Cutter
from coffret.engine.catalog_reader import Run
from coffret.engine.filters import FilterScope
from coffret.engine.messages import ScanPage
from coffret.engine.scan import ScanOptions

def entry_weight(name: bytes, size: int, mode: int) -> int: ...

class Directory:
    def __init__(self, path: bytes | None = None) -> None: ...
    def __len__(self) -> int: ...
    def read(self, fd: int) -> None: ...
    def put(self, name: bytes, status: os.stat_result) -> None: ...
    def list_names(self) -> list[bytes]: ...

class ReadAhead:
    def __len__(self) -> int: ...
    def push(self, directories: list[Directory]) -> None: ...
    def pop(self) -> Directory: ...
    def serve(self) -> None: ...
    def close(self) -> None: ...

class EntryLoop:
    page: ScanPage
    files: int
    size_bytes: int
    def __init__(self, page: ScanPage, cutter: Cutter, options: ScanOptions) -> None: ...
    def entries(
        self,
        found: Directory,
        directory: bytes,
        prefix: bytes,
        real: bytes,
        origin: bytes,
        scope: FilterScope | None,
        device: int,
        typed: bool,
        runs: Iterable[Run],
        opening: int,
        deeper: list[tuple[bytes, FilterScope | None, int]],
    ) -> Iterator[ScanPage]: ...
