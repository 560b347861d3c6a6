"""The configuration file as a plain tree with the line of every value.

References are resolved, the YAML is version 1.2, and bounds protect against bombs.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from adapter.config.problems import HOW_TO_REFER, ConfigProblem, Reference, Source, under

LARGEST_FILE_BYTES = 1024 * 1024
LARGEST_SECRET_BYTES = 64 * 1024
MAX_VALUES = 100_000  # with aliases expanded: a few lines of aliases can stand for billions of values
MAX_DEPTH = 64

NOTHING: Any = object()  # in place of a value whose problem was reported
_REFERENCE = re.compile(r"\$\{(env|file):([^{}]+)\}")


class _Unreadable(Exception):
    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


class Document:
    """A YAML file; `source` has the lines, `problems` the mistakes so far.

    Args:
        path: The file.
        environ: The variables for `${env:NAME}`.
        folder: The folder at which `${file:PATH}` begins; without it, that of the file.
    """

    def __init__(self, path: Path, environ: Mapping[str, str], folder: Path | None = None) -> None:
        self.source = Source(file=str(path))
        self.problems: list[ConfigProblem] = []
        self.path = path
        self._environ = environ
        self._folder = folder or path.parent
        self._values = 0

    def included(self, path: Path) -> "Document":
        """Return another file whose references mean the same as here."""
        return Document(path, self._environ, self._folder)

    def report(self, path: str, message: str, line: int | None = None) -> None:
        """Add a problem, at `line` or else at the line of `path`."""
        problem = self.source.problem(path, message)
        self.problems.append(problem if line is None else dataclasses.replace(problem, line=line))

    def read(self) -> Any:
        """Return the tree of the file, or `NOTHING` if it has none."""
        try:
            root = _composed(_read_text(self.path, LARGEST_FILE_BYTES))
            if not isinstance(root, MappingNode):
                raise _Unreadable("must be a mapping: adapter, merchants, senders, callbacks, routes and so on")
            self.source.lines[""] = _line(root)
            return self._value(root, "", 0)
        except _Unreadable as unreadable:
            self.report("", unreadable.message, unreadable.line)
            return NOTHING

    def _value(self, node: Node, path: str, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES or depth > MAX_DEPTH:
            limits = f"at most {MAX_VALUES} values in {MAX_DEPTH} levels are allowed, with aliases expanded"
            raise _Unreadable(f"is too large: {limits}", _line(node))
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                at = under(path, index)
                self.source.lines[at] = _line(item)
                items.append(self._value(item, at, depth + 1))
            return items
        return self._scalar(cast("ScalarNode", node), path)

    def _mapping(self, node: MappingNode, path: str, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for key, member in node.value:
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                self.report(path, "has a key that is not plain text; merge keys (<<) are not YAML 1.2", _line(key))
                continue
            # The name is the text of the file: a channel may be called 1, a country NO, without quotes.
            name = key.value
            at = under(path, name)
            if name in members:
                first = self.source.lines[at]
                self.report(at, f"is given twice, first in line {first}", _line(key))
                continue
            self.source.lines[at] = _line(key)
            members[name] = self._value(member, at, depth + 1)
        return members

    def _scalar(self, node: ScalarNode, path: str) -> Any:
        text: str = node.value
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in ("int", "float"):
            digits = text.replace("_", "")
            radix = 0 if digits.lstrip("+-").startswith(("0o", "0x", "0b")) else 10
            try:
                number = int(digits, radix) if kind == "int" else float(digits)
                if math.isfinite(number):
                    return number
            except (ValueError, OverflowError):
                pass
            self.report(path, "must be a finite number; put it in quotes if it is meant as text")
            return NOTHING
        if kind not in ("str", "bool", "timestamp"):
            self.report(path, "has a tag; tags (!name) are not allowed, plain YAML values are")
            return NOTHING
        return self._text(text, path)

    def _text(self, text: str, path: str) -> Any:
        if "${env:" not in text and "${file:" not in text:
            return text
        match = _REFERENCE.fullmatch(text)
        if match is None:
            self.report(path, f"has a reference that is not the whole value; write {HOW_TO_REFER} alone")
            return NOTHING
        try:
            return Reference(self._resolved(match[1], match[2]), text)
        except _Unreadable as unreadable:
            self.report(path, f"{text} {unreadable.message}")
            return NOTHING

    def _resolved(self, kind: str, name: str) -> str:
        if kind == "file":
            text = _read_text(self._folder / name, LARGEST_SECRET_BYTES).removesuffix("\n").removesuffix("\r")
        elif name in self._environ:
            text = self._environ[name]
        else:
            raise _Unreadable("is an environment variable that is not set; set it before the start")
        if not text.strip():
            raise _Unreadable("is empty; a reference must have a value")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _Unreadable("is not UTF-8; a reference must be text")
        return text


def _read_text(path: Path, largest: int) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(largest + 1)
    except OSError as error:
        raise _Unreadable(f"cannot be read: {(error.strerror or type(error).__name__).lower()}") from None
    except ValueError:
        raise _Unreadable("cannot be read: not the name of a file") from None
    if len(raw) > largest:
        raise _Unreadable(f"is larger than {largest} bytes, the limit")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _Unreadable("is not UTF-8; save it as UTF-8", line) from None


def _composed(text: str) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False
    try:
        return cast("Node | None", yaml.compose(text))
    except MarkedYAMLError as error:
        # str(error) would quote the line, which may hold a secret.
        mark = error.problem_mark or error.context_mark
        what = re.sub(r"'[^'<]{2,}'", "'…'", str(error.problem or error.context))
        raise _Unreadable(f"is not YAML: {what}", mark.line + 1 if mark else None) from None
    except ReaderError as error:
        raise _Unreadable(
            "is not YAML: control characters are not allowed", text.count("\n", 0, error.position) + 1
        ) from None
    except YAMLError:
        raise _Unreadable("is not YAML") from None
    except RecursionError:
        raise _Unreadable(f"is nested too deeply; at most {MAX_DEPTH} levels are allowed") from None


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1
