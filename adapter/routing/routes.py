"""Routes: built from configuration and installed handlers, and selected for an order.

Handlers are imported, conditions compiled and settings read for every merchant and channel at start. So everything that
can be wrong with them is found before a port opens.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from typing import Any

from adapter.conditions import CompiledCondition, Condition, ConditionInvalid, Result, parse_scope
from adapter.config import Config, ConfigProblem, ConfigurationInvalid, read_settings
from adapter.config.model import CallbackConfig, HookCallbackConfig, NotificationCallbackConfig, RouteConfig, WhenConfig
from adapter.identifiers import Channel
from adapter.ledger.settlement import Handling
from adapter.norce.api import V0
from adapter.norce.client import MAX_ORDER_BYTES
from adapter.norce.order_schema import InArray, NoSuchPart, part_at
from adapter.orders import Order
from adapter.outgoing import MAX_ANSWER_BYTES
from adapter.plugin import Context, HookHandler, NotificationHandler, Settings, ValidationHandler, can_look_up
from adapter.routing.handler_class import methods_that_block, misspelt_names
from adapter.routing.worst_cases import conditions_in, worst_case

GROUP = "norce_adapter.handlers"
PASSING_STATES = ("checkout", "processing", "accepted")
STATUS_SCOPE = "/state/currentStatus"

Handler = NotificationHandler[Any] | ValidationHandler[Any] | HookHandler[Any]
KINDS: dict[str, type[Handler]] = {
    "notification": NotificationHandler,
    "validation": ValidationHandler,
    "hook": HookHandler,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Callback:
    """One URL that Norce calls, and one registration on each order."""

    name: str
    kind: str  # notification, validation or hook
    condition: CompiledCondition | None = None  # of a notification
    deadline: timedelta = timedelta.max  # of an answer
    soft_limit: timedelta = timedelta.max  # an answer that takes longer is counted as slow
    target: str | None = None  # pointer that a hook's patches stay inside; None: a hook may not patch


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A callback bound to a handler, with the handler's settings and limits."""

    name: str
    callback: Callback
    when: tuple[CompiledCondition, ...]  # all must hold
    handler_name: str
    handler: Handler
    settings: dict[Channel, Settings]  # by the channels that it is for; Norce's configuration may change them
    refetch: bool
    no_answer: str | None
    shadow: bool = False  # its verdict is compared with the answer, its deliveries are recorded: neither takes effect
    timeout: timedelta
    schedule: Sequence[timedelta]
    concurrency: int
    max_answer_bytes: int = MAX_ANSWER_BYTES  # of an answer to the handler

    @property
    def method(self) -> Callable[[Order, Context[Any]], Coroutine[Any, Any, Any]]:
        """The handler's method that answers this callback. One class may answer both kinds."""
        handler: Any = self.handler
        return handler.change if self.callback.kind == "hook" else handler.validate  # type: ignore[no-any-return]

    @property
    def computes(self) -> bool:
        """True if the handler only computes, so that it may be called in place."""
        assert isinstance(self.handler, ValidationHandler | HookHandler)
        return self.handler.computes

    @property
    def handling(self) -> Handling:
        """The ways in which the notification handler can end a doubt."""
        assert isinstance(self.handler, NotificationHandler)
        return Handling.of(type(self.handler))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The routes that were selected for an order."""

    callback: Result  # of the callback's own condition
    routes: tuple[tuple[Route, Result], ...]  # matched, or error: the condition could not be evaluated


class Routes:
    """All routes and their callbacks. `warnings` are problems that do not prevent a start."""

    def __init__(
        self, callbacks: Mapping[str, Callback], routes: Iterable[Route], warnings: Iterable[ConfigProblem]
    ) -> None:
        self.callbacks = callbacks
        self.all = tuple(routes)
        self.warnings = tuple(warnings)
        self._of = {name: tuple(r for r in self.all if r.callback.name == name) for name in callbacks}

    def of(self, callback: str) -> tuple[Route, ...]:
        """Return the routes of a callback in the order of the configuration."""
        return self._of[callback]

    def serving(self, callback: str, channel: Channel) -> list[Route]:
        """Return the routes of a callback for a channel.

        The address of a request names both, so no order is needed.
        """
        return [route for route in self._of[callback] if channel in route.settings]

    def wanting(self, callback: Callback, channel: Channel, order: Any) -> Selection:
        """Select the routes for a channel whose conditions hold on an order. Never raises."""
        held = Result.MATCHED if callback.condition is None else callback.condition.evaluate(order).result
        if held is Result.NOT_MATCHED:
            return Selection(callback=held, routes=())
        wanted: list[tuple[Route, Result]] = []
        for route in self.serving(callback.name, channel):
            own = all_hold(route.when, order)
            if own is not Result.NOT_MATCHED:
                wanted.append((route, held if own is Result.MATCHED else own))
        return Selection(callback=held, routes=tuple(wanted))


def wants(route: Route, order: Any) -> Result:
    """Evaluate the conditions of a route and its callback on an order's `data`. Never raises."""
    own = route.callback.condition
    return all_hold(route.when if own is None else (own, *route.when), order)


def all_hold(conditions: Sequence[CompiledCondition], order: Any) -> Result:
    """Evaluate conditions that must all hold on an order's `data`. Never raises."""
    results = [condition.evaluate(order).result for condition in conditions]
    if Result.NOT_MATCHED in results:
        return Result.NOT_MATCHED
    return Result.ERROR if Result.ERROR in results else Result.MATCHED


def installed(points: Iterable[EntryPoint] | None = None) -> dict[str, EntryPoint]:
    """Return the handlers of all installed packages by name, without importing them."""
    return {point.name: point for point in (entry_points(group=GROUP) if points is None else points)}


def shared_names(points: Iterable[EntryPoint] | None = None) -> dict[str, list[str]]:
    """Return the handler names that several packages provide, with the names of the packages."""
    providers: defaultdict[str, list[EntryPoint]] = defaultdict(list)
    for point in entry_points(group=GROUP) if points is None else points:
        providers[point.name].append(point)
    several = {name: its for name, its in providers.items() if len(its) > 1}
    return {
        name: sorted({each.dist.name if each.dist else each.value for each in its}) for name, its in several.items()
    }


def settings_types(points: Iterable[EntryPoint] | None = None) -> tuple[dict[str, type[Settings]], list[str]]:
    """Import all installed handlers.

    Returns:
        The settings type of each handler by its name, and the names of handlers that cannot be imported.
    """
    types: dict[str, type[Settings]] = {}
    broken = []
    for name, point in sorted(installed(points).items()):
        try:
            types[name] = point.load().settings_type
        except (Exception, SystemExit):  # noqa: BLE001 - an import may fail in any way
            broken.append(name)
    return types, broken


def build(config: Config, points: Collection[EntryPoint] | None = None) -> Routes:
    """Build the routes of a configuration. `points` replaces the installed handlers in tests.

    Raises:
        ConfigurationInvalid: All problems of conditions, handlers and settings at once.
    """
    return _Builder(config, installed(points), shared_names(points)).routes()


class _Builder:
    def __init__(
        self, config: Config, handlers: Mapping[str, EntryPoint], shared_names: Mapping[str, Sequence[str]]
    ) -> None:
        self._config = config
        self._handlers = handlers
        self._shared_names = shared_names
        self._problems: list[ConfigProblem] = []
        self._warnings: list[ConfigProblem] = []

    def routes(self) -> Routes:
        callbacks = {name: self._callback(name, each) for name, each in self._config.callbacks.items()}
        routes = [self._route(name, each, callbacks[each.callback]) for name, each in self._config.routes.items()]
        if not self._problems:
            built = Routes(callbacks, [route for route in routes if route is not None], self._warnings)
            for callback in callbacks.values():
                self._check_worst_case(callback, built)
        if self._problems:
            raise ConfigurationInvalid(self._problems)
        return built

    def _check_worst_case(self, callback: Callback, built: Routes) -> None:
        """Check that the service has time for its own conditions, however large the order is."""
        if callback.kind == "notification":
            return
        order_bytes = self._config.server.max_body_bytes if callback.kind == "hook" else MAX_ORDER_BYTES
        for channel in self._config.channels:
            serving = [route for route in built.serving(callback.name, channel) if not route.shadow]
            computing = [
                own for route in serving if route.computes for _, own in conditions_in(route.settings[channel])
            ]
            longest = worst_case(chain(*(route.when for route in serving), computing), order_bytes)
            if longest > callback.deadline / 2:
                names = ", ".join(route.name for route in serving if route.when or route.computes)
                self._problem(
                    f"callbacks.{callback.name}.deadline",
                    f"the conditions of its routes ({names}) could together take {longest.total_seconds():.1f} s for "
                    f"an order of {order_bytes / 2**20:g} MiB, and may take half of the deadline; raise the deadline, "
                    "write fewer conditions for the same part of the order, or give them smaller scopes",
                )
                return

    def _callback(self, name: str, each: CallbackConfig) -> Callback:
        if isinstance(each, NotificationCallbackConfig):
            self._check_registrable(f"callbacks.{name}.scope", each.scope, V0)
            return Callback(name=name, kind=each.kind, condition=self._compiled(f"callbacks.{name}", each))
        if isinstance(each, HookCallbackConfig):
            self._check_registrable(f"callbacks.{name}.watch", each.watch, each.version)
        return Callback(
            name=name,
            kind=each.kind,
            deadline=each.deadline,
            soft_limit=each.soft_limit or each.deadline / 2,
            target=each.target if isinstance(each, HookCallbackConfig) else None,
        )

    def _check_registrable(self, path: str, pointer: str, version: str) -> None:
        try:
            part_at(parse_scope(pointer), version)
        except InArray as error:
            self._problem(path, f"{error}, and Norce refuses to register that; use the array itself")
        except (ConditionInvalid, NoSuchPart):
            return  # reported with the condition, or a warning of `check`

    def _route(self, name: str, each: RouteConfig, callback: Callback) -> Route | None:
        path = f"routes.{name}"
        when = self._conditions(f"{path}.when", each.when)
        handler = self._handler(f"{path}.handler", each.handler, callback)
        if handler is None:
            return None
        if callback.kind == "notification" and each.refetch:
            self._warn_of_passing_state(f"callbacks.{callback.name}", callback.condition)
            for at, condition in when.items():
                self._warn_of_passing_state(at, condition)
        elif callback.kind == "notification":
            self._warn_of_forged_orders(f"{path}.refetch")
        settings: dict[Channel, Settings] = {}
        channels = self._config.channels_of(name)
        if not channels:
            self._problem(path, "is for no configured channel: correct its merchants and channels")
        for channel in channels:
            tree, paths = self._config.settings(name, channel)
            read = read_settings(self._config, handler.settings_type, tree, paths)
            if isinstance(read, tuple):
                self._problems += [problem for problem in read if problem not in self._problems]
            else:
                settings[channel] = read
        if isinstance(handler, NotificationHandler):
            self._warn_of_doubt(f"{path}.handler", handler)
        return Route(
            name=name,
            callback=callback,
            when=tuple(condition for condition in when.values() if condition is not None),
            handler_name=each.handler,
            handler=handler,
            settings=settings,
            refetch=each.refetch,
            no_answer=each.no_answer,
            shadow=each.mode == "shadow",
            timeout=each.timeout,
            schedule=each.retry.schedule,
            concurrency=each.concurrency,
            max_answer_bytes=each.max_answer_bytes,
        )

    def _conditions(
        self, path: str, given: WhenConfig | tuple[WhenConfig, ...] | None
    ) -> dict[str, CompiledCondition | None]:
        """Compile the conditions of a route; return them by their paths."""
        if isinstance(given, tuple):
            return {f"{path}[{index}]": self._compiled(f"{path}[{index}]", each) for index, each in enumerate(given)}
        return {} if given is None else {path: self._compiled(path, given)}

    def _compiled(self, path: str, each: NotificationCallbackConfig | WhenConfig) -> CompiledCondition | None:
        try:
            return Condition(each.scope, each.schema).compile()
        except ConditionInvalid as error:
            member = "scope" if error.code.startswith("scope_") else "schema"
            self._problem(f"{path}.{member}", str(error))
            return None

    def _handler(self, path: str, name: str, callback: Callback) -> Handler | None:
        if name not in self._handlers:
            self._problem(path, f"no installed handler has this name; installed: {', '.join(sorted(self._handlers))}")
            return None
        if len(packages := self._shared_names.get(name, ())) > 1:
            self._problem(path, f"several packages provide a handler of this name: {', '.join(packages)}; keep one")
            return None
        try:
            class_ = self._handlers[name].load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an import may fail in any way; it is reported, not raised
            self._problem(path, f"the handler cannot be imported: {type(error).__name__}: {error}")
            return None
        kind = KINDS[callback.kind]
        if not (isinstance(class_, type) and issubclass(class_, kind)):
            self._problem(path, f"is no {kind.__name__}, but callback {callback.name} is a {callback.kind}")
            return None
        misspelt = [f"{given} looks like {meant}" for given, meant in misspelt_names(class_, KINDS.values()).items()]
        blocking = methods_that_block(class_, KINDS.values())
        for method in blocking:
            self._problem(path, f"its method {method} is no coroutine; define it with async def")
        if blocking:
            return None
        try:
            handler: Handler = class_()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
            reason = "; ".join([f"{type(error).__name__}: {error}", *misspelt])
            self._problem(path, f"the handler cannot be created: {reason}")
            return None
        for words in misspelt:
            self._warnings.append(self._config.problem(path, f"its {words}, which it lacks; its author can rename it"))
        return handler

    def _warn_of_passing_state(self, path: str, condition: CompiledCondition | None) -> None:
        if condition is None or condition.condition.scope != STATUS_SCOPE:
            return
        schema = condition.condition.schema
        state = schema.get("const") if isinstance(schema, dict) else None
        if state in PASSING_STATES:
            remedy = f"an order is {state} only for a while, and may have moved on when the route reads it again"
            self._warnings.append(self._config.problem(f"{path}.schema", f"{remedy}; use an enum of states"))

    def _warn_of_forged_orders(self, path: str) -> None:
        senders = self._config.senders
        if senders.signed_urls is not None or senders.url_secrets:
            remedy = (
                "the route exports what the caller sends, and a shopper can see the URL of a callback and call it; "
                "remove refetch: false, or accept callers by senders.header_secrets alone"
            )
            self._warnings.append(self._config.problem(path, remedy))

    def _warn_of_doubt(self, path: str, handler: NotificationHandler[Any]) -> None:
        if not (can_look_up(type(handler)) or handler.repeatable):
            remedy = (
                "the handler has no lookup and does not declare repeatable, so after each broken connection or killed "
                "process its order waits for a person; its author can add one of them"
            )
            self._warnings.append(self._config.problem(path, remedy))

    def _problem(self, path: str, message: str) -> None:
        self._problems.append(self._config.problem(path, message))
