"""Names and docstrings of adapter/: one noun for one class, and first lines that read like plain English."""

import ast
import re
from collections import defaultdict
from functools import cache
from typing import NamedTuple

from tests import ROOT

LONGEST_SUMMARY = 88
MOST_FILES_OF_A_HELPER = 3
# A first line that opens with one of these words has to be solved before it can be understood.
RIDDLE = re.compile(r"(What|Who|Whoever|Whom|Whose|Where|Wherever|Whether|Which|When|How|Nobody|No one|The same|As )\b")
# The definition, as path and name, and the reason. At most one in a hundred.
EXCEPTIONS: dict[tuple[str, str], str] = {}


class Definition(NamedTuple):
    path: str
    name: str  # `module` for the module itself
    node: ast.AST

    @property
    def summary(self) -> str | None:
        """The first line of the docstring, if there is one."""
        text = ast.get_docstring(self.node)  # type: ignore[arg-type]
        return None if text is None else text.partition("\n")[0]

    @property
    def is_excepted(self) -> bool:
        return (self.path, self.name) in EXCEPTIONS


@cache
def definitions() -> list[Definition]:
    """Return every module, class and function of adapter/."""
    return [
        Definition(str(path.relative_to(ROOT)), getattr(node, "name", "module"), node)
        for path in sorted((ROOT / "adapter").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def files_by_name(*kinds: type[ast.AST]) -> dict[str, set[str]]:
    files: dict[str, set[str]] = defaultdict(set)
    for each in definitions():
        if isinstance(each.node, kinds):
            files[each.name].add(each.path)
    return files


def is_riddle(summary: str) -> bool:
    return RIDDLE.match(summary) is not None or len(summary) > LONGEST_SUMMARY


def test_a_class_name_occurs_in_one_file() -> None:
    twice = {name: files for name, files in files_by_name(ast.ClassDef).items() if len(files) > 1}

    assert twice == {}


def test_the_name_of_a_private_helper_occurs_in_few_files() -> None:
    helpers = files_by_name(ast.FunctionDef, ast.AsyncFunctionDef).items()

    often = {name: files for name, files in helpers if re.match("_[a-z]", name) and len(files) > MOST_FILES_OF_A_HELPER}

    assert often == {}


def test_docstrings_begin_with_a_plain_sentence() -> None:
    riddles = [
        f"{each.path}:{getattr(each.node, 'lineno', 1)} {each.name}: {each.summary}"
        for each in definitions()
        if each.summary is not None and is_riddle(each.summary) and not each.is_excepted
    ]

    assert riddles == []


def test_exceptions_are_few_and_needed() -> None:
    with_docstring = [each for each in definitions() if each.summary is not None]
    needed = {(each.path, each.name) for each in with_docstring if is_riddle(each.summary or "")}

    assert EXCEPTIONS.keys() <= needed
    assert len(EXCEPTIONS) <= len(with_docstring) / 100
    assert all(EXCEPTIONS.values())
