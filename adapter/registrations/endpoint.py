"""The public port beside the callbacks: registrations, and the published documents.

The merchant's own systems register callbacks. They authenticate with one of the merchant's tokens as a bearer token, or
with a secret of `senders.header_secrets`. A signed callback URL is not accepted, because shoppers can see it.

Facts: checkout protocol, sections 1.3 and 10.
"""

import asyncio
import hmac
from collections import Counter
from collections.abc import Container, Mapping
from importlib.resources import files
from typing import Any

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from adapter.callbacks.connection_table import discard_body, note_identified
from adapter.callbacks.limits import MOST_WAITING
from adapter.callbacks.parsing import CallbackInvalid, check_order_id
from adapter.callbacks.senders import RawCallback, Senders, Unauthenticated
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.norce.client import NorceError, NorceRejected, NorceUnavailable, OrderNotFound
from adapter.registrations.on_orders import Registered, Registrar

log = structlog.get_logger(__name__)

REGISTRATIONS_PATH = "/api/v1/orders/{order_id}/registrations"
SCHEMA_PATH = "/openapi/v1/schemas/{adapter_id}.json"
DESCRIPTION_PATH = "/docs/v1/openapi.yaml"
NO_ANSWER = "Norce did not answer. Please send it again."
LATER = {"retry-after": "5"}
UNKNOWN_CALLER = {"www-authenticate": "Bearer", "connection": "close"}
# Of one merchant. Each makes several requests to Norce, and the client limits those of a merchant: the others are for
# orders that a shopper waits for.
MAX_AT_ONCE = 32
# Of all merchants. If Norce does not answer, registrations that wait for it must leave room for notifications.
MAX_IN_TOTAL = MOST_WAITING // 2


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers


class Registrations:
    """The endpoint that registers our callbacks on an order, or removes them.

    On a channel that Norce's configuration switches off, it only removes them.
    """

    def __init__(self, config: Config, registrar: Registrar, switched_off: Container[Channel]) -> None:
        self._config = config
        self._registrar = registrar
        self._senders = Senders(config.senders)
        self._switched_off = switched_off
        self._running = Counter[str]()  # by merchant

    @property
    def waiting(self) -> int:
        """The number of requests that wait for Norce."""
        return self._running.total()

    async def __call__(self, request: Request) -> Response:
        """Answer one request, and log it."""
        order_id = request.path_params["order_id"]
        facts: dict[str, Any] = {"order_id": order_id if len(order_id) <= 64 else None}
        try:
            channel = self._authorized_channel(request)
            note_identified(request.scope)
            discard_body(request.scope)
            facts |= {"merchant": channel.merchant, "channel": channel.name}
            done = await self._run(request.method, channel, order_id)
        except _Refused as refused:
            log.warning("registration_refused", code=refused.code, status_code=refused.status, **facts)
            body = {"code": refused.code, "message": refused.message}
            return JSONResponse(body, refused.status, refused.headers)
        counts = {"added": len(done.added), "removed": len(done.removed), "kept": len(done.kept)}
        log.info("callbacks_registered", **counts, **facts)
        return JSONResponse(msgspec.to_builtins(done))

    async def _run(self, method: str, channel: Channel, order_id: str) -> Registered:
        if self._running[channel.merchant] >= MAX_AT_ONCE or self.waiting >= MAX_IN_TOTAL:
            raise _Refused(503, "overloaded", "Too many registrations wait for Norce. Please send it again.", LATER)
        self._running[channel.merchant] += 1
        try:
            return await self._register(method, channel, order_id)
        except asyncio.CancelledError as error:  # the service stops
            raise _Refused(503, "norce-unavailable", NO_ANSWER, LATER) from error
        finally:
            self._running[channel.merchant] -= 1

    async def _register(self, method: str, channel: Channel, order_id: str) -> Registered:
        try:
            check_order_id(order_id)
            if method == "DELETE":
                return await self._registrar.deregister(channel, order_id)
            if channel in self._switched_off:
                raise _Refused(409, "order-conflict", "Norce's configuration has this adapter switched off here.")
            return await self._registrar.register(channel, order_id)
        except CallbackInvalid as error:
            raise _Refused(400, "order-bad-request", str(error)) from error
        except LookupError as error:
            raise _Refused(409, "configuration-error", str(error)) from error
        except OrderNotFound as error:
            raise _Refused(404, "order-not-found", "Norce has no such order.") from error
        except NorceUnavailable as error:
            raise _Refused(503, "norce-unavailable", NO_ANSWER, LATER) from error
        except NorceError as error:
            code = "norce-rejected" if isinstance(error, NorceRejected) else "norce-refused"
            raise _Refused(502, code, str(error)) from error

    def _authorized_channel(self, request: Request) -> Channel:
        headers = dict(request.headers.items())
        channel = Channel(headers.get("x-merchant", ""), headers.get("x-channel", ""))
        if not self._is_authorized(headers, channel.merchant):
            raise _Refused(401, "unauthorized", "The caller is not known.", UNKNOWN_CALLER)
        if not all(channel):
            raise _Refused(400, "order-bad-request", "The headers x-merchant and x-channel are needed.")
        if channel not in self._config.channels:
            raise _Refused(404, "configuration-not-found", "This merchant and channel are not configured here.")
        return channel

    def _is_authorized(self, headers: Mapping[str, str], merchant: str) -> bool:
        shown = headers.get("authorization", "").encode("latin-1")
        of_merchant = self._config.merchants.get(merchant)
        tokens = () if of_merchant is None else of_merchant.tokens
        if any(hmac.compare_digest(shown, b"Bearer " + token.reveal().encode()) for token in tokens):
            return True
        raw = RawCallback(method="POST", order_id="", callback="", query={}, headers=headers)
        try:
            return self._senders.identify(raw).may_speak_for(merchant)
        except Unauthenticated:
            return False


def openapi() -> bytes:
    """Return our OpenAPI description. A test compares it with the service."""
    return files("adapter").joinpath("openapi.yaml").read_bytes()


def routes(registrations: Registrations, adapter_id: str, schema: Mapping[str, Any]) -> list[BaseRoute]:
    """Return the routes of the public port beside the callbacks.

    `schema` describes our document in Norce's configuration.
    """
    document = msgspec.json.encode(schema)

    async def published(request: Request) -> Response:
        if request.path_params["adapter_id"] != adapter_id:
            return JSONResponse({"code": "not-found", "message": "There is no adapter of this id here."}, 404)
        return Response(document, media_type="application/schema+json")

    async def described(_request: Request) -> Response:
        return Response(openapi(), media_type="application/yaml")  # RFC 9512

    return [
        Route(REGISTRATIONS_PATH, registrations.__call__, methods=["POST", "DELETE"]),
        Route(SCHEMA_PATH, published),
        Route(DESCRIPTION_PATH, described),
    ]
