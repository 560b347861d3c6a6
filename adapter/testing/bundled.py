"""The conformance suites of the bundled handlers."""

from collections.abc import Callable

import httpx

from adapter.handlers.http import HttpHandler
from adapter.handlers.jetshop import JetshopExport
from adapter.handlers.log import LogHandler
from adapter.handlers.patch import PatchHandler
from adapter.handlers.rules import Rules
from adapter.sandbox.jetshop_stand_in import JetshopStandIn
from adapter.testing.conformance import HandlerConformance, HookConformance, ValidationConformance

_RULES = {"rules": [{"scope": "/country", "schema": {"const": "NO"}, "code": "not-norwegian", "message": "Sorry."}]}


class JetshopConformance(HandlerConformance[JetshopExport]):
    """The suite of the handler `jetshop`."""

    settings = {
        "base_url": "http://localhost:8000",
        "shop_id": "1",
        "auth": {"type": "basic", "username": "stand-in", "password": "stand-in"},
        "unmapped": "passthrough",
    }
    system = JetshopStandIn


_HTTP = {
    "url": "https://receiver.example",
    "path": "/orders/{order_id}",
    "auth": {"type": "signature", "secrets": ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]},
}


def _receiver() -> Callable[[httpx.Request], httpx.Response]:
    """Return a system that stores requests at their addresses, and shows what is there."""
    stored: set[str] = set()

    def respond(request: httpx.Request) -> httpx.Response:
        if request.method != "GET":
            stored.add(request.url.path)
        return httpx.Response(200 if request.url.path in stored else 404)

    return respond


class HttpConformance(HandlerConformance[HttpHandler]):
    """The suite of the handler `http`, for notifications."""

    settings = _HTTP | {"lookup_path": "/orders/{order_id}"}
    system = _receiver


class QuestionConformance(ValidationConformance[HttpHandler]):
    """The suite of the handler `http`, for validations."""

    settings = _HTTP
    system = _receiver


class LogConformance(HandlerConformance[LogHandler]):
    """The suite of the handler `log`."""


class RulesConformance(ValidationConformance[Rules]):
    """The suite of the handler `rules`, for validations."""

    settings = _RULES


class RefusalConformance(HookConformance[Rules]):
    """The suite of the handler `rules`, for hooks."""

    settings = _RULES


class PatchConformance(HookConformance[PatchHandler]):
    """The suite of the handler `patch`."""

    settings = {"changes": [{"scope": "/country", "path": "/cart/attributes/priceList", "value": "business"}]}


HTTP = (HttpConformance, QuestionConformance)
RULES = (RulesConformance, RefusalConformance)
