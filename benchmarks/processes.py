"""The processes of a run: every server on one core, the load on another."""

import contextlib
import json
import os
import platform
import resource
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orders import CALLBACK, CHANNEL, KEY, MERCHANT

HERE = Path(__file__).parent


class LeftOut(Exception):
    """A measurement that is impossible on this machine, with the reason."""


class Server:
    """A running server with its port. All servers write to one log."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self._process = process
        self._log = log
        self.port = port

    def wait(self) -> None:
        for _ in range(300):
            if self._process.poll() is not None:
                end = self._log.read_text(errors="replace")[-2000:]
                sys.exit(f"{end}\na server ended by itself, with {self._process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        sys.exit(f"nothing listens on port {self.port}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def rss_mib(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


class Processes:
    """Starts servers. Their `folder` is on the disk that is measured, and is removed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        cores = sorted(os.sched_getaffinity(0))
        self.server_core, self.load_core = cores[0], cores[-1]
        os.sched_setaffinity(0, {self.load_core})
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        (folder / "token").write_text(secrets.token_hex(16))
        (folder / "key").write_text(KEY)

    @contextlib.contextmanager
    def on_server_core(self) -> Iterator[None]:
        """Run the processes that are started inside on the core of the servers."""
        os.sched_setaffinity(0, {self.server_core})
        try:
            yield
        finally:
            os.sched_setaffinity(0, {self.load_core})

    @contextlib.contextmanager
    def running(
        self, *command: str, port: int, environment: Mapping[str, str] | None = None, on_load_core: bool = False
    ) -> Iterator[Server]:
        path = self.folder / "servers.log"
        core = contextlib.nullcontext() if on_load_core else self.on_server_core()
        with path.open("ab") as log, core:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
            )
        server = Server(process, port, path)
        try:
            server.wait()
            yield server
        finally:
            server.stop()

    @contextlib.contextmanager
    def echo(self) -> Iterator[Server]:
        port = free_port()
        with self.running(sys.executable, str(HERE / "echo.py"), str(port), port=port) as server:
            yield server

    @contextlib.contextmanager
    def norce(self) -> Iterator[Server]:
        """Start a Norce that has every order, of 3.9 MiB. It runs on the core of the load."""
        port = free_port()
        command = (sys.executable, str(HERE / "large_orders.py"), str(port))
        with self.running(*command, port=port, on_load_core=True) as server:
            yield server

    @contextlib.contextmanager
    def service(
        self,
        url: str,
        handler: str = "holds",
        *,
        kind_of_server: str = "service",
        environment: Mapping[str, str] | None = None,
        more: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Iterator[Server]:
        """Run the service on this store. `more` is added to its configuration."""
        port = free_port()
        path = self.config(url, handler, port, more or {})
        command = (sys.executable, str(HERE / "servers.py"), kind_of_server, str(path))
        with self.running(*command, port=port, environment=environment) as server:
            yield server

    @contextlib.contextmanager
    def peer(self, app: str, environment: Mapping[str, str]) -> Iterator[Server]:
        """Run a receiver of `peers/` as its users do."""
        port = free_port()
        command = (
            sys.executable, "-m", "uvicorn", "--app-dir", str(HERE / "peers"), f"{app}:app", "--port", str(port),
            "--no-access-log", "--log-level", "warning",
        )  # fmt: skip
        with self.running(*command, port=port, environment=environment) as server:
            yield server

    def config(self, url: str, handler: str, port: int, more: Mapping[str, Mapping[str, Any]]) -> Path:
        """Write a configuration file with a route for deliveries, and one whose queue a benchmark may pause."""
        route = {
            "callback": CALLBACK,
            "when": {"scope": "/state/currentStatus", "schema": {"const": "completed"}},
            "handler": handler,
            "refetch": handler == "compares",
            "timeout": "10m" if handler == "holds" else "15s",
            "concurrency": 1 if handler == "holds" else 32,
        }
        never = {**route, "when": {"scope": "/state/currentStatus", "schema": {"const": "accepted"}}}
        path = self.folder / f"{port}.yaml"
        parts: dict[str, dict[str, Any]] = {
            "adapter": {"id": "bench_adapter", "public_url": f"http://127.0.0.1:{port}"},
            "server": {"host": "127.0.0.1", "port": port},
            "operations": {"host": "127.0.0.1", "port": free_port(), "socket": None},
            "store": {"url": url},
            "norce": {},
            "dispatcher": {"grace": "0s" if handler == "holds" else "20s"},
            "merchants": {MERCHANT: {"tokens": ["${file:token}"], "channels": {CHANNEL: {}}}},
            "senders": {"signed_urls": {"keys": {"k": "${file:key}"}}},
            "callbacks": {
                CALLBACK: {
                    "kind": "notification",
                    "scope": "/state/currentStatus",
                    "schema": {"enum": ["accepted", "completed"]},
                }
            },
            "routes": {"free": route} | ({"parked": never} if handler == "delivers" else {}),
        }
        path.write_text(json.dumps({name: {**part, **more.get(name, {})} for name, part in parts.items()}))
        return path

    def delivered(self, server: Server) -> int:
        """Return how often a service that has ended called its handler."""
        return int((self.folder / f"{server.port}.delivered").read_text())

    @contextlib.contextmanager
    def redis(self) -> Iterator[str]:
        """Run a Redis that writes to disk before it answers. Raise `LeftOut` if there is none."""
        program = shutil.which("redis-server")
        if program is None:
            raise LeftOut("no redis-server is installed here")
        port, folder = free_port(), self.folder / "redis"
        folder.mkdir(exist_ok=True)
        command = (
            program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
            "--appendonly", "yes", "--appendfsync", "always",
        )  # fmt: skip
        with self.running(*command, port=port):
            yield f"redis://127.0.0.1:{port}/0"

    def slow_fsync(self) -> Mapping[str, str]:
        """Return an environment in which fsync and fdatasync take a millisecond more. May raise `LeftOut`."""
        compiler = shutil.which("cc")
        if compiler is None:
            raise LeftOut("no C compiler (cc) is installed here")
        library = self.folder / "slow_fsync.so"
        source = HERE / "slow_fsync.c"
        built = subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=False)
        if built.returncode:
            raise LeftOut("slow_fsync.c does not compile here")
        return {"LD_PRELOAD": str(library)}

    def fdatasync_p50_ms(self) -> float:
        """Measure a rewrite of 8 KB with fdatasync on this disk."""
        path, times = self.folder / "probe", []
        with path.open("wb", buffering=0) as probe:
            for _ in range(100):
                probe.seek(0)
                probe.write(os.urandom(8192))
                started = time.perf_counter()
                os.fdatasync(probe.fileno())
                times.append(time.perf_counter() - started)
        return statistics.median(times) * 1000

    def machine(self) -> str:
        names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        mounts = [line.split()[:3] for line in _lines("/proc/mounts")]
        device, _, kind = max((m for m in mounts if self.folder.is_relative_to(m[1])), key=lambda m: len(m[1]))
        return (
            f"{platform.machine()}, {names[0] if names else 'unknown processor'}, {os.cpu_count()} cores (servers on "
            f"{self.server_core}, load on {self.load_core}), kernel {platform.release()}, Python "
            f"{platform.python_version()}; {kind} on {device}, fdatasync {self.fdatasync_p50_ms():.3f} ms"
        )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _lines(path: str) -> list[str]:
    return Path(path).read_text(errors="replace").splitlines()


def settle() -> Any:
    """Wait half a second: a slow server still works, and would take time from the next one."""
    time.sleep(0.5)
