"""Messages between a pool and its workers: frames of marshal, since both ends are the same interpreter."""

from __future__ import annotations

import marshal
import os
import struct

TYPE_CHECKING = False  # see `chunkworker`
if TYPE_CHECKING:
    from typing import Any

FRAME = struct.Struct("<I")


def frame(message: tuple[Any, ...]) -> bytes:
    """A message as it goes over the socket."""
    body = marshal.dumps(message)
    return FRAME.pack(len(body)) + body


def take_frames(data: bytearray) -> list[tuple[Any, ...]]:
    """Take the complete messages off the front of what was received."""
    messages, at = [], 0
    with memoryview(data) as view:
        while len(data) - at >= FRAME.size:
            (length,) = FRAME.unpack_from(data, at)
            if len(data) - at - FRAME.size < length:
                break
            begin = at + FRAME.size
            messages.append(marshal.loads(view[begin : begin + length]))
            at = begin + length
    del data[:at]
    return messages


def put_frame(fd: int, message: tuple[Any, ...]) -> None:
    """Write a message to a blocking socket; the worker's side."""
    data = memoryview(frame(message))
    while data:
        data = data[os.write(fd, data) :]
