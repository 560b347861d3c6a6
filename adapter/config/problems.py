"""Problems in the configuration, and the paths and lines where they are.

A problem never holds a value, because any value may be a secret in the wrong place. Text that came by reference is a
`Reference`: its `repr` shows the reference, not the text.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

HOW_TO_REFER = "${env:NAME} or ${file:PATH}"


class Place(NamedTuple):
    """A line of a file."""

    file: str
    line: int | None  # from 1; None without a line, such as for a missing file

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigProblem:
    """A mistake at one place of the configuration, with what is allowed there."""

    file: str
    line: int | None  # from 1; None without a line, such as for a missing file
    path: str  # such as "routes.export-payment.settings.base_url"; empty for the whole file
    message: str

    def __str__(self) -> str:
        place = Place(self.file, self.line)
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigurationInvalid(Exception):
    """The configuration has problems: all of them, file by file and in the order of each."""

    def __init__(self, problems: Iterable[ConfigProblem]) -> None:
        found = dict.fromkeys(problems)
        self.problems = tuple(sorted(found, key=lambda problem: (problem.file, problem.line or 0)))
        super().__init__("\n".join(map(str, self.problems)))


class Reference(str):
    """Text that came from `${env:NAME}` or `${file:PATH}`; its `repr` is the reference."""

    __slots__ = ("source",)
    source: str

    def __new__(cls, text: str, source: str) -> "Reference":
        reference = super().__new__(cls, text)
        reference.source = source
        return reference

    def __repr__(self) -> str:
        return repr(self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The file of a `Config`, with the line of each value.

    A merchant may be in an included file.
    """

    file: str
    lines: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # by the path of a merchant: the included file

    def __repr__(self) -> str:
        return f"<{self.file}>"

    def add(self, included: "Source", path: str) -> None:
        """Add the lines of the value at `path` in an included file."""
        self.files[path] = included.file
        below = (f"{path}.", f"{path}[")
        self.lines.update({at: line for at, line in included.lines.items() if at == path or at.startswith(below)})

    def place(self, path: str) -> Place:
        """Return the place of the value at `path`, or of the nearest parent that has a line."""
        nearest = path
        while nearest and nearest not in self.lines:
            nearest = parent(nearest)
        merchant = nearest
        while merchant and merchant not in self.files:
            merchant = parent(merchant)
        return Place(self.files.get(merchant, self.file), self.lines.get(nearest))

    def problem(self, path: str, message: str) -> ConfigProblem:
        """Return a problem at the place of `path`."""
        file, line = self.place(path)
        return ConfigProblem(file=file, line=line, path=path, message=message)


def under(path: str, step: str | int) -> str:
    """Return the path of a member or an item, such as `a.b`, `a[0]` or `a["b c"]`."""
    if isinstance(step, int):
        return f"{path}[{step}]"
    if not _PLAIN.fullmatch(step):
        return f"{path}[{json.dumps(step, ensure_ascii=False)}]"
    return f"{path}.{step}" if path else step


_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_LAST_STEP = re.compile(r'(?:\.?[A-Za-z0-9_-]+|\[\d+\]|\["(?:[^"\\]|\\.)*"\])\Z')


def parent(path: str) -> str:
    """Return the path without its last step."""
    return _LAST_STEP.sub("", path)


def joined(path: str, rest: str) -> str:
    """Return the path `rest` below `path`."""
    return path + rest if not rest or rest.startswith("[") else f"{path}.{rest}"
