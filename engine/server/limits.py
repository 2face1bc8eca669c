"""What a server allows, so that nobody can exhaust it: every wait has an end, every table a size."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

import anyio
import msgspec

_ADDRESSES = 4096
# Wrong tokens from one address: so many at once, and one more every few seconds.
_TRIES, _TRY_EVERY_S = 10, 6.0


class Limits(msgspec.Struct, frozen=True):
    """Sizes in bytes, times in seconds."""

    #: Bodies and answers in flight, over all requests together; the largest object there can be needs 256 MiB.
    memory_bytes: int = 256 << 20
    #: At a time. Each costs some 200 KiB at worst before it has shown a token.
    connections: int = 256
    #: From one address, as long as they have not shown a token that is good.
    unknown_connections: int = 64
    #: From the beginning of a connection until a request has come that shows a good token.
    header_s: float = 15.0
    #: Between requests; clients give idle connections up after 30 s, proxies after 60.
    keepalive_s: float = 75.0
    #: Without a byte moved.
    stall_s: float = 120.0
    #: A body, or an answer, that is slower than this on the whole is given up. `--limit-upload` allows no less than
    #: 1 KiB/s, which several transfers share.
    slowest_bytes_per_s: int = 256
    #: How long a request waits for room in memory; its client tries again. It would give up by itself after 60 s.
    room_wait_s: float = 30.0
    #: For an answer of the storage; to a put it may take longer. Clients wait for 60 and 120 s.
    storage_s: float = 50.0
    put_s: float = 110.0
    #: What is under way when the server is stopped may take this long.
    grace_s: float = 30.0
    #: What a client that was refused still sends is read and thrown away, so that the answer reaches it.
    linger_s: float = 5.0

    def transfer_s(self, size_bytes: int) -> float:
        """How long moving so many bytes may take."""
        return self.stall_s + size_bytes / self.slowest_bytes_per_s


class Tries:
    """Wrong tokens by address. Tokens can't be guessed: this keeps the log short, and misconfigured clients quiet."""

    def __init__(self) -> None:
        # Address → until when, on the loop's clock, its tries are used up, if each takes its time.
        self._until: OrderedDict[str, float] = OrderedDict()

    def failed(self, address: str) -> bool:
        """Note a failure; whether there were too many lately."""
        now = anyio.current_time()
        until = max(self._until.pop(address, 0.0), now)
        too_many = until - now > _TRIES * _TRY_EVERY_S
        self._until[address] = until if too_many else until + _TRY_EVERY_S
        while len(self._until) > _ADDRESSES:
            self._until.popitem(last=False)
        return too_many


def address_of(peername: object) -> str:
    """Whom a connection counts for: an IPv4 address, or the network of 64 bits that an IPv6 one lies in."""
    host = str(peername[0]).partition("%")[0] if isinstance(peername, tuple) and peername else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
