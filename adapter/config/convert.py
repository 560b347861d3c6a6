"""
A tree as declared types: of `adapter.config.model`, or of a plugin's settings.

It walks a tree beside a type and goes on after a mistake, which `msgspec.convert` does not, and says what is allowed.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from adapter.config.problems import HOW_TO_REFER, Reference, under
from adapter.config.yaml_source import NOTHING
from adapter.plugin import Secret, Url

_DURATION = re.compile(r"(\d{1,9})(ms|s|m|h|d)")
_UNITS = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
LISTS: dict[Any, Callable[[list[Any]], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    Sequence: tuple,
    Collection: tuple,
}
MAPPINGS = (dict, Mapping)


class Reader:
    """
    Makes values of declared types from a tree, and goes on after a mistake: each is reported with its path.

    `values` has what was read, by path, for checks that need several places; what could not be read is not in it.
    """

    def __init__(self, report: Callable[[str, str], None], masked: Callable[[str], str]) -> None:
        self.report = report
        self.masked = masked
        self.values: dict[str, Any] = {}

    def read(self, type_: Any, value: Any, path: str) -> Any:
        result = NOTHING if value is NOTHING else self.read_anew(type_, value, path)
        if result is not NOTHING:
            self.values[path] = result
        return result

    def read_anew(self, type_: Any, value: Any, path: str) -> Any:
        base, _ = bare(type_)
        kind = class_of(base)
        if kind in (Union, UnionType):
            return self.union(type_, value, path)
        if isinstance(value, Mapping) and is_struct(base):
            return self.struct(base, value, path)
        if isinstance(value, Mapping) and kind in MAPPINGS:
            return self.mapping(type_, value, path)
        if isinstance(value, list) and kind in LISTS and (kind is not tuple or Ellipsis in get_args(base)):
            return self.list(type_, value, path)
        return self.leaf(type_, value, path)

    def union(self, type_: Any, value: Any, path: str) -> Any:
        base, notes = bare(type_)
        members = [member for member in get_args(base) if member is not NoneType]
        if value is None and len(members) < len(get_args(base)):
            return None
        if isinstance(value, Mapping):
            structs = [member for member in members if is_struct(member)]
            if len(structs) > 1:
                return self.tagged(structs, value, path)
            fitting = structs or [member for member in members if class_of(member) in MAPPINGS]
        elif isinstance(value, list):
            fitting = [member for member in members if class_of(member) in LISTS]
        else:
            fitting = []
        if len(members) == 1:
            fitting = members
        return self.read_anew(noted(fitting[0], notes), value, path) if fitting else self.leaf(type_, value, path)

    def tagged(self, structs: list[Any], value: Mapping[str, Any], path: str) -> Any:
        by_tag = {class_of(struct).__struct_config__.tag: struct for struct in structs}
        key = class_of(structs[0]).__struct_config__.tag_field
        tag = self.read(Literal[tuple(by_tag)], value[key], under(path, key)) if key in value else None
        if key not in value:
            self.report(under(path, key), f"is missing; it must be {list_of(by_tag)}")
        return self.read_anew(by_tag[tag], value, path) if tag in by_tag else NOTHING

    def struct(self, type_: Any, value: Mapping[str, Any], path: str) -> Any:
        config = class_of(type_).__struct_config__
        fields = {declared.encode_name: declared for declared in msgspec.structs.fields(type_)}
        known = [config.tag_field, *fields] if config.tag_field else [*fields]
        for key in value:
            if key not in known:
                allowed = list_of(known, key) if known else "no key at all"
                self.report(under(path, key), f"is not a key here; allowed: {allowed}")
        arguments = {}
        for key, declared in fields.items():
            if key in value:
                arguments[declared.name] = self.read(declared.type, value[key], under(path, key))
            elif declared.required:
                self.report(under(path, key), f"is missing; it must be {_allowed_in(declared.type)}")
                arguments[declared.name] = NOTHING
        if NOTHING in arguments.values():
            return NOTHING
        try:
            return type_(**arguments)
        except (ValueError, TypeError) as error:
            self.report(path, self.masked(str(error)))
            return NOTHING

    def mapping(self, type_: Any, value: Mapping[str, Any], path: str) -> Any:
        of_key, of_value = get_args(bare(type_)[0]) or (str, Any)
        result = {}
        for name, member in value.items():
            at = under(path, name)
            key = self.leaf(of_key, name, at, "the name ")
            if (read := self.read(of_value, member, at)) is not NOTHING and key is not NOTHING:
                result[key] = read
        return self.sized(type_, len(value), result if len(result) == len(value) else NOTHING, path)

    def list(self, type_: Any, value: list[Any], path: str) -> Any:
        base, _ = bare(type_)
        of_item = (*get_args(base), Any)[0]
        items = [self.read(of_item, item, under(path, index)) for index, item in enumerate(value)]
        result = NOTHING if any(item is NOTHING for item in items) else LISTS[class_of(base)](items)
        return self.sized(type_, len(value), result, path)

    def sized(self, type_: Any, size: int, result: Any, path: str) -> Any:
        least, most = _bound(type_, "min_length"), _bound(type_, "max_length")
        if (least is not None and size < least) or (most is not None and size > most):
            self.report(path, f"must be {_allowed_in(type_)}; there are {size}")
            return NOTHING
        return result

    def leaf(self, type_: Any, value: Any, path: str, subject: str = "") -> Any:
        base, _ = bare(type_)
        message = f"{subject}must be {_allowed_in(type_)}{_contrast(base, value)}"
        try:
            if base is timedelta:
                return _duration(type_, value)
            # A reference is text, as every name is; for a number it is the text that spells it.
            spelt = base in (int, float, bool) and (isinstance(value, Reference) or subject != "")
            return msgspec.convert(str(value) if spelt else value, type_, strict=not spelt, dec_hook=_custom)
        except msgspec.ValidationError as error:
            if error.__cause__ is not None:  # what the type itself says: an address, a secret, a plugin's own
                message = self.masked(str(error.__cause__))
            elif " - at `" in str(error):  # within a type that is not walked, such as a dataclass
                message = self.masked(str(error))
        except ValueError:
            pass
        self.report(path, message)
        return NOTHING


def bare(type_: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its notes (`Annotated`) and other names, and the notes, the outermost last."""
    notes: tuple[Any, ...] = ()
    while True:
        if get_origin(type_) is Annotated:
            type_, notes = type_.__origin__, (*type_.__metadata__, *notes)
        elif isinstance(type_, NewType):
            type_ = type_.__supertype__
        elif hasattr(type_, "__value__"):  # `type Address = Url`, from Python 3.12
            type_ = type_.__value__
        else:
            return type_, notes


def noted(type_: Any, notes: tuple[Any, ...]) -> Any:
    return Annotated[(type_, *notes)] if notes else type_


def class_of(type_: Any) -> Any:
    base, _ = bare(type_)
    origin = get_origin(base) or base
    return origin if isinstance(origin, type) or origin is Union else object


def is_struct(type_: Any) -> bool:
    kind = class_of(type_)
    return kind is not Union and issubclass(kind, msgspec.Struct)


def _bound(type_: Any, name: str) -> Any:
    notes = [note for note in bare(type_)[1] if isinstance(note, Meta)]
    return next((bound for note in notes if (bound := getattr(note, name)) is not None), None)


def _extra(type_: Any, name: str) -> Any:
    notes = [note for note in bare(type_)[1] if isinstance(note, Meta)]
    return next((extra for note in notes if (extra := (note.extra or {}).get(name)) is not None), None)


def _custom(type_: Any, value: Any) -> Any:
    if issubclass(class_of(type_), Secret):
        if not isinstance(value, Reference):
            raise ValueError(f"is a secret, which is given by reference only: {HOW_TO_REFER}")
        return type_(str(value))
    if not isinstance(value, str):
        raise ValueError(f"must be {_allowed_in(type_)}, not {_kind(value)}")
    return type_(str(value))


def _duration(type_: Any, value: Any) -> timedelta:
    duration = _spelt_duration(value) if isinstance(value, str) else None
    if duration is None:
        raise ValueError("not a duration")
    within = _extra(type_, "within")
    if within and not _spelt_duration(within[0]) <= duration <= _spelt_duration(within[1]):
        raise ValueError("out of bounds")
    return duration


def _spelt_duration(text: str) -> timedelta:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("not a duration")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


# --- the words of a problem -----------------------------------------------------------------------------------------

_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    Decimal: "a number",
    bool: "true or false",
    timedelta: "a duration such as 500ms, 2s, 5m, 2h or 1d",
    Secret: f"a secret by reference: {HOW_TO_REFER}",
    Url: "an https:// address",
    Any: "any value",
}


def _allowed_in(type_: Any) -> str:
    base, notes = bare(type_)
    if allowed := _extra(type_, "allowed"):
        return str(allowed)
    kind = class_of(base)
    if get_origin(base) is Literal:
        return list_of(get_args(base))
    if kind in (Union, UnionType):
        members = [member for member in get_args(base) if member is not NoneType]
        return " or ".join(dict.fromkeys(_allowed_in(noted(member, notes)) for member in members))
    if issubclass(kind, Enum):
        return list_of([member.value for member in kind])
    if is_struct(base) or kind in MAPPINGS:
        return "a mapping" + _size(type_, "entry", "entries")
    if kind in LISTS:
        return (
            f"a list{_size(type_, 'item', 'items')}, each {_allowed_in(get_args(base)[0])}"
            if get_args(base)
            else "a list"
        )
    words = _WORDS.get(base) or f"a value of the type {getattr(base, '__name__', base)}"
    if within := _extra(type_, "within"):
        words += f", from {within[0]} to {within[1]}"
    words += _size(type_, "character", "characters") if base is str else _range(type_)
    pattern = _bound(type_, "pattern")
    return f"{words} matching {pattern}" if pattern else words


def _size(type_: Any, one: str, many: str) -> str:
    least, most = _bound(type_, "min_length") or 0, _bound(type_, "max_length")
    if most is None:
        return f" of at least {least} {one if least == 1 else many}" if least else ""
    return f" of {least} to {most} {many}" if least != most else f" of {least} {one if least == 1 else many}"


def _range(type_: Any) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "multiple_of": "a multiple of"}
    bounds = [f"{word} {bound}" for name, word in words.items() if (bound := _bound(type_, name)) is not None]
    return f", {' and '.join(bounds)}" if bounds else ""


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "empty" if value is None else "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "a mapping"


def _contrast(base: Any, value: Any) -> str:
    """What was found in place of what is allowed, by its kind and never by its value."""
    given, kind = _kind(value), class_of(base)
    if given in ("a number", "true or false"):
        if base is str:
            return f", not {given}: put it in quotes"
        if base is timedelta:
            return f", not {given}: write its unit"
    if kind in (Union, UnionType):
        return f", not {given}"
    if base in (int, float, Decimal):
        expected = "a number"
    elif base is bool:
        expected = "true or false"
    elif is_struct(base) or kind in MAPPINGS:
        expected = "a mapping"
    else:
        expected = "a list" if kind in LISTS else "text"
    return "" if given == expected else f", not {given}"


def list_of(names: Iterable[Any], given: str = "", join: str = "or") -> str:
    known = [str(name) for name in names]
    near = difflib.get_close_matches(given, known, n=1)
    listed = ", ".join(known) if len(known) < 2 else f"{', '.join(known[:-1])} {join} {known[-1]}"
    return f"{listed}; did you mean {near[0]}?" if near and len(known) > 1 else listed or "none is configured"
