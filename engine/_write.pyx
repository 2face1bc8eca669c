# cython: language_level=3, boundscheck=False, wraparound=False
"""Write small files whole: the system calls of the usual case, in compiled code, since a restore makes every file so.

Usual is a regular file without holes and without extended attributes, in a directory that hands down no ACL. The rest
is the caller's, who also goes on where the system does not let metadata be set: see `UnusualWriter`. A file costs no
more calls than it needs: its mode comes with open(2), and owner and mode are set only if fstat(2) says that they differ.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

import os

cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    enum: CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec* now)

cdef extern from "<sys/stat.h>" nogil:
    struct c_stat "stat":
        uint32_t st_mode, st_uid, st_gid
    int fstat(int fd, c_stat* status)
    int fchmod(int fd, uint32_t mode)
    int futimens(int fd, const timespec* times)

cdef extern from "<fcntl.h>" nogil:
    enum: O_WRONLY, O_CREAT, O_EXCL, O_NOFOLLOW, O_CLOEXEC, O_DIRECT, F_SETFL
    int openat(int folder, const char* name, int flags, uint32_t mode)
    int fcntl(int fd, int command, int flags)

cdef extern from "<stdio.h>" nogil:
    int renameat(int from_folder, const char* before, int folder, const char* name)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void* data, size_t count)
    int fchown(int fd, uint32_t uid, uint32_t gid)
    int unlinkat(int folder, const char* name, int flags)
    int c_close "close"(int fd)

cdef enum:
    PERMISSIONS = 0o7777
    SET_ID = 0o6000
    PRIVATE = 0o600
    UNOWNED = 0o1777
    UNKNOWN = 0xFFFF
    PAGE = 4096
    SECOND_NS = 1_000_000_000

# A file of so many bytes or more goes past the page cache, but for what is left of its last page, and there is nothing
# left to be flushed. Making one of 130 KB costs 55 µs of CPU so, instead of 70 to 280 (the more, the fresher the memory
# of a virtual machine is); one of 60 KB costs as much as through the cache, and waits for the disk.
DIRECT_BYTES = 128 << 10
cdef size_t LEAST_DIRECT = DIRECT_BYTES
# Each such write waits for the disk. If the first ones take longer than this on average, it is one that had better
# sort them: a disk that seeks, or that is far away.
cdef int64_t PATIENCE_NS = 4_000_000
cdef int64_t TRIALS = 64

# What fits 64 bits.
cdef object EARLIEST = -(1 << 63)
cdef object LATEST = (1 << 63) - 1


cdef class SmallWriter:
    """Writes files below one directory. `buffer`: page-aligned memory, of whole pages; `words[number]`: see `Mark`.

    :raises BufferError: if one of these is not writable memory
    """

    cdef Py_buffer buffer, words
    cdef int held
    cdef uint64_t* word
    cdef bint owner
    cdef uint32_t uid, gid
    #: Whether to write past the page cache still.
    cdef public bint direct
    cdef int64_t waited_ns, waits
    cdef int error

    def __cinit__(self, buffer, words, int number, *, bint owner):
        self.held = 0
        PyObject_GetBuffer(buffer, &self.buffer, PyBUF_WRITABLE)
        self.held = 1
        PyObject_GetBuffer(words, &self.words, PyBUF_WRITABLE)
        self.held = 2
        self.word = <uint64_t*>self.words.buf + number
        self.owner, self.uid, self.gid = owner, os.geteuid(), os.getegid()
        self.direct = <size_t>self.buffer.buf % PAGE == 0

    def __dealloc__(self):
        if self.held > 0:
            PyBuffer_Release(&self.buffer)
        if self.held > 1:
            PyBuffer_Release(&self.words)

    def group(self, writer, opened, uint64_t job, uint64_t number, bytes directory not None, list files not None):
        """Write the files of one directory, the first of which is the job's `number`-th: see `Writer.files`.

        `opened` gives the verified bytes of a part. What is unusual is left to `writer`: see `UnusualWriter`.
        Returns faults.
        """
        cdef int folder = -1
        cdef bint plain = False
        cdef uint64_t mark
        cdef list faults = []
        for name, temporary, meta, parts, extents in files:
            mark = job << 32 | number << 2
            number += 1
            try:
                data = [opened(part) for part in parts]
                if folder < 0:
                    folder = writer.enter(directory)
                    plain = not writer.inherits
                mode, uid, gid, _, mtime_ns, xattrs = meta
                if plain and not extents and not xattrs and EARLIEST <= mtime_ns <= LATEST and self.plain(mode, uid, gid):
                    notes = self.write(writer, folder, name, temporary, meta, mode, uid, gid, mtime_ns, data, mark)
                else:
                    self.word[0] = mark | 1
                    notes = writer.unusual(folder, name, temporary, meta, data, extents)
                if notes:
                    faults += writer.kept(directory, name, notes)
            except Exception as error:
                faults.append(writer.lost(directory, name, error))
            self.word[0] = 0
        return faults

    def usual_metadata(self, int fd, meta not None):
        """Set the metadata of an open file or directory; False if it has attributes, or can't be set in all respects."""
        cdef bint done
        cdef uint32_t uid, gid, asked, given = 0
        cdef int64_t mtime
        mode, owner, group, _, mtime_ns, xattrs = meta
        if xattrs or not EARLIEST <= mtime_ns <= LATEST:
            return False
        uid, gid, mtime = owner, group, mtime_ns
        asked = self.allowed(mode, uid, gid)
        with nogil:
            done = self.own(fd, uid, gid, &given) and self.dress(fd, given, asked, mtime)
        return done

    cdef object write(
        self,
        writer,
        int folder,
        bytes name,
        bytes temporary,
        meta,
        uint32_t mode,
        uint32_t uid,
        uint32_t gid,
        int64_t mtime_ns,
        list data,
        uint64_t mark,
    ):
        """Make a file; return notes on what could not be set. If it fails, nothing is left of it."""
        cdef const char* made = PyBytes_AS_STRING(temporary if temporary else name)
        cdef const char* named = PyBytes_AS_STRING(name) if temporary else NULL
        cdef int fd
        cdef bint finished
        cdef uint32_t given = 0, asked = self.allowed(mode, uid, gid)
        cdef bint ours = uid == self.uid and gid == self.gid
        self.word[0] = mark | 1
        # Nobody may read it who may not in the end, whatever group the directory gives it; and no set-id bits before the
        # content is whole.
        fd = create(folder, made, asked & (0o707 | (asked & 0o7) << 3) if ours or not self.owner else PRIVATE)
        if fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.word[0] = mark | 3
        notes = None
        try:
            with nogil:
                finished = self.own(fd, uid, gid, &given)
                if not finished:
                    fchmod(fd, PRIVATE)
            self.fill(fd, data)
            with nogil:
                finished = finished and self.dress(fd, given, asked, mtime_ns)
            if not finished:
                notes = writer.dress(fd, meta)
        except BaseException:
            c_close(fd)
            unlinkat(folder, made, 0)
            raise
        with nogil:
            finished = self.finish(fd, folder, made, named)
        if not finished:
            raise OSError(self.error, os.strerror(self.error))
        return notes

    cdef bint plain(self, uint32_t mode, uint32_t uid, uint32_t gid) noexcept:
        """Whether a file may have its owner before its content: who will own a set-id file must not get hold of it."""
        return not (self.owner and mode & SET_ID) or (uid == self.uid and gid == self.gid)

    cdef uint32_t allowed(self, uint32_t mode, uint32_t uid, uint32_t gid) noexcept:
        """The permissions to set: see `metadata.allowed_mode`."""
        if self.owner or (uid == self.uid and gid == self.gid):
            return mode & PERMISSIONS
        return mode & UNOWNED

    cdef int fill(self, int fd, list data) except -1:
        """Write the content."""
        cdef Py_buffer part
        cdef size_t total = 0, at = 0
        cdef bint gathered
        cdef int failed = 0
        for each in data:
            total += <size_t>len(each)
        gathered = self.direct and LEAST_DIRECT <= total <= <size_t>self.buffer.len
        for each in data:
            PyObject_GetBuffer(each, &part, PyBUF_SIMPLE)
            with nogil:
                if gathered:
                    memcpy(<char*>self.buffer.buf + at, part.buf, part.len)
                    at += part.len
                else:
                    failed = self.put(fd, <const char*>part.buf, part.len)
            PyBuffer_Release(&part)
            if failed:
                break
        if gathered:
            with nogil:
                failed = self.put_directly(fd, total)
        if failed:
            raise OSError(self.error, os.strerror(self.error))
        return 0

    cdef int put(self, int fd, const char* data, size_t count) noexcept nogil:
        """Write all bytes at the file's position; 0, or -1 with `error` set."""
        cdef ssize_t done
        while count:
            done = write(fd, data, count)
            if done < 0:
                if errno == EINTR:
                    continue
                self.error = errno
                return -1
            data, count = data + done, count - done
        return 0

    cdef int put_directly(self, int fd, size_t count) noexcept nogil:
        """Write `count` bytes of the buffer: whole pages past the page cache, as far as that is possible."""
        cdef const char* data = <const char*>self.buffer.buf
        cdef size_t pages = count - count % PAGE, at = 0
        cdef ssize_t done
        cdef timespec begin, end
        if fcntl(fd, F_SETFL, O_DIRECT) == 0:
            clock_gettime(CLOCK_MONOTONIC, &begin)
            while at < pages and at % PAGE == 0:
                done = write(fd, data + at, pages - at)
                if done < 0:
                    if errno == EINTR:
                        continue
                    # Some file systems refuse it only here. What is wrong otherwise shows below.
                    self.direct = False
                    break
                at += done
            clock_gettime(CLOCK_MONOTONIC, &end)
            if self.waits < TRIALS:
                self.waits += 1
                self.waited_ns += (end.tv_sec - begin.tv_sec) * SECOND_NS + end.tv_nsec - begin.tv_nsec
                if self.waits == TRIALS and self.waited_ns > TRIALS * PATIENCE_NS:
                    self.direct = False
            fcntl(fd, F_SETFL, 0)
        else:
            self.direct = False
        return self.put(fd, data + at, count - at)

    cdef bint own(self, int fd, uint32_t uid, uint32_t gid, uint32_t* mode) noexcept nogil:
        """Set the owner if it is another, and tell the mode that was there; whether that was possible."""
        cdef c_stat status
        if fstat(fd, &status) != 0:
            return False
        mode[0] = status.st_mode & PERMISSIONS
        if not self.owner or (status.st_uid == uid and status.st_gid == gid):
            return True
        mode[0] = UNKNOWN  # set-id bits may go with the owner
        return fchown(fd, uid, gid) == 0

    cdef bint dress(self, int fd, uint32_t given, uint32_t mode, int64_t mtime_ns) noexcept nogil:
        """Set mode, if it is not the one given already, and time; whether that was possible."""
        cdef timespec times[2]
        if given != mode and fchmod(fd, mode) != 0:
            return False
        times[0].tv_sec, times[0].tv_nsec = mtime_ns // SECOND_NS, mtime_ns % SECOND_NS
        times[1] = times[0]
        return futimens(fd, times) == 0

    cdef bint finish(self, int fd, int folder, const char* made, const char* named) noexcept nogil:
        """Close the file and give it its name; if that fails, it goes, with `error` set."""
        if (c_close(fd) == 0 or errno == EINTR) and (named == NULL or renameat(folder, made, folder, named) == 0):
            return True
        self.error = errno
        unlinkat(folder, made, 0)
        return False


cdef int create(int folder, const char* name, uint32_t mode) noexcept nogil:
    """Make a file and open it for writing; -1 with errno set if that fails, also if the name is taken, by a link say."""
    cdef int fd
    while True:
        fd = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode)
        if fd >= 0 or errno != EINTR:
            return fd
