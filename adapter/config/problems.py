"""
Where things stand in the configuration: paths, lines, and the problems found there.

Values are never part of a problem: any of them may be a secret in the wrong place. A value that came by reference is
a `Reference` for as long as it is text, so that its `repr` shows where it came from and not what it is.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

HOW_TO_REFER = "${env:NAME} or ${file:PATH}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong at one place of the configuration, and what is allowed there."""

    file: str
    line: int | None  # counted from 1; None where there is no line to show, such as a file that is not there
    path: str  # "routes.export-payment.settings.base_url"; empty for the file as a whole
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigurationInvalid(Exception):
    """The configuration cannot be used. `problems` are all of them, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(dict.fromkeys(problems), key=lambda problem: problem.line or 0))
        super().__init__("\n".join(map(str, self.problems)))


class Reference(str):
    """Text that `${env:NAME}` or `${file:PATH}` stands for. It is the text; its `repr` is the reference."""

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
    """The file that a `Config` was read from: where each value stands, and which texts must not be shown."""

    file: str
    lines: dict[str, int] = field(default_factory=dict)
    resolved: set[str] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"<{self.file}>"

    def problem(self, path: str, message: str) -> Problem:
        """At the line of `path`, or of the nearest place around it that is in the file."""
        nearest = path
        while nearest and nearest not in self.lines:
            nearest = around(nearest)
        return Problem(file=self.file, line=self.lines.get(nearest), path=path, message=message)

    def masked(self, message: str) -> str:
        """A message that somebody else wrote, without the texts that came by reference."""
        for text in sorted(self.resolved, key=len, reverse=True):
            message = message.replace(text, "***")
        return message


def under(path: str, step: str | int) -> str:
    """The path of a member or an item: `a.b`, `a[0]`, and `a["b c"]` where the name is not a plain one."""
    if isinstance(step, int):
        return f"{path}[{step}]"
    if not _PLAIN.fullmatch(step):
        return f"{path}[{json.dumps(step, ensure_ascii=False)}]"
    return f"{path}.{step}" if path else step


_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_LAST_STEP = re.compile(r'(?:\.?[A-Za-z0-9_-]+|\[\d+\]|\["(?:[^"\\]|\\.)*"\])\Z')


def around(path: str) -> str:
    return _LAST_STEP.sub("", path)


def joined(path: str, rest: str) -> str:
    return path + rest if not rest or rest.startswith("[") else f"{path}.{rest}"
