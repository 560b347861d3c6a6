"""The trials of `check --online`.

They try the database, Norce, the destinations and the public address, in parallel and each within a limit of time. They
change nothing and print no secret.
"""

import asyncio
import os
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from adapter.config import Config
from adapter.config.problems import under
from adapter.connections import connections
from adapter.identifiers import Channel
from adapter.metrics import Metrics
from adapter.norce.client import Norce, NorceError, NorceRefused
from adapter.plugin import Outcome, Settings, can_check_credentials
from adapter.registrations.endpoint import SCHEMA_PATH
from adapter.routing.from_config import norce_accounts, norce_client
from adapter.routing.routes import Route, Routes
from adapter.routing.runner import Runner

LIMIT = timedelta(seconds=15)  # of one trial; connecting to PostgreSQL takes at most 5 s for each host


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Something that was tried, and the problem with its remedy if it failed."""

    name: str
    problem: str | None


async def try_everything(config: Config, routes: Routes, limit: timedelta = LIMIT) -> list[Trial]:
    """Try everything that the configuration names outside this process."""
    runner = Runner(make_norce=lambda: norce_client(config, Metrics("")), clock=lambda: datetime.now(UTC))
    try:
        trials = [
            ("database", _try_database(config)),
            *_norce_trials(config),
            *_destination_trials(routes, runner, limit),
            *([] if config.adapter.public_url is None else [("public_url", _try_public_url(config))]),
        ]
        problems = await asyncio.gather(*(_limited(trial, limit) for _, trial in trials))
    finally:
        await runner.stop(timedelta(seconds=1))
    return [Trial(name=name, problem=problem) for (name, _), problem in zip(trials, problems, strict=True)]


Work = Coroutine[Any, Any, str | None]  # returns the problem, if there is one


async def _limited(trial: Work, limit: timedelta) -> str | None:
    try:
        return await asyncio.wait_for(trial, limit.total_seconds())
    except TimeoutError:
        return f"no result within {limit.total_seconds():g} s"


async def _try_database(config: Config) -> str | None:
    return await asyncio.to_thread(_database_problem, config.store.url)


def _database_problem(url: str) -> str | None:
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    from adapter.cli.shared import in_one_line
    from adapter.ledger.databases import Sqlite, StoreMissing, StoreUnavailable, database_at

    database = database_at(url)
    try:
        database.check_exists()
        with database.engine(read_only=True).connect() as connection:
            connection.execute(text("SELECT 1"))
    except StoreMissing:  # the first `serve` creates it
        assert isinstance(database, Sqlite)
        folder = next(each for each in Path(database.path).absolute().parents if each.exists())
        return None if os.access(folder, os.W_OK) else f"{folder} is not writable; correct store.url, or its owner"
    except (StoreUnavailable, DBAPIError) as error:
        reason = error.orig if isinstance(error, DBAPIError) else error
        return f"{database.location} cannot be read: {in_one_line(reason)}; correct store.url, or the database"
    return None


def _norce_trials(config: Config) -> Iterator[tuple[str, Work]]:
    for merchant, account in norce_accounts(config).items():
        for index in range(len(account.tokens)):
            yield f"Norce, {merchant}, token {index + 1}", _try_token(config, merchant, index)


async def _try_token(config: Config, merchant: str, index: int) -> str | None:
    account = norce_accounts(config)[merchant]
    at = under("merchants", merchant)
    norce = Norce(
        {merchant: type(account)(base_url=account.base_url, tokens=(account.tokens[index],))},
        adapter_id=config.adapter.id,
        timeout=config.norce.timeout,
        version=config.norce.version,
    )
    try:
        channel = Channel(merchant, next(iter(config.merchants[merchant].channels)))
        async for _ in norce.order_pages(channel, limit=1):
            break
    except NorceRefused as error:
        return f"{error}; correct {at}.tokens[{index}], or let Norce issue a new token"
    except NorceError as error:
        return f"{error}; check norce.environment, norce.base_url and {at}.slug"
    finally:
        await norce.aclose()
    return None


def _destination_trials(routes: Routes, runner: Runner, limit: timedelta) -> Iterator[tuple[str, Work]]:
    for route in routes.all:
        if not can_check_credentials(type(route.handler)):
            continue
        different: list[tuple[Settings, list[Channel]]] = []
        for channel, settings in route.settings.items():
            same = next((channels for each, channels in different if each == settings), None)
            if same is None:
                different.append((settings, [channel]))
            else:
                same.append(channel)
        for settings, channels in different:
            named = "" if len(different) == 1 else f", {', '.join(f'{each.merchant} {each.name}' for each in channels)}"
            yield f"destination of {route.name}{named}", _try_destination(runner, route, settings, channels[0], limit)


async def _try_destination(
    runner: Runner, route: Route, settings: Settings, channel: Channel, limit: timedelta
) -> str | None:
    now = datetime.now(UTC)
    context = runner.context(
        "deliveries",
        route=route.name,
        settings=settings,
        channel=channel,
        order_id="",
        identity="check",
        deadline=now + limit,
        first_attempt_at=now,
        concurrency=route.concurrency,
        max_answer_bytes=route.max_answer_bytes,
        log_fields=route.handler.log_fields,
    )
    run = runner.start("deliveries", route.handler.check_credentials, context)
    try:
        await run.wait()
    except Outcome as error:
        return f"{error}; correct {under('routes', route.name)}.settings, or the destination"
    except Exception as error:  # noqa: BLE001 - a plugin may fail in any way, and its text may hold a secret
        return f"the handler failed with {type(error).__name__}; ask its author"
    return None


async def _try_public_url(config: Config) -> str | None:
    """Read our schema as Norce does, which shows that this adapter answers there."""
    url = f"{config.adapter.public_url}{SCHEMA_PATH.format(adapter_id=config.adapter.id)}"
    client = httpx.AsyncClient(transport=connections(), trust_env=False, timeout=LIMIT.total_seconds())
    try:
        async with client as http, http.stream("GET", url) as answer:
            status = answer.status_code
    except httpx.HTTPError as error:
        if "certificate" in str(error).lower():
            return "its certificate is not publicly trusted, and Norce may refuse it"
        return f"no answer ({type(error).__name__}); start the service, and lead the address to its public port"
    if status == 200:
        return None
    return f"answers {status} for our schema; lead the address to the public port of this adapter, without a redirect"
