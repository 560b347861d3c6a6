"""
Wiring: what is made from what, in which order the service starts and stops.

Start: ledger, queues, plugins' loops, dispatcher, ports. Stop: readiness off, no new callbacks, running deliveries
finish or are released, plugins' loops, ledger last. One owner of signals: two uvicorn servers would overwrite each
other's, and raise SIGTERM again.
"""

import asyncio
import contextlib
import functools
import gc
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

import httpx
import structlog
import uvicorn
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from adapter.attempts import Attempts, Queue
from adapter.callbacks.endpoints import CallbackEndpoint
from adapter.callbacks.intake import Intake
from adapter.callbacks.protocol import GuardedProtocol
from adapter.callbacks.senders import Senders
from adapter.config import Config
from adapter.config.schemas import document_schema
from adapter.console import Health, console
from adapter.dispatcher import Dispatcher
from adapter.ledger.claims import QueueKey
from adapter.ledger.documents import TakenDocuments
from adapter.ledger.inbox import Inbox
from adapter.ledger.judged import Docket
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.marks import Marks
from adapter.ledger.store import Store, StoreUnavailable
from adapter.ledger.upkeep import Pruned, Retention, Upkeep
from adapter.metrics import Metrics
from adapter.norce.client import Account, Norce, base_url
from adapter.norce.configuration import Documents
from adapter.norce.reconciliation import Reconciliation
from adapter.norce.registration import Registrar
from adapter.pauses import Policy
from adapter.public import Registrations
from adapter.public import routes as beside_callbacks
from adapter.routes import Routes
from adapter.runner import Runner
from adapter.verdicts import Misses, Verdicts

log = structlog.get_logger(__name__)

CALLBACKS = "/api/v1/callbacks/orders/"
CALLBACK_PATH = f"{CALLBACKS}{{order_id}}/{{callback}}"
SWITCH_SECONDS = 0.0005
COLLECTED_AFTER = 20_000  # objects more than were freed since
# uvloop takes one connection from a listening descriptor each time round its loop, and a busy loop goes round a hundred
# times a second: newcomers waited 15 s, while who was in already was served. With so many descriptors, so many at once.
CONNECTIONS_A_TURN = 64
MOST_UNACCEPTED = 4096
FIRST_LOOK = timedelta(seconds=5)
PLUGINS_STOP_WITHIN = timedelta(seconds=1)
PRUNE_SECONDS = 3600.0
PRUNE_STEP_SECONDS = 0.2
TURN_SECONDS = 30.0
VERSION = version("norce-adapter")


class PortInUse(Exception):
    """A port cannot be listened on. Choose another in `server.port` or `operations.port`, or stop who has it."""


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
        docket = Docket(store, dropped=metrics.verdicts_dropped.inc)
        stack.push_async_callback(docket.flush)

        def moment() -> datetime:
            return datetime.fromtimestamp(store.clock() / 1000, UTC)

        def make_norce() -> Norce:
            return client(config, metrics)

        if any(route.callback.kind != "notification" and not route.computes for route in routes.all):
            stack.enter_context(_interpreter_back_sooner())
        norce = make_norce()
        stack.push_async_callback(norce.aclose)
        runner = Runner(make_norce=make_norce, clock=moment, replaced=metrics.loop_replaced)
        stack.push_async_callback(runner.stop, PLUGINS_STOP_WITHIN)
        lease = Lease(store, version=VERSION)
        await lease.enter()
        lanes = Lanes(store, lease, policy=pause_policy(config))
        queues = await lanes.open_queues(queue_keys(config, routes))
        of_route = {route.name: route for route in routes.all}
        dispatcher = Dispatcher(
            {
                queue_id: Queue(id=queue_id, route=of_route[key.route], merchant=key.merchant, channel=key.channel)
                for key, queue_id in queues.items()
            },
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
        documents = Documents(
            config, routes, norce, published_schema(config, routes),
            taken=TakenDocuments(store), metrics=metrics, changed=dispatcher.wake,
        )  # fmt: skip
        if config.norce.refresh:
            await documents.recall()
            # Before anybody is answered; where Norce does not answer, by what it said the last time. Never for longer,
            # whatever Norce is given otherwise: no lease is renewed meanwhile, and no signal heard.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(config.norce.timeout, FIRST_LOOK).total_seconds()):
                    await documents.refresh()
        switched_off = documents.switched_off
        dispatcher.switched_off = switched_off
        intake = intake_of(routes, store, queues, metrics, dispatcher.wake)
        endpoint = CallbackEndpoint(
            routes=routes,
            senders=Senders(config.senders),
            merchants=channels(config),
            intake=intake,
            verdicts=Verdicts(
                routes,
                runner=runner,
                norce=norce,
                metrics=metrics,
                clock=store.clock,
                misses=Misses(most=config.verdicts.misses, bypass=config.verdicts.bypass),
                record=docket.record,
            ),
            metrics=metrics,
            adapter_id=config.adapter.id,
            max_body_bytes=config.server.max_body_bytes,
            receive_timeout_seconds=config.server.receive_timeout.total_seconds(),
            clock=store.clock,
            switched_off=switched_off,
        )
        registrations = Registrations(config, Registrar(config, norce), switched_off)
        beside = beside_callbacks(registrations, config.adapter.id, documents.schema)
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
            ("docket", docket.keep()),
            ("retention", _prune(Upkeep(store, retention(config)))),
            ("configuration", documents.keep(config.norce.refresh)),
            ("reconciliation", _reconcile(healing, config.reconciliation.every)),
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
                _callbacks_first(endpoint, public_port(endpoint, beside)),
                public,
                _refusals(metrics),
                lambda: endpoint.verdicts.waiting + registrations.waiting,
            )
        )

        health.started = True
        service = Service(
            public_address=_address(public),
            operations_address=_address(operations),
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
        QueueKey(route=route.name, merchant=merchant, channel=channel)
        for route in routes.all
        if route.callback.kind == "notification"
        for merchant, of_merchant in config.merchants.items()
        for channel in of_merchant.channels
    ]


def pause_policy(config: Config) -> Policy:
    """When a queue pauses by itself."""
    given = config.dispatcher
    return Policy(after_failures=given.pause_after, first=given.pause, longest=given.longest_pause)


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


def public_port(endpoint: CallbackEndpoint, beside: Sequence[BaseRoute]) -> Router:
    """What the public port has. A router and no Starlette around it: the endpoint answers its errors itself."""
    return Router(
        routes=[Route(CALLBACK_PATH, endpoint), *beside],
        redirect_slashes=False,  # whether Norce follows redirects is documented nowhere
        default=JSONResponse({"code": "not-found", "message": "There is nothing at this address."}, 404),
    )


def _callbacks_first(endpoint: CallbackEndpoint, router: Router) -> ASGIApp:
    """The router, and before it what nearly everybody asks for: by the same rule, for a tenth of the time."""

    async def public(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path.startswith(CALLBACKS):
            order_id, _, callback = path[len(CALLBACKS) :].partition("/")
            if order_id and callback and "/" not in callback:
                scope["path_params"] = {"order_id": order_id, "callback": callback}
                await endpoint(scope, receive, send)
                return
        await router(scope, receive, send)

    return public


def retention(config: Config) -> Retention:
    """How long things are kept."""
    given = config.store.retention
    return Retention(
        bodies=given.bodies,
        bodies_of_dead_letters=given.bodies_of_dead_letters,
        rows=given.rows,
        verdicts=given.verdicts,
    )


async def _prune(upkeep: Upkeep) -> None:
    """Every hour, in steps with room between them for everybody else."""
    while True:
        try:
            pruned = await upkeep.step()
            if pruned.bodies or pruned.notifications or pruned.verdicts:
                log.info("pruned", bodies=pruned.bodies, notifications=pruned.notifications, verdicts=pruned.verdicts)
        except StoreUnavailable:  # the store has said so itself
            pruned = Pruned()
        except Exception as error:  # what is wrong with one row must not end all pruning
            log.error("pruning_failed", exc_info=error)
            pruned = Pruned()
        await asyncio.sleep(PRUNE_STEP_SECONDS if pruned.more else PRUNE_SECONDS)


def published_schema(config: Config, routes: Routes) -> dict[str, Any]:
    """What Norce's configuration may hold about us."""
    types = {route.name: type(next(iter(route.settings.values()))) for route in routes.all}
    return document_schema(config.adapter.id, str(config.adapter.public_url or ""), types)


def reconciliation(config: Config, norce: Norce, intake: Intake, store: Store, metrics: Metrics) -> Reconciliation:
    """Norce's event logs, of all merchants."""
    return Reconciliation(
        norce,
        intake,
        Marks(store),
        merchants=channels(config),
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
    ids = {(key.route, key.merchant, key.channel): queue_id for key, queue_id in queues.items()}
    return Intake(routes, Inbox(store), queue_ids=ids, metrics=metrics, wake=wake)


def channels(config: Config) -> dict[str, frozenset[str]]:
    """The channels of every merchant."""
    return {name: frozenset(merchant.channels) for name, merchant in config.merchants.items()}


async def _reconcile(healing: Reconciliation, every: timedelta) -> None:
    """Asks often whether it is due: which node has the turn is for the ledger to say."""
    while every:
        try:
            await healing.in_turn(every)
        except StoreUnavailable:  # the store has said so itself
            pass
        except Exception as error:  # a mistake of ours, or of Norce's, must not end all that come after
            log.error("reconciliation_broke", exc_info=error)
        await asyncio.sleep(min(every.total_seconds(), TURN_SECONDS))
    await asyncio.Event().wait()


def _refusals(metrics: Metrics) -> Callable[[], None]:
    """Counts what is refused unread, and says so at most once in ten seconds."""
    said_at = float("-inf")

    def refused() -> None:
        nonlocal said_at
        metrics.refused.inc()
        if time.monotonic() > said_at + 10:
            said_at = time.monotonic()
            log.warning("overloaded")

    return refused


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


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def served(
    app: ASGIApp,
    listening: socket.socket,
    refused: Callable[[], None] = lambda: None,
    waiting: Callable[[], int] = lambda: 0,
) -> AsyncIterator[None]:
    """
    An app behind a listening socket, from the first connection to the last answer. `refused` hears of each 503 for want
    of room; `waiting` says how many requests do nothing but wait.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=functools.partial(GuardedProtocol, refused=refused, waiting=waiting),  # type: ignore[arg-type]
        backlog=MOST_UNACCEPTED,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=10,
    )
    server = _Server(config)
    sockets = [listening, *(listening.dup() for _ in range(CONNECTIONS_A_TURN - 1))]
    task = asyncio.create_task(server.serve(sockets=sockets))
    while not server.started:
        if task.done():
            await task
            raise RuntimeError("the HTTP server ended before it started")
        await asyncio.sleep(0.005)
    try:
        with _rare_collections():
            yield
    finally:
        server.should_exit = True
        await task


@contextlib.contextmanager
def _interpreter_back_sooner() -> Iterator[None]:
    """
    Where plugins answer shoppers: a thread of theirs that computes gives the interpreter back after half a millisecond.

    At Python's own 5 ms, four such threads left an answer waiting for seconds. It costs a tenth of the accepts, so it
    stays as it is where nobody asks plugins for answers.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """
    Keeps the garbage collector from most of its work while requests are served.

    A decoded order is hundreds of objects: at Python's own threshold every other request starts a collection, and each
    hundredth of these walks all that was ever imported. Measured, 50 us an accept and stalls of 40 ms. What there is at
    the start is set apart; what requests leave is freed without a collector, or waits for a rarer one.
    """
    threshold = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(COLLECTED_AFTER, *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises `PortInUse`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: asyncio sends small answers at once (TCP_NODELAY) only on a socket that says so.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise PortInUse(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{host}:{port}"
