"""The orders that are sent: about 5 KB each, with a random id and the current time as `lastModified`.

An id and a time are inserted into the same bytes, which is cheap enough while a load runs.
"""

import hmac
import json
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.resources import files

from adapter.callbacks.senders import sign
from adapter.identifiers import Channel

KEY = "benchmark-key-of-enough-bytes"
MERCHANT, CHANNEL, CALLBACK = "bench", "1", "order-status"


def _pieces() -> tuple[bytes, bytes, bytes]:
    order = json.loads(files("adapter.sandbox.demo").joinpath("orders", "order-completed.json").read_text("utf-8"))
    for member in ("id", "lastModified", "validations", "hooks", "notifications", "shippings"):
        order.pop(member)
    order |= {"merchant": MERCHANT, "channel": CHANNEL, "cart": {**order["cart"], "items": order["cart"]["items"][:1]}}
    first = json.dumps({"id": "ID", "lastModified": "MODIFIED"} | order, ensure_ascii=False, indent=1).encode()
    head, _, rest = first.partition(b"ID")
    middle, _, tail = rest.partition(b"MODIFIED")
    return head, middle, tail


_HEAD, _MIDDLE, _TAIL = _pieces()


def new_id() -> str:
    return secrets.token_urlsafe(18)


def body(order_id: str) -> bytes:
    modified = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return b"".join((_HEAD, order_id.encode(), _MIDDLE, modified.encode(), _TAIL))


def large(order_id: str, size: int = 1020 * 1024) -> bytes:
    """Return the same order with as many lines in its cart as fit into `size` bytes."""
    order = json.loads(body(order_id))
    line = order["cart"]["items"][0]
    room = size - len(json.dumps(order))
    order["cart"]["items"] = [line] * (room // (len(json.dumps(line)) + 2))
    return json.dumps(order).encode()


def request(callback: str = CALLBACK, make: Callable[[str], bytes] = body) -> bytes:
    """Return the head and the body of one callback as Norce sends it to a signed URL."""
    order_id = new_id()
    sent = make(order_id)
    sig = sign(hmac.new(KEY.encode(), digestmod="sha256"), Channel(MERCHANT, CHANNEL), order_id, callback)
    path = f"/api/v1/callbacks/orders/{order_id}/{callback}?merchant={MERCHANT}&channel={CHANNEL}&key=k&sig={sig}"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"x-merchant: {MERCHANT}\r\nx-channel: {CHANNEL}\r\ncontent-length: {len(sent)}\r\n\r\n"
    )
    return head.encode() + sent


def prepared(count: int, callback: str = CALLBACK) -> list[bytes]:
    return [request(callback) for _ in range(count)]


def endless() -> Iterator[bytes]:
    while True:
        yield request()
