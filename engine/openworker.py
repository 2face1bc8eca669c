"""A worker of the open pool: decrypts, decompresses and verifies blocks; writes files of a restore, or checks packs.

`python -m coffret.engine.openworker SOCKET MEMORY NUMBER SLABS SLAB_BYTES`, started by `openpool`. The parent fetches
stored ranges into slabs; everything that costs CPU happens here. Every chunk id is verified before a byte is used.

    to the worker     ("keys", data_key, id_key, repository_id, target, owner, sparse, replace, slabs)
                      ("files", job, slab, blocks, groups)   ("piece", job, slab, blocks, place, writes)
                      ("finish", job, directory, name, temporary, meta)   ("nodes", job, nodes)
                      ("pack", job, slab, length, name, table)
    from the worker   ("done", job, faults)   with faults = [(key, reason)]   ("error", reason)

`blocks` = [(header, at, stored, position, raw, codec)], a part = (block, inner, length, chunk id); see
`restore_jobs`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
from typing import Any

import zstandard
from blake3 import blake3

from coffret.engine.errors import Damaged
from coffret.engine.frames import put_frame, take_frames
from coffret.engine.packfile import MAX_RAW_BYTES, PackReader, verify_chunks
from coffret.engine.places import Places
from coffret.engine.sealing import PACK, ZSTD, BlockCipher, Sealer, Secrets
from coffret.engine.workermain import run_worker

ALIGNMENT = 4096
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_UNOWNED_MODE = 0o1777
# Larger than a sealed block is as a rule.
_SCRATCH_BYTES = 8 << 20


class Blocks:
    """The blocks of one job, opened when first wanted."""

    def __init__(self, worker: OpenWorker, view: memoryview, blocks: list[tuple[Any, ...]]) -> None:
        self._worker, self._view, self._blocks = worker, view, blocks
        self._opened: dict[int, memoryview | Damaged] = {}

    def part(self, part: tuple[int, int, int, bytes]) -> memoryview:
        """A chunk, verified.

        :raises Damaged: if the block does not open, or the chunk has another id
        """
        number, inner, length, chunk_id = part
        block = self._opened.get(number)
        if block is None:
            try:
                block = self._worker.open(self._view, self._blocks[number])
            except Damaged as error:
                block = error
            self._opened[number] = block
        if isinstance(block, Damaged):
            raise block
        data = block[inner : inner + length]
        if blake3(data, key=self._worker.id_key).digest() != chunk_id:
            raise Damaged(f"chunk {chunk_id.hex()[:16]} does not have its id")
        return data


class OpenWorker:
    """The state of one worker process."""

    def __init__(self, socket: int, memory: int, number: int, slabs: int, slab_bytes: int) -> None:
        self._socket, self._slab_bytes = socket, slab_bytes
        self._view = memoryview(mmap.mmap(memory, slabs * slab_bytes))
        self._jobs: list[tuple[Any, ...]] = []
        self._input = bytearray()
        self._ciphers: dict[bytes, BlockCipher] = {}
        self._zstd = zstandard.ZstdDecompressor()
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))

    def run(self) -> None:
        """Serve until the socket ends."""
        while True:
            while not self._jobs:
                data = os.read(self._socket, 1 << 18)
                if not data:
                    raise EOFError
                self._input += data
                self._jobs += take_frames(self._input)
            message = self._jobs.pop(0)
            kind = message[0]
            if kind == "keys":
                self._hello(message)
                continue
            faults = getattr(self, f"_{kind}")(*message[2:])
            put_frame(self._socket, ("done", message[1], faults))

    def _hello(self, message: tuple[Any, ...]) -> None:
        _, data_key, self.id_key, repository_id, target, self._owner, self._sparse, self._replace, _ = message
        self._direct = True
        self._sealer = Sealer(Secrets(data_key, self.id_key, b""), repository_id)
        self._places: Places | None = None
        if target:
            self._places = Places(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            self._buffer = mmap.mmap(-1, 2 * self._slab_bytes)

    def slab(self, number: int) -> memoryview:
        """The bytes of a slab."""
        return self._view[number * self._slab_bytes : (number + 1) * self._slab_bytes]

    def open(self, view: memoryview, block: tuple[Any, ...]) -> memoryview:
        """Decrypt and decompress one block.

        :raises Damaged: if it is not what was stored
        """
        header, at, stored, position, raw_bytes, codec = block
        if raw_bytes > MAX_RAW_BYTES:
            raise Damaged("a block is larger than any that is made")
        cipher = self._ciphers.get(header)
        if cipher is None:
            if len(self._ciphers) > 256:
                self._ciphers.clear()
            cipher = self._ciphers[header] = self._sealer.cipher(header, PACK)
        sealed = view[at : at + stored]
        body: bytes | memoryview
        if codec == ZSTD and stored <= len(self._scratch):
            body = cipher.open_into(sealed, position, self._scratch)
        else:
            body = cipher.open(sealed, position)
        if codec == ZSTD:
            try:
                if zstandard.frame_content_size(body) != raw_bytes:
                    raise Damaged("a block declares another length than its table")
                body = self._zstd.decompress(body)
            except zstandard.ZstdError:
                raise Damaged("a block does not decompress") from None
        if len(body) != raw_bytes:
            raise Damaged("a block has another length than its table says")
        return memoryview(body)

    # Restore ----------------------------------------------------------------------------------------------------------

    def _files(
        self, slab: int, blocks: list[tuple[Any, ...]], groups: list[tuple[bytes, list[Any]]]
    ) -> list[tuple[bytes, str]]:
        """Whole files: groups = [(directory, [(name, temporary, meta, parts, extents)])]."""
        opened = Blocks(self, self.slab(slab), blocks)
        faults: list[tuple[bytes, str]] = []
        assert self._places is not None
        for directory, files in groups:
            for name, temporary, meta, parts, extents in files:
                path = directory + b"/" + name if directory else name
                try:
                    data = [opened.part(part) for part in parts]
                    folder = self._places.enter(directory)
                    faults += [(path, note) for note in self._write_file(folder, name, temporary, meta, data, extents)]
                except (Damaged, OSError) as error:
                    faults.append((path, reason_of(error)))
        return faults

    def _write_file(
        self, folder: int, name: bytes, temporary: bytes, meta: tuple[Any, ...], data: list[memoryview], extents: bytes
    ) -> list[str]:
        made = temporary or name
        fd = os.open(made, _CREATE, 0o600, dir_fd=folder)
        try:
            try:
                if extents:
                    reserve(fd, meta[3], sparse=self._sparse)
                    write_extents(fd, data, extents)
                else:
                    for part in data:
                        write_fully(fd, part)
                notes = self._apply(fd, meta)
            finally:
                os.close(fd)
            if temporary:
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(made, dir_fd=folder)
            raise
        return notes

    def _piece(
        self,
        slab: int,
        blocks: list[tuple[Any, ...]],
        place: tuple[bytes, bytes],
        writes: list[tuple[int, int, int, list[tuple[int, int, int, bytes]]]],
    ) -> list[tuple[bytes, str]]:
        """A part of a large file: writes = [(file offset, length, bytes of the first part to skip, parts)]."""
        assert self._places is not None
        directory, name = place
        opened = Blocks(self, self.slab(slab), blocks)
        try:
            folder = self._places.enter(directory)
            fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                for offset, length, skip, parts in writes:
                    self._write_run(fd, folder, name, offset, length, skip, [opened.part(part) for part in parts])
            finally:
                os.close(fd)
        except (Damaged, OSError) as error:
            return [(b"", reason_of(error))]
        return []

    def _write_run(
        self, fd: int, folder: int, name: bytes, offset: int, length: int, skip: int, parts: list[memoryview]
    ) -> None:
        """Write contiguous bytes: aligned pages directly, past the page cache; the edges through it."""
        lead = offset % ALIGNMENT
        view = memoryview(self._buffer)
        at = lead
        for part in parts:
            piece = part[skip:]
            skip = 0
            piece = piece[: lead + length - at]
            view[at : at + len(piece)] = piece
            at += len(piece)
        begin = offset - lead
        first = ALIGNMENT if lead else 0
        last = at - at % ALIGNMENT
        if not self._direct or last - first < (1 << 20):
            write_at(fd, view[lead:at], offset)
            return
        if lead:
            write_at(fd, view[lead:first], offset)
        if last < at:
            write_at(fd, view[last:at], begin + last)
        direct = -1
        try:
            direct = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECT, dir_fd=folder)
            write_at(direct, view[first:last], begin + first)
        except OSError:  # some file systems refuse it at open, some at write
            self._direct = False
            write_at(fd, view[first:last], begin + first)
        finally:
            if direct >= 0:
                os.close(direct)

    def _finish(
        self, directory: bytes, name: bytes, temporary: bytes, meta: tuple[Any, ...]
    ) -> list[tuple[bytes, str]]:
        """A large file is written: set its metadata and give it its name; without a name it failed, and goes."""
        assert self._places is not None
        if not name:
            os.unlink(temporary, dir_fd=self._places.enter(directory))
            return []
        path = directory + b"/" + name if directory else name
        folder = -1
        try:
            folder = self._places.enter(directory)
            fd = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                notes = self._apply(fd, meta)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            return [(path, reason_of(error))]
        return [(path, note) for note in notes]

    def _nodes(self, nodes: list[tuple[bytes, bytes, tuple[Any, ...], bytes, int]]) -> list[tuple[bytes, str]]:
        """What is no regular file, in order: (directory, name, meta, target, rdev); directories get their metadata."""
        assert self._places is not None
        faults: list[tuple[bytes, str]] = []
        for directory, name, meta, target, rdev in nodes:
            path = directory + b"/" + name if directory else name
            try:
                mode = meta[0]
                if stat.S_ISDIR(mode):
                    notes = self._apply(self._places.enter(path), meta)
                else:
                    folder = self._places.enter(directory)
                    if self._replace:
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(name, dir_fd=folder)
                    if stat.S_ISLNK(mode):
                        os.symlink(target, name, dir_fd=folder)
                    else:
                        os.mknod(name, stat.S_IFMT(mode) | 0o600, rdev, dir_fd=folder)
                    notes = self._apply_at(folder, name, meta)
                faults += [(path, note) for note in notes]
            except OSError as error:
                faults.append((path, reason_of(error)))
        return faults

    def _apply(self, fd: int, meta: tuple[Any, ...]) -> list[str]:
        """Set owner, attributes, mode and times of an open file or directory; return what could not be set.

        In this order: changing the owner clears capabilities and set-id bits, an ACL may clear the latter too, and who
        is not root can't give attributes to what is read-only. The mode's group bits are the mask of the ACL.
        """
        mode, uid, gid, _, mtime_ns, xattrs = meta
        notes: list[str] = []
        mode = self._own(mode, uid, gid, lambda: os.fchown(fd, uid, gid))
        for name, value in xattrs:
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                if self._owner or not name.startswith((b"security.", b"trusted.")):
                    notes.append(f"attribute {os.fsdecode(name)} not set: {error.strerror}")
        os.fchmod(fd, stat.S_IMODE(mode))
        os.utime(fd, ns=(mtime_ns, mtime_ns))
        return notes

    def _apply_at(self, folder: int, name: bytes, meta: tuple[Any, ...]) -> list[str]:
        """The same for what can't be opened: links, FIFOs, devices and sockets."""
        mode, uid, gid, _, mtime_ns, xattrs = meta
        notes: list[str] = []
        mode = self._own(mode, uid, gid, lambda: os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False))
        for key, value in xattrs:
            try:
                os.setxattr(b"/proc/self/fd/%d/%s" % (folder, name), key, value, follow_symlinks=False)
            except OSError as error:
                if self._owner or not key.startswith((b"security.", b"trusted.")):
                    notes.append(f"attribute {os.fsdecode(key)} not set: {error.strerror}")
        if not stat.S_ISLNK(mode):
            os.chmod(name, stat.S_IMODE(mode), dir_fd=folder)
        os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=folder, follow_symlinks=False)
        return notes

    def _own(self, mode: int, uid: int, gid: int, change: Any) -> int:
        """Give a file to its owner, if that is asked for; without it no set-id bit may come back."""
        if self._owner:
            change()
            return mode
        return mode if (uid, gid) == (os.geteuid(), os.getegid()) else stat.S_IFMT(mode) | (mode & _UNOWNED_MODE)

    # Check ------------------------------------------------------------------------------------------------------------

    def _pack(self, slab: int, length: int, name: str, tables: list[tuple[int, int, int, int, bytes]]) -> list[Any]:
        """Verify a whole pack against its own block table, and that against the index's (sorted by offset)."""
        view = self.slab(slab)[:length]
        faults: list[tuple[int, str]] = []
        try:
            reader = PackReader(view, self._sealer)
            blocks = reader.open_footer(view, length)
        except Damaged as error:
            return [(-1, str(error))]
        by_offset = {block.offset: block for block in blocks}
        for offset, stored, raw_bytes, codec, refs in tables:
            block = by_offset.get(offset)
            own = (block.stored_bytes, block.raw_bytes, block.codec) if block else None
            if block is None or own != (stored, raw_bytes, codec) or not same_refs(refs, block.refs):
                faults.append((offset, "the index says something else than the pack's block table"))
        for block in blocks:
            at = (reader.header, block.offset, block.stored_bytes, block.offset, block.raw_bytes, block.codec)
            try:
                verify_chunks(self.open(view, at), block.refs, self.id_key)
            except Damaged as error:
                faults.append((block.offset, str(error)))
        return faults


def same_refs(indexed: bytes, stored: bytes) -> bool:
    """Whether an index's refs of a block agree with the block's own; unnamed stretches agree with anything."""
    if indexed == stored:
        return True
    mine, at = {}, 0
    for chunk_id, length in struct.iter_unpack("<32sI", stored):
        mine[at] = (chunk_id, length)
        at += length
    at = 0
    for chunk_id, length in struct.iter_unpack("<32sI", indexed):
        if chunk_id != bytes(32) and mine.get(at) != (chunk_id, length):
            return False
        at += length
    return True


def reason_of(error: Exception) -> str:
    """An error in a few words."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def write_fully(fd: int, data: memoryview) -> None:
    """Write all bytes at the file's position."""
    while data:
        data = data[os.write(fd, data) :]


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def reserve(fd: int, size_bytes: int, *, sparse: bool) -> None:
    """Give a file its size, as one hole, or with all its blocks where holes are not wanted."""
    os.ftruncate(fd, size_bytes)
    if not sparse and size_bytes:
        os.posix_fallocate(fd, 0, size_bytes)


def write_extents(fd: int, data: list[memoryview], extents: bytes) -> None:
    """Write a chunk stream to where a sparse file has data."""
    pending = list(data)
    for offset, length in struct.iter_unpack("<QQ", extents):
        while length and pending:
            piece = pending[0][:length]
            write_at(fd, piece, offset)
            offset, length = offset + len(piece), length - len(piece)
            pending[0] = pending[0][len(piece) :]
            if not pending[0]:
                pending.pop(0)


if __name__ == "__main__":
    run_worker(OpenWorker)
