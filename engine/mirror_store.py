"""The mirror's folder: a manifest, the runs it names, and a lock for those who change them.

    manifest      magic, checksum, MessagePack: the index objects merged, and the runs; replaced by rename
    <token>.run   immutable (mirror_run.py); durable before a manifest names it
    lock          flock'ed while the manifest is changed

Readers take no lock: a manifest is read whole, and a run that is mapped stays readable when it is unlinked. A process
killed at any moment leaves the manifest of before or after, and perhaps files that the next change removes. Whatever
is missing, cut short, foreign or unreadable is forgotten with the index objects it came from: they are merged again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec
import xxhash

from coffret.connectors.localfiles import sync_folder
from coffret.engine.errors import CoffretError, OutOfSpace
from coffret.engine.mirror_fold import FreshRuns, fold, runs_to_fold
from coffret.engine.mirror_run import BadRun, Run, RunInfo, Span
from coffret.engine.state import make_private

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
    from pathlib import Path

    from coffret.engine.records import IndexObject

_MAGIC = b"coffret mirror 0"
_DIGEST_BYTES = 16
_MANIFEST, _LOCK = "manifest", "lock"
_LOCK_POLL_S = 0.02
# A change takes seconds, 20 at the very most: whoever holds the lock longer is stopped, or hangs.
LOCK_WAIT_S = 30.0
# One for each source of a machine, and some more; a catalog that is forgotten is only looked up once more.
_MAX_SOUND = 256
# Damaged packs that are remembered; who has more has lost the repository, and the next check finds the rest.
_MAX_BAD = 4096


class MirrorBusy(CoffretError):
    """Another process holds the lock of the cache and does not come to an end."""

    remedy = "end that process, name another folder with --cache-dir, or use --no-cache"


class Manifest(msgspec.Struct):
    """What the mirror holds. `objects`: name of an index object → its first section and how many it has.

    Sections are numbered by `next_section` and numbers are not used again, within an `epoch`: the life of a mirror
    from one beginning anew to the next.

    `losses`: how often index objects have disappeared. Since the last time: `sound` are the catalogs (ids of their
    roots, the latest last) of which every chunk is known to be located, and `audited` tells whether all packs were
    found in the storage. `bad` are packs that a check found to be damaged: what lies only there is not to be relied on.
    """

    repository_id: str
    epoch: bytes = b""
    next_section: int = 0
    objects: dict[str, tuple[int, int]] = {}
    runs: list[RunInfo] = []
    losses: int = 0
    sound: list[bytes] = []
    audited: bool = False
    bad: list[bytes] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Manifest).decode


class Store:
    """One mirror's folder. Not for several threads at once."""

    def __init__(self, folder: Path, repository_id: str) -> None:
        """Take a folder, which is made if it is missing.

        :raises OSError: if it can't be made or written to
        """
        self.folder = folder
        self._repository_id = repository_id
        self._runs: dict[bytes, Run] = {}
        # What the manifest file held when it was last read or written: most changes find it as they left it.
        self._known: tuple[bytes, Manifest] = (b"", self._empty())
        make_private(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "not writable", str(folder))

    def load(self) -> tuple[Manifest, list[Run]]:
        """Read the manifest and map its runs, largest first; what is not sound is left out of both.

        :raises OSError: if the folder can't be read
        """
        while True:
            data = self._read()
            manifest = self._parse(data)
            bad = []
            for info in manifest.runs:
                if info.token not in self._runs or not info.lies_in(self.folder):
                    try:
                        self._runs[info.token] = Run(self.folder, info)
                    except BadRun:
                        bad.append(info)
            # A run may have been folded away since the manifest was read: then there is another manifest.
            if not bad or self._read() == data:
                break
        if bad:
            manifest = _without_runs(manifest, bad)
        self._runs = {info.token: self._runs[info.token] for info in manifest.runs}
        return manifest, self._largest_first()

    def change(
        self, items: Sequence[tuple[str, IndexObject]], gone: Mapping[str, int]
    ) -> Generator[None, None, tuple[Manifest, list[Run]]]:
        """Merge index objects that are not there yet; forget those of `gone` that still have the given first section.

        All of it, or nothing, is seen by others and by whoever comes after a crash. Yields after each piece of work;
        closing the generator gives up and leaves no trace.

        :raises Damaged: if an index object holds impossible numbers
        :raises MirrorBusy: if another process does not give the lock back
        :raises OutOfSpace: if the folder's file system is full
        :raises CoffretError: if the folder can't be used, or a run is damaged; then the mirror is empty afterwards
        """
        written: list[RunInfo] = []
        with reported(self.folder):
            lock = yield from self._lock()
            try:
                manifest, runs = self.load()
                manifest = msgspec.structs.replace(manifest, objects=dict(manifest.objects))
                changed = _forget_objects(manifest, gone)
                fresh = FreshRuns(self.folder, manifest)
                for name, index in items:
                    if name not in manifest.objects:
                        changed = True
                        for info in fresh.add(name, index):
                            written.append(info)
                            yield
                written += fresh.flush()
                if not changed:
                    return manifest, self._largest_first()
                live = _liveness(manifest)
                runs += [Run(self.folder, info) for info in written]
                runs = [run for run in runs if any(map(live, run.info.spans))]
                if chosen := runs_to_fold(runs, live):
                    folded = yield from fold(self.folder, chosen, live)
                    written.append(folded)
                    runs = [run for run in runs if run not in chosen] + [Run(self.folder, folded)]
                manifest.runs = [run.info for run in runs]
                self._publish(manifest, {info.token for info in written})
                written.clear()
                self._runs = {run.info.token: run for run in runs}
                return manifest, self._largest_first()
            except BadRun:
                self._publish(self._empty(), set())  # else every change to come would meet it
                raise
            finally:
                for info in written:
                    (self.folder / info.file_name).unlink(missing_ok=True)
                os.close(lock)

    def doubt(self) -> Generator[None, None, None]:
        """What was known to be sound may not be."""
        with reported(self.folder):
            lock = yield from self._lock()
            try:
                self._publish(_doubted(self.load()[0]), set(), durable=True)
            finally:
                os.close(lock)

    def vouch(self, epoch: bytes, losses: int, root: bytes, *, audited: bool) -> Generator[None, None, None]:
        """Note a catalog as sound (if one is given), and that packs were found, unless anything was lost since."""
        with reported(self.folder):
            lock = yield from self._lock()
            try:
                manifest, _ = self.load()
                if (manifest.epoch, manifest.losses) == (epoch, losses):
                    sound = [known for known in manifest.sound if known != root] + ([root] if root else [])
                    audited = audited or manifest.audited
                    manifest = msgspec.structs.replace(manifest, sound=sound[-_MAX_SOUND:], audited=audited)
                    self._publish(manifest, set())
            finally:
                os.close(lock)

    def judge(self, bad: Set[bytes], good: Set[bytes]) -> Generator[None, None, Manifest]:
        """Note packs as damaged, and others as whole."""
        with reported(self.folder):
            lock = yield from self._lock()
            try:
                manifest, _ = self.load()
                judged = sorted((bad | set(manifest.bad)) - good)[:_MAX_BAD]
                if judged != manifest.bad:
                    manifest = msgspec.structs.replace(manifest, bad=judged)
                    self._publish(manifest, set(), durable=True)
                return manifest
            finally:
                os.close(lock)

    def _read(self) -> bytes:
        try:
            return (self.folder / _MANIFEST).read_bytes()
        except FileNotFoundError:
            return b""

    def _parse(self, data: bytes) -> Manifest:
        """The manifest that was stored, or an empty one if it is not sound, not ours, or of another version.

        Not to be changed: it is kept.
        """
        if data != self._known[0]:
            manifest = self._empty()
            body = memoryview(data)[len(_MAGIC) + _DIGEST_BYTES :]
            if data[: len(_MAGIC) + _DIGEST_BYTES] == _MAGIC + xxhash.xxh3_128_digest(body):
                with suppress(msgspec.MsgspecError):
                    found = _decode(body)
                    manifest = found if found.repository_id == self._repository_id else manifest
            self._known = (data, manifest)
        return self._known[1]

    def _empty(self) -> Manifest:
        return Manifest(self._repository_id, epoch=os.urandom(8))

    def _largest_first(self) -> list[Run]:
        return sorted(self._runs.values(), key=lambda run: -run.info.rows)

    def _publish(self, manifest: Manifest, new: set[bytes], *, durable: bool = False) -> None:
        """Make the new runs durable, then the manifest; then remove files that nobody names.

        After a power loss the manifest may be the one before, unless this one is `durable`. Most changes are found out
        anew then; that something is not to be believed any more is not.
        """
        for info in manifest.runs:
            if info.token in new:
                _sync(self.folder / info.file_name)
        body = _encode(manifest)
        data = _MAGIC + xxhash.xxh3_128_digest(body) + body
        draft = self.folder / f"{_MANIFEST}.new"
        with open(draft, "wb", opener=_private) as file:
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
        draft.rename(self.folder / _MANIFEST)
        if durable:
            sync_folder(self.folder)
        self._known = (data, manifest)
        kept = {info.file_name for info in manifest.runs}
        for path in self.folder.glob("*.run"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def _lock(self) -> Generator[None, None, int]:
        """Wait for the lock, without blocking longer than a poll; the descriptor returned holds it."""
        make_private(self.folder)  # it may have been removed under us
        lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + LOCK_WAIT_S
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return lock
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise MirrorBusy(f"another process holds the index cache in {self.folder}") from None
                    time.sleep(_LOCK_POLL_S)
                    yield
        except BaseException:
            os.close(lock)
            raise


def _liveness(manifest: Manifest) -> Callable[[Span], bool]:
    """Whether a span belongs to an index object that the manifest names."""
    owners = {first for first, _ in manifest.objects.values()}
    return lambda span: span.owner in owners


def _forget_objects(manifest: Manifest, gone: Mapping[str, int]) -> bool:
    """Take index objects out if they are the same that the caller saw; tell whether any was."""
    same = [name for name, first in gone.items() if manifest.objects.get(name, (-1, 0))[0] == first]
    for name in same:
        del manifest.objects[name]
    if same:
        manifest.losses, manifest.sound, manifest.audited = manifest.losses + 1, [], False
    return bool(same)


def _doubted(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, losses=manifest.losses + 1, sound=[], audited=False)


def _without_runs(manifest: Manifest, bad: list[RunInfo]) -> Manifest:
    """The manifest without runs that can't be read, and without every index object they have a part of."""
    owners = {span.owner for info in bad for span in info.spans}
    return msgspec.structs.replace(
        _doubted(manifest),
        objects={name: span for name, span in manifest.objects.items() if span[0] not in owners},
        runs=[info for info in manifest.runs if info not in bad],
    )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(file)
    finally:
        os.close(file)


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Say what a failure of the cache's file system means to the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(
                f"no space left for the index cache in {folder}",
                remedy="free some space there, or name another folder with --cache-dir",
            ) from error
        raise CoffretError(
            f"the index cache in {folder} can't be used: {error.strerror}",
            remedy="name another folder with --cache-dir, or use --no-cache",
        ) from error
    except BadRun as error:
        raise CoffretError(
            f"the index cache in {folder} is damaged: {error}", remedy="run the command again: it is made anew"
        ) from error
