"""`adapter/openapi.yaml`: what is published about the public port is what it does.

A real service, with a simulated Norce behind it, is asked everything that the description allows and more, and every
answer is held against it.
"""

import asyncio
import hmac
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from ruamel.yaml import YAML
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks
from starlette.routing import Route

from adapter import config as configuration
from adapter.callbacks import endpoints, limits, parsing, protocol
from adapter.callbacks.senders import sign
from adapter.callbacks.server import CALLBACK_PATH, PublicApp
from adapter.identifiers import Channel
from adapter.norce.client import NorceRefused, NorceRejected, NorceUnavailable, OrderNotFound
from adapter.registrations.endpoint import (
    DESCRIPTION_PATH,
    REGISTRATIONS_PATH,
    SCHEMA_PATH,
    Registrations,
    openapi,
    routes,
)
from adapter.registrations.on_orders import Registered
from tests.cli.test_cli import Serving
from tests.simulators import Served

DESCRIPTION: dict[str, Any] = YAML(typ="safe", pure=True).load(openapi())
# Every address of the public port. A callback's takes any method at first: which one, its kind decides.
SERVED = {
    CALLBACK_PATH: {"post", "get"},
    REGISTRATIONS_PATH: {"post", "delete"},
    SCHEMA_PATH: {"get"},
    DESCRIPTION_PATH: {"get"},
    "/livez": {"get"},
}
ENVIRON = {
    "TOKEN": "a token at norce",
    "URL_KEY": "a key for signing URLs",
    "HEADER": "Secret in-a-header",
    "STATIC": "a-secret-in-the-query",
}
CONFIG: dict[str, Any] = {
    "adapter": {"id": "jetshop_adapter", "public_url": "http://127.0.0.1:8080"},
    "server": {"host": "127.0.0.1", "port": 0},
    "operations": {"port": 0, "socket": None},
    "merchants": {"norce": {"tokens": ["${env:TOKEN}"], "channels": {"1": {}}}},
    "senders": {
        "signed_urls": {"keys": {"k1": "${env:URL_KEY}"}},
        "header_secrets": [{"header": "Authorization", "values": ["${env:HEADER}"]}],
        "url_secrets": [{"parameter": "secret", "values": ["${env:STATIC}"]}],
    },
    "callbacks": {
        "order-status": {"kind": "notification", "scope": "/state/currentStatus"},
        "order-rules": {"kind": "validation"},
        "cart-changed": {"kind": "hook", "watch": "/cart", "target": "/cart"},
    },
    "routes": {
        "told": {"callback": "order-status", "handler": "log"},
        "in-euros": {
            "callback": "order-rules",
            "handler": "rules",
            "no_answer": "reject",
            "settings": {
                "rules": [{"scope": "/currency", "schema": {"const": "EUR"}, "code": "not-in-euros", "message": "No."}]
            },
        },
        "small-ones-only": {
            "callback": "cart-changed",
            "handler": "rules",
            "no_answer": "approve",
            "settings": {
                "rules": [{"scope": "/total", "schema": {"maximum": 100}, "code": "too-large", "message": "No."}]
            },
        },
        "volume-prices": {
            "callback": "cart-changed",
            "handler": "patch",
            "no_answer": "approve",
            "settings": {
                "changes": [{"scope": "/cart/many", "schema": {"const": True}, "path": "/cart/prices", "value": "low"}]
            },
        },
    },
}


def loaded(folder: Path, norce: str = "http://127.0.0.1:1") -> configuration.Config:
    path = folder / "config.yaml"
    places = {"norce": {"base_url": norce}, "store": {"url": f"sqlite:///{folder}/ledger.db"}}
    path.write_text(json.dumps(CONFIG | places))
    return configuration.load(path, ENVIRON)


# --- what it says -----------------------------------------------------------------------------------------------------

SCHEMA = schemathesis.openapi.from_dict(
    DESCRIPTION,
    config=schemathesis.Config.from_dict(
        {"seed": 1, "generation": {"deterministic": True, "max-examples": 8, "database": "none"}}
    ),
)


def test_the_description_is_openapi_3_1() -> None:
    assert DESCRIPTION["openapi"].startswith("3.1.")
    SCHEMA.validate()


def test_the_schemas_are_json_schemas() -> None:
    for schema in DESCRIPTION["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


class Broken:
    """A registrar with a scripted Norce."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    async def register(self, *_: Any) -> Any:
        if self._error:
            raise self._error
        return Registered()

    deregister = register


def app_of(registrations: Registrations) -> PublicApp:
    """Return the application of the public port; its callbacks lead nowhere."""

    async def unused(*_: Any) -> None:
        raise NotImplementedError

    endpoint: Any = unused
    return PublicApp(endpoint, routes(registrations, "our_adapter", {}))


def test_the_description_has_every_address_of_the_public_port_and_no_other(tmp_path: Path) -> None:
    router = app_of(Registrations(loaded(tmp_path), Broken(None), ())).router
    routes = [route for route in router.routes if isinstance(route, Route)]
    methods = {route.path: {each.lower() for each in route.methods} - {"head"} for route in routes}

    described = {path: {each for each in item if each != "parameters"} for path, item in DESCRIPTION["paths"].items()}
    assert len(routes) == len(router.routes)
    assert methods | {CALLBACK_PATH: SERVED[CALLBACK_PATH]} == SERVED
    assert described == SERVED


def test_the_limits_in_the_description_are_those_of_the_service() -> None:
    text = DESCRIPTION["info"]["description"]

    assert (
        f"longer than {protocol.LONGEST_HEAD_SECONDS:.0f} s or exceeds {protocol.LARGEST_HEAD_BYTES // 1024} KiB"
        in text
    )
    assert (protocol.LONGEST_HEAD_SECONDS, protocol.LARGEST_HEAD_BYTES) == (10, 32 * 1024)
    assert (protocol.LONGEST_UNREAD_SECONDS, protocol.LARGEST_FRAMING_BYTES) == (10, 8 * 1024)
    assert f"more than {protocol.MOST_FIELDS} fields" in " ".join(text.split())
    assert DESCRIPTION["components"]["parameters"]["OrderId"]["schema"]["maxLength"] == parsing.LONGEST_ID == 64
    assert (limits.MOST_AT_ONCE, limits.MOST_WAITING) == (500, 2000)


def resolved(part: dict[str, Any]) -> dict[str, Any]:
    """The part, or what it refers to."""
    for step in part.get("$ref", "").split("/")[1:]:
        part = DESCRIPTION[step] if step == "components" else part[step]
    return part


def codes(path: str, method: str) -> dict[int, set[str]]:
    """The statuses of an operation with the codes of their errors; none where it is a handler that chooses them."""
    found = {}
    for status, response in DESCRIPTION["paths"][path][method]["responses"].items():
        content = resolved(response).get("content", {}).get("application/json", {})
        code = content.get("schema", {}).get("properties", {}).get("code", {})
        found[int(status)] = set(code.get("enum", [])) | ({code["const"]} if "const" in code else set())
    return found


def test_callbacks_are_answered_with_the_statuses_and_codes_that_are_described() -> None:
    described = codes(CALLBACK_PATH, "post") | {405: codes(CALLBACK_PATH, "get")[405]}
    answered = {(status, code) for status, code, _ in endpoints.STATUS.values() if status != 400}
    answered |= {(404, "not-found")}
    by_the_server = {answer.partition(b"\r\n\r\n")[2] for answer in (protocol.OVERLOADED, protocol.TOO_SLOW)}

    assert {(status, code) for status, of_status in described.items() for code in of_status} == answered
    assert {json.loads(body)["code"] for body in by_the_server} <= {code for _, code in answered}
    assert described.keys() == {200, 400, *(status for status, *_ in endpoints.STATUS.values())}
    # A validation has no body that could be of the wrong type, and stores nothing.
    only_of_a_post = {status: described[status] for status in (415, 429)}
    assert codes(CALLBACK_PATH, "get") | only_of_a_post == described | {503: {"overloaded", "order-busy"}}


# --- what is answered -------------------------------------------------------------------------------------------------


class Service(Serving):
    """The service on loopback, in a thread of its own, and a Norce in another that has one order."""

    def __init__(self, folder: Path) -> None:
        self.norce = Served(ENVIRON["TOKEN"])
        loaded(folder, self.norce.url)
        super().__init__(folder / "config.yaml", ENVIRON)
        self.order_id = self.norce.ask("create_order", {"currency": "SEK"})["id"]

    def close(self) -> None:
        super().close()
        self.norce.close()


def asked(asgi: Any, method: str, url: str, headers: dict[str, str]) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(asgi)) as http:
            return await http.request(method, url, headers=headers)

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    serving = Service(tmp_path_factory.mktemp("openapi"))
    yield serving
    serving.close()


CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.unsupported_method,
]
ABOUT_CONTENT = [openapi_checks.content_type_conformance, openapi_checks.response_schema_conformance]


def answered(case: Any, service: Service) -> Any:
    """The answer, which is as described."""
    response = case.call(base_url=service.address)
    excluded = []
    if response.status_code == 200 and not response.content:
        # OpenAPI cannot say of a 200 that it has a body for some and none for others: the text does.
        assert case.path_parameters["callback"] != "cart-changed"
        excluded += ABOUT_CONTENT
    if response.status_code == 503 and response.json()["code"] == "order-busy":  # many requests are for one order
        excluded.append(checks.not_a_server_error)
    if response.status_code == 401:  # before anything is said about methods
        excluded.append(openapi_checks.unsupported_method)
    case.validate_response(response, checks=CHECKS, excluded_checks=excluded)
    return response


def signed(case: Any) -> None:
    order_id, callback = (str(case.path_parameters[name]) for name in ("order_id", "callback"))
    keyed = hmac.new(ENVIRON["URL_KEY"].encode(), digestmod="sha256")
    sig = sign(keyed, Channel("norce", "1"), order_id, callback)
    case.query = {"merchant": "norce", "channel": "1", "key": "k1", "sig": sig}


def by_header(case: Any) -> None:
    case.query = {}
    case.headers["Authorization"] = ENVIRON["HEADER"]


def by_url(case: Any) -> None:
    case.query = {"secret": ENVIRON["STATIC"]}


def by_token(case: Any) -> None:
    case.headers["Authorization"] = f"Bearer {ENVIRON['TOKEN']}"


SHOP = {"x-merchant": "norce", "x-channel": "1"}


def case_of(service: Service, method: str, path: str, callback: str, **given: Any) -> Any:
    """A request about the order that there is."""
    body = given.pop("body", None)
    content = {} if body is None else {"body": body, "media_type": "application/json"}
    parameters = {"order_id": given.pop("order_id", service.order_id)} | ({"callback": callback} if callback else {})
    headers = SHOP | given.pop("headers", {})
    return SCHEMA[path][method].Case(path_parameters=parameters, headers=headers, **content)


ORDER = {"merchant": "norce", "channel": "1", "lastModified": "2026-02-03T08:16:35.870Z", "total": 1}
CALLS = {
    "a notification": ("post", "order-status", signed, {"body": ORDER}, 200),
    "a notification in an envelope": (
        "post",
        "order-status",
        by_url,
        {"body": {"notification": {}, "order": ORDER}},
        200,
    ),
    "another order's body": ("post", "order-status", by_header, {"body": {"id": "another"}}, 400),
    "an id that is too long": ("post", "order-status", by_header, {"order_id": "x" * 65, "body": ORDER}, 400),
    "no secret": ("post", "order-status", None, {"body": ORDER}, 401),
    "a placeholder for an id": ("post", "order-status", by_header, {"order_id": "{order.id}", "body": ORDER}, 404),
    "a slash in the id": ("post", "order-status", by_header, {"order_id": "a/slash", "body": ORDER}, 404),
    "no body": ("post", "order-status", by_header, {}, 415),
    "no name of a merchant": (
        "post",
        "order-status",
        by_header,
        {"headers": {"x-merchant": "no name"}, "body": {}},
        404,
    ),
    "no name of a callback": ("post", "No-Name", by_header, {"body": ORDER}, 404),
    "an order under an unknown name": ("post", "never-known", by_header, {"body": ORDER}, 200),
    "an unknown name without a body": ("post", "never-known", by_header, {}, 200),
    "an unknown name by GET": ("get", "never-known", by_header, {}, 200),
    "a body that is too large": ("post", "order-status", by_header, {"body": {"large": "x" * 1024 * 1024}}, 413),
    "a notification by GET": ("get", "order-status", by_header, {}, 405),
    "a validation that is not passed": ("post", "order-rules", signed, {}, 400),
    "the same by GET": ("get", "order-rules", by_header, {}, 400),
    "a validation of an order that Norce has not": ("get", "order-rules", by_header, {"order_id": "unknown"}, 404),
    "a validation with a secret in the URL": ("post", "order-rules", by_url, {}, 401),
    "a validation without a secret": ("get", "order-rules", None, {}, 401),
    "a hook that accepts": ("post", "cart-changed", signed, {"body": ORDER}, 200),
    "a hook that patches": ("post", "cart-changed", signed, {"body": ORDER | {"cart": {"many": True}}}, 200),
    "a hook that refuses": ("post", "cart-changed", signed, {"body": ORDER | {"total": 101}}, 400),
    "a hook without a body": ("post", "cart-changed", signed, {}, 415),
    "a hook by GET": ("get", "cart-changed", signed, {}, 405),
}


@pytest.mark.parametrize(("method", "callback", "caller", "given", "status"), CALLS.values(), ids=CALLS)
def test_a_callback_is_answered_as_described(
    service: Service,
    method: str,
    callback: str,
    caller: Callable[[Any], None] | None,
    given: dict[str, Any],
    status: int,
) -> None:
    case = case_of(service, method, CALLBACK_PATH, callback, **given)
    if caller:
        caller(case)

    assert answered(case, service).status_code == status


def test_callbacks_are_registered_and_removed_as_described(service: Service) -> None:
    def sent(method: str, caller: Callable[[Any], None] = by_token, **given: Any) -> Any:
        case = case_of(service, method, REGISTRATIONS_PATH, "", **given)
        caller(case)
        return answered(case, service)

    names = sorted(CONFIG["callbacks"])
    assert sent("post").json() == {"added": names, "removed": [], "kept": []}
    assert sent("post", by_header).json() == {"added": [], "removed": [], "kept": names}
    assert sent("delete").json() == {"added": [], "removed": names, "kept": []}
    assert sent("delete", by_url).status_code == 401
    assert sent("post", order_id="unknown").status_code == 404
    assert sent("post", order_id="x" * 65).status_code == 400
    assert sent("post", headers={"x-channel": "2"}).status_code == 404


REFUSALS: list[dict[str, Any]] = [
    {"error": OrderNotFound("")},
    {"error": NorceUnavailable("")},
    {"error": NorceRejected("")},
    {"error": NorceRefused("")},
    {"order_id": "x" * 65},
    {"order_id": "a/slash"},
    {"headers": SHOP | {"authorization": ""}},
    {"headers": SHOP | {"x-channel": "2"}},
]
ONLY_OF_A_POST: list[dict[str, Any]] = [{"error": LookupError()}, {"switched_off": {("norce", "1")}}]


@pytest.mark.parametrize("method", ["post", "delete"])
def test_registrations_are_refused_with_the_statuses_and_codes_that_are_described(tmp_path: Path, method: str) -> None:
    config = loaded(tmp_path)
    case = SCHEMA[REGISTRATIONS_PATH][method].Case(path_parameters={"order_id": "o"})
    refused = {(503, "overloaded")}
    for given in REFUSALS + (ONLY_OF_A_POST if method == "post" else []):
        registrations = Registrations(config, Broken(given.get("error")), given.get("switched_off", ()))
        headers = {"authorization": f"Bearer {ENVIRON['TOKEN']}"} | SHOP | given.get("headers", {})
        url = f"http://adapter/api/v1/orders/{given.get('order_id', 'o')}/registrations"
        answer = asked(app_of(registrations), method, url, headers)
        case.validate_response(answer, checks=CHECKS, excluded_checks=[checks.not_a_server_error])
        refused.add((answer.status_code, answer.json()["code"]))

    described = codes(REGISTRATIONS_PATH, method)
    assert {(status, code) for status, of_status in described.items() for code in of_status} == refused
    assert described.keys() == {200, *(status for status, _ in refused)}


# --- random requests --------------------------------------------------------------------------------------------------


@SCHEMA.include(path=list(SERVED)).parametrize()
def test_a_caller_without_a_secret_is_answered_as_described(case: Any, service: Service) -> None:
    answer = answered(case, service)

    if DESCRIPTION["paths"][case.operation.path][case.operation.method]["security"]:
        assert answer.status_code in (401, 404, 405)


@pytest.mark.parametrize(
    ("caller", "callback"),
    [
        (signed, "order-status"),
        (by_header, "order-status"),
        (by_header, "order-rules"),
        (by_url, "order-status"),
        (signed, "cart-changed"),
        (by_header, ""),
    ],
)
@SCHEMA.include(path=CALLBACK_PATH).parametrize()
def test_a_known_caller_is_answered_as_described(
    case: Any, service: Service, caller: Callable[[Any], None], callback: str
) -> None:
    if callback:
        case.path_parameters["callback"] = callback
    if not case.headers.get("x-merchant"):
        case.headers.update(SHOP)
    caller(case)

    answered(case, service)


@pytest.mark.parametrize(("caller", "is_known"), [(by_token, True), (by_header, False)])
@SCHEMA.include(path=REGISTRATIONS_PATH).parametrize()
def test_a_merchants_system_is_answered_as_described(
    case: Any, service: Service, caller: Callable[[Any], None], is_known: bool
) -> None:
    if is_known:
        case.path_parameters["order_id"] = service.order_id
    case.headers.update(SHOP)
    caller(case)

    answered(case, service)
