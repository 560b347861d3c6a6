"""
The pinned contract in `contract.yaml`, read once, when first asked for.

It is this project's contract and not Jetshop's: who keeps to it agrees with us, and nothing follows about Jetshop.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema_rs
from ruamel.yaml import YAML


@cache
def contract() -> dict[str, Any]:
    """The whole document. Shared by all who ask: to be read, not changed."""
    tree: dict[str, Any] = YAML(typ="safe", pure=True).load(files(__package__).joinpath("contract.yaml").read_bytes())
    return tree


@cache
def schema(name: str) -> jsonschema_rs.Draft202012Validator:
    """One of the contract's schemas, compiled."""
    return jsonschema_rs.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": contract()["components"]}, validate_formats=True
    )


def misses(name: str, document: Any) -> list[str]:
    """Where a document breaks a schema of the contract, and the keyword that it breaks there; never a value."""
    return [
        f"{_pointer(e.instance_path)} breaks `{_keyword(e.schema_path)}`" for e in schema(name).iter_errors(document)
    ]


def _pointer(path: Sequence[str | int]) -> str:
    return "/" + "/".join(str(step) for step in path)


def _keyword(path: Sequence[str | int]) -> str:
    return next((step for step in reversed(path) if isinstance(step, str)), "schema")
