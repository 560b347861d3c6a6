"""The commands `serve` and `check`."""

import os
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from adapter.cli.shared import (
    CONFIGURATION,
    FAILED,
    STORE,
    config_option,
    end,
    end_with_problems,
    in_one_line,
    load_config,
    load_config_and_routes,
    load_routes,
    stop_signal,
)
from adapter.config import Config, ConfigurationInvalid

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
    from adapter.ledger.binding import BoundToAnother
    from adapter.ledger.names import KindChanged
    from adapter.ledger.store import StoreInUse, StoreUnavailable
    from adapter.routing.from_config import queue_keys

    config = load_config(config_path)
    logs.configure(level=config.logs.level, format=config.logs.format)
    with logs.printed_lines():
        routes = load_routes(config)
        try:
            ensure_descriptors(most_attempts(config, len(queue_keys(config))))
            uvloop.run(_serve(config, routes, hold=hold))
        except (BoundToAnother, StoreInUse, StoreUnavailable) as error:
            end(STORE, in_one_line(error))
        except KindChanged as error:
            _end_with_changed_kinds(config, error.known)
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

    A warning names each condition, watch and target that can have no effect on Norce's order. If there is a ledger,
    other warnings name what is gone and still used, and orphaned queues; --strict allows these.

    With --online: try the database, each token at Norce, each destination whose handler can check its credentials, and
    the public address, which needs a running service. Nothing is changed anywhere.
    """
    from adapter.routing.norce_check import norce_warnings

    config, routes = load_config_and_routes(config_path)
    warnings = [*routes.warnings, *norce_warnings(config, routes)]
    for warning in sorted(warnings, key=lambda warning: (warning.file, warning.line or 0)):
        click.echo(f"warning: {warning}", err=True)
    for words in _warnings_of_ledger(config):
        click.echo(f"warning: {words}", err=True)
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


def _warnings_of_ledger(config: Config) -> list[str]:
    """Compare the configuration with its ledger, if there is one.

    If they do not fit together, end the command.
    """
    from sqlalchemy.exc import DBAPIError

    from adapter.ledger.binding import BoundToAnother, binding
    from adapter.ledger.clock import read_from_outside
    from adapter.ledger.databases import StoreMissing, StoreUnavailable, database_at
    from adapter.ledger.names import known_names
    from adapter.routing.from_config import ledger_binding
    from adapter.routing.gone_names import warnings_of

    database, given = database_at(config.store.url), ledger_binding(config)
    try:
        database.check_exists()
        with database.engine(read_only=True).connect() as connection:
            bound, known = binding(connection), known_names(connection)
            found = warnings_of(config, connection, read_from_outside(database, connection))
    except StoreMissing:
        return []
    except (StoreUnavailable, DBAPIError) as error:
        cause = in_one_line(getattr(error, "orig", None) or error)
        return [f"cannot read {database.location}, so it was not compared with the configuration: {cause}"]
    if bound is not None and bound != given:
        end(STORE, str(BoundToAnother(database.location, bound, given)))
    if changed := known.other_kinds({name: each.kind for name, each in config.callbacks.items()}):
        _end_with_changed_kinds(config, changed)
    return [str(each) for each in found]


def _end_with_changed_kinds(config: Config, known: Mapping[str, str]) -> NoReturn:
    """End with a problem for each callback that the ledger knows as another kind."""
    words = "the ledger knows this name as a {}, and open orders may carry it; give the callback another name"
    problems = [config.problem(f"callbacks.{name}.kind", words.format(kind)) for name, kind in known.items()]
    end_with_problems(ConfigurationInvalid(problems))
