"""What ten versions of an edited tree take in a repository: the scenario of the data set *edits*."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.contenders import Place, version_of
from bench.edits import VERSIONS, EditedTree
from bench.measure import CommandFailed, run, stored_bytes
from bench.results import Dedup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bench.contenders import Contender
    from bench.results import Run


def measure_dedup(
    run_: Run,
    contenders: Sequence[Contender],
    folder: Path,
    seeds: Sequence[int],
    *,
    scale: float = 1.0,
    sample: Path | None = None,
    versions: int = VERSIONS,
    tell: Callable[[str], None] = print,
) -> list[Dedup]:
    """Back up each version of each seed's tree with every contender; a line each."""
    lines = [
        Dedup(
            run=run_,
            seeds=list(seeds),
            versions=versions,
            contender=contender.name,
            version=version_of(contender),
            first_bytes=[],
            stored_bytes=[],
        )
        for contender in contenders
    ]
    for seed in seeds:
        sizes = _one_seed(
            contenders, lines, folder, EditedTree(folder / "edited", seed, scale=scale, sample=sample), versions
        )
        for contender, line, (first, last) in zip(contenders, lines, sizes, strict=True):
            line.first_bytes.append(first)
            line.stored_bytes.append(last)
            tell(f"  edits    seed {seed:<7} {contender.name:15} {(last or 0) / 1e6:8.1f} MB stored")
    return lines


def _one_seed(
    contenders: Sequence[Contender], lines: Sequence[Dedup], folder: Path, tree: EditedTree, versions: int
) -> list[tuple[int | None, int | None]]:
    """Bytes stored after the first and after the last version, of each contender."""
    places = [Place(folder / contender.name) for contender in contenders]
    works = [_attempt(*job) for job in zip(contenders, places, lines, strict=True)]
    first: list[int | None] = []
    for serial in range(versions):
        if serial:
            tree.advance()
        for number, job in enumerate(zip(contenders, places, lines, strict=True)):
            works[number] = works[number] and _attempt(*job, tree.root, serial)
        if serial == 0:
            first = _sizes(places, works)
    last = _sizes(places, works)
    for place in places:
        place.remove()
    return list(zip(first, last, strict=True))


def _sizes(places: Sequence[Place], works: Sequence[bool]) -> list[int | None]:
    return [stored_bytes(place.repository) if good else None for place, good in zip(places, works, strict=True)]


def _attempt(contender: Contender, place: Place, line: Dedup, source: Path | None = None, serial: int = 0) -> bool:
    """Make the repository, or back up into it if there is a source; whether that worked."""
    try:
        if source is None:
            contender.make(place)
        else:
            command = contender.command(contender.backup, place, source=source, serial=serial)
            run(command, place.folder / "backup.log", sample=False)
    except CommandFailed as error:
        line.faults.append(str(error))
        return False
    return True
