# cython: language_level=3, boundscheck=False, wraparound=False
"""Read small files whole: the system calls of the usual case, in compiled code, since a pool worker sees every file.

Files and directories are opened by paths no component of which may be a link: what a user puts in the place of a
directory between scan and read must not lead root's backup elsewhere.

Usual is a regular file without holes that is as long as fstat(2) says. Anything else is left to the caller, who looks
at it anew and at leisure. A file of 1 KiB costs 29 µs of CPU so, 38 by Python's os
functions; most of both is the kernel's.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, EPERM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

import os

include "_open.pxi"

cdef extern from "<sys/stat.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    struct c_stat "stat":
        uint32_t st_mode, st_uid, st_gid
        uint64_t st_ino, st_dev, st_nlink
        int64_t st_size, st_blocks
        timespec st_mtim, st_ctim
    int fstat(int fd, c_stat* status)

cdef extern from "<fcntl.h>" nogil:
    enum: POSIX_FADV_DONTNEED
    int posix_fadvise(int fd, int64_t offset, int64_t length, int advice)

cdef extern from "<sys/uio.h>" nogil:
    enum: RWF_NOWAIT
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t preadv2(int fd, const iovec* parts, int count, int64_t offset, int flags)

cdef extern from "<sys/xattr.h>" nogil:
    ssize_t flistxattr(int fd, char* names, size_t size)

cdef extern from "<sys/vfs.h>" nogil:
    struct c_statfs "statfs":
        long f_type
    int statfs(const char* path, c_statfs* found)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void* buffer, size_t count, int64_t offset)

cdef enum:
    S_IFMT = 0o170000
    S_IFREG = 0o100000
    # What the kernel copies in one system call, with next to no time between the first byte and the last.
    AT_ONCE_BYTES = 128 << 10

cdef int64_t FAR_S = 9_000_000_000

# As `chunkworker.STAT_FIELDS`, with the size that was read.
cdef struct Fields:
    uint64_t mode, uid, gid, size
    int64_t mtime_ns, ctime_ns
    uint64_t inode, device, nlink

FIELDS_FORMAT = "<4Q2q3Q"


cdef class SmallReader:
    """Reads files into one slab, back to back, up to `limit` of them; what fstat(2) said of each is in `stats`.

    :raises BufferError: if the slab is not writable memory
    """

    cdef Py_buffer slab
    cdef Fields* found
    cdef bint held
    cdef size_t count, limit
    #: The file read last, still open, if it has extended attributes: the caller's to read and close. Else -1.
    cdef readonly int fd

    def __cinit__(self, slab, size_t limit):
        self.fd, self.count, self.limit = -1, 0, limit
        self.found = <Fields*>malloc(limit * sizeof(Fields))
        if self.found == NULL:
            raise MemoryError
        PyObject_GetBuffer(slab, &self.slab, PyBUF_WRITABLE)
        self.held = True

    def __dealloc__(self):
        free(self.found)
        if self.held:
            PyBuffer_Release(&self.slab)

    def stats(self):
        """Of each file that was read: nine integers as in FIELDS_FORMAT."""
        return PyBytes_FromStringAndSize(<char*>self.found, self.count * sizeof(Fields))

    def read(self, bytes path not None, size_t at):
        """Read a file to `at`; return its length in bytes, or -1 if it is not of the usual kind or can't be read."""
        self.fd = -1
        if self.count == self.limit or at > <size_t>self.slab.len:
            return -1
        cdef const char* name = PyBytes_AS_STRING(path)
        cdef int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC
        cdef int fd = open_unlinked(AT_FDCWD, name, flags | O_NOATIME)
        if fd < 0 and errno == EPERM:  # not the owner
            fd = open_unlinked(AT_FDCWD, name, flags)
        if fd < 0:
            return -1
        cdef int64_t got = self.take(fd, <char*>self.slab.buf + at, self.slab.len - at)
        if got >= 0 and flistxattr(fd, NULL, 0) > 0:
            self.fd = fd
        else:
            c_close(fd)
        return got

    cdef int64_t take(self, int fd, char* buffer, size_t room) noexcept nogil:
        cdef c_stat before, after
        cdef bint at_once = False
        cdef Fields* fields = &self.found[self.count]
        if fstat(fd, &before) != 0 or before.st_mode & S_IFMT != S_IFREG:
            return -1
        if not (in_range(before.st_mtim.tv_sec) and in_range(before.st_ctim.tv_sec)):
            return -1
        # Fewer blocks than bytes: there are holes.
        if <size_t>before.st_size + 1 > room or before.st_blocks * 512 < before.st_size:
            return -1
        if read_whole(fd, buffer, before.st_size, &at_once) != before.st_size:
            return -1
        # What one read took from memory needs no second look: a later change shows in the times, and one in the same
        # tick makes the file racy.
        if not at_once or before.st_size > AT_ONCE_BYTES:
            if fstat(fd, &after) != 0 or after.st_size != before.st_size or not (
                same_time(&after.st_mtim, &before.st_mtim) and same_time(&after.st_ctim, &before.st_ctim)
            ):
                return -1
        fields.mode, fields.uid, fields.gid, fields.size = before.st_mode, before.st_uid, before.st_gid, before.st_size
        fields.mtime_ns = before.st_mtim.tv_sec * 1000000000 + before.st_mtim.tv_nsec
        fields.ctime_ns = before.st_ctim.tv_sec * 1000000000 + before.st_ctim.tv_nsec
        fields.inode, fields.device, fields.nlink = before.st_ino, before.st_dev, before.st_nlink
        self.count += 1
        return before.st_size


cdef inline bint in_range(int64_t seconds) noexcept nogil:
    """Whether a time in nanoseconds fits 64 bits: from 1684 to 2255."""
    return -FAR_S < seconds < FAR_S


cdef inline bint same_time(const timespec* left, const timespec* right) noexcept nogil:
    return left.tv_sec == right.tv_sec and left.tv_nsec == right.tv_nsec


cdef int64_t read_whole(int fd, char* buffer, int64_t size, bint* at_once) noexcept nogil:
    """Read a file of `size` bytes; the result is another number if it is longer or shorter than that.

    What has to come from the disk does not stay in the page cache: a backup must not push a server's working set out
    of memory.
    """
    cdef iovec part
    cdef int64_t got = 0
    cdef ssize_t count
    part.iov_base, part.iov_len = buffer, size + 1  # a byte more tells a file that has grown
    count = preadv2(fd, &part, 1, 0, RWF_NOWAIT)
    if count >= size:
        at_once[0] = True
        return count
    if count > 0:
        got = count
    while got <= size:
        count = pread(fd, buffer + got, size + 1 - got, got)
        if count < 0 and errno == EINTR:
            continue
        if count < 0:
            return -1
        if count == 0:
            break
        got += count
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)
    return got


def open_real(bytes path not None, int flags, int folder=AT_FDCWD):
    """Open a path none of whose components is a link, from the directory open at `folder` if it is relative.

    Where the kernel can't see to that (before Linux 5.6) links are followed, but for the last component with O_NOFOLLOW.

    :raises OSError: as os.open, ELOOP for a link
    """
    cdef const char* name = PyBytes_AS_STRING(path)
    cdef int fd
    while True:
        with nogil:
            fd = open_unlinked(folder, name, flags | O_CLOEXEC)
        if fd >= 0:
            return fd
        if errno != EINTR:
            raise OSError(errno, os.strerror(errno), path)


def file_system_type(bytes path not None):
    """The magic number of the file system at `path`, by statfs(2); 0 if it can't be told."""
    cdef const char* name = PyBytes_AS_STRING(path)
    cdef c_statfs found
    cdef int failed
    with nogil:
        failed = statfs(name, &found)
    return 0 if failed else found.f_type & 0xFFFFFFFF
