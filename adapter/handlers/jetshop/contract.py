"""The contract of the export in `contract.yaml`, loaded on first use.

It is this project's contract, not Jetshop's.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema_rs
from ruamel.yaml import YAML


@cache
def contract() -> dict[str, Any]:
    """Return the contract as an OpenAPI description. It is shared, so do not change it."""
    tree: dict[str, Any] = YAML(typ="safe", pure=True).load(files(__package__).joinpath("contract.yaml").read_bytes())
    return tree


@cache
def schema(name: str) -> jsonschema_rs.Draft202012Validator:
    """Return a schema of the contract, compiled."""
    return jsonschema_rs.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": contract()["components"]}, validate_formats=True
    )


def violations(name: str, document: Any) -> list[str]:
    """Return the violations of a schema of the contract: place and keyword, never a value."""
    return [
        f"{_pointer(e.instance_path)} breaks `{_keyword(e.schema_path)}`" for e in schema(name).iter_errors(document)
    ]


def _pointer(path: Sequence[str | int]) -> str:
    return "/" + "/".join(str(step) for step in path)


def _keyword(path: Sequence[str | int]) -> str:
    return next((step for step in reversed(path) if isinstance(step, str)), "schema")
