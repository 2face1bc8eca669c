"""From a location to its connector."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from coffret.connectors.errors import InvalidLocation
from coffret.connectors.local import LocalConnector
from coffret.connectors.registry import SCHEMES, open_connector

if TYPE_CHECKING:
    from pathlib import Path


def path_of(url: str) -> str:
    connector = open_connector(url, {})
    assert isinstance(connector, LocalConnector)
    return str(connector.path)


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert path_of("/srv/backup") == "/srv/backup"
    assert path_of("backup") == path_of("./backup") == f"{tmp_path}/backup"
    assert path_of("~/backup") == "/home/somebody/backup"
    assert path_of("~nobody-of-this-name") == f"{tmp_path}/~nobody-of-this-name"
    assert path_of("/srv/50%25?#") == "/srv/50%25?#"
    assert path_of("host:backup") == f"{tmp_path}/host:backup"


def test_file_urls() -> None:
    assert path_of("file:///srv/backup") == path_of("FILE:///srv/backup") == path_of("file://localhost/srv/backup")
    assert path_of("file:///srv/my%20backup%3F") == "/srv/my backup?"
    assert os.fsencode(path_of("file:///srv/%ff")) == b"/srv/\xff"
    location = open_connector("/srv/my backup?", {}).location
    assert path_of(location) == "/srv/my backup?"


@pytest.mark.parametrize("url", ["file://host/srv", "file://", "file:///srv?a=b", "file:///srv#a", "file:///%00", ""])
def test_what_is_no_local_path(url: str) -> None:
    with pytest.raises(InvalidLocation):
        open_connector(url, {})


def test_memory_is_shared_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of use to tests alone, which register it."""
    monkeypatch.setitem(SCHEMES, "memory", ("coffret.connectors.memory", "memory://name"))
    assert open_connector("memory://one", {}) is open_connector("memory://one", {})
    assert open_connector("memory://one", {}) is not open_connector("memory://two", {})
    for url, options in (("memory://", {}), ("memory://one", {"no-such-option": "1"})):
        with pytest.raises(InvalidLocation):
            open_connector(url, options)


@pytest.mark.parametrize("url", ["gopher://host/x", "FTP:///pub", "c3+http://h/", "memory://x"])
def test_an_unknown_kind_is_told_what_there_is(url: str) -> None:
    with pytest.raises(InvalidLocation, match="/path or file:///path"):
        open_connector(url, {})


@pytest.mark.parametrize("url", ["sftp:me@host:/srv", "s3:https://host/bucket", "sqlite:x.db", "File:/srv", "s3:"])
def test_the_forms_of_other_programs_are_no_folders(url: str) -> None:
    with pytest.raises(InvalidLocation, match=f"a folder of this name is ./{url}"):
        open_connector(url, {})
    assert path_of(f"./{url}").startswith(f"{os.getcwd()}/")


@pytest.mark.parametrize(
    "url", ["http://host:0/", "https://host:0/", "s3://host:0/b", "s3+http://host:0/b", "sftp://host:0/x"]
)
def test_no_server_listens_at_port_0(url: str) -> None:
    with pytest.raises(InvalidLocation):
        open_connector(url, {})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unknown_options_are_refused(scheme: str) -> None:
    with pytest.raises(InvalidLocation):
        open_connector(f"{scheme}:///tmp/x", {"no-such-option": "1"})
