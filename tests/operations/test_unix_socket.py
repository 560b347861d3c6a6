"""`adapter.operations.unix_socket`: the file of the socket, from its creation to its removal."""

import os
import socket
from pathlib import Path

import pytest

from adapter.callbacks.server import PortInUse
from adapter.operations.unix_socket import listening_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "operations.sock"


def left_behind(path: Path) -> None:
    """Make the file of a service that was killed."""
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777], ids=oct)
def test_only_the_user_of_the_service_may_use_it_whatever_the_umask(path: Path, umask: int) -> None:
    path.parent.mkdir()
    before = os.umask(umask)
    try:
        with listening_at(path):
            mode = path.stat().st_mode & 0o777
    finally:
        os.umask(before)

    assert mode == 0o600


def test_its_folder_is_made_and_its_file_goes_at_the_end(path: Path) -> None:
    with listening_at(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))

    assert list(path.parent.iterdir()) == []


def test_the_file_of_a_killed_service_is_replaced(path: Path) -> None:
    left_behind(path)

    with listening_at(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_on_which_another_service_listens_is_left_alone(path: Path) -> None:
    with listening_at(path):
        with pytest.raises(PortInUse, match=r"another service listens there; see operations\.socket"):
            listening_at(path).__enter__()

        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_file_that_is_no_socket_is_left_alone(path: Path, kind: str) -> None:
    path.parent.mkdir()
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to("/dev/null")}[kind]()

    with pytest.raises(PortInUse, match="the file there is not a socket"):
        listening_at(path).__enter__()

    assert os.path.lexists(path)


@pytest.mark.parametrize(
    "path", [Path("/proc/operations.sock"), Path("/dev/null/operations.sock"), Path("/" + "x" * 120)]
)
def test_a_path_that_cannot_be_listened_on_is_named(path: Path) -> None:
    with pytest.raises(PortInUse, match=f"cannot listen on {path}: .+; see operations.socket"):
        listening_at(path).__enter__()


def test_a_socket_that_another_service_has_put_in_its_place_stays(path: Path) -> None:
    with listening_at(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))

    assert path.is_socket()
