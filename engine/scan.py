"""Scan: walk the source in catalog order, compare it with the parent snapshot, and cut pages as it goes.

Runs in a thread. A page is cut by names and other facts known before any file is read, so it leaves the scan with
the places of files that are to be read still empty; the stages after it fill them.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from typing import TYPE_CHECKING

import msgspec

from coffret.engine._read import file_system_type
from coffret.engine._scan import Directory, EntryLoop, ReadAhead
from coffret.engine.catalog import join_path, section_weight
from coffret.engine.chunkworker import PATH_MAX, PSEUDO, open_path, open_unlinked, read_xattrs
from coffret.engine.entries import make_entry, make_extra
from coffret.engine.errors import SourceError
from coffret.engine.filters import RULES_MAX_BYTES
from coffret.engine.messages import ScanPage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coffret.engine.catalog import Cutter
    from coffret.engine.catalog_reader import ParentCursor
    from coffret.engine.entries import Store
    from coffret.engine.filters import Filters, FilterScope
    from coffret.engine.records import Entry

# Paths shorter than this are given to system calls in one piece; a name of 255 bytes still fits behind them.
_LONG = 3800
# With fewer directories to go to a thread of its own for reading them is not worth starting (70 µs).
_MANY = 8
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PASS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class ScanOptions(msgspec.Struct, frozen=True):
    """What to leave out and what to trust.

    `skip`, `skip_files`: (device, inode) of directories, and of files, left out. `verbose`: tell what happened to each
    entry.
    """

    filters: Filters | None = None
    skip: frozenset[tuple[int, int]] = frozenset()
    skip_files: frozenset[tuple[int, int]] = frozenset()
    one_file_system: bool = False
    ignore_inode: bool = False
    ignore_ctime: bool = False
    verbose: bool = False


class Roots:
    """What was asked for, as a tree: the roots, and the directories on the way to them.

    `paths` are as typed; relative ones begin in the current directory.

    :raises SourceError: if none of them exists, or the current directory does not that they begin in
    """

    def __init__(self, paths: Sequence[bytes], fault: Callable[[bytes, str], None]) -> None:
        absolute = sorted({_absolute(path) for path in paths}, key=lambda path: path.split(b"/"))
        found: list[bytes] = []
        missing: list[tuple[bytes, str]] = []
        for path in absolute:
            try:
                _look_at(path)
            except OSError as error:
                missing.append((path, error.strerror or str(error)))
                continue
            if not any(path == root or path.startswith(root.rstrip(b"/") + b"/") for root in found):
                found.append(path)
        if not found:
            path, reason = missing[0]
            raise SourceError(
                f"{os.fsdecode(path)}: {reason}", remedy="check the path; nothing of what was asked for can be read"
            )
        for path, reason in missing:
            fault(path, reason)
        self.paths = found
        # All that was named, roots or not, and the names of those that lie within roots, by directory.
        self.names = {path.strip(b"/") for path in absolute} - {path.strip(b"/") for path, _ in missing}
        self.inner: dict[bytes, set[bytes]] = {}
        for path in self.names - {path.strip(b"/") for path in found}:
            directory, _, name = path.rpartition(b"/")
            self.inner.setdefault(directory, set()).add(name)
        # Directories on the way, and which of their names lead to a root.
        self.ancestors: dict[bytes, list[bytes]] = {}
        for root in found:
            parts = root.strip(b"/").split(b"/") if root != b"/" else []
            for depth, part in enumerate(parts):
                names = self.ancestors.setdefault(b"/".join(parts[:depth]), [])
                if part not in names:
                    names.append(part)
        for names in self.ancestors.values():
            names.sort()
        # Where that lies what was named by way of links, here or on the way: below it no link is followed.
        self.real = {name: real for name in self.names if (real := os.path.realpath(b"/" + name)) != b"/" + name}

    def real_path(self, directory: bytes) -> bytes:
        """The path of a directory without the links by which it was named."""
        if self.real:
            head, rest = directory, b""
            while head and head not in self.names:
                head, _, name = head.rpartition(b"/")
                rest = b"/" + name + rest
            if head in self.real:
                return self.real[head].rstrip(b"/") + rest
        return b"/" + directory

    def hidden_by(self, directory: bytes) -> list[bytes]:
        """Those of `paths` that lie in a directory, or are it."""
        return [path for path in self.paths if path[1:] == directory or path.startswith(b"/" + directory + b"/")]


class Scanner(EntryLoop):
    """Walks roots and yields pages. `store` takes large attributes; `fault` gets (path, reason).

    All in one thread, which may be another at each step; another reads directories ahead until the walk is over or
    `close` is called. What is done for every entry is in `EntryLoop`.
    """

    def __init__(
        self,
        roots: Roots,
        options: ScanOptions,
        *,
        cutter: Cutter,
        parent: ParentCursor | None,
        store: Store,
        fault: Callable[[bytes, str], None],
    ) -> None:
        super().__init__(ScanPage(0, 1), cutter, options)
        self._roots, self._options, self._parent = roots, options, parent
        self._store, self.fault = store, fault
        # The directories to go to, the next one last: what is known of each, and beside it what lies there.
        self._stack: list[tuple[bytes, bytes, FilterScope | None, int]] = []
        self._ahead, self._served = ReadAhead(), False
        self._pages = self._walk()

    def next(self, count: int) -> list[ScanPage]:
        """Up to `count` further pages; none when the walk is over."""
        pages = []
        for page in self._pages:
            pages.append(page)
            if len(pages) >= count:
                break
        return pages

    def close(self) -> None:
        """Read no further ahead: the walk is over, or given up. It may be called again, in any thread."""
        self._ahead.close()

    def _walk(self) -> Iterator[ScanPage]:
        self._push([(b"", None, os.stat(b"/").st_dev)])
        while self._stack:
            yield from self._directory(*self._stack.pop())
        self.close()
        if self.page.count:
            self.page.seal()
            yield self.page

    def _push(self, deeper: Sequence[tuple[bytes, FilterScope | None, int]]) -> None:
        """Go to these directories next, in this order."""
        following: list[tuple[bytes, bytes, FilterScope | None, int]] = []
        found = []
        for directory, scope, device in deeper:
            origin = self._roots.real_path(directory)
            following.append((directory, origin, scope, device))
            plain = directory not in self._roots.ancestors and max(len(origin), 1 + len(directory)) < _LONG
            found.append(Directory(origin) if plain else Directory())
        following.reverse()
        self._stack += following
        self._ahead.push(found)
        if not self._served and len(self._stack) >= _MANY:
            self._served = True
            with contextlib.suppress(RuntimeError):  # no further thread can be started
                threading.Thread(target=self._ahead.serve, name="read ahead", daemon=True).start()

    def _directory(self, directory: bytes, origin: bytes, scope: FilterScope | None, device: int) -> Iterator[ScanPage]:
        """Add a directory's entries, in order, to the current page and those after it."""
        roots, path = self._roots, b"/" + directory
        on_the_way = directory in roots.ancestors
        handle = -1
        try:
            found = self._ahead.pop()
            if max(len(origin), len(path)) >= _LONG:
                handle = open_path(path, _PASS) if on_the_way else open_unlinked(origin, _LIST)
                if not on_the_way:
                    found.read(handle)
                if len(path) >= _LONG:
                    path = b"/proc/self/fd/%d" % handle
            prefix = path if path.endswith(b"/") else path + b"/"
            self._follow_typed(directory, prefix, found)
            filters = self._options.filters
            if filters is not None and len(found) and not on_the_way:
                scope = filters.enter(directory, found.list_names(), lambda name: _read_rules(path, name), scope)
            if not directory:
                found.put(b"", os.stat(b"/"))
            deeper: list[tuple[bytes, FilterScope | None, int]] = []
            yield from self.entries(
                found,
                directory,
                prefix,
                b"/" + directory + b"/" if directory else b"/",
                origin.rstrip(b"/") + b"/",
                scope,
                device,
                on_the_way or directory in roots.inner,
                self._parent.seek(directory) if self._parent else (),
                section_weight(directory),
                deeper,
            )
            self._push(deeper)
        except OSError as error:
            self.fault(b"/" + directory, error.strerror or str(error))
        finally:
            if handle >= 0:
                os.close(handle)

    def _follow_typed(self, directory: bytes, prefix: bytes, found: Directory) -> None:
        """Of names that were typed, and of those on the way to them, links are followed."""
        for name in (*self._roots.ancestors.get(directory, ()), *self._roots.inner.get(directory, ())):
            try:
                status = os.stat(prefix + name)
            except FileNotFoundError:  # a dangling link is backed up as what it is
                try:
                    status = os.lstat(prefix + name)
                except OSError as error:
                    self.fault(b"/" + join_path(directory, name), error.strerror or str(error))
                    continue
            found.put(name, status)

    def cut(self, level: int) -> ScanPage:
        """End the current page, and begin one with a cut of this level."""
        page = self.page
        page.seal()
        self.page = ScanPage(page.number + 1, level)
        return page

    def enters(self, below: bytes, path: bytes, typed: bool) -> bool:
        """Whether the content of a directory on another device than its parent belongs to the backup."""
        if below in self._roots.names or below in self._roots.ancestors:
            return True
        return not self._options.one_file_system and file_system_type(path) not in PSEUDO

    def left_out(self, below: bytes, real: bytes) -> None:
        """A directory of Coffret's own was met: that is told if it, or anything in it, was asked for."""
        for path in {real} if below in self._roots.names else self._roots.hidden_by(below):
            self.fault(path, "left out: it is the repository, or Coffret's cache or state")

    def source(self, real: bytes, origin: bytes) -> bytes:
        """Where to read a file: what a typed link leads to, else where it lies."""
        return os.path.realpath(real) if real[1:] in self._roots.names else origin

    def node(
        self, name: bytes, path: bytes, real: bytes, fields: tuple[int, ...], device: int, read_ns: int
    ) -> Entry | None:
        """The entry of what is no regular file, from `chunkworker.STAT_FIELDS`; `device`: what a device node means."""
        mode = fields[0]
        try:
            target = os.readlink(path) if stat.S_ISLNK(mode) else b""
        except OSError as error:
            self.fault(real, error.strerror or str(error))
            return None
        extra = make_extra(
            self._store,
            target=target,
            rdev=device if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
            nlink=1 if stat.S_ISDIR(mode) else fields[8],
            xattrs=read_xattrs(path, follow=stat.S_ISDIR(mode)),
        )
        return make_entry(name, fields, read_ns, extra=extra)


def _read_rules(path: bytes, name: bytes) -> bytes | None:
    """A small file of a directory being scanned, or None if it can't be read."""
    try:
        fd = os.open(path + b"/" + name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, RULES_MAX_BYTES) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None
    finally:
        os.close(fd)


def _absolute(path: bytes) -> bytes:
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise SourceError(
            "the current directory does not exist any more", remedy="change to another, or give absolute paths"
        ) from None


def _look_at(path: bytes) -> None:
    """Fail as lstat(2) does, for a path of any length."""
    if len(path) < PATH_MAX:
        os.lstat(path)
    else:
        os.close(open_path(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
