"""The index mirror: a local copy of what the repository's index objects say, in the user's cache.

It answers where a chunk lies without holding chunks in memory, opens in a time that does not depend on their number,
is shared by processes, and can be lost at any time: what it lacks is fetched and merged again (`reconcile`, `merge`).
What it says is always seen through a *view*: the index objects that its owner found listed, each *sure* or, while
its attempt has not ended, *pending*. Whatever else the files hold, or others do to them, is not seen. Each attempt,
and the readers of an open repository together, have one of their own (`Mirror.view`): what is sure for the one that
wrote it is pending for another.

Everything runs in threads: changes step by step in one, look-ups beside them in another on immutable files, so that a
look-up never waits for a merge. A hop to a thread costs some 60 µs, so calls take many ids.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from blake3 import blake3

from coffret.connectors.threads import outlast
from coffret.engine.mirror_store import MirrorBusy, Store, reported
from coffret.engine.mirror_view import Location, Sifted, View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator, KeysView, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from coffret.engine.mirror_run import Run
    from coffret.engine.records import IndexObject

__all__ = ["Location", "Mirror", "MirrorBusy", "Sifted", "attempt_of", "mirror_folder"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_NO_PACKS: frozenset[bytes] = frozenset()
# Of a run that another host may fold away, pages that were not read yet are gone: touching them kills the process.
_NETWORK_FILE_SYSTEMS = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "smb3",
    "smbfs",
}


class _Files:
    """What the views of a mirror share: its files, the turn to change them, and the threads that work on them.

    `why_private`: why they lie in a temporary folder, removed at the end; "" if they do not.
    """

    def __init__(
        self, store: Store, private: tempfile.TemporaryDirectory[str] | None = None, why_private: str = ""
    ) -> None:
        self.store, self.private, self.why_private = store, private, why_private
        self.changing = anyio.Lock()
        self.change_thread, self.look_thread = anyio.CapacityLimiter(1), anyio.CapacityLimiter(1)

    @classmethod
    def at(cls, folder: Path | None, repository_id: str) -> _Files:
        """Those in a folder, or private ones."""
        why = "no cache is wanted"
        if folder is not None:
            kind = file_system(folder)
            if not is_network(kind):
                try:
                    return cls(Store(folder, repository_id))
                except OSError as error:
                    why = f"{folder}: {error.strerror}"
            else:
                why = f"{folder} is on a network file system ({kind})"
        return cls.apart(repository_id, why)

    @classmethod
    def apart(cls, repository_id: str, why: str) -> _Files:
        """Private ones, in a new temporary folder."""
        private = tempfile.TemporaryDirectory(prefix="coffret-mirror-")
        return cls(Store(Path(private.name), repository_id), private, why)


class Mirror:
    """The mirror of one repository at one location, as one of its users sees it. Methods may be called concurrently."""

    def __init__(self, files: _Files, repository_id: str, *, owner: bool = True) -> None:
        self._files, self._repository_id = files, repository_id
        self._owner = owner  # whether to remove private files at the end
        self._view = View({}, (), ())
        self._epoch, self._losses, self._certain = b"", 0, False
        self._sound: frozenset[bytes] = frozenset()
        #: Whether all packs were found in the storage, as far as is known; and those that are not to be relied on.
        self.audited = False
        self.bad_packs: frozenset[bytes] = frozenset()
        #: Why the files shared with other processes were left (see `leave`); "" if they were not.
        self.left = ""
        #: Lists the repository anew and brings this view up to date; for who does not find what must be there.
        self.relist: Callable[[], Awaitable[None]] | None = None
        self._settled: frozenset[str] = frozenset()  # attempts whose index objects are sure
        self._pending: set[str] = set()  # index objects of all other attempts
        self._gone: dict[str, int] = {}  # index objects to forget at the next change, with their first section

    @classmethod
    async def open(cls, folder: Path | None, repository_id: str) -> Mirror:
        """Open the mirror in a folder of its own (`mirror_folder`), or, with None, a private one.

        A private one is taken too where the folder can't be written or lies on a network file system. Nothing is read
        before `reconcile`.
        """
        return cls(await anyio.to_thread.run_sync(_Files.at, folder, repository_id), repository_id)

    def view(self) -> Mirror:
        """Another view of the same files, which goes by nothing yet; to be closed before this one."""
        return Mirror(self._files, self._repository_id, owner=False)

    @property
    def why_private(self) -> str:
        """Why the mirror is a private one in a temporary folder, removed at the end; "" if it is not."""
        return self._files.why_private

    async def leave(self, why: str) -> None:
        """Go on with private files, since those shared with other processes can't be had; `reconcile` follows."""
        self._view, self._gone = View({}, (), ()), {}
        self._files = await anyio.to_thread.run_sync(_Files.apart, self._repository_id, why)
        self._owner, self.left = True, why

    @property
    def seen(self) -> View:
        """What look-ups go by now: it is never changed, only replaced."""
        return self._view

    @property
    def objects(self) -> KeysView[str]:
        """Names of the index objects that look-ups go by."""
        return self._view.objects.keys()

    async def reconcile(
        self, listed: Collection[str], *, settled: Collection[str] = (), revoked: Collection[str] = ()
    ) -> list[str]:
        """Go by exactly these index objects from now on; return the names of those to be fetched and merged.

        `listed`: names of all index objects the repository has now, `index/<attempt>-<n>`. `settled`: attempts (as in
        the names) that have ended well, and the caller's own. `revoked`: attempts ended by a tombstone, whose index
        objects are ignored. Those of all other attempts are pending: see `sift`.

        :raises CoffretError: if the cache can't be read
        """
        async with self._files.changing:
            with reported(self._files.store.folder):
                manifest, runs = await self._alone(self._files.store.load)
            self._settled = frozenset(settled)
            self._pending = {name for name in listed if attempt_of(name) not in self._settled}
            wanted = {name for name in listed if attempt_of(name) not in revoked}
            self._gone = {name: first for name, (first, _) in manifest.objects.items() if name not in wanted}
            self._epoch, self._losses, self._certain = manifest.epoch, manifest.losses, True
            self._sound, self.audited, self.bad_packs = (
                frozenset(manifest.sound),
                manifest.audited,
                frozenset(manifest.bad),
            )
            await self._see({name: span for name, span in manifest.objects.items() if name in wanted}, runs)
            return sorted(wanted - manifest.objects.keys())

    async def lacking(self, listed: Collection[str]) -> list[str]:
        """Names of those index objects that `reconcile` would want to be fetched; nothing is gone by for it.

        :raises CoffretError: if the cache can't be read
        """
        async with self._files.changing:
            with reported(self._files.store.folder):
                manifest, _ = await self._alone(self._files.store.load)
        return [name for name in listed if name not in manifest.objects]

    async def merge(self, items: Sequence[tuple[str, IndexObject]]) -> None:
        """Merge index objects, by name, and go by them; forget for good what `reconcile` found to be gone.

        All or nothing, also when the process is killed. One call with many objects is cheaper than many calls; the
        objects are held in memory, some 64,000 rows of 90 bytes beside them.

        :raises Damaged: if an index object holds impossible numbers
        :raises MirrorBusy: if another process does not let go of the cache
        :raises OutOfSpace: if there is no room for the cache
        :raises CoffretError: if the cache can't be used
        """
        async with self._files.changing:
            if not items and not self._gone:
                return
            manifest, runs = await self._drive(self._files.store.change(items, self._gone))
            # What others lose meanwhile may be what this view goes by.
            self._certain = self._certain and manifest.losses == self._losses + bool(self._gone)
            self._losses, self._gone = manifest.losses, {}
            self._sound, self.audited = frozenset(manifest.sound), manifest.audited
            # Another process may have begun the mirror anew, or forgotten what it did not find listed.
            seen = self._view.objects
            if manifest.epoch != self._epoch:
                seen = {name: span for name, span in manifest.objects.items() if name in seen}
                self._epoch, self._certain = manifest.epoch, False
            added = {name: manifest.objects[name] for name, _ in items}
            self._pending |= {name for name in added if attempt_of(name) not in self._settled}
            await self._see({**seen, **added}, runs)

    def is_sound(self, root: bytes) -> bool:
        """Whether every chunk of the catalog with this root (its id) is located, so that it needs no look-ups."""
        return self._certain and root in self._sound

    async def vouch(self, root: bytes = b"", *, audited: bool = False) -> None:
        """Remember a catalog as sound, and that all packs were found; not if index objects were lost meanwhile.

        :raises CoffretError: if the cache can't be used
        """
        audited = audited and not self.audited
        if not self._certain or not (audited or (root and root not in self._sound)):
            return
        async with self._files.changing:
            await self._drive(self._files.store.vouch(self._epoch, self._losses, root, audited=audited))
        self._sound, self.audited = self._sound | {root}, self.audited or audited

    async def doubt(self) -> None:
        """Have everything made sure of anew: something was missing that must be there.

        :raises CoffretError: if the cache can't be used
        """
        self._certain = self.audited = False
        async with self._files.changing:
            await self._drive(self._files.store.doubt())

    async def known_bad(self) -> frozenset[bytes]:
        """The packs that are remembered as damaged; nothing is gone by for it.

        :raises CoffretError: if the cache can't be read
        """
        async with self._files.changing:
            with reported(self._files.store.folder):
                manifest, _ = await self._alone(self._files.store.load)
        return frozenset(manifest.bad)

    async def judge(self, bad: frozenset[bytes], good: frozenset[bytes]) -> None:
        """Remember packs as damaged: what lies only there is stored again by the next backup; forget of `good` ones.

        :raises CoffretError: if the cache can't be used
        """
        async with self._files.changing:
            manifest = await self._drive(self._files.store.judge(bad, good))
        self.bad_packs = (self.bad_packs | frozenset(manifest.bad)) - good

    def sift_here(self, ids: Sequence[bytes], *, marked: frozenset[bytes]) -> Sifted:
        """`sift` for who runs in a thread already."""
        return self._view.sift(ids, marked)

    async def sift(self, ids: Sequence[bytes], *, marked: frozenset[bytes] = _NO_PACKS) -> Sifted:
        """Tell which chunks have to be stored, and which locations adopted. Chunks only in `marked` packs are absent.

        0.5 to 1 µs a chunk and run where nothing is marked or pending, and some 3 µs more for a hit otherwise.
        """
        return await self._look(lambda view: view.sift(ids, marked))

    async def locate(self, ids: Sequence[bytes], *, avoid: frozenset[bytes] = _NO_PACKS) -> list[Location | None]:
        """Where each chunk lies, in a pack that is not bad nor to `avoid` if there is one; None if nowhere."""
        avoid |= self.bad_packs
        return await self._look(lambda view: view.locate(ids, avoid))

    async def locate_all(self, chunk_id: bytes) -> list[Location]:
        """Every location of a chunk, for trying another when one is damaged."""
        return await self._look(lambda view: [location for _, location in view.locations(chunk_id, view.runs)])

    async def packs(self) -> AsyncIterator[list[tuple[bytes, int]]]:
        """Iterate over lists of (pack id, size in bytes); a pack named by several index objects comes as often."""
        batches = self._view.packs()
        while (
            batch := await anyio.to_thread.run_sync(next, batches, None, limiter=self._files.look_thread)
        ) is not None:
            yield batch

    async def close(self) -> None:
        """Remove a private mirror; a shared one needs no closing."""
        with anyio.CancelScope(shield=True):
            async with self._files.changing:
                self._view = View({}, (), ())
                if self._owner and self._files.private is not None:
                    await self._alone(self._files.private.cleanup)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _see(self, objects: Mapping[str, tuple[int, int]], runs: Sequence[Run]) -> None:
        self._view = await self._alone(View, objects, self._pending, runs)

    async def _look(self, look: Callable[[View], _T]) -> _T:
        return await anyio.to_thread.run_sync(look, self._view, limiter=self._files.look_thread)

    async def _drive(self, steps: Generator[None, None, _T]) -> _T:
        """Run a change to its end, step by step: cancelled between two, it gives up without a trace."""
        try:
            while True:
                ended = await self._alone(_advance, steps)
                if ended is not None:
                    return ended[0]
        finally:
            steps.close()

    async def _alone(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a call in the thread for changes, and return only when it is over, however the task is cancelled.

        `anyio.to_thread` waits when an anyio scope is cancelled, but not when a task is (`asyncio.timeout`,
        `Task.cancel`): then a step would still be at work when its generator is closed, or the next change begins.
        """
        step = anyio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._files.change_thread)
        return await outlast(asyncio.ensure_future(step))


def _advance(steps: Generator[None, None, _T]) -> tuple[_T] | None:
    try:
        next(steps)
    except StopIteration as end:
        return (end.value,)
    return None


def attempt_of(name: str) -> str:
    """The attempt an index object's name begins with."""
    return name.rpartition("/")[2].rpartition("-")[0]


def mirror_folder(cache: Path, repository_id: str, location: str) -> Path:
    """The folder of a mirror: by repository and location, since a clone has the id of its original."""
    return cache / f"{repository_id}-{blake3(location.encode()).hexdigest(8)}"


def is_network(file_system_type: str) -> bool:
    """Whether a file system of this type may be changed by another host, as far as its type tells."""
    remote = file_system_type.startswith("fuse.") and "overlay" not in file_system_type
    return remote or file_system_type in _NETWORK_FILE_SYSTEMS


def file_system(folder: Path) -> str:
    """Type of the file system a folder lies on, or will lie on when it is made; "" if the system does not tell."""
    try:
        device = next(path for path in (folder, *folder.parents) if path.exists()).stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    except (OSError, StopIteration):
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == number:
            return kind.split()[0]
    return ""
