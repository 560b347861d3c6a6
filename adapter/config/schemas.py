"""
JSON Schemas made from our declared types: of `config.yaml`, for editors, and of the document that Norce's configuration
may hold about us. Pure.

What one would get wrong: they are not the check. `config.load` is, which knows what belongs together and says it
better; a schema is what an editor or a form can show beforehand. In the file any text may come by reference, and a
number or a secret too; in Norce's document nothing does, and hosts and credentials have no place.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from datetime import timedelta
from typing import Any, get_args, get_type_hints, is_typeddict

import msgspec

from adapter.config.reader import Within, bare, class_of, is_struct
from adapter.config.shape import ConfigFile
from adapter.plugin import Secret, Settings, Url

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = {"type": "string", "pattern": r"^\$\{(env|file):[^{}]+\}$", "description": "By reference."}
DURATION = r"^[0-9]{1,9}(ms|s|m|h|d)$"
_SCALARS = ("integer", "number", "boolean")
_ADDRESS = {"type": "string", "format": "uri"}


def file_schema(handlers: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """The schema of `config.yaml`; a route's settings are those of its handler, where it is one of these."""
    schemas = _Schemas([ConfigFile, *handlers.values()], by_reference=True)
    route = schemas.defined["Route"]
    route["allOf"] = [
        {
            "if": {"properties": {"handler": {"const": name}}, "required": ["handler"]},
            # What is missing may be said per merchant and channel.
            "then": {"properties": {"settings": schemas.of(type_) | {"required": []}}},
        }
        for name, type_ in sorted(handlers.items())
    ]
    return {
        "$schema": DIALECT,
        "title": "norce-adapter: config.yaml",
        **schemas.of(ConfigFile),
        "$defs": dict(sorted(schemas.defined.items())),
    }


def document_schema(adapter_id: str, public_url: str, routes: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """
    The schema of our document in Norce's configuration: the basic one, complete in itself, and the settings that may be
    changed there, by route. Served at `/openapi/v1/schemas/{adapter_id}.json`; the admin UI's form is made from it.
    """
    schemas = _Schemas(list(routes.values()), by_reference=False)
    return {
        "$schema": DIALECT,
        "$id": f"{public_url.rstrip('/')}/openapi/v1/schemas/{adapter_id}.json",
        "title": adapter_id,
        "description": "What norce-adapter reads for this channel. Hosts and credentials stay with the adapter.",
        "type": "object",
        "required": ["$schema", "id"],
        "properties": {
            "$schema": {"type": "string", "title": "Schema", "description": "The address of this schema."},
            "id": {"const": adapter_id, "title": "Id", "description": "The adapter's id."},
            "active": {
                "type": "boolean",
                "default": True,
                "title": "Active",
                "description": "Off: nothing is refused or changed here, and what is to be delivered waits.",
            },
            "adapter": {
                "type": "object",
                "title": "Adapter",
                "description": "Where the adapter is.",
                "required": ["publicUrl"],
                "properties": {
                    "publicUrl": _ADDRESS | {"title": "Public address", "description": "For browsers and providers."},
                    "internalUrl": _ADDRESS | {"title": "Internal address", "description": "For Norce Checkout."},
                },
            },
            "callbacks": {
                "type": "object",
                "title": "Callbacks",
                "description": "What the addresses of static registrations name by placeholder.",
                "properties": {
                    "secret": {
                        "type": "string",
                        "title": "Secret",
                        "description": "One of senders.url_secrets: it says that Norce is calling.",
                    }
                },
            },
            "order": {
                "type": "object",
                "title": "Order",
                "description": "What is added to every new order.",
                "properties": {
                    "notifications": {
                        "type": "array",
                        "items": {"type": "object"},
                        "title": "Notifications",
                        "description": "As they are registered on an order.",
                    }
                },
            },
            "routes": {
                "type": "object",
                "title": "Routes",
                "description": "Settings in place of the adapter's own, by route.",
                "properties": {name: _route(name, type_, schemas) for name, type_ in routes.items()},
                "additionalProperties": False,
            },
        },
        "$defs": dict(sorted(schemas.defined.items())),
    }


def changeable(type_: type[Settings]) -> frozenset[str]:
    """The settings that Norce's document may change: all that hold no `Url` and no `Secret`, however deep."""
    fields = msgspec.structs.fields(type_)
    return frozenset(field.encode_name for field in fields if not any(map(_is_kept, _kinds(field.type))))


def _is_kept(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Url | Secret)


def _kinds(type_: Any, seen: list[Any] | None = None) -> Iterator[Any]:
    """The classes of all types in a type, its own included: of its members and items, under whatever name."""
    seen = [] if seen is None else seen
    if type_ in seen:
        return
    seen.append(type_)
    base, _ = bare(type_)
    kind = class_of(base)
    yield kind
    members = is_struct(base) or is_dataclass(kind) or is_typeddict(kind) or hasattr(kind, "_fields")
    for inner in (*get_args(base), *(get_type_hints(kind).values() if members else ())):
        yield from _kinds(inner, seen)


def _route(name: str, type_: type[Settings], schemas: "_Schemas") -> dict[str, Any]:
    whole, allowed = schemas.of(type_), changeable(type_)
    settings = {
        "type": "object",
        "title": "Settings",
        "properties": {key: value for key, value in whole.get("properties", {}).items() if key in allowed},
        "additionalProperties": False,
    }
    return {"type": "object", "title": name, "properties": {"settings": settings}, "additionalProperties": False}


class _Schemas:
    """The schemas of these types and of all in them, in our words. `defined` are the ones that are referred to."""

    def __init__(self, types: list[type[msgspec.Struct]], *, by_reference: bool) -> None:
        self._by_reference = by_reference
        structs = list(dict.fromkeys(found for each in types for found in _kinds(each) if is_struct(found)))
        made, components = msgspec.json.schema_components(structs, schema_hook=_custom, ref_template="#/$defs/{name}")
        self._names = {each: str(ref["$ref"]).rpartition("/")[2] for each, ref in zip(structs, made, strict=True)}
        self.defined = {name: self._told(part) for name, part in components.items()}
        for struct, name in self._names.items():
            self._annotate(struct, self.defined[name].get("properties", {}))
        referred = set(re.findall(r'"\$ref":\s*"#/\$defs/([^"]+)"', msgspec.json.encode(self.defined).decode()))
        self._all, self.defined = self.defined, {n: part for n, part in self.defined.items() if n in referred}

    def of(self, type_: type[msgspec.Struct]) -> dict[str, Any]:
        return dict(self._all[self._names[type_]])

    def _told(self, part: Any) -> Any:
        if isinstance(part, list):
            return [self._told(each) for each in part]
        if not isinstance(part, dict):
            return part
        told = {
            key: {name: self._told(each) for name, each in value.items()} if key == "properties" else self._told(value)
            for key, value in part.items()
            if key not in ("discriminator", "title", "default")
        }
        if "default" in part and part["default"] is not None and "$ref" not in part:
            told["default"] = part["default"]
        if told.get("format") == "decimal":
            told["type"] = ["number", "string"]
        if told.get("format") == "duration":
            del told["format"]
            told["pattern"] = DURATION
            if "default" in told:
                told["default"] = _spelt(msgspec.convert(told["default"], timedelta))
        return self._or_by_reference(told) if self._by_reference else told

    def _or_by_reference(self, told: dict[str, Any]) -> dict[str, Any]:
        """Any text may be a reference anyway, unless it is held to something."""
        held = told.get("type") == "string" and {"pattern", "format", "maxLength", "enum"} & told.keys()
        named = {"enum", "const"} & told.keys() and "type" not in told
        if told == REFERENCE or not (held or named or told.get("type") in _SCALARS):
            return told
        kept = {key: told[key] for key in ("description", "default") if key in told}
        return kept | {"anyOf": [{key: value for key, value in told.items() if key not in kept}, REFERENCE]}

    @staticmethod
    def _annotate(struct: type[msgspec.Struct], properties: dict[str, Any]) -> None:
        for field in msgspec.structs.fields(struct):
            shown = properties[field.encode_name]
            shown["title"] = field.encode_name.replace("_", " ").capitalize()
            if isinstance(field.default, frozenset):
                shown["default"] = sorted(shown["default"])  # the same at each start
            if isinstance(field.default, tuple):
                shown["default"] = [_spelt(e) if isinstance(e, timedelta) else e for e in field.default]
            for note in _notes(field.type):
                if isinstance(note, Within):
                    bounds = f"From {note.shortest} to {note.longest}."
                    shown["description"] = f"{shown.get('description', '')} {bounds}".strip()


def _custom(type_: type) -> dict[str, Any]:
    if type_ is Secret:
        return dict(REFERENCE)
    if type_ is Url:
        return dict(_ADDRESS)
    return {"title": type_.__name__}  # a plugin's own type: only its reader knows what may stand there


def _notes(type_: Any) -> Iterator[Any]:
    for each in get_args(type_):
        if isinstance(each, Within):
            yield each
        elif get_args(each):
            yield from _notes(each)


def _spelt(duration: timedelta) -> str:
    milliseconds = duration // timedelta(milliseconds=1)
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms" if milliseconds else "0s"
