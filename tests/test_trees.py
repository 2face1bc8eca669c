"""The helpers that say whether a tree came back: they must see every difference, or no other test means anything."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from tests.trees import (
    Directory,
    File,
    Link,
    Special,
    Symlink,
    build,
    describe,
    differences,
    entries,
    make_hostile_tree,
    remove_tree,
    trees,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = os.geteuid() == 0
NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that anybody may write to, removed at the end whatever lies in it."""
    path = Path(mkdtemp(prefix="coffret-trees-"))
    path.chmod(0o777)
    yield path
    remove_tree(path)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights for a while."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def test_a_hostile_tree_is_what_it_is(place: Path) -> None:
    refused = make_hostile_tree(place / "tree", seed=1, root_user=ROOT)
    nodes = describe(place / "tree")
    assert differences(nodes, describe(place / "tree")) == []
    kinds = {node.kind for node in nodes.values()}
    assert kinds >= {"file", "directory", "symlink", "fifo", "socket"} or "socket" in refused
    assert max(map(len, nodes)) > 4096
    assert max(path.count(b"/") for path in nodes) > 1000
    if ROOT and "devices" not in refused:
        assert kinds >= {"character device", "block device"}
    if "hard links" not in refused:
        assert len(nodes[b"links/first"].links) == 6
        assert nodes[b"links/first"].links & {b"far/below/fourth", b"kinds/third"}
    remove_tree(place / "tree")
    assert list(place.iterdir()) == []


def test_the_same_seed_makes_the_same_tree(place: Path) -> None:
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        make_hostile_tree(place / name, seed=seed, root_user=False, many=3, deep=False)
    one = describe(place / "one")
    assert differences(one, describe(place / "two")) == []
    assert any("contents/text" in line and "content is" in line for line in differences(one, describe(place / "three")))


@pytest.mark.skipif(not ROOT, reason="the other tests run without root's rights already")
def test_nobody_can_make_describe_and_remove_a_hostile_tree(place: Path) -> None:
    with as_nobody():
        make_hostile_tree(place / "tree", seed=1, root_user=False, many=3)
        nodes = describe(place / "tree")
        assert all(node.content is not None for node in nodes.values() if node.kind == "file")
        (place / "tree/contents/text").chmod(0)
        assert describe(place / "tree")[b"contents/text"].content is None
        remove_tree(place / "tree")
    assert list(place.iterdir()) == []


def test_cp_copies_all_of_it_but_the_deep_paths(place: Path) -> None:
    """GNU cp -a as a witness: two trees made apart are the same to `describe`."""
    make_hostile_tree(place / "tree", seed=2, root_user=ROOT, many=10, deep=False)
    done = subprocess.run(["cp", "-a", place / "tree", place / "copy"], capture_output=True, check=False)
    assert done.stderr == b""
    assert differences(describe(place / "tree"), describe(place / "copy"), ignore=["extents"]) == []


# What `differences` says after each of the changes below, line by line, by its beginning.
CHANGES = {
    "mode": ["b'file': mode is 0640, not 0600"],
    "set-id": ["b'directory': mode is 2700, not 0700"],
    "time": ["b'file': mtime_ns is 1, not 5"],
    "link time": ["b'link': mtime_ns is -1, not 5"],
    "size": [
        "b'sparse': size is 1048576, not 1048577",
        "b'sparse': content is ",
        "b'sparse': extents is ((524288, 4096),), not ((524288, 4096), (1048576, 1))",
    ],
    "content": ["b'file': content is "],
    "target": ["b'link': target is b'elsewh', not b'target'"],
    "attribute": ["b'file': xattrs is {'user.a': b'2'}, not {'user.a': b'1'}"],
    "attribute lost": ["b'file': xattrs is {}, not {'user.a': b'1'}"],
    "hard link": [
        "b'again': links is none, not [b'again', b'file']",
        "b'file': links is none, not [b'again', b'file']",
    ],
    "kind": ["b'fifo': kind is 'socket', not 'fifo'"],
    "hole filled": ["b'sparse': extents is ((0, 1048577),), not ((524288, 4096), (1048576, 1))"],
    "missing": ["b'fifo': the fifo is missing"],
    "added": ["b'fifo2': a symlink that should not be there"],
}
if ROOT:
    CHANGES["owner"] = ["b'link': uid is 1, not 0", "b'link': gid is 2, not 0"]
    CHANGES["device"] = [f"b'device': rdev is {os.makedev(1, 5)}, not {os.makedev(1, 3)}"]


def _change(top: Path, change: str) -> None:
    match change:
        case "mode":
            (top / "file").chmod(0o640)
        case "set-id":
            (top / "directory").chmod(0o2700)
        case "time":
            os.utime(top / "file", ns=(0, 1))
        case "link time":
            os.utime(top / "link", ns=(0, -1), follow_symlinks=False)
        case "size":
            os.truncate(top / "sparse", 1 << 20)
        case "content":
            (top / "file").write_bytes(b"b")
        case "target":
            (top / "link").unlink()
            (top / "link").symlink_to("elsewh")
        case "attribute":
            os.setxattr(top / "file", "user.a", b"2")
        case "attribute lost":
            os.removexattr(top / "file", "user.a")
        case "hard link":
            (top / "again").unlink()
            shutil.copy2(top / "file", top / "again")
        case "kind":
            (top / "fifo").unlink()
            os.mknod(top / "fifo", stat.S_IFSOCK | 0o600)
        case "hole filled":
            content = (top / "sparse").read_bytes()
            with (top / "sparse").open("r+b") as file:
                file.write(content)
        case "missing":
            (top / "fifo").unlink()
        case "added":
            (top / "fifo2").symlink_to("x")
        case "owner":
            os.lchown(top / "link", 1, 2)
        case "device":
            (top / "device").unlink()
            os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(1, 5))


def _small_tree(top: Path) -> None:
    data = ((512 << 10, 4096), (1 << 20, 1))
    spec = Directory(
        {
            b"again": File(1, ((0, 1),), mode=0o600, mtime_ns=5, xattrs={"user.a": b"1"}),
            b"directory": Directory({}, mode=0o700, mtime_ns=5),
            b"fifo": Special(stat.S_IFIFO, mtime_ns=5),
            b"file": Link(0),
            b"link": Symlink(b"target", mtime_ns=5),
            b"sparse": File((1 << 20) + 1, data, mtime_ns=5),
        }
    )
    build(spec, top)
    if ROOT:
        os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(place: Path, change: str) -> None:
    """Each change shows as exactly these lines, but for the time that changing took."""
    _small_tree(place / "tree")
    before = describe(place / "tree")
    expected = CHANGES[change]
    _change(place / "tree", change)
    ignore = [] if "time" in change else ["mtime_ns"]
    lines = differences(before, describe(place / "tree"), ignore=ignore)
    # The content of `again` and `file` is one: what changes in one changes in both.
    lines = [line for line in lines if not line.startswith("b'again'") or "links" in line]
    assert len(lines) == len(expected), lines
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_what_is_ignored_is_not_reported(place: Path) -> None:
    _small_tree(place / "tree")
    before = describe(place / "tree")
    (place / "tree/file").chmod(0o777)
    os.utime(place / "tree/fifo")
    assert differences(before, describe(place / "tree"), ignore=["mode", "mtime_ns"]) == []


def test_removing_what_is_absent_is_no_error(place: Path) -> None:
    remove_tree(place / "absent")
    (place / "link").symlink_to("nowhere")
    remove_tree(place / "link")
    assert list(place.iterdir()) == []


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(spec=trees(root_user=ROOT))
def test_random_trees_are_built_as_specified(place: Path, spec: Directory) -> None:
    for name in ("tree", "twin"):
        remove_tree(place / name)
        build(spec, place / name)
    nodes = describe(place / "tree")
    assert differences(nodes, describe(place / "twin")) == []
    specs = dict(entries(spec))
    assert nodes.keys() == specs.keys()
    for path, wanted in specs.items():
        node = nodes[path]
        match wanted:
            case File():
                assert (node.kind, node.size, node.mode) == ("file", wanted.size, wanted.mode)
                assert (node.mtime_ns, node.xattrs) == (wanted.mtime_ns, wanted.xattrs)
            case Directory():
                assert (node.kind, node.mode, node.mtime_ns) == ("directory", wanted.mode, wanted.mtime_ns)
            case Symlink():
                assert (node.kind, node.target, node.mtime_ns) == ("symlink", wanted.target, wanted.mtime_ns)
            case Special():
                assert (node.mode, node.mtime_ns) == (wanted.mode, wanted.mtime_ns)
                assert node.kind == ("fifo" if wanted.kind == stat.S_IFIFO else "socket")
            case Link():
                assert len(node.links) > 1 or (node.kind, node.size) == ("file", 0)
