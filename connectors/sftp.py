"""Objects as files on an SSH server: laid out as `local` does it, so that either opens what the other made.

An object is written to a file of its own in `tmp/`, flushed to the disk where the server knows how, and only then given
its name: by a hard link if it must be absent, else by a rename that replaces (`sftpnames`). Requests are sent without
waiting for the answers to those before, within what the server takes (`sftpfiles`), over several connections
(`sftpconnections`), each made as `ssh` makes it (`sftplogin`).
"""

from __future__ import annotations

import re
import secrets
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlsplit

import msgspec

from coffret.connectors.base import Capabilities, Connector, ObjectInfo, checked_range, valid_name, valid_prefix
from coffret.connectors.errors import (
    AlreadyExists,
    ConnectorError,
    InvalidLocation,
    InvalidRange,
    NotFound,
    NotStorage,
    StorageFull,
    TransientError,
)
from coffret.connectors.sftpconnections import Connections
from coffret.connectors.sftperrors import Refusal
from coffret.connectors.sftpfiles import FOLDER, REGULAR, Files, at_once
from coffret.connectors.sftphandles import KEPT
from coffret.connectors.sftplogin import Address, Login
from coffret.connectors.sftpnames import FileGone, Naming
from coffret.connectors.sftpscan import scan
from coffret.connectors.sftpturns import list_in_turns
from coffret.connectors.sftpwalk import check_root, info_of, text, walk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from coffret.connectors.base import Buffer, Listings
    from coffret.connectors.limit import Pace
    from coffret.connectors.sftpfiles import OpenFile

FOLDERS = ("keys", "packs", "index", "snapshots", "leases", "trash", "removed", "tmp")
CONNECTIONS = 4
_MAX_CONNECTIONS = 64
# Gets under way for each connection: with 4 a restore at 50 ms waited for all of them most of the time.
_GETS = 12
# From here on a transfer is worth a connection of its own, and a look whether the name is taken before it begins.
_LARGE_BYTES = 1 << 20
_TEMPORARY = re.compile(r"[0-9a-f]{32}")
# As in `local`: a killed process leaves what it was writing, and no put takes as long as this.
_ABANDONED_AFTER_S = 24 * 3600


def open_url(url: str, options: Mapping[str, str]) -> SFTPConnector:
    """The connector for `sftp://[user@]host[:port]/path` (percent-encoded; a path from the home folder: `/~/path`).

    Options, also as the URL's query: `connections`, how many SSH connections there may be at a time (default 4).

    :raises InvalidLocation: if the form or an option is not known
    """
    parts = urlsplit(url)
    options = {**dict(parse_qsl(parts.query, keep_blank_values=True)), **options}
    if unknown := options.keys() - {"connections"}:
        raise InvalidLocation(f"an SFTP repository has no option {min(unknown)!r}")
    count = options.get("connections", str(CONNECTIONS))
    if not (count.isascii() and count.isdigit() and 1 <= int(count) <= _MAX_CONNECTIONS):
        raise InvalidLocation(f"connections={count}: a number from 1 to {_MAX_CONNECTIONS} is needed")
    if parts.password is not None:
        raise InvalidLocation("a password in a location would be seen by all: it is asked for, or better, use a key")
    path = unquote_to_bytes(parts.path)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if not parts.hostname or not path or b"\0" in path or parts.fragment or port == 0:
        raise InvalidLocation(f"{url}: an SFTP repository has the form sftp://[user@]host[:port]/path")
    user = unquote(parts.username) if parts.username else None
    return SFTPConnector(Address(unquote(parts.hostname), port, user), path, connections=int(count))


class SFTPConnector(Connector):
    """A repository in a folder of an SSH server, which `create` makes if need be.

    What it can't promise: SFTP knows no fsync of folders, so that after a power loss of the server the last objects
    may have lost their names (not their content, where the server has fsync: OpenSSH does). How exclusive names are on
    servers of other makes is found out, and told by `capabilities` and `notes`.
    """

    def __init__(
        self, address: Address, path: bytes, *, connections: int = CONNECTIONS, login: Login | None = None
    ) -> None:
        """`path` is absolute, or relative to the home folder as `/~/path`."""
        path = re.sub(rb"/+", b"/", path).rstrip(b"/") or b"/"
        self.location = f"sftp://{address}{quote(path)}"
        self._root = (path[3:] or b".") if path == b"/~" or path.startswith(b"/~/") else path
        self.capabilities = Capabilities(
            parallel_puts=connections, parallel_gets=_GETS * connections, ordered_lists=True
        )
        self._connections = Connections(login or Login(address), connections)
        self._naming = Naming()
        self._unsynced = self._swept = False
        self._pace: Pace | None = None
        # What could not be removed since the connection broke.
        self._left_over: set[str] = set()

    @property
    def notes(self) -> Sequence[str]:
        notes = [*self._naming.notes]
        if self._unsynced:
            notes.append("the server can't flush files to its disk: a power loss there may damage what was stored last")
        if self._connections.note:
            notes.append(self._connections.note)
        return [f"{self.location}: {note}" for note in notes]

    def set_connections(self, count: int) -> None:
        self._connections.limit = min(count, _MAX_CONNECTIONS)
        self.capabilities = msgspec.structs.replace(self.capabilities, parallel_puts=count, parallel_gets=_GETS * count)

    def expect_transfers(self) -> None:
        self._connections.expect()

    def set_pace(self, pace: Pace) -> bool:
        self._pace = pace
        return True

    async def create(self) -> None:
        async with self._files("", learn=False) as files:
            await files.make_root()
            if await self._may_be_made_one(files):
                await files.make_folders([*FOLDERS, *(f"packs/{number:02x}" for number in range(256))])
            await self._naming.learn(files)

    async def put(self, name: str, body: Sequence[Buffer], *, if_absent: bool = False) -> None:
        size_bytes = sum(map(len, body))
        async with self._files(valid_name(name), size_bytes) as files:
            if if_absent and size_bytes >= _LARGE_BYTES and await files.attributes(name) is not None:
                raise Refusal(AlreadyExists, "it exists already")
            try:
                await self._put(files, name, body, if_absent)
                self._connections.forget(name)
            except Refusal as refusal:
                raise await self._explained(files, refusal, name, size_bytes) from refusal

    async def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if length and length > 0 and offset >= 0 and name.startswith(KEPT):
            buffer = bytearray(length)
            await self._read_kept(name, offset, memoryview(buffer))
            return bytes(buffer)
        async with self._opened(valid_name(name), offset, length or 0) as (files, file):
            if length is None:
                return await self._read_all(files, file, name, offset)
            if length <= 0:
                checked_range(name, (await file.attributes()).size or 0, offset, length)
            buffer = bytearray(length)
            await files.read_into(file, offset, memoryview(buffer))
            return bytes(buffer)

    async def _read_kept(self, name: str, offset: int, buffer: memoryview) -> None:
        """A range of a pack, which stays open for the next."""
        async with self._files(valid_name(name), len(buffer), reads=True) as files, self._missing(files, name):
            handles = files.session.handles
            for last in (False, True):
                handle, reused = handles.take(files, name)
                try:
                    await files.read_into(await handle.opened(), offset, buffer)
                    return
                except Refusal as refusal:
                    handles.drop(name, handle)
                    # One that was open may be no more what has this name. For another too many may be open.
                    curable = reused or (refusal.kind is ConnectorError and handles.drop_idle())
                    if last or not curable:
                        raise
                finally:
                    handles.give_back(handle)

    async def peek(self, name: str, limit_bytes: int) -> bytes:
        async with self._opened(valid_name(name), 0, limit_bytes) as (files, file):
            return await self._read_all(files, file, name, 0, limit_bytes)

    async def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if len(buffer) and offset >= 0 and name.startswith(KEPT):
            await self._read_kept(name, offset, buffer)
            return
        async with self._opened(valid_name(name), offset, len(buffer)) as (files, file):
            if not len(buffer):
                checked_range(name, (await file.attributes()).size or 0, offset, 0)
            await files.read_into(file, offset, buffer)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        async with self._files(valid_prefix(prefix)) as files, aclosing(walk(files, prefix)) as infos:
            async for info in infos:
                yield info

    async def stat(self, name: str) -> ObjectInfo:
        async with self._files(valid_name(name)) as files:
            attributes = await files.attributes(name)
            if attributes is None or attributes.type != REGULAR:
                raise Refusal(NotFound, "there is no such object")
            return info_of(name, attributes)

    async def delete(self, name: str) -> None:
        async with self._files(valid_name(name)) as files:
            self._connections.forget(name)
            try:
                await files.remove(name)
                self._connections.forget(name)
            except Refusal as refusal:
                attributes = await files.attributes(name)
                if attributes is not None and attributes.type != FOLDER:
                    raise await self._explained(files, refusal, name, 0) from refusal
                await check_root(files)

    async def list_turns(self, turns: Sequence[Sequence[str]]) -> Listings:
        found: Listings = {}
        async with self._files("") as files:
            if files.session.in_order and all(prefix.endswith("/") for turn in turns for prefix in turn):
                found = await list_in_turns(files, turns)
        rest = [[prefix for prefix in turn if prefix not in found] for turn in turns]
        return found | await super().list_turns([turn for turn in rest if turn])

    async def close(self) -> None:
        await self._connections.close()

    @asynccontextmanager
    async def _files(
        self, name: str, size_bytes: int = 0, *, learn: bool = True, reads: bool = False
    ) -> AsyncIterator[Files]:
        """The files on the server, over a connection for a call about `name` that moves so many bytes."""
        large = size_bytes >= _LARGE_BYTES
        session = await self._connections.session(large, reads=reads)
        session.calls, session.large_calls = session.calls + 1, session.large_calls + large
        files = Files(session, self._root, self._pace)
        try:
            if learn:
                await self._naming.learn(files)
            yield files
        except Refusal as refusal:
            raise refusal.kind(f"{self.location}{'/' * bool(name)}{name}: {refusal.reason}") from refusal
        finally:
            session.calls, session.large_calls = session.calls - 1, session.large_calls - large
            self._connections.changed()
            if self.capabilities.exclusive_puts is not bool(self._naming.exclusive):
                self.capabilities = msgspec.structs.replace(
                    self.capabilities, exclusive_puts=bool(self._naming.exclusive)
                )

    @asynccontextmanager
    async def _opened(self, name: str, offset: int, size_bytes: int) -> AsyncIterator[tuple[Files, OpenFile]]:
        """An object to read so many bytes of; what is no file is NotFound."""
        async with self._files(name, size_bytes, reads=True) as files:
            if offset < 0:
                raise Refusal(InvalidRange, f"there is no byte {offset}")
            async with self._missing(files, name):
                file = await files.open(name)
                try:
                    yield files, file
                finally:
                    file.close_later()

    @asynccontextmanager
    async def _missing(self, files: Files, name: str) -> AsyncIterator[None]:
        """Reading an object: a refusal without a cause means NotFound where there is no file of this name."""
        try:
            yield
        except Refusal as refusal:
            if refusal.kind is not ConnectorError:
                raise
            attributes = await files.attributes(name, follow=True)
            if attributes is not None and attributes.type == REGULAR:
                raise
            raise Refusal(NotFound, "there is no such object") from refusal

    async def _read_all(
        self, files: Files, file: OpenFile, name: str, offset: int, limit_bytes: int | None = None
    ) -> bytes:
        """Everything from `offset` on, or so much of it: the first piece is asked for together with the size."""
        size_bytes, first = 0, b""

        async def ask_size() -> None:
            nonlocal size_bytes
            size_bytes = (await file.attributes()).size or 0

        async def read_first() -> None:
            nonlocal first
            at_most = files.session.read_bytes
            first = await file.read(at_most if limit_bytes is None else min(at_most, limit_bytes), offset)

        await at_once([ask_size(), read_first()])
        wanted = checked_range(name, size_bytes, offset, None)
        if limit_bytes is not None:
            wanted = min(wanted, limit_bytes)
        if self._pace is not None:
            await self._pace.download.take(len(first))
        if wanted <= len(first):
            return first[:wanted]
        buffer = bytearray(wanted)
        buffer[: len(first)] = first
        await files.read_into(file, offset + len(first), memoryview(buffer)[len(first) :])
        return bytes(buffer)

    async def _put(self, files: Files, name: str, body: Sequence[Buffer], if_absent: bool) -> None:
        temporary, left = f"tmp/{secrets.token_hex(16)}", True
        try:
            await self._write(files, temporary, body)
            try:
                left = await self._naming.give(files, temporary, name, if_absent)
            except Refusal as refusal:
                if refusal.kind is not NotFound and not isinstance(refusal, FileGone):
                    raise
                await files.make_folders([name[:at] for at, sign in enumerate(name) if sign == "/"])
                if isinstance(refusal, FileGone):
                    await self._write(files, temporary, body)
                left = await self._give_again(files, temporary, name, if_absent)
        finally:
            if left:
                self._left_over.add(temporary)
                await files.session.clear_up(self._clear_up(files))
        if not self._swept or self._left_over:
            files.session.later(self._sweep(files))

    async def _give_again(self, files: Files, temporary: str, name: str, if_absent: bool) -> bool:
        try:
            return await self._naming.give(files, temporary, name, if_absent)
        except Refusal as refusal:
            if refusal.kind is not NotFound:
                raise
            raise Refusal(TransientError, "its folder vanished while it was written") from refusal

    async def _write(self, files: Files, temporary: str, body: Sequence[Buffer]) -> None:
        try:
            synced = await files.write(temporary, body)
        except Refusal as refusal:
            if refusal.kind is not NotFound:
                raise
            await check_root(files)
            await files.make_folder("tmp")
            synced = await files.write(temporary, body)
        self._unsynced = self._unsynced or not synced

    async def _clear_up(self, files: Files) -> None:
        """Remove temporary files whose puts have ended; those of a broken connection are tried again later."""
        for temporary in tuple(self._left_over):
            with suppress(Refusal):  # it is not there
                await files.remove(temporary)
            self._left_over.discard(temporary)

    async def _sweep(self, files: Files) -> None:
        """Remove what killed processes left in `tmp/`, by the server's clock: a file was made there just now."""
        await self._clear_up(files)
        if self._swept:
            return
        self._swept = True
        folder = await files.attributes("tmp", follow=True)
        for entry in await scan(files, "tmp") if folder is not None and folder.mtime else ():
            name = text(entry.filename)
            age_s = (folder.mtime or 0) - (entry.attrs.mtime or 0) if folder is not None else 0
            if _TEMPORARY.fullmatch(name) and age_s > _ABANDONED_AFTER_S:
                with suppress(Refusal):
                    await files.remove(f"tmp/{name}")

    async def _explained(self, files: Files, refusal: Refusal, name: str, size_bytes: int) -> Refusal:
        """The refusal, with a kind found for it if the server gave none."""
        if refusal.kind is ConnectorError:
            if size_bytes and await files.is_full(size_bytes):
                return Refusal(StorageFull, "no space is left on the server")
            attributes = await files.attributes(name, follow=True)
            if attributes is not None and attributes.type == FOLDER:
                return Refusal(NotStorage, "there is a folder of this name")
        return refusal

    async def _may_be_made_one(self, files: Files) -> bool:
        """Whether this is an empty folder, or one whose `create` was cut short; not if it has a config already.

        :raises NotStorage: if it holds anything else
        """
        names = set()
        for entry in await scan(files, ""):
            name = text(entry.filename)
            if (name == "config" and entry.attrs.type == REGULAR) or (name in FOLDERS and entry.attrs.type == FOLDER):
                names.add(name)
            elif name not in (".", "..", "lost+found"):
                raise NotStorage(f"{self.location} holds other files, {name!r} for one")
        if "config" in names:
            return False
        # As in `local`: more than the key slot and lease of a creation cut short is a repository that lost its config.
        async with aclosing(walk(files, "")) as infos:
            async for info in infos:
                if not info.name.startswith(("keys/", "leases/")):
                    raise NotStorage(f"{self.location} holds objects of a repository without its config")
        return True
