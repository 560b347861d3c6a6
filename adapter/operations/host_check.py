"""The check of the `Host` header on the operations port.

A page in a browser of this network can call the port under a name of its own that leads here (DNS rebinding), and read
the answer. Such a name is not ours. An IP address is not a name, so probes that call one need no configuration.
"""

import ipaddress
import re
from collections.abc import Collection

import structlog
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

log = structlog.get_logger(__name__)

LOCALHOST = "localhost"

_HOST = re.compile(r"(?:\[(?P<address>[^\[\]]*)\]|(?P<name>[^:\[\]]*))(?::[0-9]*)?")


class HostCheck:
    """Middleware that answers 421 to a request for an unknown name.

    Args:
        names: The names of this port; `localhost` is always one. They may have any case.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {LOCALHOST, *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            # Some load balancers probe without the header. Every browser sends it.
            unknown = [each for each in Headers(scope=scope).getlist("host") if not self._is_known(each)]
            if unknown:
                log.warning("host_refused", host=unknown[0], status=421)
                message = "This port has no such name: call it by its IP address, or add the name to operations.hosts."
                app = JSONResponse({"code": "host-not-allowed", "message": message}, 421)
        await app(scope, receive, send)

    def _is_known(self, header: str) -> bool:
        parts = _HOST.fullmatch(header.strip())
        if parts is None:
            return False
        host = parts["address"] or parts["name"]
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return parts["name"] is not None and host.lower().removesuffix(".") in self._names
        return True
