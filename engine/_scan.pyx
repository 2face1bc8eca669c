# cython: language_level=3, boundscheck=False, wraparound=False
"""The inner loop of the scan, which sees every entry of every backup: lstat(2) and compare with the parent snapshot.

Compiled, and a whole directory is read without the GIL: on a million entries an unchanged one costs 4.6 µs of CPU
(8.7 in Python), 2.2 of them in the kernel. What is rare (a page's end, a directory, anything new that is no regular
file) is left to the subclass.
"""

from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE

import os

from xxhash import xxh3_64_intdigest

from coffret.engine import settings
from coffret.engine.messages import Read

include "_listing.pxi"

cdef extern from "Python.h":
    uint64_t PyLong_AsUnsignedLongLongMask(object number) except? 0xFFFFFFFFFFFFFFFF

cdef enum:
    S_IFMT = 0o170000
    S_IFREG = 0o100000
    S_IFDIR = 0o040000
    S_IFLNK = 0o120000

# From 1684 to 2255 nanoseconds fit 64 bits.
cdef int64_t FAR_S = 9_000_000_000
# See `entry_weight`.
cdef int64_t ENTRY_WEIGHT = 240 + settings.INLINE_XATTR_BYTES
cdef int64_t REF_BYTES = 36
cdef int64_t INLINE_REFS = settings.INLINE_REFS
cdef int64_t INLINE_EXTENTS = settings.INLINE_EXTENTS
cdef int64_t PAGE_MAX_ENTRIES = settings.PAGE_MAX_ENTRIES
cdef int64_t PAGE_MAX_WEIGHT = settings.PAGE_MAX_WEIGHT
cdef uint64_t PAGE_MASK = settings.PAGE_AVG_ENTRIES - 1
# By default a file has at most one chunk, beside its last, per 512 KiB, and one extent and one hole per 8 KiB.
cdef enum:
    CHUNK_SHIFT = 19
    EXTENT_SHIFT = 13


cdef inline int64_t weight_of(size_t name_bytes, int64_t size, uint32_t mode) noexcept nogil:
    cdef int64_t weight = ENTRY_WEIGHT + <int64_t>name_bytes
    if mode & S_IFMT == S_IFREG:
        return weight + REF_BYTES * min(1 + (size >> CHUNK_SHIFT), INLINE_REFS) + 16 * min(size >> EXTENT_SHIFT, INLINE_EXTENTS)
    if mode & S_IFMT == S_IFLNK:  # its size is its target's length
        return weight + size
    return weight


def entry_weight(bytes name not None, int64_t size, uint32_t mode):
    """About the most bytes an entry takes in its page, by facts of lstat(2): a page's weight is the sum of these.

    An upper estimate of the entry as encoded: numbers at 5 or 9 bytes, user and group names of 32, heads, xattrs as
    large as are kept inline. What a file becomes between scan and read may exceed it: it bounds pages, it does not
    measure them.
    """
    return weight_of(PyBytes_GET_SIZE(name), size, mode)


cdef inline uint64_t low_bits(int64_t seconds, uint32_t rest_ns) noexcept nogil:
    """Nanoseconds modulo 2^64: what an entry holds lies between -2^63 and 2^64, so that it is enough to compare."""
    return <uint64_t>seconds * 1000000000 + rest_ns


cdef inline object nanoseconds(int64_t seconds, uint32_t rest_ns):
    if -FAR_S < seconds < FAR_S:
        return seconds * 1000000000 + rest_ns
    return <object>seconds * 1_000_000_000 + rest_ns


cdef bint same_links(const Node* node, object before) except -1:
    """Whether a file has as many names as before; a directory's number only tells what lies in it."""
    extra = before.extra
    return node.mode & S_IFMT == S_IFDIR or (1 if extra is None else extra.nlink) == node.nlink


cdef bint unchanged(const Node* node, object before, bint ignore_inode, bint ignore_ctime) except -1:
    """Whether an entry of the parent's describes the same node, in the same state; a racy one never does.

    The ctime tells of another owner and of another link, but it may be ignored, and some file systems have none.
    """
    return (
        PyLong_AsUnsignedLongLongMask(before.mtime_ns) == low_bits(node.mtime_s, node.mtime_rest_ns)
        and (
            same_links(node, before)
            if ignore_ctime
            else PyLong_AsUnsignedLongLongMask(before.ctime_ns) == low_bits(node.ctime_s, node.ctime_rest_ns)
        )
        and (ignore_inode or PyLong_AsUnsignedLongLongMask(before.inode) == node.inode)
        and PyLong_AsUnsignedLongLongMask(before.mode) == node.mode
        and PyLong_AsUnsignedLongLongMask(before.uid) == node.uid
        and PyLong_AsUnsignedLongLongMask(before.gid) == node.gid
        and (node.mode & S_IFMT != S_IFREG or PyLong_AsUnsignedLongLongMask(before.size) == <uint64_t>node.size)
        and not before.racy
    )


cdef class EntryLoop:
    """Takes a directory's entries into pages: the parent's if unchanged, else new ones, a regular file's yet to be read.

    A subclass has the methods `cut`, `enters`, `left_out`, `node`, `source` and `fault`; see `scan.Scanner`.
    """

    #: The page being filled; regular files and their bytes, as far as the walk has come.
    cdef public object page
    cdef public int64_t files, size_bytes
    cdef object cutter, skip, skip_files
    cdef bint ignore_inode, ignore_ctime, verbose

    def __init__(self, page, cutter, options):
        self.page, self.cutter, self.skip, self.skip_files = page, cutter, options.skip, options.skip_files
        self.ignore_inode, self.ignore_ctime, self.verbose = options.ignore_inode, options.ignore_ctime, options.verbose

    def entries(self, Directory found not None, bytes directory not None, bytes prefix not None, bytes real not None,
                bytes origin not None, scope, uint64_t device, bint typed, runs, int64_t opening, list deeper not None):
        """Take all of a directory, in order, and iterate over the pages that became full.

        `prefix`, `real` and `origin` are the directory's path to use here, to tell, and to read from later, with the
        slash; `typed`: it holds names that the user gave, or leads to some; `runs`: the parent's listing; `opening`: the
        weight of beginning it in a page;
        `deeper` gets the directories to go into. The root's own entry, of no name, comes first in its listing.
        """
        cdef object seed = self.cutter.seed(directory), excluded = None if scope is None else scope.excluded
        cdef object page = self.page, entry, name, path, lies, old, run, old_page = None, source = page.source
        cdef list entries = [], before = []
        cdef Py_ssize_t old_at = 0, old_count = 0, old_first = 0
        cdef size_t at
        cdef Node* node
        cdef const char* old_name
        cdef size_t old_length
        cdef int order, level
        cdef bint regular, is_directory, same
        cdef int64_t weight, position = 0, following = page.following, count = page.count, total = page.weight
        cdef int64_t files = page.files, directories = page.directories, new = page.new, changed = page.changed
        cdef int64_t missing = page.missing
        cdef int64_t new_directories = page.new_directories, changed_directories = page.changed_directories
        cdef Listing* listing = &found.listing
        sort_listing(listing)
        runs = iter(runs)
        for at in range(listing.count):
            node = &listing.nodes[at]
            name = PyBytes_FromStringAndSize(node.name, node.length)
            if node.error:
                self.fault(real + name, os.strerror(node.error))
                continue
            regular, is_directory = node.mode & S_IFMT == S_IFREG, node.mode & S_IFMT == S_IFDIR
            if node.length:
                if excluded is not None and excluded(name, is_directory, node.size if regular else 0):
                    continue
                if is_directory:
                    below = directory + b"/" + name if directory else name
                    if self.skip and (node.device, node.inode) in self.skip:
                        self.left_out(below, real + name)
                        continue
                    if node.device == device or self.enters(below, prefix + name, typed):
                        deeper.append((below, scope, node.device))
                elif self.skip_files and (node.device, node.inode) in self.skip_files:
                    continue

            bits = xxh3_64_intdigest(name, seed)
            level = 0 if <uint64_t>bits & PAGE_MASK else self.cutter.level(seed, name)
            weight = weight_of(node.length, node.size, node.mode)
            if count and (level or count >= PAGE_MAX_ENTRIES or total + weight > PAGE_MAX_WEIGHT):
                page.source, page.following, page.count, page.weight, page.missing = source, following, count, total, missing
                page.files, page.directories, page.new, page.changed = files, directories, new, changed
                page.new_directories, page.changed_directories = new_directories, changed_directories
                yield self.cut(level or 1)
                page, entries, source = self.page, [], None
                following = count = total = missing = files = directories = new = changed = 0
                new_directories = changed_directories = 0
            if not entries:
                page.sections.append((directory, entries))
                total += opening
            total += weight
            directories += is_directory
            if regular:
                files += 1
                self.files += 1
                self.size_bytes += node.size

            old = None
            while True:  # the parent's entry of this name: both come in order
                if old_at == old_count:
                    run = next(runs, None)
                    if run is None:
                        break
                    before, old_page, old_first = run.entries, run.page, run.first
                    old_at, old_count = 0, PyList_GET_SIZE(before)
                    continue
                entry = <object>PyList_GET_ITEM(before, old_at)
                other = entry.name
                old_name, old_length = PyBytes_AS_STRING(other), PyBytes_GET_SIZE(other)
                order = memcmp(old_name, node.name, min(old_length, node.length))
                if order > 0 or (order == 0 and old_length > node.length):
                    break
                old_at += 1
                if order == 0 and old_length == node.length:
                    old, position = entry, old_first + old_at - 1
                    break

            if old is not None and unchanged(node, old, self.ignore_inode, self.ignore_ctime):
                if count == 0 and position == 0:
                    source, following = old_page, 1
                elif source is old_page and position == following:
                    following += 1
                else:
                    source = None
                count += 1
                entries.append(old)
                continue
            source = None
            count += 1
            if regular:
                path = real + name
                lies = path if origin == real else origin + name
                if typed:
                    lies = self.source(path, lies)
                page.reads.append(Read(page, entries, PyList_GET_SIZE(entries), path, lies, name, node.size))
                missing += 1
                entries.append(None)
            else:
                mtime_ns = nanoseconds(node.mtime_s, node.mtime_rest_ns)
                ctime_ns = nanoseconds(node.ctime_s, node.ctime_rest_ns)
                fields = (node.mode, node.uid, node.gid, 0, mtime_ns, ctime_ns, node.inode, node.device, node.nlink)
                entries.append(self.node(name, prefix + name, real + name, fields, node.rdev, listing.read_ns))
            if old is None:
                new += 1
                new_directories += is_directory
            else:
                changed += 1
                changed_directories += is_directory
            if self.verbose:
                page.status[id(name)] = "new" if old is None else "changed"
        page.source, page.following, page.count, page.weight, page.missing = source, following, count, total, missing
        page.files, page.directories, page.new, page.changed = files, directories, new, changed
        page.new_directories, page.changed_directories = new_directories, changed_directories
