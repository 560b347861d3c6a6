"""Shared by the tests of registrations: a configuration, and a client that checks every body."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft202012Validator

from adapter import config as configuration
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.norce.api import BY_NAME, schema
from adapter.norce.client import Account, Norce
from adapter.plugin import Secret
from tests.simulators import TOKEN, Shop

NEW, OLD = "a-new-key-of-32-bytes-0123456789", "an-old-key-of-32-bytes-012345678"
OURS = ("cart-changed", "order-rules", "order-status")
CHANNEL = Channel("norce", "1")
TREE: dict[str, Any] = {
    "adapter": {"id": "our_adapter", "public_url": "http://127.0.0.1:8080"},
    "merchants": {"norce": {"tokens": ["${env:TOKEN}"], "channels": {"1": {}}}},
    "senders": {"signed_urls": {"keys": {"old": "${env:OLD}"}}},
    "callbacks": {
        "order-status": {"kind": "notification", "scope": "/state/currentStatus", "schema": {"const": "completed"}},
        "order-rules": {"kind": "validation"},
        "cart-changed": {"kind": "hook", "watch": "/cart", "target": "/cart"},
    },
}


def configured(folder: Path, **changed: Any) -> Config:
    path = folder / "config.yaml"
    path.write_text(json.dumps(TREE | changed))
    return configuration.load(path, {"TOKEN": TOKEN, "OLD": OLD, "NEW": NEW, "STATIC": "a secret & more"})


class Valid(httpx.AsyncBaseTransport):
    """Forwards to the simulator and checks every added callback against its schema."""

    def __init__(self, simulator: Any) -> None:
        self._inner = httpx.ASGITransport(simulator.app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.content and request.method == "POST":
            place = request.url.path.rpartition("/")[2][:-1]
            Draft202012Validator(schema(BY_NAME[f"add_{place}"].body or "")).validate(json.loads(request.content))
        return await self._inner.handle_async_request(request)


@contextmanager
def opened(norce: Shop, version: str = "v0", transport: httpx.AsyncBaseTransport | None = None) -> Iterator[Norce]:
    account = Account(base_url="http://norce/checkout", tokens=(Secret(TOKEN),))
    client = Norce(
        {"norce": account},
        adapter_id="our_adapter",
        timeout=timedelta(minutes=1),
        version=version,
        transport=transport or Valid(norce.simulator),
    )
    try:
        yield client
    finally:
        norce.loop.run(client.aclose())
