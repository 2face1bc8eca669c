"""What lies in a directory, and a thread that reads directories before the scan comes to them.

A scan is half system calls and half Python: with a second thread for the calls, which never holds the interpreter's
lock, the two run side by side. What a link leads to and extended attributes are read later, when the scan comes to them: if
one changes in between, its ctime is another than the one stored, and the next backup reads it again.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EINTR, ENOMEM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, qsort, realloc
from libc.string cimport memcmp, memcpy, strlen

include "_open.pxi"

cdef extern from "<fcntl.h>" nogil:
    enum: AT_SYMLINK_NOFOLLOW

cdef extern from "<dirent.h>" nogil:
    struct dirent64:  # as getdents64(2) fills them in, of d_reclen bytes each
        unsigned short d_reclen
        char d_name[1]

cdef extern from "<sys/syscall.h>" nogil:
    enum: SYS_getdents64

cdef extern from "<sys/stat.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    struct c_stat "stat":
        uint32_t st_mode, st_uid, st_gid
        uint64_t st_ino, st_dev, st_rdev, st_nlink
        int64_t st_size
        timespec st_mtim, st_ctim
    int fstatat(int fd, const char* path, c_stat* status, int flags)

cdef extern from "<time.h>" nogil:
    enum: CLOCK_REALTIME
    int clock_gettime(int clock, timespec* now)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* mutex, const void* attributes)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)
    int pthread_cond_init(pthread_cond_t* cond, const void* attributes)
    int pthread_cond_destroy(pthread_cond_t* cond)
    int pthread_cond_wait(pthread_cond_t* cond, pthread_mutex_t* mutex)
    int pthread_cond_signal(pthread_cond_t* cond)

cdef enum:
    # Of what the scan will come to next: so many directories are looked at by the thread, so many entries of them are
    # held at a time (of 110 bytes and their names; each directory counts as some), and one with more is left to the scan
    # itself.
    AHEAD_DIRECTORIES = 64
    AHEAD_NODES = 16_000
    AHEAD_EACH = 16
    AHEAD_MAX_NODES = 8_000
    # Room for this is made first: most directories hold less.
    FIRST_NODES = 16
    FIRST_NAMES = 256
    # The thread is woken for no less than this, since waking it takes as long as reading a directory.
    AHEAD_WORTH = 4

cdef enum State:
    UNREAD  # there is a path, to be read
    LARGE  # the same, but not ahead
    READING
    READ  # or there is none

cdef struct Node:
    size_t offset  # of its name in `Listing.names`, without a NUL
    size_t length
    const char* name  # set when all names are there
    int error  # errno of its lstat
    uint32_t mode, uid, gid
    int64_t size
    int64_t mtime_s, ctime_s
    uint32_t mtime_rest_ns, ctime_rest_ns
    uint64_t inode, device, rdev, nlink

cdef struct Listing:
    Node* nodes
    char* names
    size_t count, sorted, room, used, names_room  # `sorted`: `count` when it was sorted last
    const char* path
    State state
    int error
    int64_t read_ns  # when reading began


cdef int by_name(const void* left, const void* right) noexcept nogil:
    cdef const Node* a = <const Node*>left
    cdef const Node* b = <const Node*>right
    cdef int order = memcmp(a.name, b.name, min(a.length, b.length))
    if order == 0:
        order = (a.length > b.length) - (a.length < b.length)
    return order if order else (a.offset > b.offset) - (a.offset < b.offset)


cdef bint same_name(const Node* left, const Node* right) noexcept nogil:
    return left.length == right.length and memcmp(left.name, right.name, left.length) == 0


cdef void sort_listing(Listing* found) noexcept nogil:
    """Bring the names into order; of those that came several times the last is kept."""
    cdef size_t at, kept = 0
    if found.sorted == found.count:
        return
    for at in range(found.count):
        found.nodes[at].name = found.names + found.nodes[at].offset
    qsort(found.nodes, found.count, sizeof(Node), by_name)
    for at in range(found.count):
        if at + 1 == found.count or not same_name(&found.nodes[at], &found.nodes[at + 1]):
            found.nodes[kept] = found.nodes[at]
            kept += 1
    found.sorted = found.count = kept


cdef Node* add_node(Listing* found, const char* name, size_t length) noexcept nogil:
    """Room for an entry; NULL if there is no memory."""
    cdef void* grown
    if found.count == found.room:
        grown = realloc(found.nodes, max(FIRST_NODES, 2 * found.room) * sizeof(Node))
        if grown == NULL:
            return NULL
        found.nodes, found.room = <Node*>grown, max(FIRST_NODES, 2 * found.room)
    if found.used + length > found.names_room:
        grown = realloc(found.names, max(FIRST_NAMES, 2 * (found.used + length)))
        if grown == NULL:
            return NULL
        found.names, found.names_room = <char*>grown, max(FIRST_NAMES, 2 * (found.used + length))
    cdef Node* node = &found.nodes[found.count]
    memcpy(found.names + found.used, name, length)
    node.offset, node.length = found.used, length
    found.used += length
    found.count += 1
    return node


cdef void clear_listing(Listing* found) noexcept nogil:
    free(found.nodes)
    free(found.names)
    found.nodes, found.names = NULL, NULL
    found.count = found.sorted = found.room = found.used = found.names_room = 0


cdef int take_all(Listing* found, int fd, size_t most) noexcept nogil:
    """Take up what lies in the directory open at `fd`, up to a little more than `most` entries; return an errno.

    Not by readdir(3), which costs two system calls and a buffer of its own for each directory.
    """
    cdef char buffer[32768]
    cdef dirent64* entry
    cdef c_stat status
    cdef timespec now
    cdef Node* node
    cdef const char* name
    cdef long got, at
    clock_gettime(CLOCK_REALTIME, &now)
    found.read_ns = now.tv_sec * 1000000000 + now.tv_nsec
    while found.count <= most:
        got = syscall(SYS_getdents64, fd, buffer, sizeof(buffer))
        if got <= 0:
            return errno if got else 0
        at = 0
        while at < got:
            entry = <dirent64*>(buffer + at)
            at += entry.d_reclen
            name = entry.d_name
            if name[0] == b"." and (name[1] == 0 or (name[1] == b"." and name[2] == 0)):
                continue
            node = add_node(found, name, strlen(name))
            if node == NULL:
                return ENOMEM
            node.error = 0
            if fstatat(fd, name, &status, AT_SYMLINK_NOFOLLOW) != 0:
                node.error = errno
                continue
            node.mode, node.uid, node.gid, node.size = status.st_mode, status.st_uid, status.st_gid, status.st_size
            node.mtime_s, node.mtime_rest_ns = status.st_mtim.tv_sec, <uint32_t>status.st_mtim.tv_nsec
            node.ctime_s, node.ctime_rest_ns = status.st_ctim.tv_sec, <uint32_t>status.st_ctim.tv_nsec
            node.inode, node.device = status.st_ino, status.st_dev
            node.rdev, node.nlink = status.st_rdev, status.st_nlink
    return 0


cdef State read_listing(Listing* found, size_t most) noexcept nogil:
    """Open, read, sort and close; an error is left in `error`. Of one with more than `most` entries nothing is kept.

    A directory that has become a link since it was seen is not followed, nor one above it that has.
    """
    cdef int fd
    while True:
        fd = open_unlinked(AT_FDCWD, found.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        if fd >= 0:
            break
        found.error = errno
        if found.error != EINTR:
            return READ
    found.error = take_all(found, fd, most)
    c_close(fd)
    if found.count > most:
        clear_listing(found)
        return LARGE
    sort_listing(found)
    return READ


cdef class Directory:
    """What a directory holds, as lstat(2) shows it, in the order of names: of the one at `path`, if one is given.

    Until `ReadAhead.pop` has returned it, it holds nothing; without a path it is to be filled by `read` and `put`.
    """

    cdef Listing listing
    cdef object path

    def __cinit__(self, bytes path=None):
        cdef timespec now
        clock_gettime(CLOCK_REALTIME, &now)
        self.listing.read_ns = now.tv_sec * 1000000000 + now.tv_nsec
        self.path = path
        self.listing.path = PyBytes_AS_STRING(path) if path is not None else NULL
        self.listing.state = UNREAD if path is not None else READ

    def __dealloc__(self):
        clear_listing(&self.listing)

    def __len__(self):
        return self.listing.count

    def read(self, int fd):
        """Take up all that lies in the directory open at `fd`, from where it was read up to.

        :raises OSError: if it can't be listed; what can't be looked at is told by `EntryLoop`
        """
        cdef int error
        with nogil:
            error = take_all(&self.listing, fd, <size_t>-1)
        if error:
            raise OSError(error, os.strerror(error))

    def put(self, bytes name not None, status):
        """Add an entry of which an `os.stat_result` is known; it takes the place of one of this name."""
        cdef Node* node = add_node(&self.listing, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        if node == NULL:
            raise MemoryError
        node.error = 0
        node.mode, node.uid, node.gid, node.size = status.st_mode, status.st_uid, status.st_gid, status.st_size
        node.mtime_s, node.mtime_rest_ns = divmod(status.st_mtime_ns, 1_000_000_000)
        node.ctime_s, node.ctime_rest_ns = divmod(status.st_ctime_ns, 1_000_000_000)
        node.inode, node.device, node.rdev, node.nlink = status.st_ino, status.st_dev, status.st_rdev, status.st_nlink

    def list_names(self):
        """The names, in order."""
        cdef Listing* found = &self.listing
        sort_listing(found)
        return [PyBytes_FromStringAndSize(found.nodes[at].name, found.nodes[at].length) for at in range(found.count)]


cdef class ReadAhead:
    """The stack of directories that a walk has still to go to, and what a thread needs to read them before that.

    `push` and `pop` are the walk's, `serve` the thread's; without it all is as well, only that nothing is read ahead.
    """

    cdef pthread_mutex_t lock
    cdef pthread_cond_t work, done  # there is something to read; something was read
    cdef bint idle, awaited, closed
    cdef list stack
    cdef Listing** listings  # those of `stack`
    cdef size_t count, room, held  # `held`: entries read and not yet popped

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.work, NULL)
        pthread_cond_init(&self.done, NULL)
        self.stack = []

    def __dealloc__(self):
        free(self.listings)
        pthread_cond_destroy(&self.done)
        pthread_cond_destroy(&self.work)
        pthread_mutex_destroy(&self.lock)

    def __len__(self):
        return self.count

    def push(self, list directories not None):
        """Put directories on top, of which the first will be the next to be popped."""
        cdef Directory each
        cdef size_t at, wanted = self.count + len(directories)
        cdef void* grown
        for each in reversed(directories):
            self.stack.append(each)
        # Nothing here may raise while the lock is held.
        pthread_mutex_lock(&self.lock)
        if wanted > self.room:
            grown = realloc(self.listings, 2 * wanted * sizeof(Listing*))
            if grown == NULL:
                pthread_mutex_unlock(&self.lock)
                raise MemoryError
            self.listings, self.room = <Listing**>grown, 2 * wanted
        for at in range(self.count, wanted):
            each = <Directory>self.stack[at]
            self.listings[at] = &each.listing
        self.count = wanted
        self.offer()
        pthread_mutex_unlock(&self.lock)

    def pop(self):
        """Take the next directory, when it is read.

        :raises IndexError: if there is none
        :raises OSError: if it can't be read; it is taken all the same
        """
        if not self.count:
            raise IndexError("there is no directory to go to")
        cdef Directory each = self.stack[self.count - 1]  # an index from the end would not be looked after here
        cdef Listing* found = &each.listing
        with nogil:
            pthread_mutex_lock(&self.lock)
            while found.state == READING:
                self.awaited = True
                pthread_cond_wait(&self.done, &self.lock)
            self.awaited = False
            self.count -= 1
            if found.state == READ and found.path != NULL:
                self.held -= min(self.held, found.count + AHEAD_EACH)
            self.offer()
            pthread_mutex_unlock(&self.lock)
            if found.state != READ:
                found.state = read_listing(found, <size_t>-1)
        self.stack.pop()
        if found.error:
            raise OSError(found.error, os.strerror(found.error))
        return each

    def serve(self):
        """Read directories until the stack is closed."""
        with nogil:
            self.read_all()

    def close(self):
        """End `serve`; there is nothing to come any more. It may be called again."""
        pthread_mutex_lock(&self.lock)
        self.closed = True
        pthread_cond_signal(&self.work)
        pthread_mutex_unlock(&self.lock)

    cdef void read_all(self) noexcept nogil:
        cdef Listing* found
        cdef State state
        pthread_mutex_lock(&self.lock)
        while not self.closed:
            found = self.unread()
            if found == NULL:
                self.idle = True
                pthread_cond_wait(&self.work, &self.lock)
                self.idle = False
                continue
            found.state = READING
            pthread_mutex_unlock(&self.lock)
            state = read_listing(found, AHEAD_MAX_NODES)
            pthread_mutex_lock(&self.lock)
            found.state = state
            if state == READ:
                self.held += found.count + AHEAD_EACH
            if self.awaited:
                pthread_cond_signal(&self.done)
        pthread_mutex_unlock(&self.lock)

    cdef Listing* unread(self) noexcept nogil:
        """The next directory to read ahead; NULL if enough is."""
        cdef size_t at = self.count
        if self.held < AHEAD_NODES:
            while at > 0 and at + AHEAD_DIRECTORIES > self.count:
                at -= 1
                if self.listings[at].state == UNREAD:
                    return self.listings[at]
        return NULL

    cdef void offer(self) noexcept nogil:
        """Wake the thread if it waits and there is enough for it to do."""
        cdef size_t at = self.count, worth = 0
        if not self.idle or self.held >= AHEAD_NODES:
            return
        while at > 0 and at + AHEAD_DIRECTORIES > self.count and worth < AHEAD_WORTH:
            at -= 1
            worth += self.listings[at].state == UNREAD
        if worth >= AHEAD_WORTH:
            pthread_cond_signal(&self.work)
