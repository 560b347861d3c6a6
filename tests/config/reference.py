"""The generator of `config.yaml` and `config.schema.json`: `make docs` writes them from `adapter/config/model.py`.

Each key gets its description and its default from its declaration. Only the example values stand here.
"""

import json
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from importlib.metadata import EntryPoint
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Meta, Struct
from msgspec.structs import FieldInfo

from adapter.config.convert import class_of, is_struct, list_of, unwrap
from adapter.config.json_schema import file_schema, spelled
from adapter.config.model import ONLY_FOR_ANSWERS, ConfigFile, RouteConfig
from adapter.routing.routes import GROUP, settings_types
from tests import ROOT

# From the source: the metadata of an installed package may be older.
BUNDLED = [
    EntryPoint(name, value, GROUP)
    for name, value in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"][
        GROUP
    ].items()
]
BUNDLED_TYPES = settings_types(BUNDLED)[0]
WIDTH = 120
HEADER = """\
# yaml-language-server: $schema=./config.schema.json
#
# The reference: every key, what it means, its default. A key with its default may be left out; a key that is commented
# out has none. `norce-adapter check` prints every problem of a changed file with its line. `make docs` generates this
# file from the declarations in adapter/config/model.py.
#
# Durations are written with their unit: 500ms, 2s, 5m, 2h, 1d. YAML is 1.2: NO is a country.
# Secrets are given by reference, as ${env:NAME} (an environment variable) or ${file:PATH} (a file; relative paths begin
# at the folder of this one). Any other text may be given like that too. A reference is always the whole value.
"""


class Off(NamedTuple):
    """An example that is commented out."""

    value: Any


EXAMPLE = {
    "adapter": {"id": "jetshop_adapter", "public_url": "https://adapter.example"},
    "operations": {"token": Off("${env:NORCE_ADAPTER_OPERATIONS_TOKEN}")},
    "norce": {"base_url": Off("http://localhost:8090/checkout")},
    "include": Off("merchants/*.yaml"),
    "merchants": {
        "norce": {
            "slug": "customer-slug",
            "tokens": ["${env:NORCE_TOKEN}"],
            "routes": {"export-payment": {"settings": {}}},
            "channels": {"1": {"routes": {"export-payment": {"settings": {}}}}},
        }
    },
    "senders": {
        "signed_urls": {"keys": {"k1": "${env:NORCE_ADAPTER_URL_KEY}"}},
        "header_secrets": Off(
            [{"header": "authorization", "values": ["${env:NORCE_ADAPTER_SECRET}"], "merchants": ["norce"]}]
        ),
        "url_secrets": Off(
            [{"parameter": "secret", "values": ["${env:NORCE_ADAPTER_STATIC}"], "merchants": ["norce"]}]
        ),
    },
    "callbacks": {
        "order-status": {
            "kind": "notification",
            "scope": "/state/currentStatus",
            "schema": {"enum": ["accepted", "completed"]},
        },
        "order-rules": {"kind": "validation", "soft_limit": Off(timedelta(seconds=1))},
        "cart-changed": {"kind": "hook", "watch": "/cart", "target": "/cart"},
    },
    "routes": {
        "export-payment": {
            "callback": "order-status",
            "merchants": Off(["norce"]),
            "channels": Off(["1"]),
            "when": {"scope": "/state/currentStatus", "schema": {"const": "completed"}},
            "handler": "jetshop",
            "settings": {
                "base_url": "https://shop.example",
                "shop_id": "1",
                "auth": {"type": "basic", "username": "norce", "password": "${env:JETSHOP_PASSWORD}"},
                "method_map": {
                    "klarna_checkout_adapter": {"code": "klarna", "name": "Klarna"},
                    "awardit_adapter": {"code": "gift-card", "name": "Gift card"},
                },
            },
        },
        "swedish-orders-have-an-id": {
            "callback": "order-rules",
            "when": {"scope": "/country", "schema": {"const": "SE"}},
            "handler": "rules",
            "no_answer": "approve",
            "settings": {
                "rules": [
                    {
                        "scope": "/customer/billing/nationalIdentificationNumber",
                        "schema": {"type": "string"},
                        "code": "national-id-missing",
                        "message": "A purchase in Sweden needs a national identification number.",
                    }
                ]
            },
        },
        "many-pay-less": {
            "callback": "cart-changed",
            "handler": "patch",
            "no_answer": "approve",
            "settings": {
                "changes": [
                    {
                        "scope": "/cart/items",
                        "schema": {"contains": {"properties": {"quantity": {"minimum": 5}}}},
                        "path": "/cart/attributes/priceList",
                        "value": "volume",
                    }
                ]
            },
        },
    },
}


def generated() -> dict[str, str]:
    """Return the generated files, by name."""
    schema = file_schema(BUNDLED_TYPES)
    return {
        "config.yaml": HEADER + "".join(f"{each}\n" for line in _sections() for each in _wrapped(line)),
        "config.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
    }


def _sections() -> Iterator[str]:
    for line in _members(ConfigFile, EXAMPLE, set()):
        yield from ("", line) if line.startswith("# ") else (line,)


def _members(type_: Any, example: Mapping[str, Any], described: set[str]) -> Iterator[str]:
    """Yield the lines of a section. A key with a known description is repeated only if the example has it."""
    tag = class_of(type_).__struct_config__.tag_field
    if tag:
        yield from _described("Required: notification, validation or hook.", described)
        yield f"{tag}: {example[tag]}"
    fields = {field.encode_name: field for field in msgspec.structs.fields(type_)}
    for name in example if fields.keys() == example.keys() else fields:
        field = fields[name]
        left_out = type_ is RouteConfig and name in ONLY_FOR_ANSWERS and "no_answer" not in example
        if name not in example and (left_out or _about(field) in described):
            continue
        yield from _described(_about(field), described)
        value = example[name] if name in example else _default(field)
        if isinstance(value, Off):
            lines = _entry(field.type, name, value.value, described)
            yield from (line if "# " in line else re.sub(r"^( *)", r"\1#", line) for line in lines)
        else:
            yield from _entry(field.type, name, value, described)


def _described(about: str, described: set[str]) -> Iterator[str]:
    if about not in described:
        described.add(about)
        yield f"# {about}"


def _entry(type_: Any, name: str, value: Any, described: set[str]) -> Iterator[str]:
    """Yield a key and its value: a section with descriptions, any other value as plain YAML."""
    of_value = _struct(type_, value)
    of_members = [_struct(part, each) for part in get_args(_plain(type_)) for each in _inside(value)]
    if of_value:
        yield f"{name}:"
        yield from _indented(_members(of_value, value if isinstance(value, Mapping) else {}, described))
    elif not any(of_members):
        yield from _as_yaml(name, value)
    elif isinstance(value, Mapping):
        yield f"{name}:"
        for key, each in value.items():
            struct = next(found for part in get_args(_plain(type_)) if (found := _struct(part, each)))
            if class_of(struct).__struct_config__.tag_field:
                yield from _indented([f"# {struct.__doc__}"])
            yield f"  {key if re.match('[a-z]', key) else json.dumps(key)}:"
            yield from _indented(_indented(_members(struct, each, described)))
    else:
        yield f"{name}:"
        for each in value:
            lines = list(_members(_struct(get_args(_plain(type_))[0], each), each, described))
            first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
            yield from _indented([*lines[:first], f"- {lines[first]}"])
            yield from _indented(_indented(lines[first + 1 :]))


def _plain(type_: Any) -> Any:
    base, _ = unwrap(type_)
    members = [member for member in get_args(base) if member is not NoneType]
    return _plain(members[0]) if class_of(base) in (Union, UnionType) and len(members) == 1 else base


def _struct(type_: Any, value: Any) -> Any:
    """Return the section class of a value, if it has one."""
    base = _plain(type_)
    if is_struct(base):
        return base
    tagged = get_args(base) if class_of(base) in (Union, UnionType) else ()
    structs = {class_of(each).__struct_config__.tag: each for each in tagged if is_struct(each)}
    return structs.get(value.get("kind")) if isinstance(value, Mapping) else None


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, list) else []


def _about(field: FieldInfo) -> str:
    """Return the comment of a key: its description, its allowed values and its default."""
    notes = [note.description for note in unwrap(field.type)[1] if isinstance(note, Meta) and note.description]
    said = [notes[-1] if notes else cleandoc(_plain(field.type).__doc__)]
    if get_origin(_plain(field.type)) is Literal:
        said.append(f"It is {list_of(get_args(_plain(field.type)))}.")
    default = _default(field)
    if field.required:
        said.append("Required.")
    elif not isinstance(default, Struct) and default != "":
        said.append(f"Default: {'none' if default is None else _flow(default)}.")
    return " ".join(said)


def _default(field: FieldInfo) -> Any:
    return field.default if field.default_factory is NODEFAULT else field.default_factory()


def _as_yaml(name: str, value: Any) -> Iterator[str]:
    if value is None or value is NODEFAULT:
        raise LookupError(f"{name} has neither an example nor a default")
    line = f"{name}: {_flow(value)}"
    if len(line) < 90 or not isinstance(value, Mapping | list):
        yield line
        return
    yield f"{name}:"
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _indented(_as_yaml(key, each))
    for each in value if isinstance(value, list) else ():
        first, *rest = [line for key, part in each.items() for line in _as_yaml(key, part)]
        yield f"  - {first}"
        yield from _indented(_indented(rest))


def _flow(value: Any) -> str:
    if isinstance(value, timedelta):
        return spelled(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./:+ -]*|\d+(\.\d+){3}", value)
    return value if plain and ": " not in value else json.dumps(value)


def _indented(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield f"  {line}"


def _wrapped(line: str) -> Iterator[str]:
    indent, hash_, text = line.partition("# ")
    if not hash_ or indent.strip():
        yield line
        return
    start = indent + hash_
    yield from textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


if __name__ == "__main__":
    for file_name, text in generated().items():
        (ROOT / file_name).write_text(text, "utf-8")
