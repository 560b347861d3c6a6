"""Conversion of a plain tree into declared types, of `config.model` or of a plugin.

`msgspec.convert` stops at the first mistake. This walks the tree beside the type, reports every mistake with its path,
and says what is allowed.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from adapter.config.problems import HOW_TO_REFER, Reference, under
from adapter.config.yaml_source import NOTHING
from adapter.plugin import PlainUrl, PrivateCa, Secret, Url

LEAST_LETTERS_OF_A_SECRET = 12
_DURATION = re.compile(r"(\d{1,9})(ms|s|m|h|d)")
_UNITS = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_UNIONS = (Union, UnionType)
_MAPPINGS = (dict, Mapping)
_LISTS: dict[Any, Callable[[list[Any]], Any]] = {
    **dict.fromkeys((tuple, Sequence, Collection), tuple),
    **{kind: kind for kind in (list, set, frozenset)},
}


class Converter:
    """A conversion that goes on after a mistake.

    `values` holds the converted values by path, for checks that need several of them.

    Args:
        report: Takes the path and the message of a mistake.
    """

    def __init__(self, report: Callable[[str, str], None]) -> None:
        self.report = report
        self.values: dict[str, Any] = {}

    def convert(self, type_: Any, value: Any, path: str) -> Any:
        """Return the value as `type_`, or `NOTHING` if a mistake was reported in it."""
        result = NOTHING if value is NOTHING else self._convert(type_, value, path)
        if result is not NOTHING:
            self.values[path] = result
        return result

    def _convert(self, type_: Any, value: Any, path: str) -> Any:
        base, _ = unwrap(type_)
        kind = class_of(base)
        if kind in _UNIONS:
            return self._union(type_, value, path)
        if isinstance(value, Mapping) and is_struct(base):
            return self._struct(base, value, path)
        if isinstance(value, Mapping) and kind in _MAPPINGS:
            return self._mapping(type_, value, path)
        if isinstance(value, list) and kind in _LISTS and (kind is not tuple or Ellipsis in get_args(base)):
            return self._list(type_, value, path)
        return self._leaf(type_, value, path)

    def _union(self, type_: Any, value: Any, path: str) -> Any:
        base, notes = unwrap(type_)
        members = [member for member in get_args(base) if member is not NoneType]
        if value is None and len(members) < len(get_args(base)):
            return None
        structs = [member for member in members if is_struct(member)]
        if isinstance(value, Mapping) and len(structs) > 1:
            return self._tagged(structs, value, path)
        if len(members) > 1 and isinstance(value, Mapping):
            members = structs or [member for member in members if class_of(member) in _MAPPINGS]
        elif len(members) > 1:
            members = [member for member in members if isinstance(value, list) and class_of(member) in _LISTS]
        if not members:
            return self._leaf(type_, value, path)
        return self._convert(Annotated[(members[0], *notes)] if notes else members[0], value, path)

    def _tagged(self, structs: list[Any], value: Mapping[str, Any], path: str) -> Any:
        by_tag = {class_of(struct).__struct_config__.tag: struct for struct in structs}
        key = class_of(structs[0]).__struct_config__.tag_field
        if key not in value:
            self.report(under(path, key), f"is missing; it must be {list_of(by_tag)}")
            return NOTHING
        tag = self.convert(Literal[tuple(by_tag)], value[key], under(path, key))
        return self._convert(by_tag[tag], value, path) if tag in by_tag else NOTHING

    def _struct(self, type_: Any, value: Mapping[str, Any], path: str) -> Any:
        tag_field = class_of(type_).__struct_config__.tag_field
        fields = {declared.encode_name: declared for declared in msgspec.structs.fields(type_)}
        known = [tag_field, *fields] if tag_field else [*fields]
        for key in value:
            if key not in known:
                allowed = list_of(known, key) if known else "no key at all"
                self.report(under(path, key), f"is not a key here; allowed: {allowed}")
        arguments = {}
        for key, declared in fields.items():
            if key in value:
                arguments[declared.name] = self.convert(declared.type, value[key], under(path, key))
            elif declared.required:
                self.report(under(path, key), f"is missing; it must be {_allowed(declared.type)}")
                arguments[declared.name] = NOTHING
        if NOTHING in arguments.values():
            return NOTHING
        try:
            return type_(**arguments)
        except (ValueError, TypeError) as error:
            self.report(path, _masked(str(error), value))
            return NOTHING

    def _mapping(self, type_: Any, value: Mapping[str, Any], path: str) -> Any:
        of_key, of_value = get_args(unwrap(type_)[0]) or (str, Any)
        result = {}
        for name, member in value.items():
            at = under(path, name)
            key = self._leaf(of_key, name, at, "the name ")
            if (converted := self.convert(of_value, member, at)) is not NOTHING and key is not NOTHING:
                result[key] = converted
        return self._sized(type_, len(value), result if len(result) == len(value) else NOTHING, path)

    def _list(self, type_: Any, value: list[Any], path: str) -> Any:
        base, _ = unwrap(type_)
        of_item = (*get_args(base), Any)[0]
        items = [self.convert(of_item, item, under(path, index)) for index, item in enumerate(value)]
        result = NOTHING if any(item is NOTHING for item in items) else _LISTS[class_of(base)](items)
        return self._sized(type_, len(value), result, path)

    def _sized(self, type_: Any, size: int, result: Any, path: str) -> Any:
        least, most = _bound(type_, "min_length"), _bound(type_, "max_length")
        if (least is not None and size < least) or (most is not None and size > most):
            self.report(path, f"must be {_allowed(type_)}; there are {size}")
            return NOTHING
        return result

    def _leaf(self, type_: Any, value: Any, path: str, subject: str = "") -> Any:
        base, _ = unwrap(type_)
        message = f"{subject}must be {_allowed(type_)}{_remedy(base, value)}"
        try:
            if base is timedelta:
                return _duration_within(type_, value)
            # References and names are text. A number is converted from the text that spells it.
            spelled = base in (int, float, bool) and (isinstance(value, Reference) or subject != "")
            return msgspec.convert(str(value) if spelled else value, type_, strict=not spelled, dec_hook=_custom)
        except msgspec.ValidationError as error:
            if error.__cause__ is not None:  # the message of the type itself: an address, a secret, a plugin's own
                message = _masked(str(error.__cause__), value)
            elif " - at `" in str(error):  # inside a type that is not walked, such as a dataclass
                message = _masked(str(error), value)
        except ValueError:
            pass
        self.report(path, message)
        return NOTHING


def unwrap(type_: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without `Annotated` and aliases, and its annotations, the outermost last."""
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


def class_of(type_: Any) -> Any:
    """Return the class behind a type, or `Union`, or `object` if it has no class."""
    base, _ = unwrap(type_)
    origin = get_origin(base) or base
    return origin if isinstance(origin, type) or origin is Union else object


def is_struct(type_: Any) -> bool:
    """Tell whether a type is a msgspec struct."""
    kind = class_of(type_)
    return kind is not Union and issubclass(kind, msgspec.Struct)


def _metas(type_: Any) -> list[Meta]:
    return [note for note in unwrap(type_)[1] if isinstance(note, Meta)]


def _bound(type_: Any, name: str) -> Any:
    return next((bound for note in _metas(type_) if (bound := getattr(note, name)) is not None), None)


def _extra(type_: Any, name: str) -> Any:
    return next((extra for note in _metas(type_) if (extra := (note.extra or {}).get(name)) is not None), None)


def _masked(message: str, value: Any) -> str:
    """Return a type's message about a value without the referenced texts in the value.

    A short text of letters may be part of any word, so it is masked only as a word of its own.
    """
    for text in sorted(_referenced(value), key=len, reverse=True):
        is_word = text.isalpha() and len(text) < LEAST_LETTERS_OF_A_SECRET
        pattern = rf"(?<![^\W_]){text}(?![^\W_])" if is_word else re.escape(text)
        message = re.sub(pattern, "***", message)
    return message


def _referenced(value: Any) -> Iterator[str]:
    if isinstance(value, Reference) and value:
        yield str(value)
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _referenced(member)
    elif isinstance(value, list):
        for item in value:
            yield from _referenced(item)


def _custom(type_: Any, value: Any) -> Any:
    if issubclass(class_of(type_), Secret) and not isinstance(value, Reference):
        raise ValueError(f"is a secret, which is given by reference only: {HOW_TO_REFER}")
    if not isinstance(value, str):
        raise ValueError(f"must be {_allowed(type_)}")
    return type_(str(value))


def _duration_within(type_: Any, value: Any) -> timedelta:
    duration, within = duration_of(value), _extra(type_, "within")
    if within and not duration_of(within[0]) <= duration <= duration_of(within[1]):
        raise ValueError("out of bounds")
    return duration


def duration_of(value: Any) -> timedelta:
    """Return the duration that a text such as `5m` names. Raises `ValueError`."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
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
    PlainUrl: "an http:// or https:// address",
    PrivateCa: "certificates in PEM",
    Any: "any value",
}


def _allowed(type_: Any) -> str:
    """Describe the values of a type."""
    if allowed := _extra(type_, "allowed"):
        return str(allowed)
    base, notes = unwrap(type_)
    kind, arguments = class_of(base), get_args(base)
    if get_origin(base) is Literal:
        return list_of(arguments)
    if kind in _UNIONS:
        members = [Annotated[(member, *notes)] if notes else member for member in arguments if member is not NoneType]
        return " or ".join(dict.fromkeys(map(_allowed, members)))
    if issubclass(kind, Enum):
        return list_of([member.value for member in kind])
    if is_struct(base) or kind in _MAPPINGS:
        return "a mapping" + _size(type_, "entry", "entries")
    if kind in _LISTS:
        return f"a list{_size(type_, 'item', 'items')}, each {_allowed(arguments[0])}" if arguments else "a list"
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


def _remedy(base: Any, value: Any) -> str:
    """Return the remedy for a number or a `true` that stands for a text."""
    if base not in (str, timedelta) or not isinstance(value, int | float):
        return ""
    return ": put it in quotes" if base is str else ": write its unit"


def list_of(names: Iterable[Any], given: str = "", join: str = "or") -> str:
    """List names in words, and suggest the one that is most like `given`."""
    known = [str(name) for name in names]
    near = difflib.get_close_matches(given, known, n=1)
    listed = ", ".join(known) if len(known) < 2 else f"{', '.join(known[:-1])} {join} {known[-1]}"
    return f"{listed}; did you mean {near[0]}?" if near and len(known) > 1 else listed or "none is configured"
