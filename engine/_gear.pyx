# cython: language_level=3, boundscheck=False, wraparound=False
"""Cut points by a windowed gear hash: the only loop of Coffret that looks at every byte in its own compiled code.

    h(i) = sum over k = 0..63 of table[data[i - k]] << k   (mod 2^64)

is computed as h(i) = (h(i - 1) << 1) + table[data[i]]: what came in 64 steps ago has been shifted out. So whether
position i is a candidate depends on bytes i-63..i alone, wherever the scan began, and any way of finding the first
candidate gives the same cuts. A candidate is a hash below a threshold: its high bits are zero, those to which all of
the window contributes.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

cdef enum:
    WINDOW = 64  # bytes
    LANE = 4096  # positions


cdef class Gear:
    """Finds cuts with one table (256 integers of 8 bytes, little endian) and one set of sizes.

    :raises ValueError: if a size or a number of bits is out of range
    """

    cdef uint64_t table[256]
    cdef uint64_t hard, easy
    cdef size_t min_bytes, avg_bytes, max_bytes

    def __init__(self, bytes table not None, int hard_bits, int easy_bits,
                 size_t min_bytes, size_t avg_bytes, size_t max_bytes):
        cdef const uint8_t* raw = table
        cdef size_t value, byte
        if not (len(table) == 256 * 8 and 0 < easy_bits <= hard_bits < 64):
            raise ValueError("a gear table has 2048 bytes, and masks have 1 to 63 bits")
        if not WINDOW <= min_bytes < avg_bytes < max_bytes:
            raise ValueError("min, avg and max do not follow one another")
        for value in range(256):
            self.table[value] = 0
            for byte in range(8):
                self.table[value] |= <uint64_t>raw[value * 8 + byte] << (8 * byte)
        self.hard, self.easy = (<uint64_t>1) << (64 - hard_bits), (<uint64_t>1) << (64 - easy_bits)
        self.min_bytes, self.avg_bytes, self.max_bytes = min_bytes, avg_bytes, max_bytes

    cdef uint64_t hash_before(self, const uint8_t* data, size_t at) noexcept nogil:
        """The sum over the 63 bytes before `at`: what the hash there needs but its own byte."""
        cdef uint64_t h = 0
        cdef size_t back
        for back in range(at - (WINDOW - 1), at):
            h = (h << 1) + self.table[data[back]]
        return h

    cdef size_t first_below(self, const uint8_t* data, size_t begin, size_t end, uint64_t threshold) noexcept nogil:
        """The first position in [begin, end) whose hash is below the threshold, or end. `begin` is 63 or more."""
        cdef size_t at = begin
        cdef uint64_t h
        while end - at >= 2 * LANE and not self.any_below(data, at, threshold):
            at += 2 * LANE
        h = self.hash_before(data, at)
        for at in range(at, end):
            h = (h << 1) + self.table[data[at]]
            if h < threshold:
                return at
        return end

    cdef bint any_below(self, const uint8_t* data, size_t begin, uint64_t threshold) noexcept nogil:
        """Whether any of the 2 * LANE positions from `begin` on has a hash below the threshold.

        Each hash waits for the one before it, two cycles; so two lanes run side by side, which took the scan from
        1,560 to 3,000 MB/s. Three or four lanes brought 2 % at most, without any comparison it would be 3,500.
        """
        cdef const uint8_t* left = data + begin
        cdef const uint8_t* right = left + LANE
        cdef uint64_t l = self.hash_before(data, begin), r = self.hash_before(data, begin + LANE)
        cdef size_t at = 0
        while at < LANE:  # unrolled by hand: compilers do not, since it may end in the middle
            l = (l << 1) + self.table[left[at]]
            r = (r << 1) + self.table[right[at]]
            if l < threshold or r < threshold:
                return True
            l = (l << 1) + self.table[left[at + 1]]
            r = (r << 1) + self.table[right[at + 1]]
            if l < threshold or r < threshold:
                return True
            l = (l << 1) + self.table[left[at + 2]]
            r = (r << 1) + self.table[right[at + 2]]
            if l < threshold or r < threshold:
                return True
            l = (l << 1) + self.table[left[at + 3]]
            r = (r << 1) + self.table[right[at + 3]]
            if l < threshold or r < threshold:
                return True
            at += 4
        return False

    cdef size_t next_length(self, const uint8_t* data, size_t size) noexcept nogil:
        """Length of the chunk that begins at `data`, or 0 if that depends on what follows the `size` bytes."""
        cdef size_t at
        if size > self.min_bytes:
            at = self.first_below(data, self.min_bytes, min(size, self.avg_bytes), self.hard)
            if at < min(size, self.avg_bytes):
                return at + 1
        if size > self.avg_bytes:
            at = self.first_below(data, self.avg_bytes, min(size, self.max_bytes), self.easy)
            if at < min(size, self.max_bytes):
                return at + 1
        return self.max_bytes if size >= self.max_bytes else 0

    def lengths(self, data, size_t start):
        """Lengths in bytes of the chunks from `start` on that are certain, whatever follows `data`. Frees the GIL.

        :raises BufferError: if `data` is not contiguous
        :raises ValueError: if `start` lies beyond its end
        """
        cdef Py_buffer view
        cdef size_t size, length, room, count = 0, at = start
        cdef size_t* found
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            size = <size_t>view.len
            if start > size:
                raise ValueError("start lies beyond the end of the data")
            if size - start <= self.min_bytes:
                return []
            room = (size - start) // self.min_bytes + 1  # each is longer than min
            found = <size_t*>malloc(room * sizeof(size_t))
            if found == NULL:
                raise MemoryError
            try:
                with nogil:
                    while count < room:
                        length = self.next_length(<const uint8_t*>view.buf + at, size - at)
                        if length == 0:
                            break
                        found[count] = length
                        count += 1
                        at += length
                return [found[index] for index in range(count)]
            finally:
                free(found)
        finally:
            PyBuffer_Release(&view)
