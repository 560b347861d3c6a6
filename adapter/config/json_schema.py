"""JSON Schemas of `config.yaml` and of our document in Norce's configuration.

msgspec makes the schemas; this module rewrites them to our spelling of durations, references and secrets. `config.load`
is the check, so a schema never refuses what `load` accepts. In the file, any text may be a reference, and so may a
number or a secret. Norce's document has no references, no hosts and no credentials.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from inspect import cleandoc
from typing import Any

import msgspec
from msgspec import inspect
from msgspec.structs import FieldInfo

from adapter.config.model import ConfigFile
from adapter.plugin import PrivateCa, Secret, Settings, Url

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = {"type": "string", "pattern": r"^\$\{(env|file):[^{}]+\}$", "description": "By reference."}
DURATION = r"^[0-9]{1,9}(ms|s|m|h|d)$"
_ADDRESS = {"type": "string", "format": "uri"}


def file_schema(handlers: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """Return the schema of `config.yaml` and of the files that it includes.

    A route's settings are those of its handler.
    """
    _, parts = msgspec.json.schema_components([ConfigFile], schema_hook=_custom, ref_template="#/$defs/{name}")
    parts = {name: _rewrite(part, references=True) for name, part in parts.items()}
    file = parts.pop("ConfigFile")
    required = set(file.pop("required")) - {"merchants"}
    file["anyOf"] = [
        *({"required": sorted(required | {where})} for where in ("merchants", "include")),
        {"required": ["merchants"], "maxProperties": 1},  # an included file
    ]
    parts["RouteConfig"]["allOf"] = [
        {
            "if": {"properties": {"handler": {"const": name}}, "required": ["handler"]},
            "then": {"properties": {"settings": _handler_settings(name, type_, parts)}},
        }
        for name, type_ in sorted(handlers.items())
    ]
    return {"$schema": DIALECT, **file, "title": "norce-adapter: config.yaml", "$defs": dict(sorted(parts.items()))}


def document_schema(adapter_id: str, public_url: str, routes: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """Return the schema of this adapter's document in Norce's configuration.

    It extends Norce's basic schema by the settings that may be changed there. `/openapi/v1/schemas/{adapter_id}.json`
    serves it, and Norce's admin UI makes a form from it.
    """
    addresses = {
        "publicUrl": _member("Public address", "For browsers and providers.", **_ADDRESS),
        "internalUrl": _member("Internal address", "For Norce Checkout.", **_ADDRESS),
    }
    secret = _member("Secret", "One of senders.url_secrets, with which Norce identifies itself.", type="string")
    notifications = _member(
        "Notifications", "Notifications as they are registered on an order.", type="array", items={"type": "object"}
    )
    parts: dict[str, Any] = {}
    by_route = {name: _route(name, type_, parts) for name, type_ in routes.items()}
    return {
        "$schema": DIALECT,
        "$id": f"{public_url.rstrip('/')}/openapi/v1/schemas/{adapter_id}.json",
        "title": adapter_id,
        "description": "Configuration of norce-adapter for this channel. Hosts and credentials stay with the adapter.",
        "type": "object",
        "required": ["$schema", "id"],
        "properties": {
            "$schema": _member("Schema", "The address of this schema.", type="string"),
            "id": _member("Id", "The adapter's id.", const=adapter_id),
            "active": _member(
                "Active",
                "If false, validations approve, hooks change nothing, and deliveries wait.",
                type="boolean",
                default=True,
            ),
            "adapter": _object("Adapter", "Addresses of the adapter.", addresses, required=["publicUrl"]),
            "callbacks": _object(
                "Callbacks", "Values for placeholders in the addresses of static registrations.", {"secret": secret}
            ),
            "order": _object("Order", "Additions to every new order.", {"notifications": notifications}),
            "routes": _object(
                "Routes", "Settings that replace those of the adapter, by route.", by_route, additionalProperties=False
            ),
        },
        "$defs": dict(sorted(parts.items())),
    }


def _member(title: str, description: str, **more: Any) -> dict[str, Any]:
    return {"title": title, "description": description, **more}


def _object(title: str, description: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return _member(title, description, type="object", properties=properties, **more)


def _handler_settings(name: str, type_: type[Settings], parts: dict[str, Any]) -> dict[str, Any]:
    description = {"description": cleandoc(str(type_.__doc__))} if type_.__dict__.get("__doc__") else {}
    return description | _settings(name, msgspec.structs.fields(type_), parts, references=True)


def _route(name: str, type_: type[Settings], parts: dict[str, Any]) -> dict[str, Any]:
    fields = [field for field in msgspec.structs.fields(type_) if field.encode_name in changeable(type_)]
    settings = _settings(name, fields, parts)
    for setting in settings["properties"].values():
        # Without defaults: a form that saves them would replace the values of `config.yaml`.
        setting.pop("default", None)
    properties = {"settings": {"title": "Settings"} | settings}
    return {"type": "object", "title": name, "properties": properties, "additionalProperties": False}


def changeable(type_: type[Settings]) -> frozenset[str]:
    """Return the settings that Norce may change: those without hosts, secrets and authorities."""
    return frozenset(
        field.encode_name
        for field in msgspec.structs.fields(type_)
        if not any(issubclass(custom, Url | Secret | PrivateCa) for custom in _custom_types(_info(field.type), []))
    )


def _info(type_: Any) -> Any:
    try:
        return inspect.type_info(type_)
    except TypeError:  # msgspec does not support the type, so it may hold anything
        return inspect.CustomType(Secret)


def _custom_types(info: Any, seen: list[Any]) -> Iterator[type]:
    """Find the types inside a type, however deep, that are not msgspec's own."""
    if isinstance(info, inspect.CustomType):
        yield info.cls
    elif isinstance(info, tuple):
        for each in info:
            yield from _custom_types(each, seen)
    elif isinstance(info, inspect.Type | inspect.Field) and not any(info is each for each in seen):
        seen.append(info)
        for name in info.__struct_fields__:
            yield from _custom_types(getattr(info, name), seen)


def _settings(
    name: str, fields: Sequence[FieldInfo], parts: dict[str, Any], *, references: bool = False
) -> dict[str, Any]:
    """Return the schema of a route's settings; schemas that it refers to go to `parts`.

    It requires nothing, since settings are merged: another place may have a missing one.
    """

    def components(types: Sequence[Any]) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
        return msgspec.json.schema_components(types, schema_hook=_custom, ref_template=f"#/$defs/{name}.{{name}}")

    def supported(type_: Any) -> Any:
        try:
            components([type_])
        except TypeError:  # a plugin's own type, or a default of one
            return Any
        return type_

    schemas, own_parts = components([supported(field.type) for field in fields])
    rewrite = partial(_rewrite, references=references, whole=False)
    parts |= {f"{name}.{part}": rewrite(schema) for part, schema in own_parts.items()}
    properties = {field.encode_name: schema | _default(field) for field, schema in zip(fields, schemas, strict=True)}
    settings: dict[str, Any] = rewrite({"type": "object", "properties": properties, "additionalProperties": False})
    return settings


def _custom(type_: type) -> dict[str, Any]:
    """Return the schema of a type that is not msgspec's own; it must not be empty."""
    if issubclass(type_, Secret):
        return dict(REFERENCE)
    return dict(_ADDRESS) if issubclass(type_, Url) else {"$comment": type_.__name__}


def _default(field: FieldInfo) -> dict[str, Any]:
    default = field.default_factory() if field.default_factory in (list, dict, set, frozenset) else field.default
    try:
        return {"default": msgspec.json.decode(msgspec.json.encode(default, order="deterministic"))}
    except TypeError:  # there is none, or it has a type of the plugin's own
        return {}


def _rewrite(schema: Any, *, references: bool = False, whole: bool = True) -> Any:
    """Rewrite a schema of msgspec to our spelling; without `whole` it requires nothing."""
    rewrite = partial(_rewrite, references=references, whole=whole)
    if isinstance(schema, list):
        return [rewrite(each) for each in schema]
    if not isinstance(schema, dict) or schema == REFERENCE:
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            result[key] = {name: {"title": _title(name)} | rewrite(each) for name, each in value.items()}
        elif key in ("additionalProperties", "items", "prefixItems", "anyOf"):
            result[key] = rewrite(value)
        elif key == "default":
            result |= _spelled_default(value, schema)
        elif (key, value) == ("format", "duration"):
            result["pattern"] = DURATION
        elif key in ("required", "minProperties"):
            result |= {key: value} if whole and value else {}
        elif key not in ("discriminator", "$comment"):
            result[key] = value
    if result.get("format") == "decimal":
        result["type"] = ["number", "string"]
    if "anyOf" in result:
        options = [each for part in result["anyOf"] for each in (part["anyOf"] if [*part] == ["anyOf"] else [part])]
        result["anyOf"] = [each for index, each in enumerate(options) if each not in options[:index]]
    elif references and _refuses_references(result):
        about = {key: result.pop(key) for key in ("title", "description", "default") if key in result}
        result = about | {"anyOf": [result, REFERENCE]}
    return result


def _refuses_references(schema: dict[str, Any]) -> bool:
    bounded = schema.keys() & {"enum", "pattern", "format", "minLength", "maxLength"}
    return bool(bounded) or schema.get("type") in ("integer", "number", "boolean")


def _spelled_default(default: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the default as the file spells it, unless it is that of a section."""
    items, parts = schema.get("items", {}), default if isinstance(default, list) else [default]
    if default is None or any(isinstance(part, dict) and part for part in parts):
        return {}
    if schema.get("format") == "duration":
        return {"default": spelled(msgspec.convert(default, timedelta))}
    if items.get("format") == "duration":
        return {"default": [spelled(msgspec.convert(each, timedelta)) for each in default]}
    return {"default": default}


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def spelled(duration: timedelta) -> str:
    """Return a duration as the file spells it, such as 5s."""
    milliseconds = duration // timedelta(milliseconds=1)
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds % size == 0:
            return f"{milliseconds // size}{unit}" if milliseconds else "0s"
    return f"{milliseconds}ms"
