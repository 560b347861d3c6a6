"""A service as a process of the harness. One pipe carries commands, another its output; its pid is killed.

The process is forked from one that has imported everything (a fork server of `multiprocessing`), because imports are
most of the cost of a start. Only code is shared.
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
    """A service that starts at once, if wanted with a point at which it dies.

    Its log comes through a pipe, because a file cannot grow while the disk is full.
    """

    def __init__(
        self, config: Path, environ: dict[str, str], *, mistake: str | None, point: str | None = None, after: int = 1
    ) -> None:
        self.address = ""  # while it serves; for other threads, which may not use the process itself
        self.errors: list[dict[str, Any]] = []
        self.noise: list[str] = []  # lines that are no log events
        self._serving_or_ended = threading.Event()
        their_commands, self._commands = _CONTEXT.Pipe(duplex=False)
        output, their_output = _CONTEXT.Pipe(duplex=False)
        armed = None if point is None else (point, after)
        self._process = _CONTEXT.Process(
            target=serve, args=(str(config), environ, their_commands, their_output, mistake, armed), daemon=True
        )
        self._process.start()
        their_commands.close()
        their_output.close()
        self._reader = threading.Thread(target=self._read_output, args=(output,), daemon=True)
        self._reader.start()

    def arm(self, point: str, after: int, *, then_stop: bool = False) -> None:
        """Let the service die at a point, or stop it right after this command arrives."""
        try:
            self._commands.send((point, after, then_stop))
        except OSError:  # it is dead already
            return

    def wait_until_serving(self, seconds: float) -> bool:
        """Wait until the service listens or has ended, and tell whether it listens."""
        self._serving_or_ended.wait(seconds)
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

    def wait_for_death(self, seconds: float) -> bool:
        """Wait for the end of the process, and tell whether it has ended."""
        self._process.join(seconds)
        return not self.alive

    def kill(self) -> None:
        """Kill the process, as a power cut would, and read the rest of its output."""
        self._process.kill()
        self._process.join()
        self._reader.join(timeout=5)
        self._commands.close()

    def send(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def limit_file_size(self, size: int | None) -> None:
        """Let no file grow beyond `size` bytes, as on a full disk. None removes the limit."""
        _, hard = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    def _read_output(self, output: Connection) -> None:
        with open(output.fileno(), "rb", closefd=False) as lines, output:
            for line in lines:
                if not line.startswith(b"{"):
                    self.noise.append(line.decode(errors="replace"))
                elif b'"serving"' in line or b'"error"' in line:
                    self._note(json.loads(line))
        self.address = ""
        self._serving_or_ended.set()

    def _note(self, event: dict[str, Any]) -> None:
        if event["event"] == "serving":
            self.address = event["address"]
            self._serving_or_ended.set()
        elif event["level"] == "error":
            self.errors.append(event)
