"""
JSON Schemas of `config.yaml`, for editors, and of the document that Norce's configuration may hold about us. Pure.

msgspec makes them; here they get our spelling of durations, references and secrets. A schema is not the check:
`config.load` is, so a schema never refuses what is accepted there. In the file any text may come by reference, and a
number or a secret too; in Norce's document nothing does, and hosts and credentials have no place.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from inspect import cleandoc
from typing import Any

import msgspec
from msgspec import inspect

from adapter.config.model import ConfigFile
from adapter.plugin import Secret, Settings, Url

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = {"type": "string", "pattern": r"^\$\{(env|file):[^{}]+\}$", "description": "By reference."}
DURATION = r"^[0-9]{1,9}(ms|s|m|h|d)$"
_ADDRESS = {"type": "string", "format": "uri"}


def file_schema(handlers: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """The schema of `config.yaml`; a route's settings are those of its handler, where it is one of these."""
    _, parts = msgspec.json.schema_components([ConfigFile], schema_hook=_custom, ref_template="#/$defs/{name}")
    parts = {name: _in_our_words(part, by_reference=True) for name, part in parts.items()}
    file = parts.pop("ConfigFile")
    parts["RouteConfig"]["allOf"] = [
        {
            "if": {"properties": {"handler": {"const": name}}, "required": ["handler"]},
            "then": {
                "properties": {
                    "settings": _settings(name, msgspec.structs.fields(type_), parts, by_reference=True)
                    | ({"description": cleandoc(str(type_.__doc__))} if type_.__dict__.get("__doc__") else {})
                }
            },
        }
        for name, type_ in sorted(handlers.items())
    ]
    return {"$schema": DIALECT, **file, "title": "norce-adapter: config.yaml", "$defs": dict(sorted(parts.items()))}


def document_schema(adapter_id: str, public_url: str, routes: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """
    The schema of our document in Norce's configuration: the basic one, complete in itself, and the settings that may be
    changed there, by route. Served at `/openapi/v1/schemas/{adapter_id}.json`; the admin UI's form is made from it.
    """
    addresses = {
        "publicUrl": _member("Public address", "For browsers and providers.", **_ADDRESS),
        "internalUrl": _member("Internal address", "For Norce Checkout.", **_ADDRESS),
    }
    secret = _member("Secret", "One of senders.url_secrets: it says that Norce is calling.", type="string")
    notifications = _member(
        "Notifications", "As they are registered on an order.", type="array", items={"type": "object"}
    )
    parts: dict[str, Any] = {}
    shown = {name: _route(name, type_, parts) for name, type_ in routes.items()}
    return {
        "$schema": DIALECT,
        "$id": f"{public_url.rstrip('/')}/openapi/v1/schemas/{adapter_id}.json",
        "title": adapter_id,
        "description": "What norce-adapter reads for this channel. Hosts and credentials stay with the adapter.",
        "type": "object",
        "required": ["$schema", "id"],
        "properties": {
            "$schema": _member("Schema", "The address of this schema.", type="string"),
            "id": _member("Id", "The adapter's id.", const=adapter_id),
            "active": _member(
                "Active",
                "Off: nothing is refused or changed here, and what is to be delivered waits.",
                type="boolean",
                default=True,
            ),
            "adapter": _object("Adapter", "Where the adapter is.", addresses, required=["publicUrl"]),
            "callbacks": _object(
                "Callbacks", "What the addresses of static registrations name by placeholder.", {"secret": secret}
            ),
            "order": _object("Order", "What is added to every new order.", {"notifications": notifications}),
            "routes": _object(
                "Routes", "Settings in place of the adapter's own, by route.", shown, additionalProperties=False
            ),
        },
        "$defs": dict(sorted(parts.items())),
    }


def _member(title: str, description: str, **told: Any) -> dict[str, Any]:
    return {"title": title, "description": description, **told}


def _object(title: str, description: str, properties: dict[str, Any], **told: Any) -> dict[str, Any]:
    return _member(title, description, type="object", properties=properties, **told)


def _route(name: str, type_: type[Settings], parts: dict[str, Any]) -> dict[str, Any]:
    fields = [field for field in msgspec.structs.fields(type_) if field.encode_name in changeable(type_)]
    settings = _settings(name, fields, parts)
    for shown in settings["properties"].values():
        # No defaults: a form that saves them would put the handler's in place of what `config.yaml` says.
        shown.pop("default", None)
    properties = {"settings": {"title": "Settings"} | settings}
    return {"type": "object", "title": name, "properties": properties, "additionalProperties": False}


def changeable(type_: type[Settings]) -> frozenset[str]:
    """The settings that Norce's document may change: all that hold no `Url` and no `Secret`, however deep."""
    return frozenset(
        field.encode_name
        for field in msgspec.structs.fields(type_)
        if not any(issubclass(kind, Url | Secret) for kind in _customs(_info(field.type), []))
    )


def _info(type_: Any) -> Any:
    try:
        return inspect.type_info(type_)
    except TypeError:  # msgspec does not know it, so it may hold anything
        return inspect.CustomType(Secret)


def _customs(part: Any, seen: list[Any]) -> Iterator[type]:
    """All types in a type that msgspec does not know by itself."""
    if isinstance(part, inspect.CustomType):
        yield part.cls
    elif isinstance(part, inspect.Type | inspect.Field) and not any(part is each for each in seen):
        seen.append(part)
        for name in part.__struct_fields__:
            yield from _customs(getattr(part, name), seen)
    elif isinstance(part, tuple):
        for each in part:
            yield from _customs(each, seen)


def _settings(
    name: str, fields: Iterable[msgspec.structs.FieldInfo], parts: dict[str, Any], *, by_reference: bool = False
) -> dict[str, Any]:
    """
    The settings of a route; what they refer to is added to `parts`. Nothing is demanded of them: what is missing here
    may stand elsewhere, since settings are merged.
    """

    def made(types: Iterable[Any]) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
        return msgspec.json.schema_components(types, schema_hook=_custom, ref_template=f"#/$defs/{name}.{{name}}")

    def known(type_: Any) -> Any:
        try:
            made([type_])
        except TypeError:  # a plugin's own type, or a default of one
            return Any
        return type_

    shapes, own_parts = made([known(field.type) for field in fields])
    words = [
        _in_our_words(shape | _default(field), by_reference=by_reference, whole=False)
        for field, shape in zip(fields, shapes, strict=True)
    ]
    for part, shape in own_parts.items():
        parts[f"{name}.{part}"] = _in_our_words(shape, by_reference=by_reference, whole=False)
    titled = {
        field.encode_name: {"title": _titled(field.encode_name)} | each
        for field, each in zip(fields, words, strict=True)
    }
    return {"type": "object", "properties": titled, "additionalProperties": False}


def _custom(type_: type) -> dict[str, Any]:
    """A type that msgspec does not know. It may be anything, but a schema hook has to return something."""
    if issubclass(type_, Secret):
        return dict(REFERENCE)
    return dict(_ADDRESS) if issubclass(type_, Url) else {"$comment": type_.__name__}


def _default(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    default = field.default_factory() if field.default_factory in (list, dict, set, frozenset) else field.default
    try:
        return {"default": msgspec.json.decode(msgspec.json.encode(default, order="deterministic"))}
    except TypeError:  # there is none, or it has a type of the plugin's own
        return {}


def _in_our_words(shape: Any, *, by_reference: bool = False, whole: bool = True) -> Any:
    """
    A schema that msgspec made, as the file is written: with durations such as 5s, and with references. Where it need
    not be `whole`, nothing is required.
    """
    inner = partial(_in_our_words, by_reference=by_reference, whole=whole)
    if isinstance(shape, list):
        return [inner(each) for each in shape]
    if not isinstance(shape, dict) or shape == REFERENCE:
        return shape
    words: dict[str, Any] = {}
    for key, each in shape.items():
        if key == "properties":
            words[key] = {name: {"title": _titled(name)} | inner(part) for name, part in each.items()}
        elif key in ("additionalProperties", "items", "prefixItems", "anyOf"):
            words[key] = inner(each)
        elif key == "default":
            words |= _default_in_our_words(each, shape)
        elif each == "duration" and key == "format":
            words["pattern"] = DURATION
        elif key in ("required", "minProperties"):
            words |= {key: each} if whole and each else {}
        elif key not in ("discriminator", "$comment"):
            words[key] = each
    if words.get("format") == "decimal":
        words["type"] = ["number", "string"]
    if "anyOf" in words:
        options = [each for part in words["anyOf"] for each in (part["anyOf"] if [*part] == ["anyOf"] else [part])]
        words["anyOf"] = [each for index, each in enumerate(options) if each not in options[:index]]
    elif by_reference and _is_narrow(words):
        about = {key: words.pop(key) for key in ("title", "description", "default") if key in words}
        words = about | {"anyOf": [words, REFERENCE]}
    return words


def _is_narrow(words: dict[str, Any]) -> bool:
    """Whether a reference is not allowed anyway, as it is where any text is."""
    of_text = words.keys() & {"enum", "pattern", "format", "minLength", "maxLength"}
    return bool(of_text) or words.get("type") in ("integer", "number", "boolean")


def _default_in_our_words(default: Any, shape: dict[str, Any]) -> dict[str, Any]:
    """The default as it is written in the file; nothing where the members say it, or where it has none to write."""
    items, parts = shape.get("items", {}), default if isinstance(default, list) else [default]
    if default is None or any(isinstance(part, dict) and part for part in parts):
        return {}
    if shape.get("format") == "duration":
        return {"default": written(msgspec.convert(default, timedelta))}
    if items.get("format") == "duration":
        return {"default": [written(msgspec.convert(each, timedelta)) for each in default]}
    return {"default": default}


def _titled(name: str) -> str:
    return name.replace("_", " ").capitalize()


def written(duration: timedelta) -> str:
    milliseconds = duration // timedelta(milliseconds=1)
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms" if milliseconds else "0s"
