"""The service as a process of its own, forked from one that has imported every module already.

Importing costs a second of CPU at every start, and most flows start two services. With a `command`, such as the
installed one, the process executes it instead.
"""

import importlib
import multiprocessing
import os
import pkgutil
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import adapter
from adapter.cli import main

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


def _serve(
    config_path: Path,
    environ: dict[str, str],
    log_path: Path,
    options: tuple[str, ...],
    command: Sequence[Path | str],
) -> None:
    os.chdir(config_path.parent)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if command:
        os.execve(command[0], [*command, "serve", *options, "--config", config_path], environ)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[:0] = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
    warnings.simplefilter("error")
    main(["serve", *options, "--config", str(config_path)])
