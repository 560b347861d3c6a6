"""The schemas of our types: of the file, for editors, and of the document in Norce's configuration."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from adapter import config as configuration
from adapter.config import ConfigurationInvalid
from adapter.config.convert import Converter
from adapter.config.json_schema import changeable, document_schema, file_schema
from adapter.config.model import merged
from adapter.config.yaml_source import Document
from adapter.plugin import Secret, Settings, Url
from adapter.routing.routes import settings_types
from tests import ROOT
from tests.config.reference import BUNDLED_TYPES
from tests.config.test_config import everything_commented_in

FILE = file_schema(BUNDLED_TYPES)


class Anything(dict[str, str]):
    """An environment in which every variable is set: its value is the reference itself."""

    def get(self, name: str, default: Any = None) -> Any:
        return f"${{env:{name}}}"

    __getitem__ = get  # type: ignore[assignment]

    def __contains__(self, _name: object) -> bool:
        return True


def tree(path: Path) -> Any:
    """Return the file as an editor sees it, with unresolved references."""
    return Document(path, Anything()).read()


def wrong(document: Any, schema: dict[str, Any] = FILE) -> list[str]:
    return sorted(error.json_path for error in Draft202012Validator(schema).iter_errors(document))


def test_the_reference_fits_its_schema() -> None:
    assert wrong(tree(ROOT / "config.yaml")) == []
    assert wrong(tree(ROOT / "docs/scenarios.yaml")) == []


@pytest.mark.parametrize(
    ("path", "value", "at"),
    [
        ("adapter", None, "$.adapter"),
        ("server.port", "eighty", "$.server.port"),
        ("server.port", 99999, "$.server.port"),
        ("server.receive_timeout", 10, "$.server.receive_timeout"),
        ("server.receive_timeout", "soon", "$.server.receive_timeout"),
        ("server.colour", "red", "$.server"),
        ("norce.environment", "moon", "$.norce.environment"),
        ("merchants.norce.tokens", ["in-plain-text"], "$.merchants.norce.tokens[0]"),
        ("merchants.norce.tokens", [], "$.merchants.norce.tokens"),
        ("routes.export-payment.settings.method_map", [], "$.routes['export-payment'].settings.method_map"),
        ("routes.export-payment.settings.colour", "red", "$.routes['export-payment'].settings"),
        ("routes.export-payment.concurrency", 0, "$.routes['export-payment'].concurrency"),
    ],
)
def test_an_editor_shows_a_mistake_where_it_is(path: str, value: Any, at: str) -> None:
    document = tree(ROOT / "config.yaml")
    *around, last = path.split(".")
    place = document
    for step in around:
        place = place[step]
    place[last] = value

    assert at in wrong(document)


def test_every_key_of_the_reference_is_known(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(everything_commented_in((ROOT / "config.yaml").read_text("utf-8")), "utf-8")

    assert wrong(tree(path)) == []


def test_a_reference_stands_for_a_number_a_duration_and_a_secret() -> None:
    document = tree(ROOT / "config.yaml")
    document["server"] |= {"port": "${env:PORT}", "receive_timeout": "${file:timeout}"}

    assert wrong(document) == []


def test_no_setting_of_a_route_is_required_because_a_merchant_may_have_it() -> None:
    document = tree(ROOT / "config.yaml")
    settings = document["routes"]["export-payment"]["settings"]
    del settings["shop_id"], settings["auth"]["password"], settings["method_map"]["klarna_checkout_adapter"]["code"]

    assert wrong(document) == []


def test_a_handler_that_cannot_be_imported_is_reported_and_skipped() -> None:
    group = "norce_adapter.handlers"
    points = [
        EntryPoint("rules", "adapter.handlers.rules:Rules", group),
        EntryPoint("gone", "adapter.handlers.gone:Gone", group),
        EntryPoint("no-handler", "json:loads", group),
    ]

    types, broken = settings_types(points)

    assert (types, broken) == ({"rules": BUNDLED_TYPES["rules"]}, ["gone", "no-handler"])


def test_any_settings_are_allowed_for_an_unknown_handler() -> None:
    document = tree(ROOT / "config.yaml")
    document["routes"]["export-payment"] |= {"handler": "erp", "settings": {"anything": ["goes"]}}

    assert wrong(document) == []


names = st.from_regex(r"[a-z]{1,8}(-[a-z]{1,4})?", fullmatch=True)
durations = st.sampled_from(["500ms", "1s", "2s", "5s"])


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Draw small configurations, valid and invalid."""
    callbacks: dict[str, Any] = {}
    for name in draw(st.lists(names, unique=True, max_size=3)):
        kind = draw(st.sampled_from(["notification", "validation", "hook"]))
        callbacks[name] = {"kind": kind} | {
            "notification": {"scope": "/state", "schema": draw(st.sampled_from([True, {"const": 1}]))},
            "validation": {"deadline": draw(durations)},
            "hook": {"watch": draw(st.sampled_from(["/cart", "/customer"])), "deadline": draw(durations)},
        }[kind]
    return {
        "adapter": {"id": draw(st.text(min_size=0, max_size=3)), "public_url": "https://adapter.example"},
        "server": draw(st.sampled_from([{}, {"port": 0}, {"port": -1}, {"port": "80"}])),
        "merchants": {draw(names): {"tokens": ["${env:TOKEN}"], "channels": {draw(names): {}}}},
        "senders": {"signed_urls": {"keys": {"k": "${env:KEY}"}}},
        "callbacks": callbacks,
    }


@given(document=configurations())
@settings(deadline=None)
def test_the_schema_accepts_exactly_what_the_service_accepts(
    document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("schemas") / "config.yaml"
    path.write_text(json.dumps(document))
    try:
        configuration.load(path, {"TOKEN": "a token", "KEY": "a key that is long enough"})
        taken = True
    except ConfigurationInvalid:
        taken = False

    assert (wrong(document) == []) == taken


def described(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        for name, each in schema.get("properties", {}).items():
            yield name, each
        for each in schema.values():
            yield from described(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from described(each)


def has_description(schema: dict[str, Any]) -> bool:
    """Tell whether a key has a description, its own or that of its section."""
    sections = [schema, *schema.get("anyOf", ())]
    references = [each["$ref"].removeprefix("#/$defs/") for each in sections if "$ref" in each]
    return "description" in schema or any("description" in FILE["$defs"][name] for name in references)


def test_every_key_and_every_setting_of_a_bundled_handler_is_described() -> None:
    tags = ("kind", "type")  # the whole of a callback or a login describes them
    undescribed = [name for name, each in described(FILE) if name not in tags and not has_description(each)]

    # The name of the handler in the condition that selects its settings; it is described where it is declared.
    assert set(undescribed) == {"handler"}


# --- the document in Norce's configuration ---------------------------------------------------------------------------


class Login(msgspec.Struct, frozen=True, kw_only=True):
    user: str
    password: Secret


class Deep(msgspec.Struct, frozen=True, kw_only=True):
    hosts: tuple[Url, ...] = ()


class Own:
    """A plugin's own type, for which no schema can be made."""

    def __init__(self, text: str = "") -> None:
        self.text = text


class Shop(Settings, frozen=True, kw_only=True):
    base_url: Annotated[Url, msgspec.Meta(description="Where it is.")]
    login: Login
    deep: dict[str, Deep] = {}  # noqa: RUF012 - a struct copies it
    shop_id: Annotated[str, msgspec.Meta(description="Which it is.")] = "1"
    patience: timedelta = timedelta(seconds=90)
    mode: Literal["fast", "slow"] = "fast"
    tolerance: Decimal = Decimal("0.01")
    own: Own | None = None


SCHEMA = document_schema("our_adapter", "https://adapter.example", {"export": Shop})
BASIC = {"$schema": SCHEMA["$id"], "id": "our_adapter"}


def with_settings(**settings: Any) -> dict[str, Any]:
    return BASIC | {"routes": {"export": {"settings": settings}}}


def test_the_document_cannot_change_hosts_or_credentials_at_any_depth() -> None:
    assert changeable(Shop) == {"shop_id", "patience", "mode", "tolerance", "own"}
    for name in ("base_url", "login", "deep"):
        assert wrong(with_settings(**{name: {}}), SCHEMA) == ["$.routes.export.settings"]
    assert not [word for word in ("password", "hosts", "proxy.example") if word in json.dumps([SCHEMA, WILD])]


class ShopUrl(Url):
    __slots__ = ()


@dataclass(frozen=True)
class Proxy:
    url: Url


class Mirror(TypedDict):
    url: Url


class Pair(NamedTuple):
    name: str
    url: Url


T = TypeVar("T")


class Box(msgspec.Struct, Generic[T], frozen=True):
    content: T


class Tree(msgspec.Struct, frozen=True):
    branches: "tuple[Tree, ...]" = ()
    login: Login | None = None


@pytest.mark.parametrize(
    "type_",
    [
        ShopUrl,
        NewType("Base", Url),
        Url | None,
        tuple[Proxy, ...],
        dict[str, Mirror],
        Pair,
        Box[Secret],
        Box[Box[ShopUrl]],
        Tree,
    ],
    ids=str,
)
def test_a_host_is_found_in_every_kind_of_type(type_: Any) -> None:
    settings_type = msgspec.defstruct("Odd", [("there", type_), ("name", str)], bases=(Settings,), kw_only=True)

    assert changeable(settings_type) == {"name"}


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Parcel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    size: int
    wait: timedelta | None = None


class Others(Settings, frozen=True, kw_only=True):
    class Parcel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        weight: int

    parcels: tuple[Parcel, ...]


class Wild(Settings, frozen=True, kw_only=True):
    """Settings with defaults that are not plain values, and with types that msgspec does not support."""

    own: Own = Own()
    owns: tuple[Own, ...] = (Own(),)
    colour: Colour = Colour.RED
    colours: tuple[Colour, ...] = (Colour.GREEN,)
    waits: tuple[timedelta, ...] = (timedelta(minutes=2),)
    parcels: tuple[Parcel, ...] = (Parcel(size=1, wait=timedelta(seconds=5)),)
    by_name: dict[str, Parcel] = {}  # noqa: RUF012 - a struct copies it
    proxy: Proxy = Proxy(Url("https://proxy.example"))
    base_url: Url = Url("https://shop.example")
    call: Any = max
    box: Box[int] = Box(content=1)
    either: int | tuple[str, ...] | None = None
    until: date = date(2030, 1, 1)
    titled: Annotated[int, msgspec.Meta(title="Seven", ge=7, le=7)] = 7


WILD = document_schema("our_adapter", "https://adapter.example", {"wild": Wild})


def settings_in(schema: dict[str, Any], route: str) -> dict[str, Any]:
    settings: dict[str, Any] = schema["properties"]["routes"]["properties"][route]["properties"]["settings"]
    return settings["properties"]


def test_a_schema_is_made_for_every_type_that_a_plugin_may_declare() -> None:
    in_file = file_schema({"wild": Wild})
    Draft202012Validator.check_schema(in_file)
    Draft202012Validator.check_schema(WILD)

    [of_wild] = in_file["$defs"]["RouteConfig"]["allOf"]
    shown = {n: each.get("default") for n, each in of_wild["then"]["properties"]["settings"]["properties"].items()}
    assert {name: shown[name] for name in settings_in(WILD, "wild")} == {
        "own": None,
        "owns": None,
        "colour": "red",
        "colours": ["green"],
        "waits": ["2m"],
        "parcels": None,
        "by_name": {},
        "call": None,
        "box": None,
        "either": None,
        "until": "2030-01-01",
        "titled": 7,
    }
    assert settings_in(WILD, "wild")["titled"]["title"] == "Seven"


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({}, ""),
        ({"own": "any", "owns": ["a", "b"], "call": {"a": 1}}, ""),
        ({"colour": "green", "colours": [], "waits": ["1d"], "until": "2031-01-01"}, ""),
        ({"parcels": [{"size": 2}], "by_name": {"a": {"wait": None}}, "box": {}, "either": ["a"]}, ""),
        ({"parcels": [{"size": "large"}]}, ".parcels[0].size"),
        ({"by_name": {"a": {"wait": 1}}}, ".by_name.a.wait"),
        ({"box": {"content": "a"}}, ".box.content"),
        ({"colours": ["blue"]}, ".colours[0]"),
        ({"titled": 8}, ".titled"),
    ],
    ids=str,
)
def test_settings_in_the_document_may_be_partial(settings: dict[str, Any], at: str) -> None:
    document = BASIC | {"routes": {"wild": {"settings": settings}}}
    configured = {"by_name": {"a": {"size": 1}}, "box": {"content": 1}}
    problems: list[str] = []
    Converter(lambda path, _: problems.append(path)).convert(Wild, merged(configured, settings), "")

    assert wrong(document, WILD) == ([f"$.routes.wild.settings{at}"] if at else [])
    assert bool(problems) == bool(at), "the reader says otherwise"


def test_types_of_the_same_name_have_separate_schemas() -> None:
    schema = document_schema("our_adapter", "https://adapter.example", {"wild": Wild, "other": Others})
    routes = {"wild": {"settings": {"parcels": [{"size": 1}]}}, "other": {"settings": {"parcels": [{"weight": 1}]}}}

    assert wrong(BASIC | {"routes": routes}, schema) == []
    routes["other"], routes["wild"] = routes["wild"], routes["other"]
    assert wrong(BASIC | {"routes": routes}, schema) != []


def test_the_document_schema_refers_to_no_other_and_extends_the_basic_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    example = json.loads((ROOT / "adapter/norce/schemas/adapter-configuration.json").read_text("utf-8"))

    assert SCHEMA["$id"] == "https://adapter.example/openapi/v1/schemas/our_adapter.json"
    assert set(example["required"]) == set(SCHEMA["required"])
    assert set(example["properties"]) <= {*SCHEMA["properties"], "$schema"}
    assert "http" not in json.dumps(SCHEMA["$defs"])


@pytest.mark.parametrize(
    ("document", "at"),
    [
        (BASIC, []),
        (BASIC | {"active": False, "settings": {"of": "somebody"}}, []),
        (BASIC | {"adapter": {"publicUrl": "https://adapter.example"}}, []),
        (with_settings(shop_id="2", patience="2m", mode="slow", tolerance=0.05, own="any"), []),
        ({"id": "our_adapter"}, ["$"]),
        (BASIC | {"id": "another"}, ["$.id"]),
        (BASIC | {"active": "no"}, ["$.active"]),
        (BASIC | {"adapter": {}}, ["$.adapter"]),
        (BASIC | {"routes": {"another": {}}}, ["$.routes"]),
        (with_settings(colour="red"), ["$.routes.export.settings"]),
        (with_settings(patience=90), ["$.routes.export.settings.patience"]),
        (with_settings(mode="${env:MODE}"), ["$.routes.export.settings.mode"]),
    ],
)
def test_the_document_schema_accepts_valid_documents_only(document: Any, at: list[str]) -> None:
    assert wrong(document, SCHEMA) == at


def test_the_document_schema_has_what_a_form_needs() -> None:
    settings = settings_in(SCHEMA, "export")

    assert settings["shop_id"] == {"type": "string", "title": "Shop id", "description": "Which it is."}
    assert settings["mode"]["enum"] == ["fast", "slow"]
    assert settings["tolerance"]["format"] == "decimal"


def test_a_saved_form_without_changes_changes_no_setting() -> None:
    assert all("default" not in shown for shown in settings_in(SCHEMA, "export").values())
