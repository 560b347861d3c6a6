"""The tables of `docs/simulator.md`, which `make docs` generates from the code."""

import re
from collections.abc import Iterable
from typing import get_args, get_type_hints

from adapter.norce.api import OPERATIONS, Operation
from adapter.sandbox.norce import Switches
from adapter.sandbox.norce.switches import questions
from adapter.sandbox.scenarios import SCENARIOS, description
from tests import ROOT

PAGE = ROOT / "docs" / "simulator.md"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def operations() -> str:
    return table(
        ("name", "operation", "body", "answers"),
        ((f"`{each.name}`", address(each), each.body or "", answers(each)) for each in OPERATIONS),
    )


def address(operation: Operation) -> str:
    names = dict.fromkeys(f"`{name}`" for names in operation.query.values() for name in names)
    query = f" ({', '.join(names)})" if names else ""
    return f"`{operation.method} /{operation.service}{operation.path}`{query}"


def answers(operation: Operation) -> str:
    return ", ".join(f"{status} {body or ''}".strip() for status, body in operation.answers.items())


def switches() -> str:
    hints = get_type_hints(Switches)
    return table(
        ("switch", "question", "default", "values"),
        (
            (f"`{name}`", question, f"`{written(default)}`", ", ".join(f"`{each}`" for each in values(hints[name])))
            for name, (question, default) in questions().items()
        ),
    )


def written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or " "


def values(hint: type) -> tuple[str, ...]:
    return get_args(hint) or (("true", "false") if hint is bool else ())


def scenarios() -> str:
    return table(("scenario", "what happens"), ((f"`{name}`", description(name)) for name in SCENARIOS))


def page(text: str) -> str:
    for name, made in (("scenarios", scenarios()), ("switches", switches()), ("operations", operations())):
        text = re.sub(f"<!-- {name} -->.*?<!-- end -->", lambda _, name=name, made=made: (
            f"<!-- {name} -->\n{made}\n<!-- end -->"), text, flags=re.S)  # fmt: skip
    return text


def test_the_page_has_the_tables_of_the_code() -> None:
    text = PAGE.read_text("utf-8")

    assert all(f"`{each.name}`" in operations() for each in OPERATIONS)
    assert page(text) == text, "run make docs"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
