"""A guard against connections beside a handler's context, and against blocking calls.

It is an audit hook of Python. Such a hook cannot be removed, but this one does nothing outside of `watched`.
"""

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

CONNECTS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "subprocess.Popen"})


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

    def see(self, event: str) -> None:
        """Note a call of the present thread. Raises `Forbidden` in its place."""
        is_own = (thread := threading.get_ident()) == self.thread
        if event == "time.sleep" and is_own:
            self.blocking.append("time.sleep blocks the thread of all handlers: await asyncio.sleep")
            raise Forbidden(self.blocking[-1])
        if event in CONNECTS and not self.other_clients and (is_own or thread not in self.strangers):
            self.connections.append(f"{event} outside of context.http: declare other_clients = True")
            raise Forbidden(self.connections[-1])


_watches: list[Watch] = []


@contextmanager
def watched(*, other_clients: bool) -> Iterator[Watch]:
    """Watch the handlers of this thread. With `other_clients`, their connections are allowed."""
    _install()
    _watches.append(Watch(other_clients=other_clients))
    try:
        yield _watches[-1]
    finally:
        _watches.pop()


@functools.cache
def _install() -> None:
    sys.addaudithook(_audit)


def _audit(event: str, _arguments: Any) -> None:
    if _watches and (event == "time.sleep" or event in CONNECTS):
        _watches[-1].see(event)
