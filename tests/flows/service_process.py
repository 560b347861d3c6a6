"""The service and commands as processes, forked from one that has imported every module already.

Importing costs a second of CPU at every start, and most flows start two services. With a `command`, such as the
installed one, the process executes it instead.
"""

import importlib
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import adapter
from adapter import logs
from adapter.cli import main
from tests import PATIENCE

COMMAND = Path(sysconfig.get_path("scripts")) / "norce-adapter"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])

importlib.import_module("alembic.command")  # the service imports it when it opens the store
for _module in pkgutil.walk_packages(adapter.__path__, "adapter."):
    if ".migrations" not in _module.name:  # Alembic's environment runs when it is imported
        importlib.import_module(_module.name)


def start(
    config_path: Path, environ: dict[str, str], log_path: Path, *options: str, command: Sequence[Path | str] = ()
) -> BaseProcess:
    """Start `norce-adapter serve` with its output in a file. `command` is executed with these arguments."""
    process = _CONTEXT.Process(target=_serve, args=(config_path, environ, log_path, options, command), daemon=True)
    process.start()
    return process


def run_command(arguments: Sequence[str], environ: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `norce-adapter` with these arguments in a folder, and return its exit code and what it printed."""
    with tempfile.TemporaryDirectory() as printed:
        out, err = Path(printed) / "out", Path(printed) / "err"
        process = _CONTEXT.Process(target=_run, args=(folder, environ, out, err, arguments), daemon=True)
        process.start()
        process.join(PATIENCE)
        assert process.exitcode is not None, f"{arguments} has not ended after {PATIENCE:g} s"
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _serve(
    config_path: Path,
    environ: dict[str, str],
    log_path: Path,
    options: tuple[str, ...],
    command: Sequence[Path | str],
) -> None:
    arguments = ("serve", *options, "--config", str(config_path))
    if not command:
        _run(config_path.parent, environ, log_path, log_path, arguments)
    _redirect(config_path.parent, log_path, log_path)
    os.execve(command[0], [*command, *arguments], environ)


def _run(folder: Path, environ: dict[str, str], out: Path, err: Path, arguments: Sequence[str]) -> None:
    _redirect(folder, out, err)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[:0] = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
    warnings.simplefilter("error")
    try:
        main(arguments)
    finally:
        logs.close()  # a forked process calls no function that waits for the exit


def _redirect(folder: Path, out: Path, err: Path) -> None:
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
