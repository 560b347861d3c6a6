"""The conformance suites of the bundled handlers."""

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
