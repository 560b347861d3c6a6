"""
`config.yaml` and the environment, read once into one frozen `Config`, or every problem with its line.

This room alone reads files and environment. `shape` says what may stand in the file, `document` reads it as a tree with
lines, `reader` makes types of the tree, `together` checks what needs several places.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from adapter.config.checks import check_together
from adapter.config.convert import Converter
from adapter.config.model import (
    CallbackConfig,
    Config,
    ConfigFile,
    HeaderSecretConfig,
    HookCallbackConfig,
    NotificationCallbackConfig,
    RouteConfig,
    SendersConfig,
    SignedUrlsConfig,
    UrlSecretConfig,
    ValidationCallbackConfig,
    WhenConfig,
    merged,
)
from adapter.config.problems import ConfigurationInvalid, Problem, around, joined
from adapter.config.yaml_source import Document
from adapter.plugin import Settings

__all__ = [
    "CallbackConfig",
    "Config",
    "ConfigurationInvalid",
    "HeaderSecretConfig",
    "HookCallbackConfig",
    "NotificationCallbackConfig",
    "Problem",
    "RouteConfig",
    "SendersConfig",
    "SignedUrlsConfig",
    "UrlSecretConfig",
    "ValidationCallbackConfig",
    "WhenConfig",
    "load",
    "merged",
    "read_settings",
]


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """
    The configuration in the file at `path`, with references resolved from `environ` and from files beside it.

    Raises `ConfigurationInvalid` with every problem there is. Conditions, handlers and settings are checked by
    `adapter.routing.routes`, which reports through `Config.problem` and `read_settings`.
    """
    document = Document(path, environ)
    problems, source = document.problems, document.source
    tree = document.read()
    if not isinstance(tree, dict):
        raise ConfigurationInvalid(problems)
    converter = Converter(lambda at, message: problems.append(source.problem(at, message)), source.masked)
    read = converter.convert(ConfigFile, tree, "")
    check_together(tree, converter)
    if problems:
        raise ConfigurationInvalid(problems)
    merchants = {
        name: merchant if merchant.slug else msgspec.structs.replace(merchant, slug=name)
        for name, merchant in read.merchants.items()
    }
    return Config(**(msgspec.structs.asdict(read) | {"merchants": merchants}), source=source)


S = TypeVar("S", bound=Settings)


def read_settings(
    config: Config, type_: type[S], tree: Mapping[str, Any], paths: Sequence[str]
) -> S | tuple[Problem, ...]:
    """
    Merged settings as the type that a handler declares, or every problem in them.

    `paths` are the places that `tree` was merged from, weakest first; a problem is shown at the strongest of them
    that has the offending value. What no place has is missing from the weakest, the route itself.
    """
    problems: list[Problem] = []
    lines = config.source.lines

    def report(at: str, message: str) -> None:
        nearest, holders = at, [path for path in paths if joined(path, at) in lines]
        while nearest and not holders:
            nearest = around(nearest)
            holders = [path for path in paths if nearest and joined(path, nearest) in lines]
        strongest = (holders or paths[:1])[-1]
        problems.append(config.source.problem(joined(strongest, at), message))

    settings = Converter(report, config.source.masked).convert(type_, tree, "")
    return tuple(problems) if problems else cast("S", settings)
