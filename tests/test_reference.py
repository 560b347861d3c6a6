"""`docs/reference.md` lists every command and option: `python -m tests.test_reference` writes it from the code."""

from collections import Counter
from collections.abc import Iterator

import click

from adapter.cli import main
from tests import ROOT

PATH = ROOT / "docs" / "reference.md"
TABLE = ("| option | meaning |", "|---|---|")
HEAD = """\
# Reference

Configuration: [config.yaml](../config.yaml) shows every key with its default, its unit and one sentence;
[config.schema.json](../config.schema.json) is the same for editors.

Commands: `norce-adapter COMMAND --help` prints what follows. `make docs` writes this file from the code.

"""


def test_the_reference_lists_every_command_as_it_is() -> None:
    assert PATH.read_text("utf-8") == reference(), "run make docs"


def reference() -> str:
    commands = list(_commands(main, "norce-adapter"))
    counts = Counter(_row(option) for _, command in commands for option in _options(command))
    shared = sorted(row for row, count in counts.items() if count > 2)
    tables = ["## Options of several commands", "", *TABLE, *shared, ""]
    return HEAD + "\n".join(tables) + "".join(_section(name, command, shared) for name, command in commands)


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command, info_name=name)
    for each in command.list_commands(context):
        found = command.get_command(context, each)
        assert found is not None
        yield from _commands(found, f"{name} {each}")


def _section(name: str, command: click.Command, shared: list[str]) -> str:
    # With the settings of `main`, because click keeps the help option of the first context that asks for it.
    context = click.Context(command, info_name=name, **main.context_settings)
    usage = command.collect_usage_pieces(context)
    title = " ".join([name, *(piece for piece in usage if piece != "[OPTIONS]")])
    lines = [f"## {title}", "", " ".join((command.help or "").replace("\b", "").split()), ""]
    own = [_row(option) for option in _options(command) if _row(option) not in shared]
    if own:
        lines += [*TABLE, *own, ""]
    also = [f"`{option.opts[0]}`" for option in _options(command) if _row(option) in shared]
    if also:
        lines += [f"Also: {', '.join(also)}.", ""]
    return "\n" + "\n".join(lines)


def _options(command: click.Command) -> list[click.Option]:
    return [each for each in command.params if isinstance(each, click.Option) and not each.hidden]


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{each}`" for each in (*option.opts, *option.secondary_opts))
    meaning = " ".join((option.help or "").split()).replace("|", "\\|")
    return f"| {names} | {meaning} |"


if __name__ == "__main__":
    PATH.write_text(reference(), "utf-8")
