"""A guard against connections beside a handler's context, and against blocking calls.

Connections are seen by an audit hook of Python. Such a hook cannot be removed, but this one does nothing outside of
`watched`.
"""

import functools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from adapter.testing.virtual_time import is_of_route

CONNECTS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "subprocess.Popen"})
_sleep = time.sleep


class Forbidden(OSError):
    """A handler did something that the service cannot see, or that stops all other handlers."""


@dataclass(slots=True, kw_only=True)
class Watch:
    """The forbidden calls in one thread, and in the threads that it starts, as sentences."""

    other_clients: bool
    thread: int = field(default_factory=threading.get_ident)
    strangers: set[int | None] = field(default_factory=lambda: {each.ident for each in threading.enumerate()})
    connections: list[str] = field(default_factory=list)
    blocking: list[str] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        """Stand in for `time.sleep`."""
        if threading.get_ident() == self.thread:
            self.blocking.append("time.sleep blocks the thread of all handlers; await asyncio.sleep")
            raise Forbidden(self.blocking[-1])
        _sleep(seconds)

    def connect(self, event: str, arguments: Any) -> None:
        """Note an audit event of the present thread. Raises `Forbidden` in its place."""
        is_own = (thread := threading.get_ident()) == self.thread
        if is_own and (event == "socket.getaddrinfo" or (event == "socket.connect" and arguments[0].gettimeout() != 0)):
            self.blocking.append(f"{event} blocks the thread of all handlers; use context.http or context.thread")
            raise Forbidden(self.blocking[-1])
        is_declared = self.other_clients or is_of_route(threading.current_thread())
        if not is_declared and (is_own or thread not in self.strangers):
            self.connections.append(f"{event} outside of context.http; declare other_clients = True")
            raise Forbidden(self.connections[-1])


_watches: list[Watch] = []


@contextmanager
def watched(*, other_clients: bool) -> Iterator[Watch]:
    """Watch the handlers of this thread. With `other_clients`, their connections are allowed."""
    _install()
    watch = Watch(other_clients=other_clients)
    _watches.append(watch)
    try:
        with mock.patch.object(time, "sleep", watch.sleep):
            yield watch
    finally:
        _watches.pop()


@functools.cache
def _install() -> None:
    sys.addaudithook(lambda event, arguments: _watches[-1].connect(event, arguments) if _is_watched(event) else None)


def _is_watched(event: str) -> bool:
    return bool(_watches) and event in CONNECTS
