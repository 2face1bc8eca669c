"""Open paths no component of which is a link; included by those who do, since nothing is exported in C."""

from libc.errno cimport ENOSYS, EPERM, errno
from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <sys/syscall.h>
    #ifndef SYS_openat2  /* since Linux 5.6, the same on all architectures */
    #define SYS_openat2 437
    #endif
    """
    enum: SYS_openat2

cdef extern from "<fcntl.h>" nogil:
    enum: AT_FDCWD, O_RDONLY, O_NOFOLLOW, O_NONBLOCK, O_CLOEXEC, O_NOATIME, O_DIRECTORY
    int openat(int folder, const char* path, int flags)

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)
    int c_close "close"(int fd)

cdef enum:
    RESOLVE_NO_SYMLINKS = 0x04

# As openat2(2) takes it.
cdef struct How:
    uint64_t flags, mode, resolve

cdef bint lacks_openat2 = False


cdef int open_unlinked(int folder, const char* path, int flags) noexcept nogil:
    """openat(2), with an error (ELOOP) where any component of the path is a link."""
    global lacks_openat2
    cdef How how
    cdef int fd
    if not lacks_openat2:
        how.flags, how.mode, how.resolve = <uint32_t>flags, 0, RESOLVE_NO_SYMLINKS
        fd = <int>syscall(SYS_openat2, folder, path, &how, sizeof(how))
        if fd >= 0 or not (errno == ENOSYS or (errno == EPERM and not flags & O_NOATIME)):
            return fd
        # An old kernel; or one that does not tell it from what is forbidden (seccomp).
        lacks_openat2 = errno == ENOSYS
    return openat(folder, path, flags)
