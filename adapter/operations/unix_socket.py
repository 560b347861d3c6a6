"""The Unix socket of the operations application. Only the user of the service may use it."""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from adapter.callbacks.server import PortInUse
from adapter.ledger.databases import make_private_folder


@contextlib.contextmanager
def listening_at(path: Path) -> Iterator[socket.socket]:
    """Listen on a Unix socket with mode 0600, and remove its file afterwards.

    The file of a killed process is replaced.

    Raises:
        PortInUse: another process listens there, or the socket cannot be created.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            make_private_folder(path.parent)
            _remove_stale(path)
            listening.bind(str(path))
            # Connecting is impossible before `listen`, so the mode that the umask gave is harmless.
            path.chmod(0o600)
            listening.listen()
            created = _identity(path)
        except OSError as error:
            reason = error.strerror or error
            raise PortInUse(f"cannot listen on {path}: {reason}; see operations.socket") from error
        try:
            yield listening
        finally:
            with contextlib.suppress(OSError):
                if _identity(path) == created:  # another service may have replaced it
                    path.unlink()
    finally:
        listening.close()


def _remove_stale(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(None, "the file there is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise OSError(None, "another service listens there")


def _identity(path: Path) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino
