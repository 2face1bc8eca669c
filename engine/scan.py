"""Scan: walk the source in catalog order, compare it with the parent snapshot, and cut pages as it goes.

Runs in a thread. A page is cut by names and other facts known before any file is read, so it leaves the scan with
the places of files that are to be read still empty; the stages after it fill them.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from operator import attrgetter
from time import time_ns
from typing import TYPE_CHECKING, Any

from coffret.engine.catalog import entry_weight, section_weight
from coffret.engine.chunkworker import open_path, read_xattrs
from coffret.engine.entries import entry_size, make_entry, make_extra
from coffret.engine.errors import SourceError
from coffret.engine.filters import RULES_MAX_BYTES
from coffret.engine.messages import Read, ScanPage
from coffret.engine.settings import PAGE_MAX_ENTRIES, PAGE_MAX_WEIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coffret.engine.catalog import Cutter
    from coffret.engine.catalog_reader import Listing, ParentCursor
    from coffret.engine.catalog_walk import LoadedPage
    from coffret.engine.entries import Store
    from coffret.engine.filters import Filters, FilterScope
    from coffret.engine.records import Entry

# File systems that hold no data of their own, by the magic numbers of statfs(2): proc, sysfs, cgroup, cgroup2,
# debugfs, tracefs, securityfs, devpts, pstore, bpf, configfs, efivarfs, binfmt_misc, mqueue, fusectl, selinuxfs,
# nsfs, rpc_pipefs.
PSEUDO = frozenset(
    (
        *(0x9FA0, 0x62656572, 0x27E0EB, 0x63677270, 0x64626720, 0x74726163, 0x73636673, 0x1CD1, 0x6165676C),
        *(0xCAFE4A11, 0x62656570, 0xDE5E81E4, 0x42494E4D, 0x19800202, 0x65735543, 0xF97CFF8C, 0x6E736673, 0x67596969),
    )
)
# Longest path given to a system call in one piece; a name of 255 bytes still fits behind it.
_LONG = 3800


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """What to leave out and what to trust.

    `skip`: (device, inode) of directories left out. `verbose`: tell what happened to each entry.
    """

    filters: Filters | None = None
    skip: frozenset[tuple[int, int]] = frozenset()
    one_file_system: bool = False
    ignore_inode: bool = False
    ignore_ctime: bool = False
    verbose: bool = False


class Roots:
    """What was asked for, as a tree: the roots, and the directories on the way to them.

    `paths` are as typed; relative ones begin in the current directory.

    :raises SourceError: if none of them exists
    """

    def __init__(self, paths: Sequence[bytes], fault: Callable[[bytes, str], None]) -> None:
        absolute = sorted({os.path.abspath(path) for path in paths}, key=lambda path: path.split(b"/"))
        found: list[bytes] = []
        missing: list[tuple[bytes, str]] = []
        for path in absolute:
            try:
                os.lstat(path)
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


class _Child:
    """An entry on the way to a root: like os.DirEntry, but links are followed, since the typed name is what counts."""

    __slots__ = ("name", "path")

    def __init__(self, path: bytes, name: bytes) -> None:
        self.path, self.name = path, name

    def stat(self, *, follow_symlinks: bool) -> os.stat_result:
        try:
            return os.stat(self.path)
        except FileNotFoundError:  # a dangling link is backed up as what it is
            return os.lstat(self.path)


class Scanner:
    """Walks roots and yields pages. `store` takes large attributes; `fault` gets (path, reason).

    All in one thread, which may be another at each step.
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
        self._roots, self._options, self._cutter, self._parent = roots, options, cutter, parent
        self._store, self._fault = store, fault
        #: Regular files and their bytes, as far as the walk has come.
        self.files = self.size_bytes = 0
        self._page = ScanPage(0, 1)
        self._finished: list[ScanPage] = []
        self._stack: list[tuple[bytes, FilterScope | None, int]] = []
        self._pages = self._walk()

    def next(self, count: int) -> list[ScanPage]:
        """Up to `count` further pages; none when the walk is over."""
        pages = []
        for page in self._pages:
            pages.append(page)
            if len(pages) >= count:
                break
        return pages

    def _walk(self) -> Iterator[ScanPage]:
        self._root_entry()
        self._stack.append((b"", None, 0))
        while self._stack:
            directory, scope, device = self._stack.pop()
            self._directory(directory, scope, device)
            if self._finished:
                yield from self._finished
                self._finished.clear()
        if self._page.count:
            self._page.seal()
            yield self._page

    def _root_entry(self) -> None:
        """The root directory's own entry: the first of every catalog."""
        entries: list[Entry | None] = []
        page = self._page
        page.sections.append((b"", entries))
        page.weight = section_weight(b"") + entry_weight(b"", 0, stat.S_IFDIR)
        page.directories += 1
        self._add(page, entries, b"", b"/", b"/", os.stat(b"/"), self._parent.root() if self._parent else None)

    def _directory(self, directory: bytes, scope: FilterScope | None, device: int) -> None:
        path = b"/" + directory
        handle = None
        try:
            if len(path) > _LONG:
                handle = open_path(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                path = b"/proc/self/fd/%d" % handle
            found = self._list(directory, path)
            filters = self._options.filters
            if filters is not None and found and (directory not in self._roots.ancestors):
                scope = filters.enter(directory, [e.name for e in found], lambda name: _read_rules(path, name), scope)
            self._entries(directory, path, found, scope, device)
        except OSError as error:
            self._fault(b"/" + directory, error.strerror or str(error))
        finally:
            if handle is not None:
                os.close(handle)

    def _list(self, directory: bytes, path: bytes) -> list[os.DirEntry[bytes] | _Child]:
        names = self._roots.ancestors.get(directory)
        prefix = path if path.endswith(b"/") else path + b"/"
        if names is not None:
            return [_Child(prefix + name, name) for name in names]
        with os.scandir(path) as iterator:
            found: list[os.DirEntry[bytes] | _Child] = list(iterator)
        found.sort(key=_NAME)
        if inner := self._roots.inner.get(directory):
            found = [_Child(prefix + item.name, item.name) if item.name in inner else item for item in found]
        return found

    def _entries(
        self,
        directory: bytes,
        path: bytes,
        found: list[os.DirEntry[bytes] | _Child],
        scope: FilterScope | None,
        device: int,
    ) -> None:
        """Add a directory's entries, in order, to the current page and those after it."""
        page, seed, level_of = self._page, self._cutter.seed(directory), self._cutter.level
        on_the_way = directory in self._roots.ancestors
        prefix = path if path.endswith(b"/") else path + b"/"
        real = b"/" + directory + b"/" if directory else b"/"
        opening = section_weight(directory)
        old: Listing | dict[bytes, Any] = self._parent.seek(directory) if self._parent else {}
        # The root directory's own entry stands before its listing, in one section.
        entries: list[Entry | None] = [] if directory else page.sections[-1][1]
        deeper: list[tuple[bytes, FilterScope | None, int]] = []
        for item in found:
            name = item.name
            try:
                status = item.stat(follow_symlinks=False)
            except OSError as error:
                self._fault(real + name, error.strerror or str(error))
                continue
            mode = status.st_mode
            is_directory = mode & 0o170000 == 0o040000
            if scope is not None and scope.excluded(name, is_directory, entry_size(status)):
                continue
            if is_directory:
                below = directory + b"/" + name if directory else name
                if (status.st_dev, status.st_ino) in self._options.skip:
                    if below in self._roots.names:
                        self._fault(real + name, "left out: it is the repository, or Coffret's cache or state")
                    continue
                if self._enters(below, prefix + name, status, device, on_the_way):
                    deeper.append((below, scope, status.st_dev))
            level = level_of(seed, name)
            weight = entry_weight(name, status.st_size, mode)
            if page.count and (level or page.count >= PAGE_MAX_ENTRIES or page.weight + weight > PAGE_MAX_WEIGHT):
                page, entries = self._cut(level or 1), []
            if not entries:
                page.sections.append((directory, entries))
                page.weight += opening
            page.weight += weight
            page.directories += is_directory
            self._add(page, entries, name, prefix, real, status, old.get(name))
        deeper.reverse()
        self._stack += deeper

    def _cut(self, level: int) -> ScanPage:
        page = self._page
        page.seal()
        self._finished.append(page)
        self._page = ScanPage(page.number + 1, level)
        return self._page

    def _enters(self, below: bytes, path: bytes, status: os.stat_result, device: int, on_the_way: bool) -> bool:
        """Whether a directory's content belongs to the backup."""
        if status.st_dev == device or on_the_way or below in self._roots.names:
            return True
        return not self._options.one_file_system and file_system_type(path) not in PSEUDO

    def _add(
        self,
        page: ScanPage,
        entries: list[Entry | None],
        name: bytes,
        prefix: bytes,
        real: bytes,
        status: os.stat_result,
        old: tuple[Entry, LoadedPage, int] | None,
    ) -> None:
        """Add an entry: the parent's if it is unchanged, else a new one, a regular file's being filled in later."""
        regular = stat.S_ISREG(status.st_mode)
        if regular:
            page.files += 1
            self.files += 1
            self.size_bytes += status.st_size
        if old is not None and self._unchanged(status, old[0]):
            page.keep(old[1], old[2])
            page.count += 1
            entries.append(old[0])
            return
        page.forget()
        page.count += 1
        if regular:
            source = os.path.realpath(real + name) if real[1:] + name in self._roots.names else real + name
            page.reads.append(Read(page, entries, len(entries), source, name, status.st_size))
            page.missing += 1
            entries.append(None)
        else:
            entries.append(self._node(name, prefix + name, real + name, status))
        if old is None:
            page.new += 1
        else:
            page.changed += 1
        if self._options.verbose:
            page.status[id(name)] = "new" if old is None else "changed"

    def _unchanged(self, status: os.stat_result, before: Entry) -> bool:
        return (
            status.st_mtime_ns == before.mtime_ns
            and (status.st_ctime_ns == before.ctime_ns or self._options.ignore_ctime)
            and (status.st_ino == before.inode or self._options.ignore_inode)
            and status.st_mode == before.mode
            and (status.st_size == before.size or not stat.S_ISREG(before.mode))
            and not before.racy
        )

    def _node(self, name: bytes, path: bytes, real: bytes, status: os.stat_result) -> Entry | None:
        """The entry of what is no regular file."""
        read_ns, mode = time_ns(), status.st_mode
        try:
            target = os.readlink(path) if stat.S_ISLNK(mode) else b""
        except OSError as error:
            self._fault(real, error.strerror or str(error))
            return None
        device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        extra = make_extra(
            self._store,
            target=target,
            rdev=status.st_rdev if device else 0,
            nlink=1 if stat.S_ISDIR(mode) else status.st_nlink,
            xattrs=read_xattrs(path, follow=stat.S_ISDIR(mode)),
        )
        fields = (
            mode,
            status.st_uid,
            status.st_gid,
            0,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
            status.st_dev,
            status.st_nlink,
        )
        return make_entry(name, fields, read_ns, extra=extra)


_NAME = attrgetter("name")


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


def file_system_type(path: bytes) -> int:
    """The magic number of the file system at `path`, by statfs(2); 0 if it can't be told."""
    import ctypes  # 15 ms, for the few that meet another file system

    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).statfs(path, buffer) != 0:
        return 0
    return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF
