"""A campaign of damage: each object of a small repository is changed in every way there is, and commands are run on it.

Of each damage these must hold, whatever it is:

* no traceback, no endless loop, no huge allocation, and one clear line if a command can't go on;
* `check` finds it, and names the object;
* `restore` brings nothing that is not what was backed up, and says so if it brings less;
* when the object is put back, all is well again: no command has done harm.

The repository is the one of `tests/bad_input`: two snapshots, and one object at least of each kind.
"""

from __future__ import annotations

import gc
import random
import resource
import shutil
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.bad_input.stage import Stage
from tests.fault_harness import contents, objects, put_in_place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KINDS = ("config", "keys", "removals", "leases", "trash", "removed", "index", "snapshots", "packs")
# What nothing can tell from what is meant to be: these come and go, or are the only trace of what they say. What a lost
# log of removed key slots means is told in docs/security.md.
UNTOLD = {(kind, "deleted") for kind in ("removals", "leases", "trash", "removed")}
# The new line at its end is not what counts.
UNTOLD |= {("removals", "cut by 1")}
# `check` ends otherwise where there is no repository any more, or another one.
CODES = {("config", "deleted"): (10,), ("config", "foreign"): (1,), ("config", "version"): (1, 4)}
# Far above what a command takes with one worker, and far below what damaged numbers can claim (MiB).
MOST_MIB = 150


@dataclass(slots=True)
class Tally:
    """What was tried, by kind of object and by what was done to it."""

    tried: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"damages tried: {sum(self.kinds.values()):,}"]
        for name, counter in (("by kind", self.kinds), ("by way", self.tried), ("restore ended with", self.codes)):
            lines.append(f"  {name}: " + ", ".join(f"{key} {count:,}" for key, count in sorted(counter.items())))
        return "\n".join(lines)


class Campaign:
    """Damages the objects of one stage. `density`: in how many places of each object a bit is flipped, 0 for all."""

    def __init__(self, home: Path, *, density: int, seed: int = 0) -> None:
        self.stage = Stage(home)
        self.stage.reset()
        self.run = self.stage.run
        self.density, self._random = density, random.Random(seed)
        self.tally = Tally()
        # Now this user has seen both snapshots; and the base of memory is known.
        self.run("check", "--workers", "1")
        self._restored(0)
        self._base_mib = peak_mib()

    def of_kind(self, kind: str) -> list[Path]:
        """The objects of a kind; in keys/ lie two."""
        repository = self.run.repository
        if kind not in ("keys", "removals"):
            return objects(repository, kind)
        return [
            path for path in objects(repository, "keys") if path.name.startswith("removed-") == (kind == "removals")
        ]

    def damages(self, kind: str, path: Path) -> Iterator[tuple[str, bytes | None]]:
        """(what was done, what stands in the object's place): None if nothing does."""
        data = path.read_bytes()
        yield "deleted", None
        yield "emptied", b""
        for cut in (1, 16, 17, len(data) // 2, len(data) - 64, len(data) - 1):
            if 0 < cut < len(data):
                yield f"cut by {cut}" if cut < 64 else "cut short", data[:-cut]
        yield "longer", data + data[:17]
        yield "zeros", bytes(len(data))
        yield "turned", data[::-1]
        for other in self.of_kind(kind):
            if other != path:
                yield "swapped", other.read_bytes()
        relative = path.relative_to(self.run.repository)
        foreign = [each for each in objects(self.stage.other, relative.parts[0]) if self._is_of(kind, each)]
        yield from (("foreign", each.read_bytes()) for each in foreign[:2])
        for at in self._places(len(data)):
            yield "a bit", data[:at] + bytes([data[at] ^ (1 << self._random.randrange(8))]) + data[at + 1 :]

    def _is_of(self, kind: str, path: Path) -> bool:
        return kind not in ("keys", "removals") or path.name.startswith("removed-") == (kind == "removals")

    def _places(self, size: int) -> list[int]:
        """Where bits are flipped: everywhere, or in some places spread over all, the ends among them."""
        if not self.density or self.density >= size:
            return list(range(size))
        step = size / self.density
        return sorted({min(size - 1, int(step * (n + self._random.random()))) for n in range(self.density)})

    def run_kind(self, kind: str) -> None:
        """All damages to all objects of a kind."""
        for path in self.of_kind(kind):
            for how, body in self.damages(kind, path):
                self.one(kind, path, how, body)

    def one(self, kind: str, path: Path, how: str, body: bytes | None) -> None:
        """One damage."""
        self.tally.tried[how] += 1
        self.tally.kinds[kind] += 1
        data = path.read_bytes()
        what = f"{kind} {path.name}: {how}"
        self._forget_cache()
        try:
            if body is None:
                path.unlink()
            else:
                put_in_place(path, body)
            self._check(kind, path, how, what)
            self._restore(kind, what)
        finally:
            put_in_place(path, data)
        gc.collect()  # a command is a process, as a rule, and leaves its cycles lying about
        assert peak_mib() - self._base_mib < MOST_MIB, what

    def _check(self, kind: str, path: Path, how: str, what: str) -> None:
        allowed = CODES.get((kind, how), (4,))
        if kind == "config" and how not in ("deleted", "foreign"):
            allowed = (1, 4, 10)  # it may say that another version, or somebody else, wrote it
        if (kind, how) in UNTOLD:
            allowed = (0,)
        # What needs no reading of packs is found without it.
        fast = [] if kind == "packs" else ["--fast"]
        outcome = self.run("check", *fast, "--workers", "1", codes=tuple(range(14)))
        assert outcome.code in allowed, f"{what}: {outcome}"
        if outcome.code == 4 and how != "deleted" and kind != "config":
            assert (path.name[:8] if kind == "keys" else path.name) in outcome.stderr, f"{what}: {outcome}"

    def _restore(self, kind: str, what: str) -> None:
        found, code = self._restored(0, 1, 3, 10, 12)
        self.tally.codes[str(code)] += 1
        expected = self.stage.expected
        if kind != "snapshots":  # an older one may be the latest then, and the user is told
            assert found.items() <= expected.items(), what
            assert code != 0 or found == expected, what

    def _restored(self, *codes: int) -> tuple[dict[str, bytes | str], int]:
        target = self.stage.home / "target"
        shutil.rmtree(target, ignore_errors=True)
        code = self.run("restore", "latest", "--to", target, "--workers", "1", codes=codes).code
        return contents(target), code

    def _forget_cache(self) -> None:
        shutil.rmtree(self.stage.home / "cache", ignore_errors=True)


def peak_mib() -> int:
    """The most memory this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
