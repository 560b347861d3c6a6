"""The table of a port's open connections, with limits on their number and time.

A connection is unidentified until its first request has an identified sender. A port that never identifies a sender
treats all its connections alike.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Protocol

# As many as the largest burst of one honest address: each is identified as soon as its head has come.
MOST_UNIDENTIFIED = 512
CHECK_SECONDS = 0.5  # between two checks for overdue connections

CONNECTION = "norce_adapter.connection"  # the key of the connection in the scope of its requests


class Connection(Protocol):
    """A connection in the table."""

    deadline: float  # of the caller, by the monotonic clock
    write_deadline: float  # until the caller has taken what was written

    def expire(self, now: float) -> None: ...

    def refuse_body(self) -> None: ...

    def drop(self) -> None:
        """Close the connection at once."""


class ConnectionTable:
    """The open connections of one port.

    An address may have `most_unidentified` connections that are unidentified. Beyond that its oldest one is closed,
    never the new one: Norce may come through the same address as an attacker, and identifies itself within
    milliseconds.

    Beyond `most` connections in total, one of the larger of two groups is closed: the unidentified (the oldest), or the
    idle ones of known callers (the longest idle; a request that waits for its refusal counts as idle). So neither can
    push the other below half of the room, and a flood of strangers does not cost known callers their connections. If
    all are busy with requests of known callers, the new connection is closed.

    Beyond `most_body_bytes` in unfinished bodies, the one that began first is refused: an honest one is complete within
    moments.

    Args:
        most: Connections in total.
        most_unidentified: Unidentified connections of an address.
        most_body_bytes: Bytes of unfinished bodies.
        highest_descriptor: Beyond it, a new connection counts as one beyond `most`: the service itself, such as its
            reads at a slow Norce, needs more descriptors than `most` leaves.
        on_limit: Called with the name of a limit each time that it acts.
        trusted_proxies: Networks whose `X-Forwarded-For` counts. Their connections have no limit by address until a
            head has named one.
    """

    def __init__(
        self,
        *,
        most: int = sys.maxsize,
        most_unidentified: int = sys.maxsize,
        most_body_bytes: int = sys.maxsize,
        highest_descriptor: int = sys.maxsize,
        trusted_proxies: Iterable[str] = (),
        on_limit: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.most = most
        self.most_unidentified = most_unidentified
        self.most_body_bytes = most_body_bytes
        self.highest_descriptor = highest_descriptor
        self.on_limit = on_limit
        self._trusted = [ip_network(each) for each in trusted_proxies]
        self._open: set[Connection] = set()
        # Ordered: the first has been in the group for longest.
        self._unidentified: dict[Connection, str | None] = {}  # with its address; None for a trusted proxy
        self._by_address: dict[str, dict[Connection, None]] = {}
        self._idle: dict[Connection, None] = {}
        self._bodies: dict[Connection, int] = {}  # unfinished, with the bytes that have come
        self._body_bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Connection, peer: str | None, descriptor: int = 0) -> bool:
        """Add a new connection, and return whether it comes from a trusted proxy.

        Args:
            connection: The connection.
            peer: The address at the other end; None for a Unix socket.
            descriptor: Of its socket.
        """
        is_proxied = self._trusted and peer is not None and self._is_trusted(peer)
        if len(self._open) >= self.most or descriptor > self.highest_descriptor:
            self.on_limit("connections")
            group: Iterable[Connection] = (
                self._unidentified if len(self._unidentified) >= len(self._idle) else self._idle
            )
            self._evict(next(iter(group), connection))
        self._open.add(connection)
        self._unidentified[connection] = None
        if not is_proxied and peer is not None:
            self._count_for(connection, network_of(peer))
        return bool(is_proxied)

    def forwarded(self, connection: Connection, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Count an unidentified connection of a trusted proxy for the caller behind it."""
        values = [value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for"]
        address = self._rightmost_untrusted(",".join(values))
        if address is not None and connection in self._unidentified:
            self._forget_address(connection)
            self._count_for(connection, network_of(address))

    def identified(self, connection: Connection) -> None:
        """Note that a sender is known. Its connection no longer counts for an address."""
        self._forget_address(connection)
        self._unidentified.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        """Note that a connection has no request. `busy` ends this."""
        if connection not in self._unidentified:
            self._idle[connection] = None

    def busy(self, connection: Connection) -> None:
        """Note that a request begins on a connection."""
        self._idle.pop(connection, None)

    def hold_body(self, connection: Connection, size: int) -> None:
        """Note how many bytes of an unfinished body have come."""
        self._body_bytes += size - self._bodies.get(connection, 0)
        self._bodies[connection] = size
        while self._body_bytes > self.most_body_bytes:
            self.on_limit("unfinished-bodies")
            oldest = next(iter(self._bodies))
            self.release_body(oldest)
            oldest.refuse_body()

    def release_body(self, connection: Connection) -> None:
        """Note that a body is complete, or not kept any longer."""
        self._body_bytes -= self._bodies.pop(connection, 0)

    def closed(self, connection: Connection) -> None:
        """Remove a connection."""
        self._open.discard(connection)
        self.release_body(connection)
        self._forget(connection)

    def expire(self, now: float) -> None:
        """Close the connections whose caller is overdue."""
        for each in [each for each in self._open if each.deadline <= now or each.write_deadline <= now]:
            each.expire(now)

    async def expire_regularly(self) -> None:
        """Close overdue connections, for ever."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await asyncio.sleep(0)  # after a pause of the loop, this reads first what has come in the meantime
            self.expire(time.monotonic())

    def _count_for(self, connection: Connection, address: str) -> None:
        of_address = self._by_address.setdefault(address, {})
        if len(of_address) >= self.most_unidentified:
            self.on_limit("unidentified-connections")
            self._evict(next(iter(of_address)))
            of_address = self._by_address.setdefault(address, of_address)  # removed with its last connection
        of_address[connection] = None
        self._unidentified[connection] = address

    def _evict(self, connection: Connection) -> None:
        self._forget(connection)
        connection.drop()

    def _forget(self, connection: Connection) -> None:
        self._forget_address(connection)
        self._unidentified.pop(connection, None)
        self._idle.pop(connection, None)

    def _forget_address(self, connection: Connection) -> None:
        address = self._unidentified.get(connection)
        if address is not None:
            of_address = self._by_address[address]
            del of_address[connection]
            if not of_address:
                del self._by_address[address]

    def _is_trusted(self, address: str) -> bool:
        with suppress(ValueError):
            parsed = _parsed(address)
            return any(parsed in network for network in self._trusted)
        return False

    def _rightmost_untrusted(self, forwarded: str) -> str | None:
        """Return the address next to our proxies; to the left of it, a caller may write anything."""
        for part in reversed(forwarded.split(",")):
            address = _without_port(part.strip())
            try:
                ip_address(address)
            except ValueError:
                return None
            if not self._is_trusted(address):
                return address
        return None


def network_of(address: str) -> str:
    """Return an IPv4 address, or the /64 of an IPv6 address: a caller has all of that."""
    if ":" not in address:
        return address
    with suppress(ValueError):
        parsed = _parsed(address)
        return str(IPv6Network((parsed, 64), strict=False) if parsed.version == 6 else parsed)
    return address


def note_identified(scope: MutableMapping[str, Any]) -> None:
    """Note that the sender of a request is known. See `ConnectionTable.identified`."""
    if (connection := scope.get(CONNECTION)) is not None:
        connection.note_identified()


def note_refusal(scope: MutableMapping[str, Any]) -> None:
    """Note that a request is refused later. Until then its connection counts as idle."""
    if (connection := scope.get(CONNECTION)) is not None:
        connection.note_refusal()


def discard_body(scope: MutableMapping[str, Any]) -> None:
    """Drop the body of a request as it comes."""
    if (connection := scope.get(CONNECTION)) is not None:
        connection.discard_body()


def _parsed(address: str) -> IPv4Address | IPv6Address:
    parsed = ip_address(address)
    mapped = parsed.ipv4_mapped if parsed.version == 6 else None
    return mapped or parsed


def _without_port(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0] if address.count(":") == 1 else address
