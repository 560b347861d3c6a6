"""The check of a configuration against Norce's order. It warns about what has no effect.

Conditions, watches and targets are compared with the order schema of their version. Warnings prevent no start, because
Norce may know more than its published schema. `norce-adapter check` prints them.
"""

from collections.abc import Iterator

from adapter.conditions import CompiledCondition, parse_scope
from adapter.config import Config, ConfigProblem, place_of_setting
from adapter.config.convert import list_of
from adapter.config.model import HookCallbackConfig
from adapter.config.problems import under
from adapter.norce.api import V0
from adapter.norce.order_schema import HOOK_PARTS, InArray, NoSuchPart, part_at
from adapter.routing.order_comparison import compare, have_common_value
from adapter.routing.routes import Callback, Route, Routes
from adapter.routing.worst_cases import conditions_in

USE_CONTAINS = 'which conditions do not enter; use the array and a schema with "contains"'


def norce_warnings(config: Config, routes: Routes) -> list[ConfigProblem]:
    """Return warnings about conditions, watches and targets that can have no effect."""
    return list(dict.fromkeys(_NorceCheck(config, routes).warnings()))


class _NorceCheck:
    def __init__(self, config: Config, routes: Routes) -> None:
        self._config = config
        self._routes = routes

    def warnings(self) -> Iterator[ConfigProblem]:
        if not self._routes.callbacks:
            yield self._config.problem(
                "callbacks", "are missing, so Norce calls nothing here; configure a callback and a route for it"
            )
        for callback in self._routes.callbacks.values():
            yield from self._callback(callback)
        for route in self._routes.all:
            yield from self._route(route)

    def _callback(self, callback: Callback) -> Iterator[ConfigProblem]:
        at = f"callbacks.{callback.name}"
        if not self._routes.of(callback.name):
            effect = "stored and delivered nowhere" if callback.kind == "notification" else "always approved"
            yield self._config.problem(
                at, f"has no route, so its calls are {effect}; add a route with callback: {callback.name}"
            )
        given = self._config.callbacks[callback.name]
        if isinstance(given, HookCallbackConfig):
            yield from self._hook_part(f"{at}.watch", given.watch, given.version, "announces only changes of")
            if given.target is not None:
                yield from self._hook_part(f"{at}.target", given.target, given.version, "lets a hook patch only")
        elif callback.condition is not None:
            yield from self._condition(at, callback.condition, V0)

    def _hook_part(self, path: str, pointer: str, version: str, rule: str) -> Iterator[ConfigProblem]:
        tokens = parse_scope(pointer)
        try:
            part_at(tokens, version)
        except NoSuchPart as error:
            yield self._config.problem(path, str(error))
            return
        if f"/{tokens[0]}" not in HOOK_PARTS:
            yield self._config.problem(path, f"cannot work: Norce {rule} {list_of(HOOK_PARTS, join='and')}")

    def _route(self, route: Route) -> Iterator[ConfigProblem]:
        given = self._config.routes[route.name].when
        at = f"routes.{route.name}.when"
        paths = [f"{at}[{index}]" for index in range(len(given))] if isinstance(given, tuple) else [at]
        for version in self._versions(route):
            for path, condition in zip(paths, route.when, strict=False):
                yield from self._condition(path, condition, version)
            yield from self._exclusions(route, at, version)
            for channel, settings in route.settings.items():
                for inside, condition in conditions_in(settings):
                    _, levels = self._config.settings(route.name, channel)
                    yield from self._condition(place_of_setting(self._config, levels, inside), condition, version)

    def _versions(self, route: Route) -> tuple[str, ...]:
        """Return the versions of the order that a route's conditions are evaluated on."""
        given = self._config.callbacks[route.callback.name]
        if isinstance(given, HookCallbackConfig):
            return (given.version,)
        read = self._config.norce.version
        if route.callback.kind == "validation":
            return (read,)
        return (V0, read) if route.refetch and read != V0 else (V0,)

    def _condition(self, path: str, condition: CompiledCondition, version: str) -> Iterator[ConfigProblem]:
        try:
            part = part_at(condition.tokens, version)
        except InArray as error:
            yield self._config.problem(f"{path}.scope", f"{error}, {USE_CONTAINS}")
            return
        except NoSuchPart as error:
            yield self._config.problem(f"{path}.scope", str(error))
            return
        for finding in compare(condition.schema, part) if part else ():
            place = f"{path}.schema"
            for step in finding.where:
                place = under(place, step)
            effect = "the condition can never hold: " if finding.never else ""
            yield self._config.problem(place, f"{effect}{finding.message}")

    def _exclusions(self, route: Route, at: str, version: str) -> Iterator[ConfigProblem]:
        """Yield a warning if conditions exclude each other: a route's, and its callback's."""
        own = () if route.callback.condition is None else (route.callback.condition,)
        if any(_is_hopeless(condition, version) for condition in (*own, *route.when)):
            return
        if any(exclude(condition, *own, version=version) for condition in route.when):
            message = f"the condition of its callback {route.callback.name} excludes every value that it takes"
        elif exclude(*own, *route.when, version=version):
            message = "its conditions exclude each other"
        else:
            return
        yield self._config.problem(at, f"{message}, so the route is never used")


def exclude(*conditions: CompiledCondition, version: str) -> bool:
    """Return True if no order meets all of these conditions."""
    for condition in conditions:
        others = [other for other in conditions if other is not condition]
        part = part_at(condition.tokens, version)
        if part is not None and not have_common_value(condition, others, part):
            return True
    return False


def _is_hopeless(condition: CompiledCondition, version: str) -> bool:
    try:
        part = part_at(condition.tokens, version)
    except NoSuchPart:
        return True
    return part is not None and any(finding.never for finding in compare(condition.schema, part))
