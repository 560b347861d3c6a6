"""The configuration: one frozen `Config` made from `config.yaml` and the environment.

If the file has mistakes, all of them are reported, with their lines.

Only this package reads files and the environment. `yaml_source` reads a file as a tree with lines, `included` adds
the merchants of other files, `convert` converts the tree to the types in `model`, and `checks` compares keys with each
other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from adapter.config.checks import check_together
from adapter.config.convert import Converter
from adapter.config.included import include_merchants
from adapter.config.model import Config, ConfigFile
from adapter.config.problems import ConfigProblem, ConfigurationInvalid, joined, parent
from adapter.config.yaml_source import Document
from adapter.plugin import Settings

__all__ = ["Config", "ConfigProblem", "ConfigurationInvalid", "load", "place_of_setting", "read_settings"]


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """Load the configuration at `path`.

    References come from `environ` and from files, relative to the folder of `path`, and so do the files of `include`.

    `routing.routes` checks conditions, handlers and settings later, through `Config.problem` and `read_settings`.

    Raises:
        ConfigurationInvalid: With every problem of the file.
    """
    document = Document(path, environ)
    problems, source = document.problems, document.source
    tree = document.read()
    if not isinstance(tree, dict) or not include_merchants(document, tree):
        raise ConfigurationInvalid(problems)
    converter = Converter(lambda at, message: problems.append(source.problem(at, message)))
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
) -> S | tuple[ConfigProblem, ...]:
    """Convert merged settings to a handler's type, or return every problem in them.

    A problem is shown at the strongest place that has the value. A missing value is shown at the weakest, the route.

    Args:
        config: The configuration that the settings belong to.
        type_: The type of the settings.
        tree: The merged settings.
        paths: The paths that `tree` was merged from, weakest first.
    """
    problems: list[ConfigProblem] = []

    def report(at: str, message: str) -> None:
        problems.append(config.source.problem(place_of_setting(config, paths, at), message))

    settings = Converter(report).convert(type_, tree, "")
    return tuple(problems) if problems else cast("S", settings)


def place_of_setting(config: Config, paths: Sequence[str], at: str) -> str:
    """Return the whole path of a setting, at the strongest place that has it.

    If none has it, the place is the weakest.
    """
    lines = config.source.lines
    nearest, holders = at, [path for path in paths if joined(path, at) in lines]
    while nearest and not holders:
        nearest = parent(nearest)
        holders = [path for path in paths if nearest and joined(path, nearest) in lines]
    return joined((holders or paths[:1])[-1], at)
