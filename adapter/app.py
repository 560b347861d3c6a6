"""Wiring: builds the parts of the service, and starts and stops them in order.

Start: ledger, queues, the plugins' event loops, operations port, dispatcher, public port. Stop: readiness off, no new
callbacks, running deliveries finish or are cancelled, the plugins' loops, the operations port, the ledger last.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version

import structlog

from adapter import logs
from adapter.callbacks.endpoints import CallbackEndpoint
from adapter.callbacks.intake import Intake
from adapter.callbacks.limits import LimitReport, Load
from adapter.callbacks.senders import Senders
from adapter.callbacks.server import (
    PublicApp,
    http_server,
    listen,
    public_connections,
    short_thread_slices,
    url_of,
)
from adapter.config import Config
from adapter.deliveries.attempt import Attempts, Queue
from adapter.deliveries.backfill import Backfill
from adapter.deliveries.dispatcher import Dispatcher
from adapter.ledger.binding import bind
from adapter.ledger.claims import QueueKey
from adapter.ledger.commands import Commands
from adapter.ledger.inbox import Inbox
from adapter.ledger.key_values import StoredDocuments, StoredTokens
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.maintenance import Maintenance
from adapter.ledger.names import Names
from adapter.ledger.store import Store
from adapter.ledger.uses import Uses
from adapter.ledger.verdict_log import VerdictLog
from adapter.metrics import Metrics
from adapter.moments import to_datetime
from adapter.norce.client import Norce
from adapter.operations.application import OperationsEndpoints, serve_operations
from adapter.operations.health import Health, background_task
from adapter.reconciliation.from_config import order_reconciliation, reconciliation
from adapter.registrations.endpoint import Registrations
from adapter.registrations.endpoint import routes as routes_beside_callbacks
from adapter.registrations.on_orders import Registrar
from adapter.routing.from_config import ledger_binding, norce_client, pause_policy, queue_keys, retention
from adapter.routing.gone_names import log_warnings
from adapter.routing.norce_settings import NorceSettings, published_schema
from adapter.routing.routes import Routes
from adapter.routing.runner import Runner
from adapter.verdicts.circuit_breaker import CircuitBreaker
from adapter.verdicts.loop_lag import LoopLag
from adapter.verdicts.verdicts import Verdicts

log = structlog.get_logger(__name__)

PLUGINS_STOP_WITHIN = timedelta(seconds=1)
VERSION = version("norce-adapter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The addresses of a running service."""

    public_address: str
    operations_address: str


@contextlib.asynccontextmanager
async def running(config: Config, routes: Routes, *, hold: bool = False) -> AsyncIterator[Service]:
    """Run the service. With `hold`, it receives callbacks and commands but delivers nothing.

    Raises:
        BoundToAnother: the ledger belongs to another Norce.
        KindChanged: a callback has another kind than in an earlier configuration.
        StoreInUse: another process uses the ledger.
        StoreUnavailable: the ledger cannot be opened.
        PortInUse: a port or the Unix socket is not available.
    """
    async with contextlib.AsyncExitStack() as stack:
        health, metrics = Health(is_held=hold), Metrics(VERSION)
        logs.count_dropped(metrics.log_lines_dropped.inc)
        store = Store.open(config.store.url)
        stack.callback(store.close)
        await bind(store, ledger_binding(config))
        names, uses = Names(store), Uses(store)
        await names.add({each.name: each.kind for each in routes.callbacks.values()}, config.channels)
        stack.push_async_callback(uses.flush)
        health.checks["store"] = lambda: not store.failing
        if any(callback.kind != "notification" for callback in routes.callbacks.values()):
            # Shoppers need no ledger, and all nodes share a database: without it no node would be left.
            health.optional.add("store")
        builder = _PartsBuilder(config=config, routes=routes, store=store, metrics=metrics)
        verdict_log = VerdictLog(store, dropped=metrics.verdicts_dropped.inc)
        stack.push_async_callback(verdict_log.flush)
        norce = norce_client(config, metrics)
        stack.push_async_callback(norce.aclose)
        if any(route.callback.kind != "notification" and not route.computes for route in routes.all):
            stack.enter_context(short_thread_slices())
        runner = builder.runner()
        stack.push_async_callback(runner.stop, PLUGINS_STOP_WITHIN)

        lease = Lease(store, version=VERSION)
        await lease.enter()
        lanes = Lanes(store, lease, policy=pause_policy(config))
        refetching = {route.name for route in routes.all if route.refetch}
        in_shadow = {route.name for route in routes.all if route.shadow}
        queues = await lanes.open_queues(queue_keys(config), refetching=refetching)
        attempts = Attempts(runner=runner, norce=norce, clock=store.clock)
        dispatcher = builder.dispatcher(queues, lanes, lease, attempts, hold=hold)
        norce_settings = builder.norce_settings(norce, dispatcher)
        await norce_settings.read_first()
        dispatcher.switched_off = norce_settings.switched_off
        intake = Intake(routes, Inbox(store), queue_ids=queues, metrics=metrics, wake=dispatcher.wake)
        lag = LoopLag()
        verdicts = builder.verdicts(runner, norce, verdict_log, lag)
        on_limit = LimitReport(metrics).acted
        load = Load(waiting=lambda: verdicts.waiting, on_limit=on_limit)
        endpoint = builder.callback_endpoint(intake, verdicts, norce_settings, load, names, uses)
        registrations = Registrations(config, Registrar(config, norce), norce_settings.switched_off)
        reconciler = reconciliation(config, norce, intake, store, metrics)
        order_reconciler = order_reconciliation(config, norce, intake, store, metrics, norce_settings.switched_off)

        public = listen(config.server.host, config.server.port)
        stack.callback(public.close)
        # The operations listeners open first and close last, so that operators can watch a shutdown.
        shadows = {queue_id for key, queue_id in queues.items() if key.route in in_shadow}
        commands = Commands(store, set(queues.values()), shadows=shadows, refetching=refetching)
        operations = OperationsEndpoints(
            health,
            metrics,
            store,
            commands=commands,
            wake=dispatcher.wake,
            reconcile=reconciler.run,
            reconcile_orders=order_reconciler.run,
            backfill=Backfill(routes, norce, store, queue_ids=queues).step,
        )
        operations_address = await serve_operations(stack, config, operations, on_limit)
        for name, work in (
            ("lease", dispatcher.keep_lease()),
            ("runner", runner.watch()),
            ("loop_lag", lag.watch()),
            ("verdict_log", verdict_log.run()),
            ("names", names.keep_up_to_date()),
            ("uses", uses.run()),
            ("retention", Maintenance(store, retention(config)).run()),
            ("configuration", norce_settings.poll(config.norce.refresh)),
            ("reconciliation", reconciler.run_regularly(config.reconciliation.every)),
            ("order_reconciliation", order_reconciler.run_regularly(config.reconciliation.orders)),
        ):
            await stack.enter_async_context(background_task(name, work, health))
        stack.callback(store.listen(dispatcher.wake))
        dispatching = asyncio.create_task(dispatcher.run())
        health.checks["dispatcher"] = lambda: not dispatching.done()
        public_listener = contextlib.AsyncExitStack()

        async def stop_working() -> None:
            # Both at once, so that the grace period of running deliveries counts from the signal.
            await asyncio.gather(public_listener.aclose(), dispatcher.stop(config.dispatcher.grace))
            await dispatching

        stack.push_async_callback(stop_working)
        app = PublicApp(endpoint, routes_beside_callbacks(registrations, config.adapter.id, norce_settings.schema))
        await public_listener.enter_async_context(
            http_server(
                app,
                public,
                connections=public_connections(
                    most_attempts(config, len(queues)),
                    max_body_bytes=config.server.max_body_bytes,
                    trusted_proxies=config.server.trusted_proxies,
                    on_limit=on_limit,
                ),
                load=load,
                keep_alive=config.server.keep_alive,
                receive_timeout=config.server.receive_timeout,
            )
        )
        await log_warnings(config, store)
        health.started = True
        service = Service(public_address=url_of(public), operations_address=operations_address)
        log.info("serving", address=service.public_address, operations_address=service.operations_address,
                 version=VERSION, adapter_id=config.adapter.id, held=hold)  # fmt: skip
        try:
            yield service
        finally:
            health.stopping = True
            log.info("stopping", running=dispatcher.running)
    log.info("stopped")


def most_attempts(config: Config, queues: int) -> int:
    """Return how many deliveries may run at once: all slots, and one for each further queue."""
    return config.dispatcher.slots + max(queues - 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PartsBuilder:
    """The values that most parts need, and a method for each part that takes many arguments."""

    config: Config
    routes: Routes
    store: Store
    metrics: Metrics

    def runner(self) -> Runner:
        return Runner(
            make_norce=lambda: norce_client(self.config, self.metrics),
            clock=lambda: to_datetime(self.store.clock()),
            tokens=StoredTokens(self.store),
            replaced=lambda loop, route: self.metrics.plugin_loops_replaced.labels(loop, route).inc(),
        )

    def dispatcher(
        self, queues: Mapping[QueueKey, int], lanes: Lanes, lease: Lease, attempts: Attempts, *, hold: bool
    ) -> Dispatcher:
        by_name = {route.name: route for route in self.routes.all}
        return Dispatcher(
            {
                queue_id: Queue(route=by_name[key.route], channel=key.channel)
                for key, queue_id in queues.items()
                if not by_name[key.route].shadow  # what waits there waits until the route is in force again
            },
            lanes=lanes,
            lease=lease,
            attempts=attempts,
            before_handler=self.config.norce.timeout,
            metrics=self.metrics,
            clock=self.store.clock,
            slots=self.config.dispatcher.slots,
            random=random.Random().random,  # noqa: S311 - jitter; plugins and tests may seed the shared generator
            shared=self.store.shared,
            held=hold,
        )

    def norce_settings(self, norce: Norce, dispatcher: Dispatcher) -> NorceSettings:
        return NorceSettings(
            self.config,
            self.routes,
            norce,
            published_schema(self.config, self.routes),
            stored=StoredDocuments(self.store),
            metrics=self.metrics,
            changed=dispatcher.wake,
        )

    def verdicts(self, runner: Runner, norce: Norce, verdict_log: VerdictLog, lag: LoopLag) -> Verdicts:
        given = self.config.circuit_breaker
        return Verdicts(
            self.routes,
            runner=runner,
            norce=norce,
            metrics=self.metrics,
            clock=self.store.clock,
            circuit_breaker=CircuitBreaker(orders=given.orders, open_for=given.open_for),
            lag=lag.seconds,
            record=verdict_log.record,
        )

    def callback_endpoint(
        self, intake: Intake, verdicts: Verdicts, norce_settings: NorceSettings, load: Load, names: Names, uses: Uses
    ) -> CallbackEndpoint:
        return CallbackEndpoint(
            routes=self.routes,
            senders=Senders(self.config.senders),
            channels=frozenset(self.config.channels),
            intake=intake,
            verdicts=verdicts,
            metrics=self.metrics,
            adapter_id=self.config.adapter.id,
            max_body_bytes=self.config.server.max_body_bytes,
            load=load,
            clock=self.store.clock,
            names=names,
            uses=uses,
            switched_off=norce_settings.switched_off,
        )
