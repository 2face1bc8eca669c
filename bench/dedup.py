"""What ten versions of an edited tree take in a repository: the scenario of the data set *edits*."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.contenders import Contender, Place, version_of
from bench.edits import VERSIONS, EditedTree
from bench.measure import CommandFailed, run, stored_bytes
from bench.results import Dedup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bench.results import Run


def measure_dedup(
    run_: Run, contenders: Sequence[Contender], folder: Path, seeds: Sequence[int], *,
    scale: float = 1.0, sample: Path | None = None, versions: int = VERSIONS, tell: Callable[[str], None] = print,
) -> list[Dedup]:  # fmt: skip
    """Back up each version of each seed's tree with every contender; a line each."""
    able = [contender for contender in contenders if contender.again]
    lines = {
        contender.name: Dedup(
            run=run_, seeds=list(seeds), versions=versions, contender=contender.name, version=version_of(contender),
            first_bytes=[], stored_bytes=[],
        )
        for contender in able
    }  # fmt: skip
    for seed in seeds:
        tree = EditedTree(folder / "edited", seed, scale=scale, sample=sample)
        places = {contender.name: Place(folder / contender.name) for contender in able}
        alive = [contender for contender in able if _create(contender, places[contender.name], lines[contender.name])]
        for serial in range(versions):
            if serial:
                tree.advance()
            alive = [c for c in alive if _backup(c, places[c.name], tree.root, serial, lines[c.name])]
        for contender in able:
            line = lines[contender.name]
            done = contender in alive
            line.stored_bytes.append(stored_bytes(places[contender.name].repository) if done else None)
            if len(line.first_bytes) < len(line.stored_bytes):
                line.first_bytes.append(None)
            places[contender.name].remove()
            tell(f"  edits    seed {seed:<7} {contender.name:15} {(line.stored_bytes[-1] or 0) / 1e6:8.1f} MB stored")
    return list(lines.values())


def _create(contender: Contender, place: Place, line: Dedup) -> bool:
    place.make()
    try:
        for template in contender.create:
            run(contender.command(template, place), place.folder / "create.log", sample=False)
    except CommandFailed as error:
        line.faults.append(str(error))
        return False
    return True


def _backup(contender: Contender, place: Place, source: Path, serial: int, line: Dedup) -> bool:
    command = contender.command(contender.backup, place, source=source, serial=serial)
    try:
        run(command, place.folder / "backup.log", sample=False)
    except CommandFailed as error:
        line.faults.append(str(error))
        return False
    if serial == 0:
        line.first_bytes.append(stored_bytes(place.repository))
    return True
