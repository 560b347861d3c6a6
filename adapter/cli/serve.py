"""The commands `serve` and `check`."""

import os
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapter.cli.shared import (
    CONFIGURATION,
    FAILED,
    STORE,
    config_option,
    end,
    in_one_line,
    load_config,
    load_config_and_routes,
    load_routes,
    stop_signal,
)
from adapter.config import Config

if TYPE_CHECKING:
    from adapter.routing.routes import Routes


@click.command()
@click.option("--hold", is_flag=True, help="Receive callbacks and commands, but hold every queue until the next start.")
@config_option
def serve(*, hold: bool, config_path: Path) -> None:
    """Serve callbacks until SIGTERM or SIGINT.

    SIGHUP is ignored, so that the service outlives the terminal that started it.
    """
    import uvloop

    from adapter import logs
    from adapter.app import most_attempts
    from adapter.callbacks.server import DescriptorsTooFew, PortInUse, ensure_descriptors
    from adapter.ledger.store import StoreInUse, StoreUnavailable
    from adapter.routing.from_config import queue_keys

    config = load_config(config_path)
    logs.configure(level=config.logs.level, format=config.logs.format)
    with logs.printed_lines():
        routes = load_routes(config)
        try:
            ensure_descriptors(most_attempts(config, len(queue_keys(config))))
            uvloop.run(_serve(config, routes, hold=hold))
        except (StoreInUse, StoreUnavailable) as error:
            end(STORE, in_one_line(error))
        except (PortInUse, DescriptorsTooFew) as error:
            end(FAILED, str(error))
        except Exception:  # noqa: BLE001 - Python would write it to standard error, which may block
            traceback.print_exc()
            sys.exit(FAILED)
    logs.close()
    # A plugin may still block a thread of `asyncio.to_thread`, for which Python would wait.
    if threading.active_count() > 1:
        os._exit(0)


async def _serve(config: Config, routes: "Routes", *, hold: bool) -> None:
    from adapter.app import running

    with stop_signal() as stop:  # may be set while the service starts
        async with running(config, routes, hold=hold):
            await stop.wait()


@click.command()
@click.option("--strict", is_flag=True, help="Fail on warnings, too.")
@click.option("--online", is_flag=True, help="Try the database, Norce, destinations and the public address, too.")
@config_option
def check(*, strict: bool, online: bool, config_path: Path) -> None:
    """Check the configuration, the handlers and their settings. Print every problem.

    Conditions, watches and targets are compared with Norce's order: what can have no effect is a warning.

    With --online: try the database, each token at Norce, each destination whose handler can check its credentials, and
    the public address, which needs a running service. Nothing is changed anywhere.
    """
    from adapter.routing.norce_check import norce_warnings

    config, routes = load_config_and_routes(config_path)
    warnings = [*routes.warnings, *norce_warnings(config, routes)]
    for warning in sorted(warnings, key=lambda warning: (warning.file, warning.line or 0)):
        click.echo(f"warning: {warning}", err=True)
    if warnings and strict:
        end(CONFIGURATION, f"{len(warnings)} warning{'' if len(warnings) == 1 else 's'}, with --strict")
    click.echo(f"{config_path}: {len(routes.callbacks)} callbacks, {len(routes.all)} routes; no problems")
    if online:
        _try_everything(config, routes)


def _try_everything(config: Config, routes: "Routes") -> None:
    """Print a line for everything that was tried, and end the command if something failed."""
    import asyncio

    from adapter import logs
    from adapter.cli.online import try_everything

    logs.configure(level="error")
    trials = asyncio.run(try_everything(config, routes))
    for trial in trials:
        click.echo(f"ok      {trial.name}" if trial.problem is None else f"failed  {trial.name}: {trial.problem}")
    if any(trial.problem for trial in trials):
        sys.exit(FAILED)
