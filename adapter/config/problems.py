"""Problems in the configuration, and the paths and lines where they are.

A problem never holds a value, because any value may be a secret in the wrong place. Text that came by reference is a
`Reference`: its `repr` shows the reference, not the text.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

HOW_TO_REFER = "${env:NAME} or ${file:PATH}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigProblem:
    """A mistake at one place of the configuration, with what is allowed there."""

    file: str
    line: int | None  # from 1; None without a line, such as for a missing file
    path: str  # such as "routes.export-payment.settings.base_url"; empty for the whole file
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigurationInvalid(Exception):
    """The configuration has problems: all of them, in the order of the file."""

    def __init__(self, problems: Iterable[ConfigProblem]) -> None:
        self.problems = tuple(sorted(dict.fromkeys(problems), key=lambda problem: problem.line or 0))
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
    """The file of a `Config`: with the line of each value."""

    file: str
    lines: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.file}>"

    def problem(self, path: str, message: str) -> ConfigProblem:
        """Return a problem at the line of `path`, or of the nearest parent that has a line."""
        nearest = path
        while nearest and nearest not in self.lines:
            nearest = parent(nearest)
        return ConfigProblem(file=self.file, line=self.lines.get(nearest), path=path, message=message)


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
