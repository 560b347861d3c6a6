"""`adapter.operations.unix_socket`: the file of the socket, from creation to removal."""

import os
import socket
from pathlib import Path

import pytest

from adapter.callbacks.server import PortInUse
from adapter.operations.unix_socket import listening_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "operations.sock"


def make_stale(path: Path) -> None:
    """Create the file of a killed service."""
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777], ids=oct)
def test_the_mode_is_0600_under_any_umask(path: Path, umask: int) -> None:
    path.parent.mkdir()
    before = os.umask(umask)
    try:
        with listening_at(path):
            mode = path.stat().st_mode & 0o777
    finally:
        os.umask(before)

    assert mode == 0o600


def test_the_folder_is_created_and_the_file_is_removed(path: Path) -> None:
    with listening_at(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))

    assert list(path.parent.iterdir()) == []


def test_the_file_of_a_killed_service_is_replaced(path: Path) -> None:
    make_stale(path)

    with listening_at(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_on_which_another_service_listens_is_kept(path: Path) -> None:
    with listening_at(path):
        with pytest.raises(PortInUse, match=r"another service listens there; see operations\.socket"):
            listening_at(path).__enter__()

        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_file_that_is_not_a_socket_is_kept(path: Path, kind: str) -> None:
    path.parent.mkdir()
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to("/dev/null")}[kind]()

    with pytest.raises(PortInUse, match="the file there is not a socket"):
        listening_at(path).__enter__()

    assert os.path.lexists(path)


@pytest.mark.parametrize(
    "path", [Path("/proc/operations.sock"), Path("/dev/null/operations.sock"), Path("/" + "x" * 120)]
)
def test_the_error_names_a_path_that_cannot_be_used(path: Path) -> None:
    with pytest.raises(PortInUse, match=f"cannot listen on {path}: .+; see operations.socket"):
        listening_at(path).__enter__()


def test_the_socket_of_a_successor_is_kept(path: Path) -> None:
    with listening_at(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))

    assert path.is_socket()
