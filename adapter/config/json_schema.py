"""
JSON Schemas made from our declared types: of `config.yaml`, for editors, and of the document that Norce's configuration
may hold about us. Pure.

What one would get wrong: they are not the check. `config.load` is, which knows what belongs together and says it
better; a schema is what an editor or a form can show beforehand, so it never refuses what the reader takes: it goes
through a type as the reader does. In the file any text may come by reference, and a number or a secret too; in Norce's
document nothing does, and hosts and credentials have no place.
"""

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import is_dataclass
from datetime import timedelta
from decimal import Decimal
from enum import Enum
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_type_hints, is_typeddict

import msgspec
from msgspec import Meta

from adapter.config.convert import LISTS, MAPPINGS, Within, bare, class_of, is_struct, noted
from adapter.config.model import ConfigFile
from adapter.plugin import Secret, Settings, Url

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = {"type": "string", "pattern": r"^\$\{(env|file):[^{}]+\}$", "description": "By reference."}
DURATION = r"^[0-9]{1,9}(ms|s|m|h|d)$"
_ADDRESS = {"type": "string", "format": "uri"}


def file_schema(handlers: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """The schema of `config.yaml`; a route's settings are those of its handler, where it is one of these."""
    schemas = _Schemas(by_reference=True)
    file = schemas.members(ConfigFile)
    schemas.defined["Route"]["allOf"] = [
        {
            "if": {"properties": {"handler": {"const": name}}, "required": ["handler"]},
            # What is missing may be said per merchant and channel.
            "then": {"properties": {"settings": schemas.members(type_, merged=True)}},
        }
        for name, type_ in sorted(handlers.items())
    ]
    return {
        "$schema": DIALECT,
        "title": "norce-adapter: config.yaml",
        **file,
        "$defs": dict(sorted(schemas.defined.items())),
    }


def document_schema(adapter_id: str, public_url: str, routes: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """
    The schema of our document in Norce's configuration: the basic one, complete in itself, and the settings that may be
    changed there, by route. Served at `/openapi/v1/schemas/{adapter_id}.json`; the admin UI's form is made from it.
    """
    schemas = _Schemas(by_reference=False)
    addresses = {
        "publicUrl": _member("Public address", "For browsers and providers.", **_ADDRESS),
        "internalUrl": _member("Internal address", "For Norce Checkout.", **_ADDRESS),
    }
    secret = _member("Secret", "One of senders.url_secrets: it says that Norce is calling.", type="string")
    notifications = _member(
        "Notifications", "As they are registered on an order.", type="array", items={"type": "object"}
    )
    shown = {name: _route(name, type_, schemas) for name, type_ in routes.items()}
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
        "$defs": dict(sorted(schemas.defined.items())),
    }


def _member(title: str, description: str, **told: Any) -> dict[str, Any]:
    return {"title": title, "description": description, **told}


def _object(title: str, description: str, properties: dict[str, Any], **told: Any) -> dict[str, Any]:
    return _member(title, description, type="object", properties=properties, **told)


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
    settings = {"title": "Settings"} | schemas.members(type_, merged=True, only=changeable(type_))
    for shown in settings["properties"].values():
        # No defaults: a form that saves them would put the handler's in place of what `config.yaml` says.
        shown.pop("default", None)
    return {"type": "object", "title": name, "properties": {"settings": settings}, "additionalProperties": False}


class _Schemas:
    """
    The schemas of types and of all in them, in our words. `defined` are the structs: they are referred to by name.

    What is `merged` with weaker mappings need not be whole: nothing is demanded of it, as deep as mappings are merged.
    """

    def __init__(self, *, by_reference: bool) -> None:
        self.defined: dict[str, dict[str, Any]] = {}
        self._names: dict[tuple[Any, bool], str] = {}
        self._by_reference = by_reference

    def of(self, type_: Any, *, merged: bool = False, inherited: tuple[Any, ...] = ()) -> dict[str, Any]:
        base, notes = bare(type_)
        return self._shape(base, (*notes, *inherited), merged) | _said(notes)

    def members(
        self, type_: type[msgspec.Struct], *, merged: bool = False, only: Container[str] | None = None
    ) -> dict[str, Any]:
        """A struct, itself and not by its name; its members without those that are not in `only`."""
        kind, properties, required = class_of(type_), {}, []
        if (tag_field := kind.__struct_config__.tag_field) and only is None:
            properties[tag_field] = {"title": _titled(tag_field)} | self._or_by_reference(
                {"const": kind.__struct_config__.tag}
            )
            required.append(tag_field)
        for field in msgspec.structs.fields(type_):
            name = field.encode_name
            if only is None or name in only:
                properties[name] = {"title": _titled(name)} | self.of(field.type, merged=merged) | _default(field)
                required += [name] if field.required else []
        told = {"type": "object", "properties": properties, "additionalProperties": False}
        said = {"description": cleandoc(kind.__doc__)} if kind.__dict__.get("__doc__") else {}
        return said | told | ({"required": required} if required and not merged else {})

    def _shape(self, base: Any, notes: tuple[Any, ...], merged: bool) -> dict[str, Any]:
        kind = class_of(base)
        if kind in (Union, UnionType):
            return self._any_of(get_args(base), notes, merged)
        if is_struct(base):
            return {"$ref": f"#/$defs/{self._named(base, merged)}"}
        if kind in MAPPINGS:
            return self._mapping(base, notes, merged)
        if kind in LISTS and (kind is not tuple or Ellipsis in get_args(base)):
            items = self.of((*get_args(base), Any)[0])  # a list replaces the weaker one, so its items are whole
            unique = {"uniqueItems": True} if issubclass(kind, set | frozenset) else {}
            return {"type": "array"} | ({"items": items} if items else {}) | unique | _sized(notes, "Items")
        return self._or_by_reference(_leaf(base, notes))

    def _any_of(self, members: tuple[Any, ...], notes: tuple[Any, ...], merged: bool) -> dict[str, Any]:
        options: list[dict[str, Any]] = []
        for member in members:
            option: dict[str, Any] = (
                {"type": "null"} if member is NoneType else self.of(member, merged=merged, inherited=notes)
            )
            if not option:
                return {}
            options += option["anyOf"] if [*option] == ["anyOf"] else [option]
        return {"anyOf": [option for index, option in enumerate(options) if option not in options[:index]]}

    def _mapping(self, base: Any, notes: tuple[Any, ...], merged: bool) -> dict[str, Any]:
        of_name, of_member = get_args(base) or (str, Any)
        names = {key: each for key, each in _leaf(*bare(of_name)).items() if key in ("pattern", "maxLength", "enum")}
        member = self.of(of_member, merged=merged)
        size = _sized(notes, "Properties")
        if merged:
            size.pop("minProperties", None)
        told = {"propertyNames": names, "additionalProperties": member}
        return {"type": "object"} | {key: each for key, each in told.items() if each} | size

    def _named(self, type_: Any, merged: bool) -> str:
        """The name of a struct, which is defined under it. Another of its name has a number."""
        if (type_, merged) not in self._names:
            plain = class_of(type_).__name__
            numbered = (f"{plain}{number}" for number in range(2, len(self._names) + 3))
            name = next(each for each in (plain, *numbered) if each not in self._names.values())
            self._names[type_, merged] = name
            self.defined[name] = self.members(type_, merged=merged)
        return self._names[type_, merged]

    def _or_by_reference(self, told: dict[str, Any]) -> dict[str, Any]:
        """Any text may be a reference anyway, unless it is held to something."""
        if not self._by_reference or told in ({}, {"type": "string"}, {"type": "null"}, REFERENCE):
            return told
        return {"anyOf": [told, REFERENCE]}


def _leaf(base: Any, notes: tuple[Any, ...]) -> dict[str, Any]:
    kind = class_of(base)
    if base is timedelta:
        return {"type": "string", "pattern": DURATION}
    if base is Decimal:
        return {"type": ["number", "string"], "format": "decimal"}
    if issubclass(kind, Secret):
        return dict(REFERENCE)
    if issubclass(kind, Url):
        return dict(_ADDRESS)
    if issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    try:
        told = msgspec.json.schema(noted(base, notes), schema_hook=lambda _: {})
    except TypeError:
        return {}
    if "$defs" in told:  # a dataclass and its like, which msgspec reads by rules of its own
        return {}
    return {key: each for key, each in told.items() if key not in ("title", "description")}


def _said(notes: tuple[Any, ...]) -> dict[str, Any]:
    """What the notes on a type tell a person."""
    said: dict[str, Any] = {}
    for note in notes:
        if isinstance(note, Meta):
            said |= {key: text for key in ("title", "description") if (text := getattr(note, key))}
    for note in notes:
        if isinstance(note, Within):
            bounds = f"From {note.shortest} to {note.longest}."
            said["description"] = f"{said.get('description', '')} {bounds}".strip()
    return said


def _sized(notes: tuple[Any, ...], what: str) -> dict[str, int]:
    bounds = {f"min{what}": "min_length", f"max{what}": "max_length"}
    return {
        key: bound
        for key, name in bounds.items()
        for note in notes
        if isinstance(note, Meta) and (bound := getattr(note, name)) is not None
    }


def _default(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    """The default as it is written in the file; nothing where it cannot be, or says no more than the members do."""
    default = field.default_factory() if field.default_factory in (list, dict, set, frozenset) else field.default
    if default is None or isinstance(default, msgspec.Struct | msgspec.UnsetType | type(msgspec.NODEFAULT)):
        return {}
    try:
        plain = msgspec.to_builtins(
            default, builtin_types=(timedelta,), str_keys=True, order="deterministic", enc_hook=_text
        )
        return {"default": json.loads(json.dumps(plain, default=_spelt))}
    except (TypeError, ValueError):
        return {}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("is written in a way that only its own type knows")
    return str(value)


def _titled(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _spelt(duration: timedelta) -> str:
    milliseconds = duration // timedelta(milliseconds=1)
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms" if milliseconds else "0s"
