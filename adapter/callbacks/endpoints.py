"""
Where a newcomer starts: the walk of a callback, and the only table of status codes for Norce.

A notification: read, identify the sender, parse, ask who wants it, remember it on disk, 200. A validation: read,
identify, ask the routes inside the deadline, 200 or 400 with the problems. A hook: the same, 200 with what else is to
change, or 400 with why not. Nothing a caller sends is answered 500.
"""

import asyncio
import time
from collections.abc import Callable, Container
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapter.callbacks import IS_WHOLE, parsing
from adapter.callbacks.intake import Intake
from adapter.callbacks.parsing import (
    BadRequest,
    CallbackInvalid,
    ConfigurationNotFound,
    NotJson,
    Unresolved,
    check_order_id,
    parse_hook,
    parse_notification,
    parse_validation,
)
from adapter.callbacks.senders import RawCallback, Sender, Senders, Unauthenticated
from adapter.identifiers import Channel
from adapter.ledger.store import StoreUnavailable
from adapter.metrics import Metrics
from adapter.norce.client import OrderNotFound
from adapter.routing.routes import Callback, Routes
from adapter.verdicts.verdicts import Verdicts

log = structlog.get_logger(__name__)

RETRY_AFTER_SECONDS = 5


class CallbackUnknown(Exception):
    """No callback of this name is configured."""


class MethodNotAllowed(Exception):
    """This callback is not called that way. `allowed`: how it is."""

    def __init__(self, allowed: str) -> None:
        super().__init__(allowed)
        self.allowed = allowed


class BodyTooLarge(Exception):
    """More bytes than the limit, whatever the headers say."""


class BodyTooSlow(Exception):
    """The body did not arrive in time, or the caller went away."""


# What went wrong: status, Norce's code, and what the caller is told where the error has no words of its own.
STATUS: dict[type[Exception], tuple[int, str, str]] = {
    BadRequest: (400, "order-bad-request", ""),
    Unauthenticated: (401, "unauthorized", "The caller is not known."),
    Unresolved: (404, "order-not-found", ""),
    OrderNotFound: (404, "order-not-found", "Norce has no such order."),
    CallbackUnknown: (404, "callback-not-found", "There is no such callback."),
    ConfigurationNotFound: (404, "configuration-not-found", ""),
    MethodNotAllowed: (405, "method-not-allowed", "This callback takes other methods; see Allow."),
    BodyTooSlow: (408, "request-timeout", "The body did not arrive in time."),
    BodyTooLarge: (413, "payload-too-large", "The body is larger than this service takes."),
    NotJson: (415, "unsupported-media-type", ""),
    StoreUnavailable: (503, "store-unavailable", "Nothing was stored. Please send it again."),
}


ACCEPTED = Response(status_code=200)
UNCHANGED = Response(b"[]", media_type="application/json")


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """What is told to the caller, and the facts for the log line."""

    response: Response
    facts: dict[str, Any]


class CallbackEndpoint:
    """
    `/api/v1/callbacks/orders/{order_id}/{callback}`, all kinds. `clock` is the ledger's. Nobody is asked where we are
    `switched_off`.
    """

    def __init__(
        self,
        *,
        routes: Routes,
        senders: Senders,
        channels: Container[Channel],
        intake: Intake,
        verdicts: Verdicts,
        metrics: Metrics,
        adapter_id: str,
        max_body_bytes: int,
        receive_timeout_seconds: float,
        clock: Callable[[], int],
        switched_off: Container[Channel] = (),
    ) -> None:
        self.routes = routes
        self.senders = senders
        self.channels = channels
        self.intake = intake
        self.verdicts = verdicts
        self.metrics = metrics
        self.adapter_id = adapter_id
        self.max_body_bytes = max_body_bytes
        self.receive_timeout_seconds = receive_timeout_seconds
        self.clock = clock
        self.switched_off = switched_off
        for scheme, key in senders.known:  # seen to be 0 where one is not used any more
            metrics.auth.labels(scheme, key, "identified")
        self._headers = {name.encode(): name for name in (*parsing.HEADERS, *senders.headers)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        name, order_id = scope["path_params"]["callback"], scope["path_params"]["order_id"]
        callback = self.routes.callbacks.get(name)
        try:
            raw = await self.read_raw(scope, receive)
            sender = self.identify(raw)
            if callback is None:
                check_order_id(order_id)
                raise CallbackUnknown(name)
            if callback.kind == "notification":
                answered = await self.receive_notification(raw, sender, callback)
            elif callback.kind == "hook":
                answered = await self.answer_hook(raw, sender, callback, receive)
            else:
                answered = await self.answer_validation(raw, sender, callback, receive)
        except Exception as error:  # noqa: BLE001 - the last place where an error can still become an answer
            answered = _refusal(error)
        response = answered.response
        seconds = time.perf_counter() - started
        shown, kind = (callback.name, callback.kind) if callback else ("unknown", "unknown")
        self.metrics.callbacks.labels(shown, kind, str(response.status_code)).inc()
        self.metrics.callback_duration.labels(kind).observe(seconds)
        write = log.warning if response.status_code >= 500 or response.status_code == 401 else log.info
        write(
            "callback_answered",
            callback=shown,
            kind=kind,
            order_id=order_id if len(order_id) <= 64 else None,
            status_code=response.status_code,
            duration_ms=round(seconds * 1000, 2),
            **answered.facts,
        )
        await response(scope, receive, send)

    async def receive_notification(self, raw: RawCallback, sender: Sender, callback: Callback) -> Answered:
        """Something happened: on disk, once, before the 200."""
        _only(raw, "POST")
        notification, order = parse_notification(raw, sender, callback, self.channels, self.clock())
        notification = self.intake.routed(notification, order)
        del order  # hundreds of objects, which are not kept for the disk
        received = await self.intake.store(notification)
        facts = _facts(sender, notification.channel, received.value, len(notification.wanted))
        return Answered(response=ACCEPTED, facts=facts)

    async def answer_validation(
        self, raw: RawCallback, sender: Sender, callback: Callback, receive: Receive
    ) -> Answered:
        """May this order proceed? 200, empty, or 400 with every problem of every route."""
        _only(raw, "POST", "GET")  # POST in the Order API's text, GET in one adapter's description: both are answered
        asked = parse_validation(raw, sender, callback, self.channels)
        if asked.channel in self.switched_off:
            return Answered(response=ACCEPTED, facts=_facts(sender, asked.channel, "switched-off", 0))
        answer = await self.verdicts.validate(callback, asked.channel, asked.order_id, lambda: _gone(receive))
        problems = answer.problems
        facts = _facts(sender, asked.channel, "rejected" if problems else "approved", len(answer.verdicts))
        if not problems:
            return Answered(response=ACCEPTED, facts=facts)
        body = [{"adapterId": self.adapter_id, "code": each.code, "message": each.message} for each in problems]
        return Answered(response=_json(400, body), facts=facts)

    async def answer_hook(self, raw: RawCallback, sender: Sender, callback: Callback, receive: Receive) -> Answered:
        """May this change be stored? 200 with what else is to change, or 400 with the first refusal."""
        _only(raw, "POST")
        asked = parse_hook(raw, sender, callback, self.channels)
        if asked.channel in self.switched_off:
            return Answered(response=UNCHANGED, facts=_facts(sender, asked.channel, "switched-off", 0))
        answer = await self.verdicts.change(
            callback, asked.channel, asked.order_id, asked.order, lambda: _gone(receive)
        )
        if (refusal := answer.refusal) is not None:
            body = {"code": refusal.code, "message": refusal.message, "innerErrorCode": refusal.inner}
            return Answered(
                response=_json(400, body), facts=_facts(sender, asked.channel, "refused", len(answer.verdicts))
            )
        if not answer.patches:
            return Answered(response=UNCHANGED, facts=_facts(sender, asked.channel, "accepted", len(answer.verdicts)))
        response = Response(answer.document, media_type="application/json")
        return Answered(response=response, facts=_facts(sender, asked.channel, "patched", len(answer.verdicts)))

    async def read_raw(self, scope: Scope, receive: Receive) -> RawCallback:
        """The request as it came. Raises `BodyTooLarge` (on bytes read, chunked too), `BodyTooSlow`."""
        headers: dict[str, str] = {}
        for given, shown in scope["headers"]:
            if name := self._headers.get(given):
                value = shown.decode("latin-1")
                headers[name] = f"{headers[name]}, {value}" if name in headers else value  # two that differ fit nothing
        query: dict[str, tuple[str, ...]] = {}
        for name, value in _pairs(scope["query_string"].decode("latin-1")):
            query[name] = (*query[name][:1], value) if name in query else (value,)  # two are as good as a million
        parameters = scope["path_params"]
        return RawCallback(
            method=scope["method"],
            order_id=parameters["order_id"],
            callback=parameters["callback"],
            query=query,
            headers=headers,
            body=await self._read_body(scope, receive),
        )

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        if IS_WHOLE in scope:
            return await self._gather(receive)
        try:
            async with asyncio.timeout(self.receive_timeout_seconds):
                return await self._gather(receive)
        except TimeoutError as error:
            raise BodyTooSlow from error

    async def _gather(self, receive: Receive) -> bytes:
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BodyTooSlow
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self.max_body_bytes:
                raise BodyTooLarge
            chunks.append(chunk)
            more = message.get("more_body", False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def identify(self, raw: RawCallback) -> Sender:
        """Who is calling. Raises `Unauthenticated`."""
        try:
            sender = self.senders.identify(raw)
        except Unauthenticated:
            self.metrics.auth.labels("none", "none", "refused").inc()
            raise
        self.metrics.auth.labels(sender.scheme, sender.key, "identified").inc()
        return sender


def _pairs(query: str) -> list[tuple[str, str]]:
    if "%" in query or "+" in query:
        return parse_qsl(query, keep_blank_values=True)
    # Nothing is escaped in most signed URLs, and then the same is had for a third of the time.
    return [(name, value) for name, _, value in (pair.partition("=") for pair in query.split("&") if pair)]


def _only(raw: RawCallback, *methods: str) -> None:
    if raw.method not in methods:
        raise MethodNotAllowed(", ".join(methods))


def _facts(sender: Sender, channel: Channel, result: str, routes: int) -> dict[str, Any]:
    return {
        "merchant": channel.merchant,
        "channel": channel.name,
        "result": result,
        "routes": routes,
        "scheme": sender.scheme,
        "key": sender.key,
    }


async def _gone(receive: Receive) -> bool:
    """Waits for what comes after the body: that the caller has hung up, which it does when it tires of waiting."""
    return bool((await receive())["type"] == "http.disconnect")


def _refusal(error: Exception) -> Answered:
    known = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), None)
    if known is None:
        log.error("callback_failed", exc_info=error)
        known = (500, "internal-server-error", "Something is wrong on our side.")
    status, code, text = known
    body = {"code": code, "message": text or str(error)}
    headers: dict[str, str] = {}
    facts: dict[str, Any] = {"code": code}
    if isinstance(error, CallbackInvalid):
        body["innerErrorCode"] = facts["inner_code"] = error.inner
    if isinstance(error, Unauthenticated):
        facts["reason"] = error.reason
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, StoreUnavailable):
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allowed
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        headers["connection"] = "close"  # the rest of the body is not waited for
    return Answered(response=_json(status, body, headers), facts=facts)


def _json(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json")
