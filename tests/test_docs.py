"""The documents say what is true: their code runs, their commands exist, their links lead somewhere."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from ruamel.yaml import YAML

from adapter import orders
from adapter.cli import main
from tests import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[pytest.param]:  # type: ignore[valid-type]
    found = []
    for path in DOCUMENTS:
        for match in re.finditer(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.M | re.S):
            line = path.read_text("utf-8")[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{path.name}:{line}"))
    assert found, f"no {language} blocks found"
    return found


def test_the_tests_that_reliability_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text("utf-8")))
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text("utf-8"), re.M)
    }

    assert len(named) > 20
    assert named - defined == set()


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str) -> None:
    exec(compile(code, "a document", "exec"), {"__name__": "a_document"})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_yaml(text: str) -> None:
    assert isinstance(YAML(typ="safe").load(text), dict)


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml_blocks_are_toml(text: str) -> None:
    assert tomllib.loads(text)


@pytest.mark.parametrize("text", blocks("console"))
def test_commands_exist_with_these_options(text: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets
        elif words[:1] == ["norce-adapter"]:
            parse(main, words[1:])
        else:
            known = ("export", "cd", "pip", "pytest", "uvicorn")
            assert words == [] or words[0] in known, f"nothing here knows {words[0]}"


def parse(command: click.Command, words: list[str]) -> None:
    """Has click parse the words as it would, and run nothing."""
    context = command.make_context(command.name or "", list(words), **main.context_settings)
    if isinstance(command, click.Group):
        name, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert sub is not None, name
        parse(sub, rest)


def test_the_reference_of_the_order_names_every_member() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text("utf-8")
    table = text.partition("\n## The order\n")[2].partition("\n## ")[0]
    named = {
        part: re.findall(r"`(\w+)`", members) for part, members in re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M)
    }
    parts = [
        each for each in vars(orders).values() if isinstance(each, type) and issubclass(each, orders.Price.__base__)
    ]
    members = {each.__name__: list(each.__annotations__) for each in parts if not each.__name__.startswith("_")}

    assert {part: set(each) for part, each in named.items()} == {
        **{part: set(each) for part, each in members.items()},
        "Order": set(orders.Order.__annotations__),
        "Item": {*members["Item"], "data"},
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", path.read_text("utf-8")):
        found = path.parent / target if target else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_names_every_word_of_the_ledger() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")

    for word in (
        "rejected",
        "exhausted",
        "unknown",
        "condition",
        "lane",
        "queue",
        "in doubt",
        "dead letter",
        "verdict",
    ):
        assert word in readme
