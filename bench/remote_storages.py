"""The storages of the remote scenarios: a server, and how each contender reaches a repository there."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.contenders import available
from bench.remote_servers import CREDENTIALS, Server, Sshd, Versitygw

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bench.contenders import Arguments, Contender, Place

_BUCKET = "bench"
_FOLDERS = [f"packs/{number:02x}" for number in range(256)]


class RemoteStorage(ABC):
    """One kind of storage on a server of this host. `port` is the server's, or that of a proxy before it."""

    name: str
    #: What a bare loop is written with.
    library: str
    server: Server
    repositories: Path

    @abstractmethod
    def url(self, repository: str, port: int) -> str:
        """A repository, as Coffret names it."""

    @abstractmethod
    def restic(self, port: int) -> Contender:
        """restic for this storage; its `{repository}` is a name."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What Coffret and the bare loops need beside their own."""
        return {}

    def coffret(self, port: int, *, connections: int | None = None) -> Contender:
        """Coffret for this storage; its `{repository}` is a name."""
        [found] = available(["coffret"])
        url = self.url("{repository}", port)
        more = ("--connections", str(connections)) if connections else ()

        def there(template: Arguments) -> Arguments:
            return (*more, *(url if part == "{repository}" else part for part in template))

        return replace(
            found,
            create=tuple(map(there, found.create)),
            backup=there(found.backup),
            restore=there(found.restore),
            environment={**found.environment, **self.environment},
        )

    def prepare_home(self, home: Path) -> None:  # noqa: B027 - S3 needs nothing there
        """Put into a new home what a client needs to be let in."""

    def folder(self, repository: str) -> Path:
        """Where the server keeps a repository."""
        return self.repositories / repository

    def prepare(self, repository: str) -> None:
        """Make what a bare loop expects to be there."""
        for name in _FOLDERS:
            (self.folder(repository) / name).mkdir(parents=True, exist_ok=True)

    def remove(self, repository: str) -> None:
        """Remove a repository, behind the server's back."""
        shutil.rmtree(self.folder(repository), ignore_errors=True)

    def requests(self) -> int | None:
        """How many requests the server has answered since it was started; None if it does not tell."""
        return None

    def close(self) -> None:
        """End the server."""
        self.server.kill()


class S3Storage(RemoteStorage):
    """A bucket of versitygw."""

    name, library = "s3", "aiobotocore"

    def __init__(self, folder: Path) -> None:
        buckets = folder / "buckets"
        self._access_log = folder / "access"
        self.server = Versitygw(folder, buckets=buckets, more=("--access-log", str(self._access_log)))
        self.repositories = buckets / _BUCKET
        self.repositories.mkdir(parents=True)
        self.server.start()

    def url(self, repository: str, port: int) -> str:
        return f"s3+http://127.0.0.1:{port}/{_BUCKET}/{repository}"

    def restic(self, port: int) -> Contender:
        [found] = available(["restic"])
        access = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), CREDENTIALS, strict=True))
        repository = f"s3:http://127.0.0.1:{port}/{_BUCKET}/{{repository}}"
        return replace(found, environment={**found.environment, **access, "RESTIC_REPOSITORY": repository})

    @property
    def environment(self) -> Mapping[str, str]:
        return dict(zip(("S3_REPOSITORY_USER", "S3_REPOSITORY_PASSWORD"), CREDENTIALS, strict=True))

    def requests(self) -> int | None:
        return self._access_log.read_bytes().count(b"\n") if self._access_log.exists() else 0


class SFTPStorage(RemoteStorage):
    """A folder behind sshd."""

    name, library = "sftp", "asyncssh"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.server = self._sshd = Sshd(folder)
        self.repositories = folder / "repositories"
        self.repositories.mkdir()
        home = self._sshd.home
        self._ssh_config = folder / "ssh_config"
        self._ssh_config.write_text(f"IdentityFile {home.key}\nUserKnownHostsFile {home.known_hosts}\nBatchMode yes\n")
        self.server.start()

    def url(self, repository: str, port: int) -> str:
        return f"sftp://{self._sshd.user}@127.0.0.1:{port}{self.folder(repository)}"

    def restic(self, port: int) -> Contender:
        [found] = available(["restic"])
        login = f"ssh -F {self._ssh_config} -p {port} {self._sshd.user}@127.0.0.1 -s sftp"
        location = {"RESTIC_REPOSITORY": f"sftp:{self._sshd.user}@127.0.0.1:{self.folder('{repository}')}"}
        option = ("-o", f"sftp.command={login}")
        return replace(
            found,
            create=tuple((*option, *template) for template in found.create),
            backup=(*option, *found.backup),
            restore=(*option, *found.restore),
            environment={**found.environment, **location},
        )

    def prepare_home(self, home: Path) -> None:
        shutil.copytree(self._sshd.home.ssh, home / ".ssh")


def storages(folder: Path, names: tuple[str, ...]) -> list[RemoteStorage]:
    """Start the servers of the storages of these names.

    :raises KeyError: if there is no storage of one of them
    :raises ServerMissing: if a server is not here
    """
    kinds: dict[str, type[S3Storage | SFTPStorage]] = {"s3": S3Storage, "sftp": SFTPStorage}
    started: list[RemoteStorage] = []
    try:
        started.extend(kinds[name](folder / name) for name in names)
    except BaseException:
        for storage in started:
            storage.close()
        raise
    return started


def make_place(storage: RemoteStorage, place: Place) -> None:
    """Empty the place of a contender, with a home that the storage's server lets in."""
    place.make()
    storage.prepare_home(place.home)
