"""A tree of everything that makes backups fail: kinds, names, links, attributes, times, holes, depth."""

from __future__ import annotations

import os
import socket
import stat
import struct
from typing import TYPE_CHECKING

from tests.tree_maker import TreeMaker

if TYPE_CHECKING:
    from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SECOND_NS = 1_000_000_000
# ext4 keeps times from 1901 to 2446, XFS to 2486; those of others are what they make of these.
TIMES_NS = {
    b"epoch": 0,
    b"one-ns-later": 1,
    b"one-ns-before": -1,
    b"year-1906": -2_000_000_000 * SECOND_NS + 123_456_789,
    b"year-1969": -1_000_000 * SECOND_NS - 999_999_999,
    b"after-2038": ((1 << 31) + 7) * SECOND_NS + 5,
    b"year-2400": 13_569_465_600 * SECOND_NS + 987_654_321,
}
NAMES = [
    *(b"\xff\xfe\x80", b"half-\xc3", b"latin-\xe9t\xe9", b"overlong-\xc0\xaf", b"surrogate-\xed\xa0\x80"),
    *("caf\u00e9".encode(), "cafe\u0301".encode(), "\U0001f4be".encode(), "\u202egnp.exe".encode()),
    *(b"new\nline", b"\n", b"tab\t", b"carriage\r", b"\x01\x1b[31m\x7f", b" leading", b"trailing ", b" "),
    *(b"-rf", b"--", b"-", b"...", b"..a", b".hidden", b"~", b"$HOME", b"`id`", b"%s%n", b"*", b"?", b"[a]", b"!"),
    *(b"#", b"back\\slash", b"quote'", b'quote"', b"a:b", b"CON", b"nul."),
    *(b"x" * 255, "\u00e9".encode() * 127, b"\xff" * 255),
]
# Their order by path components differs from that of whole paths as text: a/b, a-b, a.b …
ORDER = [
    *(b"a/b", b"a/z/y", b"a-b", b"a.b", b"a b", b"a!", b"a\x01", b"a0", b"A", b"ab", b"a\xff"),
    *(b"a.d/x", b"a-d/x", b"aa/a"),
]


def make_hostile_tree(root: Path, *, seed: int, root_user: bool, many: int = 300, deep: bool = True) -> frozenset[str]:
    """Make a directory `root` (absent before) that holds every kind of entry; the same for the same seed.

    `root_user` adds what only root can make, and files that only root can read. `many`: files in the large directory.
    `deep`: with a path longer than PATH_MAX and a directory 1,100 levels down. Returns the kinds that this file system
    refused, by name; empty on ext4.
    """
    maker = _HostileTree(root, seed)
    maker.kinds()
    maker.names()
    maker.links()
    maker.modes()
    maker.attributes()
    maker.times()
    maker.sparse()
    maker.contents()
    maker.many(many)
    if root_user:
        maker.privileged()
    if deep:
        maker.deep()
    maker.set_times()
    return frozenset(maker.refused)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL as the kernel's xattrs hold it: (tag, permissions, id) each; linux/posix_acl_xattr.h."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


_NO_ID = 0xFFFFFFFF
# user::rwx, user:1234:r--, group::r--, group:4321:rwx, mask::rwx, other::---
ACCESS_ACL = acl((1, 7, _NO_ID), (2, 4, 1234), (4, 4, _NO_ID), (8, 7, 4321), (16, 7, _NO_ID), (32, 0, _NO_ID))
DEFAULT_ACL = acl((1, 7, _NO_ID), (2, 5, 1234), (4, 5, _NO_ID), (16, 5, _NO_ID), (32, 5, _NO_ID))
# cap_net_bind_service, effective and permitted: linux/capability.h, revision 2.
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


class _HostileTree(TreeMaker):
    def kinds(self) -> None:
        self.file(b"kinds/regular", b"some text\n")
        self.file(b"kinds/empty")
        self.directory(b"kinds/directory")
        os.mkfifo(self.at(b"kinds/fifo"))
        with self.trying("socket"):
            os.mknod(self.at(b"kinds/socket"), stat.S_IFSOCK | 0o640)
        with self.trying("bound socket"), socket.socket(socket.AF_UNIX) as server:
            fd = os.open(self.at(b"kinds"), os.O_PATH)
            try:
                server.bind(b"/proc/self/fd/%d/bound" % fd)
            finally:
                os.close(fd)

    def names(self) -> None:
        for name in NAMES:
            with self.trying("names"):
                self.file(b"names/" + name, name)
        for name in NAMES[::5]:
            with self.trying("names"):
                self.file(b"names/directories/" + name + b"/" + name)
        for path in ORDER:
            self.file(b"order/" + path, path)

    def links(self) -> None:
        targets = {
            b"dangling": b"nowhere",
            b"to-file": b"../kinds/regular",
            b"to-directory": b"../kinds/directory",
            b"absolute": b"/etc/passwd",
            b"up": b"../../../../../..",
            b"itself": b"itself",
            b"not-utf8-\xff": b"\xfe\xff\n",
            b"long": b"/".join([b"t" * 200] * 20)[:4095],
        }
        for name, target in targets.items():
            os.symlink(target, self.at(b"links/" + name))
        self.hard_link(
            self.file(b"links/first", b"linked" * 1000), b"links/second", b"kinds/third", b"far/below/fourth"
        )
        self.hard_link(self.file(b"links/empty-first"), b"links/empty-second")
        self.hard_link(self.at(b"links/dangling"), b"links/dangling-again", b"kinds/dangling-again")
        self.hard_link(self.at(b"kinds/fifo"), b"links/fifo-again")

    def modes(self) -> None:
        for mode in (0o4755, 0o2755, 0o6711, 0o1644, 0o0400, 0o0444, 0o0600, 0o0777):
            os.chmod(self.file(b"modes/file-%04o" % mode, b"mode"), mode)
        for mode in (0o1777, 0o2775, 0o0700, 0o3770):
            os.chmod(self.directory(b"modes/directory-%04o" % mode), mode)
        self.file(b"modes/read-only/inside", b"kept")
        os.chmod(self.at(b"modes/read-only"), 0o500)

    def attributes(self) -> None:
        for path in (self.file(b"attributes/file", b"x"), self.directory(b"attributes/directory")):
            self.attribute(path, "user.text", b"value")
            self.attribute(path, "user.empty", b"")
            self.attribute(path, "user.binary", bytes(range(256)))
            self.attribute(path, "user.n\u00e4me", b"name beyond ASCII")
            self.attribute(path, "user." + "n" * 200, b"long name")
            self.attribute(path, "system.posix_acl_access", ACCESS_ACL)
        self.attribute(self.at(b"attributes/directory"), "system.posix_acl_default", DEFAULT_ACL)
        many = self.file(b"attributes/many")
        for number in range(30):
            self.attribute(many, f"user.{number}", b"%d" % number)
        large = self.file(b"attributes/large")
        try:  # ext4 has room for 4 KiB together, XFS and tmpfs for 64 KiB each
            os.setxattr(large, "user.large", self.random.randbytes(40_000))
        except OSError:
            self.attribute(large, "user.large", self.random.randbytes(3_500))
        self.hard_link(large, b"attributes/large-again")

    def times(self) -> None:
        for name, mtime_ns in TIMES_NS.items():
            self.file(b"times/" + name, name)
            os.symlink(name, self.at(b"times/link-" + name))
            self.file(b"times/directory-" + name + b"/inside")
            for prefix in (b"times/", b"times/link-", b"times/directory-"):
                self.chosen_times_ns[prefix + name] = mtime_ns

    def sparse(self) -> None:
        page = 64 * KIB
        self.sparse_file(b"sparse/hole-first", 4 * MIB, (3 * MIB, MIB))
        self.sparse_file(b"sparse/hole-last", 4 * MIB + 123, (0, MIB))
        self.sparse_file(b"sparse/hole-between", 4 * MIB, (0, page), (3 * MIB, MIB))
        self.sparse_file(b"sparse/hole-alone", 3 * MIB + 1)
        self.sparse_file(b"sparse/odd", 2 * MIB + 777, (MIB + 13, 4321), (2 * MIB, 777))
        self.sparse_file(b"sparse/gigabyte", GIB, (0, 10), (GIB // 2, page), (GIB - 1, 1))
        self.sparse_file(b"sparse/comb", 200 * 2 * page, *((2 * page * tooth, page) for tooth in range(200)))
        self.file(b"sparse/zeros", bytes(2 * MIB))

    def contents(self) -> None:
        text = self.text(3 * MIB)
        noise = self.random.randbytes(5 * MIB // 2)
        self.file(b"contents/text", text)
        self.file(b"contents/noise", noise)
        self.file(b"contents/same-text", text)
        self.file(b"contents/shifted", b"inserted before" + text)
        self.file(b"contents/mixed", noise[:MIB] + text[MIB : 2 * MIB] + noise[MIB:])
        self.file(b"contents/periodic", b"0123456789abcdef" * (MIB // 16))
        for size in (1, 4095, 4096, 4097, 64 * KIB, 512 * KIB - 1, 512 * KIB, MIB + 1):
            self.file(b"contents/of-%d-bytes" % size, self.random.randbytes(size))

    def many(self, count: int) -> None:
        self.directory(b"many")
        for number in range(count):
            self.file(b"many/%06d" % number, b"%d" % number if number % 3 else b"")

    def privileged(self) -> None:
        """What only root can make."""
        for path, mode, device in (
            (b"kinds/null", stat.S_IFCHR, os.makedev(1, 3)),
            (b"kinds/loop", stat.S_IFBLK, os.makedev(7, 0)),
            (b"kinds/large-numbers", stat.S_IFBLK, os.makedev(4000, 1_000_000)),
        ):
            with self.trying("devices"):
                os.mknod(self.at(path), mode | 0o620, device)
        owners = ((0, 1), (1, 0), (1000, 1000), (65534, 65534), (123_456, 654_321), (_NO_ID - 1, _NO_ID - 1))
        for uid, gid in owners:
            name = b"owners/%d-%d" % (uid, gid)
            with self.trying("owners"):
                os.chown(self.file(name), uid, gid)
                os.symlink(b"target", self.at(name + b"-link"))
                os.chown(self.at(name + b"-link"), uid, gid, follow_symlinks=False)
                os.chown(self.directory(name + b"-directory"), uid, gid)
                os.mkfifo(self.at(name + b"-fifo"))
                os.chown(self.at(name + b"-fifo"), uid, gid)
                set_id = self.file(name + b"-set-id", b"x")
                os.chown(set_id, uid, gid)
                os.chmod(set_id, 0o6755)
        capable = self.file(b"attributes/capable", b"x")
        os.chmod(capable, 0o755)
        self.attribute(capable, "security.capability", CAPABILITY)
        for path in (b"attributes/capable", b"attributes/directory", b"links/to-file", b"kinds/fifo", b"kinds/socket"):
            self.attribute(self.at(path), "trusted.coffret", b"for root alone\0")
        os.chmod(self.file(b"modes/file-0000", b"unreadable"), 0)
        self.file(b"modes/closed/inside", b"unreachable")
        os.chmod(self.at(b"modes/closed"), 0)

    def deep(self) -> None:
        """A path of 5,000 bytes, and 1,100 directories in one another: beyond PATH_MAX, RLIMIT_NOFILE and recursion."""
        self.chain(b"long", [b"%02d-" % level + b"l" * 197 for level in range(25)])
        self.chain(b"stairs", [b"s"] * 1100)
