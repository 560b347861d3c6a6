"""The settings that are in force, each with its place."""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import msgspec

from adapter.config import Config, read_settings
from adapter.config.json_schema import spelled
from adapter.config.model import ONLY_FOR_ANSWERS, ONLY_FOR_NOTIFICATIONS, ConfigFile, merged
from adapter.config.problems import Reference, joined, under
from adapter.identifiers import Channel
from adapter.plugin import Secret
from adapter.routing.routes import Route

ABSENT: Any = object()
LAYERS = ("route", "merchant", "channel")  # weakest first, as `Config.settings` has their paths
BINDINGS = ("merchants", "channels", "settings")  # members of a route that are shown in another way


class SettingInForce(NamedTuple):
    """A setting, without secrets."""

    setting: str  # its path, in the route if it is a route's
    value: Any
    origin: str  # route, merchant, channel, norce or default; file for a setting of no route
    place: str | None  # the file and line


def settings_in_force(
    config: Config, route: Route, channel: Channel, document: Mapping[str, Any] | None
) -> list[SettingInForce]:
    """Return the members and settings of a route for a channel.

    Args:
        config: The configuration.
        route: The route, which serves the channel.
        channel: The channel.
        document: Norce's document for the channel, if there is one.

    Raises:
        ValueError: The document does not fit the settings of the handler, so the service does not use it.
    """
    given = config.routes[route.name]
    hidden = ONLY_FOR_ANSWERS if route.callback.kind == "notification" else ONLY_FOR_NOTIFICATIONS
    shown = [name for name in given.__struct_fields__ if name not in (*BINDINGS, *hidden) or name == "mode"]
    path = under("routes", route.name)
    found: list[SettingInForce] = []
    for name in shown:
        for at, value, _ in _leaves(getattr(given, name), ABSENT, name):
            is_given = f"{path}.{at}" in config.source.lines
            place = _place(config, f"{path}.{at}") if is_given else None
            found.append(SettingInForce(at, without_secrets(value), "route" if is_given else "default", place))
    theirs = (document or {}).get("routes", {}).get(route.name, {}).get("settings", {})
    tree, paths = config.settings(route.name, channel)
    tree = merged(tree, theirs)
    read = read_settings(config, type(route.settings[channel]), tree, paths)
    if isinstance(read, tuple):
        raise ValueError(f"the document at Norce does not fit route {route.name}")
    for at, value, is_given in _leaves(read, tree, ""):
        origin, place = "default", None
        if is_given and _has(theirs, at):
            origin = "norce"
        elif is_given:
            layers = [
                (layer, joined(path_of_layer, at))
                for layer, path_of_layer in zip(LAYERS, paths, strict=True)
                if joined(path_of_layer, at) in config.source.lines
            ]
            origin, strongest = layers[-1]
            place = _place(config, strongest)
        found.append(SettingInForce(f"settings.{at}", without_secrets(value), origin, place))
    return found


def other_settings(config: Config) -> Iterator[SettingInForce]:
    """Yield the settings that belong to no route, section by section."""
    for section in ConfigFile.__struct_fields__:
        if section != "routes":
            for path, value in _settings_below(getattr(config, section), section):
                is_given = path in config.source.lines
                place = _place(config, path) if is_given else None
                yield SettingInForce(path, without_secrets(value), "file" if is_given else "default", place)


def without_secrets(value: Any) -> Any:
    """Return a value as JSON takes it. Text that came by reference is shown as its reference."""
    if isinstance(value, Reference):
        return value.source
    if isinstance(value, Secret):
        return str(value)
    if isinstance(value, timedelta):
        return spelled(value)
    if isinstance(value, Mapping):
        return {str(name): without_secrets(member) for name, member in value.items()}
    if isinstance(value, msgspec.Struct):
        return {name: without_secrets(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple | set | frozenset):
        return [without_secrets(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _leaves(value: Any, tree: Any, path: str) -> Iterator[tuple[str, Any, bool]]:
    """Yield the path and value of each leaf, and True if the tree gives it.

    Given values are as written.
    """
    given = tree if isinstance(tree, Mapping) else {}
    if isinstance(value, msgspec.Struct):
        fields = {each.encode_name: each.name for each in msgspec.structs.fields(value)}
        for name in dict.fromkeys((*given, *fields)):
            member = getattr(value, fields[name]) if name in fields else given[name]  # the tag of a union is no field
            yield from _leaves(member, given.get(name, ABSENT), under(path, name))
    elif given:
        for name, member in given.items():
            inner = value.get(name, member) if isinstance(value, Mapping) else member
            yield from _leaves(inner, member, under(path, name))
    else:
        yield path, value if tree is ABSENT else tree, tree is not ABSENT


def _settings_below(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each setting in a section, without the settings of routes."""
    if isinstance(value, msgspec.Struct):
        of_class = value.__struct_config__
        if of_class.tag is not None:
            yield under(path, str(of_class.tag_field)), of_class.tag
        for each in msgspec.structs.fields(value):
            if each.encode_name != "routes":
                yield from _settings_below(getattr(value, each.name), under(path, each.encode_name))
    elif isinstance(value, Mapping) and value and all(isinstance(each, msgspec.Struct) for each in value.values()):
        for name, member in value.items():
            yield from _settings_below(member, under(path, name))
    else:
        yield path, value


def _has(tree: Any, path: str) -> bool:
    return any(at == path for at, _, _ in _leaves(tree, tree, "")) if tree else False


def _place(config: Config, path: str) -> str:
    file, line = config.source.place(path)
    return file if line is None else f"{file}:{line}"
