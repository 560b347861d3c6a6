"""The command `new`, which creates a package with a handler.

The files in `template` are a whole package named shop-erp. A new package is a copy with its own name.
"""

import keyword
import re
import secrets
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path

import click

from adapter.cli.shared import FAILED, USAGE, end, printable
from adapter.routing.routes import installed

SUFFIX = ".template"  # so that no tool takes the files for modules of ours
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@click.command()
@click.argument("name")
def new(name: str) -> None:
    """Create a package with a handler, its settings, a stand-in, tests and a configuration.

    NAME is the name of the package, of its folder and of the handler, such as shop-erp. The package installs as it is,
    and its tests pass. A folder that exists is never overwritten.
    """
    module = name.replace("-", "_")
    if problem := _problem_of(name, module):
        end(USAGE, f"{printable(name)} cannot be the name of a package: {problem}")
    names = {"shop-erp": name, "shop_erp": module, "ShopErp": "".join(map(str.capitalize, name.split("-")))}
    folder = Path(name)
    try:
        folder.mkdir()
        _copy(files("adapter.cli") / "template", folder, names)
        secret = folder / "sandbox-secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32))
        order = files("adapter.sandbox.demo") / "orders" / "order-completed.json"
        (folder / "order.json").write_bytes(order.read_bytes())
    except FileExistsError:
        end(FAILED, f"{name} exists already; give another name, or move it away")
    except OSError as error:
        end(FAILED, f"{name} cannot be written: {error.strerror}")
    click.echo(f"{name} is written. Its README.md says more; first:\n  cd {name}\n  pip install --editable .\n  pytest")


def _problem_of(name: str, module: str) -> str | None:
    if not NAME.fullmatch(name):
        return "use small letters and digits, with a hyphen between words, such as shop-erp"
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        return "Python has a word or a module of this name"
    if name in installed():
        return "there is a handler of this name"
    return "a module of this name is installed" if find_spec(module) else None


def _copy(source: Traversable, target: Path, names: dict[str, str]) -> None:
    for each in source.iterdir():
        if each.is_dir():
            folder = target / (names["shop_erp"] if each.name == "package" else each.name)
            folder.mkdir()
            _copy(each, folder, names)
        elif each.name.endswith(SUFFIX):
            text = re.sub("|".join(names), lambda match: names[match[0]], each.read_text("utf-8"))
            (target / each.name.removesuffix(SUFFIX)).write_text(text, "utf-8")
