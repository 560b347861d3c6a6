"""
Wiring: what is made from what, in which order the service starts and stops.

Start: ledger, queues, plugins' loops, dispatcher, ports. Stop: readiness off, no new callbacks, running deliveries
finish or are released, plugins' loops, ledger last. One owner of signals: two uvicorn servers would overwrite each
other's, and raise SIGTERM again.
"""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import httpx
import structlog

from adapter.callbacks.endpoints import CallbackEndpoint
from adapter.callbacks.intake import Intake
from adapter.callbacks.senders import Senders
from adapter.callbacks.server import (
    address_of,
    callbacks_first,
    count_refusals,
    listen,
    public_port,
    served,
    short_thread_slices,
)
from adapter.config import Config
from adapter.config.json_schema import document_schema
from adapter.deliveries.attempt import Attempts, Queue
from adapter.deliveries.dispatcher import Dispatcher
from adapter.ledger.claims import QueueKey
from adapter.ledger.inbox import Inbox
from adapter.ledger.key_values import StoredDocuments, Watermarks
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.maintenance import Maintenance, Retention, keep_pruned
from adapter.ledger.settlement import PausePolicy
from adapter.ledger.store import Store
from adapter.ledger.verdict_log import VerdictLog
from adapter.metrics import Metrics
from adapter.moments import to_datetime
from adapter.norce.client import Account, Norce, base_url
from adapter.operations.application import Health, console
from adapter.reconciliation.events import Reconciliation, keep_reconciled
from adapter.registrations.endpoint import Registrations
from adapter.registrations.endpoint import routes as beside_callbacks
from adapter.registrations.on_orders import Registrar
from adapter.routing.norce_settings import NorceSettings
from adapter.routing.routes import Routes
from adapter.routing.runner import Runner
from adapter.verdicts.circuit_breaker import CircuitBreaker
from adapter.verdicts.verdicts import Verdicts

log = structlog.get_logger(__name__)

FIRST_LOOK = timedelta(seconds=5)
PLUGINS_STOP_WITHIN = timedelta(seconds=1)
VERSION = version("norce-adapter")


class Service:
    """A running service: where it listens, and how it is told to stop."""

    def __init__(self, *, public_address: str, operations_address: str, health: Health, dispatcher: Dispatcher) -> None:
        self.public_address = public_address
        self.operations_address = operations_address
        self.health = health
        self.dispatcher = dispatcher


@contextlib.asynccontextmanager
async def running(config: Config, routes: Routes) -> AsyncIterator[Service]:
    """
    The service, from its first port to its last record.

    Raises `ledger.store.StoreInUse`, `StoreUnavailable` and `PortInUse` before anything is served.
    """
    async with contextlib.AsyncExitStack() as stack:
        store = Store.open(config.store.url)
        stack.callback(store.close)
        health, metrics = Health(), Metrics(VERSION)
        health.checks["store"] = lambda: not store.failing
        verdict_log = VerdictLog(store, dropped=metrics.verdicts_dropped.inc)
        stack.push_async_callback(verdict_log.flush)

        def make_norce() -> Norce:
            return client(config, metrics)

        if any(route.callback.kind != "notification" and not route.computes for route in routes.all):
            stack.enter_context(short_thread_slices())
        norce = make_norce()
        stack.push_async_callback(norce.aclose)
        runner = Runner(make_norce=make_norce, clock=lambda: to_datetime(store.clock()), replaced=metrics.loop_replaced)
        stack.push_async_callback(runner.stop, PLUGINS_STOP_WITHIN)
        lease = Lease(store, version=VERSION)
        await lease.enter()
        lanes = Lanes(store, lease, policy=pause_policy(config))
        queues = await lanes.open_queues(queue_keys(config, routes))
        of_route = {route.name: route for route in routes.all}
        dispatcher = Dispatcher(
            {queue_id: Queue(route=of_route[key.route], channel=key.channel) for key, queue_id in queues.items()},
            lanes=lanes,
            lease=lease,
            attempts=Attempts(runner=runner, norce=norce, clock=store.clock),
            before_handler=config.norce.timeout,
            metrics=metrics,
            clock=store.clock,
            slots=config.dispatcher.slots,
            random=random.random,
            shared=store.shared,
        )
        norce_settings = NorceSettings(
            config, routes, norce, published_schema(config, routes),
            stored=StoredDocuments(store), metrics=metrics, changed=dispatcher.wake,
        )  # fmt: skip
        if config.norce.refresh:
            await norce_settings.restore()
            # Before anybody is answered; where Norce does not answer, by what it said the last time. Never for longer,
            # whatever Norce is given otherwise: no lease is renewed meanwhile, and no signal heard.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(config.norce.timeout, FIRST_LOOK).total_seconds()):
                    await norce_settings.refresh()
        switched_off = norce_settings.switched_off
        dispatcher.switched_off = switched_off
        intake = intake_of(routes, store, queues, metrics, dispatcher.wake)
        endpoint = CallbackEndpoint(
            routes=routes,
            senders=Senders(config.senders),
            channels=frozenset(config.channels),
            intake=intake,
            verdicts=Verdicts(
                routes,
                runner=runner,
                norce=norce,
                metrics=metrics,
                clock=store.clock,
                circuit_breaker=CircuitBreaker(
                    failures=config.circuit_breaker.failures, open_for=config.circuit_breaker.open_for
                ),
                record=verdict_log.record,
            ),
            metrics=metrics,
            adapter_id=config.adapter.id,
            max_body_bytes=config.server.max_body_bytes,
            receive_timeout_seconds=config.server.receive_timeout.total_seconds(),
            clock=store.clock,
            switched_off=switched_off,
        )
        registrations = Registrations(config, Registrar(config, norce), switched_off)
        beside = beside_callbacks(registrations, config.adapter.id, norce_settings.schema)
        healing = reconciliation(config, norce, intake, store, metrics)
        public = listen(config.server.host, config.server.port)
        stack.callback(public.close)
        operations = listen(config.operations.host, config.operations.port)
        stack.callback(operations.close)
        # The operations port is the last to go: somebody wants to see how a shutdown is going.
        behind = console(health, metrics, store, config.operations.token, wake=dispatcher.wake, reconcile=healing.run)
        await stack.enter_async_context(served(behind, operations))
        for name, coroutine in (
            ("lease", dispatcher.keep_lease()),
            ("runner", runner.watch()),
            ("verdict_log", verdict_log.keep()),
            ("retention", keep_pruned(Maintenance(store, retention(config)))),
            ("configuration", norce_settings.poll(config.norce.refresh)),
            ("reconciliation", keep_reconciled(healing, config.reconciliation.every)),
        ):
            await stack.enter_async_context(_task(name, coroutine, health))
        loop = asyncio.get_running_loop()
        stack.callback(store.database.listen(lambda: _told(loop, dispatcher.wake)))
        working = asyncio.create_task(dispatcher.run())
        health.checks["dispatcher"] = lambda: not working.done()

        serving = contextlib.AsyncExitStack()

        async def stop_working() -> None:
            # Beside each other, so that the grace of what runs counts from the signal.
            await asyncio.gather(serving.aclose(), dispatcher.stop(config.dispatcher.grace))
            await working

        stack.push_async_callback(stop_working)
        await serving.enter_async_context(
            served(
                callbacks_first(endpoint, public_port(endpoint, beside)),
                public,
                count_refusals(metrics),
                lambda: endpoint.verdicts.waiting + registrations.waiting,
            )
        )

        health.started = True
        service = Service(
            public_address=address_of(public),
            operations_address=address_of(operations),
            health=health,
            dispatcher=dispatcher,
        )
        log.info("serving", address=service.public_address, operations_address=service.operations_address,
                 version=VERSION, adapter_id=config.adapter.id)  # fmt: skip
        try:
            yield service
        finally:
            health.stopping = True
            log.info("stopping", running=dispatcher.running)
    log.info("stopped")


async def serve(config: Config, routes: Routes) -> None:
    """Serves until SIGTERM or SIGINT, also where it comes while the service starts. Raises what `running` raises."""
    with told_to_stop() as stop:
        async with running(config, routes):
            await stop.wait()


@contextlib.contextmanager
def told_to_stop() -> Iterator[asyncio.Event]:
    """An event that is set by SIGTERM and SIGINT, which have their usual effect again afterwards."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def accounts(config: Config) -> dict[str, Account]:
    """Every merchant's address and tokens at Norce."""
    return {
        name: Account(
            base_url=str(config.norce.base_url or base_url(config.norce.environment, merchant.slug)),
            tokens=merchant.tokens,
        )
        for name, merchant in config.merchants.items()
    }


def queue_keys(config: Config, routes: Routes) -> list[QueueKey]:
    """A queue for every notification route, merchant and channel."""
    return [
        QueueKey(route.name, channel)
        for route in routes.all
        if route.callback.kind == "notification"
        for channel in config.channels
    ]


def pause_policy(config: Config) -> PausePolicy:
    """When a queue pauses by itself."""
    given = config.queues
    return PausePolicy(after_failures=given.pause_after, first=given.first_pause, longest=given.max_pause)


def client(config: Config, metrics: Metrics, transport: httpx.AsyncBaseTransport | None = None) -> Norce:
    """A client for Norce, for the event loop that it is made on. `transport` is for tests."""
    for name, merchant in config.merchants.items():
        for number, _ in enumerate(merchant.tokens, 1):
            metrics.norce_requests.labels(name, str(number), "200")  # seen to be 0 where it is not used any more
    return Norce(
        accounts(config),
        adapter_id=config.adapter.id,
        timeout=config.norce.timeout,
        version=config.norce.version,
        transport=transport,
        used=lambda merchant, token, status: metrics.norce_requests.labels(merchant, str(token), str(status)).inc(),
    )


def retention(config: Config) -> Retention:
    """How long things are kept."""
    given = config.store.retention
    return Retention(
        bodies=given.bodies,
        bodies_of_dead_letters=given.bodies_of_dead_letters,
        rows=given.rows,
        verdicts=given.verdicts,
    )


def published_schema(config: Config, routes: Routes) -> dict[str, Any]:
    """What Norce's configuration may hold about us."""
    types = {route.name: type(next(iter(route.settings.values()))) for route in routes.all}
    return document_schema(config.adapter.id, str(config.adapter.public_url or ""), types)


def reconciliation(config: Config, norce: Norce, intake: Intake, store: Store, metrics: Metrics) -> Reconciliation:
    """Norce's event logs, of all merchants."""
    return Reconciliation(
        norce,
        intake,
        Watermarks(store),
        channels=frozenset(config.channels),
        adapter_id=config.adapter.id,
        overlap=config.reconciliation.overlap,
        remembered=config.store.retention.rows,
        metrics=metrics,
        clock=store.clock,
    )


@contextlib.asynccontextmanager
async def reconciling(config: Config, routes: Routes, metrics: Metrics) -> AsyncIterator[Reconciliation]:
    """The same where no service runs: with the store, and nobody who works it off. Raises what `running` raises."""
    store = Store.open(config.store.url)
    norce = client(config, metrics)
    try:
        lanes = Lanes(store, Lease(store, version=VERSION), policy=pause_policy(config))
        queues = await lanes.open_queues(queue_keys(config, routes))
        yield reconciliation(config, norce, intake_of(routes, store, queues, metrics), store, metrics)
    finally:
        await norce.aclose()
        store.close()


def intake_of(
    routes: Routes,
    store: Store,
    queues: Mapping[QueueKey, int],
    metrics: Metrics,
    wake: Callable[[], None] = lambda: None,
) -> Intake:
    return Intake(routes, Inbox(store), queue_ids=queues, metrics=metrics, wake=wake)


def _told(loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(wake)


@contextlib.asynccontextmanager
async def _task(name: str, coroutine: Coroutine[None, None, None], health: Health) -> AsyncIterator[None]:
    """Work that never ends by itself; where it does, the service is not ready, and the log says why."""
    task = asyncio.create_task(coroutine)
    health.checks[name] = lambda: not task.done()
    task.add_done_callback(_failed)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("task_failed", exc_info=error)
