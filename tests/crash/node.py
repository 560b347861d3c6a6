"""
A service as a process of the harness: told by a pipe, heard by another, killed by its pid.

A process is forked from one that has imported everything (`multiprocessing` calls it a fork server), for imports are
most of what a start costs. Nothing is shared but code.
"""

import json
import multiprocessing
import os
import resource
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.crash.child import serve

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.crash.child"])


class Node:
    """
    A service that starts at once, and may be told with it at which point to die.

    What it logs comes by a pipe: a file would be full when the disk is.
    """

    def __init__(
        self, config: Path, environ: dict[str, str], *, mistake: str | None, point: str | None = None, after: int = 1
    ) -> None:
        self.address = ""  # while it serves; for other threads, which must not ask the process itself
        self.errors: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._serving = threading.Event()  # or ended
        ours, self._orders = _CONTEXT.Pipe(duplex=False)
        said, theirs = _CONTEXT.Pipe(duplex=False)
        armed = None if point is None else (point, after)
        self._process = _CONTEXT.Process(
            target=serve, args=(str(config), environ, ours, theirs, mistake, armed), daemon=True
        )
        self._process.start()
        ours.close()
        theirs.close()
        self._listener = threading.Thread(target=self._listen, args=(said,), daemon=True)
        self._listener.start()

    def arm(self, point: str, after: int, *, then_stop: bool = False) -> None:
        """Tells it where to die, and perhaps to stop as soon as it knows."""
        try:
            self._orders.send((point, after, then_stop))
        except OSError:  # it is dead already
            return

    def serves(self, within: float) -> bool:
        """Whether it serves, as soon as that is known."""
        self._serving.wait(within)
        return bool(self.address) and self.alive

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    @property
    def killed(self) -> bool:
        return self.exit_code == -signal.SIGKILL

    def dies(self, within: float) -> bool:
        """Whether it has ended, as soon as that is so."""
        self._process.join(within)
        return not self.alive

    def kill(self) -> None:
        """As a power cut would, to this process alone; returns when it is gone and all it said is heard."""
        self._process.kill()
        self._process.join()
        self._listener.join(timeout=5)
        self._orders.close()

    def send(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def largest_file(self, size: int | None) -> None:
        """No file may grow beyond this any more: its disk is full. None: there is room again."""
        _, hard = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    def _listen(self, said: Connection) -> None:
        with open(said.fileno(), "rb", closefd=False) as lines, said:
            for line in lines:
                if not line.startswith(b"{"):
                    self.noise.append(line.decode(errors="replace"))
                elif b'"serving"' in line or b'"error"' in line:
                    self._hear(json.loads(line))
        self.address = ""
        self._serving.set()

    def _hear(self, said: dict[str, Any]) -> None:
        if said["event"] == "serving":
            self.address = said["address"]
            self._serving.set()
        elif said["level"] == "error":
            self.errors.append(said)
