"""Write the inputs that are kept: what is likely to break a parser, thought of by people. Add to it what a run finds.

python -m tests.fuzz.make_corpus
"""

from __future__ import annotations

import msgspec
import zstandard
from tests.fuzz.targets import CHUNK, CORPUS, REF

from coffret.engine.packfile import TRAILER

_DEEP = b"\x91" * 3000 + b"\xc0"
_HUGE = {
    "array32": b"\xdd\xff\xff\xff\xff",
    "map32": b"\xdf\xff\xff\xff\xff",
    "bin32": b"\xc6\xff\xff\xff\xff",
    "str32": b"\xdb\xff\xff\xff\xff",
    "deep": _DEEP,
    "utf8": b"\x91\xd9\x02\xff\xfe",
    "ext": b"\xc9\xff\xff\xff\xff\x01",
}


def _frame(size: int) -> bytes:
    """A zstd frame that declares this many bytes, and holds a block of one repeated byte."""
    return (
        b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + ((128 << 10) << 3 | 0b011).to_bytes(3, "little") + b"x"
    )


def inputs() -> dict[str, dict[str, bytes]]:
    """Target → name → bytes."""
    records = ("index-payload", "snapshot-payload", "end-payload", "mark-payload", "table", "page", "node", "xattrs")
    found: dict[str, dict[str, bytes]] = {name: dict(_HUGE) for name in records}
    encode = msgspec.msgpack.encode
    found["page"] |= {
        "dot-dot": encode([[b"", [[b"..", 0o40755, 0, 0, "", "", 0, 0, 0, 0, 0]]]]),
        "slash": encode([[b"", [[b"a/b", 0o100644, 0, 0, "", "", 0, 0, 0, 0, 0, False, b"", None]]]]),
        "negative": encode([[b"", [[b"a", -1, -1, -1, "", "", -1, -1, -1, -1, -1, False, b"", None]]]]),
        "size": encode([[b"", [[b"a", 0o100644, 0, 0, "", "", 2**63, 0, 0, 0, 0, False, REF * 3, None]]]]),
        "repeats": encode([[b"", [[b"a", 0o100644, 0, 0, "", "", 2**40, 0, 0, 0, 0, False, REF, [b"", 0, 1, 16]]]]]),
        "empty-section": encode([[b"", []]]),
    }
    found["node"] |= {"counts": encode([[b"", b"", REF, -1, -1, -1]]), "ref": encode([[b"", b"", REF[:35], 1, 1, 1]])}
    found["frame"] = {
        "no-size": zstandard.ZstdCompressor(write_content_size=False).compress(CHUNK),
        "claims-a-tebibyte": _frame(1 << 40),
        "claims-all": _frame((1 << 64) - 1),
        "claims-less": _frame(1),
        "empty": b"",
        "twice": zstandard.ZstdCompressor().compress(CHUNK) * 2,
    }
    found["pack"] = found["pack-clear"] = {
        "only-a-trailer": TRAILER.pack(16, 0, b"COFFREND"),
        "long-footer": bytes(100) + TRAILER.pack((1 << 32) - 1, (1 << 32) - 1, b"COFFREND"),
    }
    found["slot"] = {"not-json": b"\xff", "deep": b"[" * 10_000, "number": b'{"version":' + b"9" * 5000 + b"}"}
    found["config"] = found["pins"] = dict(found["slot"])
    found["keyring"] = dict(found["slot"])
    found["recovery"] = {
        "empty": b"-----BEGIN COFFRET RECOVERY FILE-----\n-----END COFFRET RECOVERY FILE-----\n",
        "twice": b"-----BEGIN COFFRET RECOVERY FILE-----\n" * 2,
    }
    found["extents"] = {"odd": bytes(17), "overlap": bytes(32), "wraps": b"\xff" * 16}
    found["lists"] = {"itself": REF * 5, "odd": REF[:-1], "nothing": REF[:32] + bytes(4)}
    return found


def main() -> None:
    """Write them all."""
    for target, files in inputs().items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
