"""The handler `http`: sends orders to a URL, or asks it whether a purchase may proceed.

`context.http` limits it to the host in the settings and raises the outcomes of a missing answer and of most statuses.
The body of an answer is never logged, stored or shown, because it may quote the customer. There are two exceptions: the
destination's own reference for the order, and the problems of a validation, which are meant for the shopper.
"""

import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import datetime
from hmac import digest
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import quote

import httpx
import msgspec
from jsonpointer import EndOfList, JsonPointer, JsonPointerException

from adapter.plugin import (
    Context,
    Done,
    Misconfigured,
    Notification,
    NotificationHandler,
    Order,
    Outcome,
    Problem,
    Reject,
    Retry,
    Secret,
    Settings,
    Unknown,
    Url,
    ValidationHandler,
)

ABSENT = object()
LONGEST_REFERENCE = 200
NOT_DONE = frozenset({"retry", "reject", "misconfigured"})  # nothing has happened
_TEXT = re.compile(r"[\x21-\x7e]+")
_PLACEHOLDER = re.compile(r"\{(order_id|key)\}")
_PATH = r"(/(?!\.{1,2}(/|$))([A-Za-z0-9._~-]|\{(order_id|key)\})+)*(?!\n)$"

Pointer: TypeAlias = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^(/([^/~]|~[01])*)*(?!\n)$", extra={"allowed": "a JSON Pointer such as /total/includingVat"}
    ),
]
LookupPath: TypeAlias = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^(?=.*\{(order_id|key)\})" + _PATH,
        extra={"allowed": "a plain path with {order_id} or {key}, such as /orders/{order_id}"},
    ),
]
Meaning: TypeAlias = Literal["done", "retry", "reject", "misconfigured", "unknown"]
RAISED: dict[str, type[Outcome]] = {
    "retry": Retry,
    "reject": Reject,
    "misconfigured": Misconfigured,
    "unknown": Unknown,
}


class HttpBearer(Settings, frozen=True, kw_only=True, tag_field="type", tag="bearer"):
    """`Authorization: Bearer …`."""

    token: Annotated[Secret, msgspec.Meta(description="The token, by reference.")]

    def __post_init__(self) -> None:
        if not _TEXT.fullmatch(self.token.reveal()):
            raise ValueError("token must be plain ASCII text without spaces")

    def headers(self, _message: str, _sent_at: datetime, _body: bytes) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token.reveal()}"}


class HttpSignature(Settings, frozen=True, kw_only=True, tag_field="type", tag="signature"):
    """A signature over id, time and body, by Standard Webhooks 1.0."""

    secrets: Annotated[
        tuple[Secret, ...],
        msgspec.Meta(
            min_length=1,
            description="Each is `whsec_` and 24 to 64 bytes in base64, by reference. All of them sign: two during a "
            "rotation.",
        ),
    ]

    def __post_init__(self) -> None:
        for secret in self.secrets:
            _key(secret)

    def headers(self, message: str, sent_at: datetime, body: bytes) -> dict[str, str]:
        """Return the headers with the signatures of a message, which is named by its id."""
        timestamp = str(int(sent_at.timestamp()))
        signed = f"{message}.{timestamp}.".encode() + body
        signatures = (b64encode(digest(_key(secret), signed, "sha256")).decode() for secret in self.secrets)
        return {
            "webhook-id": message,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
        }


def _key(secret: Secret) -> bytes:
    try:
        key = b64decode(secret.reveal().removeprefix("whsec_"), validate=True)
    except ValueError:
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError("secrets: each must be whsec_ and 24 to 64 bytes in base64")
    return key


class HttpSettings(Settings, frozen=True, kw_only=True):
    """The settings of the handler `http`."""

    url: Annotated[Url, msgspec.Meta(description="The destination. The handler reaches only this host.")]
    path: Annotated[
        str,
        msgspec.Meta(
            pattern="^" + _PATH,
            description="Path below `url`. `{order_id}` and `{key}` (the idempotency key) are filled in.",
            extra={"allowed": "a plain path such as /orders/{order_id}, with no placeholder but {order_id} and {key}"},
        ),
    ] = ""
    method: Annotated[Literal["POST", "PUT"], msgspec.Meta(description="Method of the request.")] = "POST"
    auth: Annotated[
        HttpBearer | HttpSignature,
        msgspec.Meta(description="How we identify ourselves; `type` is `bearer` or `signature` (Standard Webhooks)."),
    ]
    members: Annotated[
        dict[str, Pointer],
        msgspec.Meta(
            description="The body, as names with JSON Pointers into the order (`total: /total/includingVat`); what the "
            "order lacks is left out. Without it, the body is the whole order."
        ),
    ] = msgspec.field(default_factory=dict)
    statuses: Annotated[
        dict[Annotated[int, msgspec.Meta(ge=300, le=599)], Meaning],
        msgspec.Meta(
            description="Notifications: the meaning of a status other than 2xx. `done`: the order is there; `unknown`: "
            "it is looked up; `retry`, `reject` and `misconfigured`: the destination never sends it after it has acted."
        ),
    ] = msgspec.field(default_factory=dict)
    reference: Annotated[
        Pointer | None,
        msgspec.Meta(
            description="Notifications: JSON Pointer into the answer, to the destination's number for the order. It is "
            "stored and shown to operators."
        ),
    ] = None
    lookup_path: Annotated[
        LookupPath | None,
        msgspec.Meta(
            description="Notifications: path below `url` for a GET after an unknown outcome. 2xx: the order is there; "
            "404: it is not. With `{key}` it finds every delivery, with `{order_id}` only the first one of an order."
        ),
    ] = None
    repeatable: Annotated[
        bool,
        msgspec.Meta(
            description="Notifications: the destination ignores a second request with the same `Idempotency-Key`. An "
            "order in doubt that cannot be looked up is then sent again; otherwise it waits for a person."
        ),
    ] = False


class HttpHandler(NotificationHandler[HttpSettings], ValidationHandler[HttpSettings]):
    """The handler `http`: sends orders to a URL, or asks it whether a purchase may proceed."""

    lookup_by_key = True  # where the path has no key, `lookup` does not ask

    async def deliver(self, notification: Notification, context: Context[HttpSettings]) -> Done:
        """Send the order and return or raise what the status means."""
        statuses = context.settings.statuses
        not_done = {status for status, meaning in statuses.items() if meaning in NOT_DONE}
        answer = await _send(notification.order, context, context.key(), {"not_done": not_done})
        meaning = statuses.get(answer.status_code)
        if meaning == "done":
            return Done()
        try:
            return _done(answer, context.settings)
        except Outcome as usual:
            if meaning is None:
                raise
            raise _as(RAISED[meaning], usual) from usual

    async def lookup(self, notification: Notification, context: Context[HttpSettings]) -> Done | None:
        """Return Done if the destination has the order.

        A path without the key could find an earlier delivery of the order, so only the first one is looked up by it.
        """
        settings, path = context.settings, context.settings.lookup_path
        is_first = context.previous is None and not context.is_resend
        if path is not None and ("{key}" in path or is_first):
            url = _url(path, notification.order, settings, context.key())
            headers = settings.auth.headers(context.key("lookup"), context.clock(), b"")
            answer = await context.http.get(url, headers=headers)
            return None if answer.status_code == 404 else _done(answer, settings)
        if settings.repeatable:
            return None
        raise Unknown("no-lookup", "no lookup_path finds this delivery, and the settings do not say repeatable")

    async def validate(self, order: Order, context: Context[HttpSettings]) -> list[Problem]:
        """Return the problems of a 400 in Norce's own form, and none for a 2xx.

        Anything else counts as no answer.
        """
        message = context.key(context.clock().isoformat())  # the same question may be asked again
        answer = await _send(order, context, message, {"write": False})
        if answer.status_code == 400:
            return _problems(answer)
        _check_status(answer)
        return []


async def _send(order: Order, context: Context[HttpSettings], message: str, facts: dict[str, Any]) -> httpx.Response:
    settings = context.settings
    body = msgspec.json.encode(_document(order, settings.members))
    headers = {"content-type": "application/json", "idempotency-key": message}
    headers |= settings.auth.headers(message, context.clock(), body)
    url = _url(settings.path, order, settings, message)
    return await context.http.request(settings.method, url, content=body, headers=headers, extensions=facts)


def _url(path: str, order: Order, settings: HttpSettings, message: str) -> str:
    if order.id in ("", ".", "..") and "{order_id}" in path:
        raise Reject("order-validation", "/id cannot be part of an address")
    values = {"order_id": order.id, "key": message}
    return settings.url + _PLACEHOLDER.sub(lambda found: quote(values[found[1]], safe=""), path)


def _document(order: Order, members: Mapping[str, str]) -> Any:
    found = {name: _resolve(order.data, pointer) for name, pointer in members.items()}
    return {name: value for name, value in found.items() if value is not ABSENT} if members else order.data


def _resolve(document: Any, pointer: str) -> Any:
    try:
        found = JsonPointer(pointer).resolve(document)
    except (JsonPointerException, TypeError):
        return ABSENT
    return ABSENT if isinstance(found, EndOfList) else found  # the pointer ends in -


def _done(answer: httpx.Response, settings: HttpSettings) -> Done:
    _check_status(answer)
    if settings.reference is None:
        return Done()
    reference = _resolve(answer.json(), settings.reference)
    if not isinstance(reference, str | int) or isinstance(reference, bool):
        raise Unknown("destination-broken-answer", f"the answer has no number or text at {settings.reference!r}")
    return Done(str(reference)[:LONGEST_REFERENCE])


def _check_status(answer: httpx.Response) -> None:
    """Raise an outcome unless an answer is 2xx and no page for people, such as a proxy's."""
    if "html" in answer.raise_for_status().headers.get("content-type", "").lower():
        raise Unknown("destination-broken-answer", f"{answer.status_code} with a page")


def _as(kind: type[Outcome], usual: Outcome) -> Outcome:
    """Return an outcome of another kind with the facts of the usual one."""
    outcome = kind(usual.code, usual.message)
    outcome.host, outcome.status = usual.host, usual.status
    if isinstance(outcome, Retry | Unknown) and isinstance(usual, Retry | Unknown):
        outcome.after = usual.after
    return outcome


class _NorceProblem(msgspec.Struct):
    code: Annotated[str, msgspec.Meta(min_length=1)]
    message: str | None = None


def _problems(answer: httpx.Response) -> list[Problem]:
    """Return the problems in `[{adapterId, code, message}]`."""
    try:
        found = msgspec.convert(answer.json(), Annotated[list[_NorceProblem], msgspec.Meta(min_length=1)])
    except msgspec.ValidationError as error:
        raise Unknown("destination-broken-answer", "the answer 400 has no list of {code, message}") from error
    return [Problem(each.code, each.message or "") for each in found]
