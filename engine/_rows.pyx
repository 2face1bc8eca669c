# cython: language_level=3, boundscheck=False, wraparound=False
"""Rows of the index mirror by the hundred thousand: made of an index object's blocks, sorted, and counted by bucket.

A row is what `mirror_run.ROW` packs, numbers in it being big-endian, so that rows compare as bytes:

    chunk id (32) | section | offset | stored bytes | raw bytes | inner offset | length | codec (1)

At the end of a backup nothing else is left to do meanwhile: 86,000 rows took Python 110 ms and take 25 ms here.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcmp, memcpy

cdef enum:
    ID = 32
    REF = ID + 4  # as records.pack_ref: an id, and a length that is little-endian
    ROW = ID + 6 * 4 + 1


ROW_BYTES = ROW


cdef struct SortKey:
    uint64_t key  # the first 8 bytes of a row
    const uint8_t* row


cdef inline void put_number(uint8_t* at, uint32_t value) noexcept nogil:
    at[0], at[1], at[2], at[3] = value >> 24, (value >> 16) & 255, (value >> 8) & 255, value & 255


cdef inline uint64_t number_at(const uint8_t* at, int size) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(size):
        value = (value << 8) | at[i]
    return value


def rows_of(list blocks not None, uint32_t section, bytes unnamed not None):
    """The rows of a pack's blocks, one behind the other; chunks whose id is `unnamed` have none.

    :raises OverflowError: if a number does not fit
    :raises ValueError: if refs are cut short
    """
    cdef Py_ssize_t count = 0, filled, i
    cdef uint32_t offset, stored, raw, length
    cdef uint64_t inner
    cdef uint8_t codec
    cdef const uint8_t* ref
    cdef const uint8_t* unnamed_id = <const uint8_t*>PyBytes_AS_STRING(unnamed)
    cdef uint8_t* at
    cdef bytes refs, made
    if len(unnamed) != ID:
        raise ValueError("an id of another length")
    for block in blocks:
        count += len(block.refs) // REF
    made = PyBytes_FromStringAndSize(NULL, count * ROW)
    at = <uint8_t*>PyBytes_AS_STRING(made)
    for block in blocks:
        offset, stored, raw, codec = block.offset, block.stored_bytes, block.raw_bytes, block.codec
        refs, inner = block.refs, 0
        if len(refs) % REF:
            raise ValueError("refs are cut short")
        ref = <const uint8_t*>PyBytes_AS_STRING(refs)
        for i in range(len(refs) // REF):
            length = ref[ID] | (<uint32_t>ref[ID + 1] << 8) | (<uint32_t>ref[ID + 2] << 16) | (<uint32_t>ref[ID + 3] << 24)
            if memcmp(ref, unnamed_id, ID):
                if inner >> 32:
                    raise OverflowError("a chunk lies beyond any block")
                memcpy(at, ref, ID)
                put_number(at + ID, section)
                put_number(at + ID + 4, offset)
                put_number(at + ID + 8, stored)
                put_number(at + ID + 12, raw)
                put_number(at + ID + 16, <uint32_t>inner)
                put_number(at + ID + 20, length)
                at[ID + 24] = codec
                at += ROW
            inner += length
            ref += REF
    filled = at - <uint8_t*>PyBytes_AS_STRING(made)
    return made if filled == len(made) else made[:filled]


cdef int compare(const void* left, const void* right) noexcept nogil:
    cdef const SortKey* a = <const SortKey*>left
    cdef const SortKey* b = <const SortKey*>right
    if a.key != b.key:
        return -1 if a.key < b.key else 1
    return memcmp(a.row, b.row, ROW)


def sort_rows(bytes rows not None):
    """The rows in order, one behind the other.

    :raises ValueError: if the last one is cut short
    """
    cdef Py_ssize_t count = len(rows) // ROW, i
    cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(rows)
    cdef bytes made = PyBytes_FromStringAndSize(NULL, count * ROW)
    cdef uint8_t* target = <uint8_t*>PyBytes_AS_STRING(made)
    cdef SortKey* keys
    if len(rows) % ROW:
        raise ValueError("rows are cut short")
    keys = <SortKey*>malloc(count * sizeof(SortKey) + 1)
    if keys == NULL:
        raise MemoryError
    with nogil:
        for i in range(count):
            keys[i].row = data + i * ROW
            keys[i].key = number_at(keys[i].row, 8)
        qsort(keys, count, sizeof(SortKey), compare)
        for i in range(count):
            memcpy(target + i * ROW, keys[i].row, ROW)
        free(keys)
    return made


def bucket_starts(bytes rows not None, uint64_t begin, uint64_t end, int shift, uint32_t first):
    """Where each bucket from `begin` to `end` starts among sorted rows, as native u32: `first` more than its position.

    A bucket is the first 32 bits of an id, shifted right.
    """
    cdef Py_ssize_t count = len(rows) // ROW, i = 0
    cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(rows)
    cdef bytes made = PyBytes_FromStringAndSize(NULL, (end - begin) * sizeof(uint32_t))
    cdef uint32_t* starts = <uint32_t*>PyBytes_AS_STRING(made)
    cdef uint64_t bucket
    with nogil:
        for bucket in range(begin, end):
            while i < count and number_at(data + i * ROW, 4) >> shift < bucket:
                i += 1
            starts[bucket - begin] = first + <uint32_t>i
    return made
