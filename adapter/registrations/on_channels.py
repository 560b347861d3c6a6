"""
The documents in Norce's configuration that register our callbacks on every new order of a channel.

Facts: checkout protocol, sections 8.2 and 9. Every holder of the merchant's token can read every document.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from adapter.config import Config
from adapter.identifiers import Channel
from adapter.norce.client import Norce, NorceUnavailable, NotFound
from adapter.registrations.on_orders import static_notifications, static_secret

STATIC = "static_notifications"


async def standing(config: Config, norce: Norce, channel: Channel) -> dict[str, dict[str, Any]]:
    """
    The two documents that have a channel notify us of its new orders, as they are to be, by their names: ours, which
    says where we are and holds the secret, and the channel's own list. What else is in them is kept, others' entries
    too.

    Raises `NorceError`, and `LookupError` where no secret, or no public address, is configured.
    """
    if config.adapter.public_url is None:
        raise LookupError("adapter.public_url is needed: it is where Norce finds us")
    adapter_id, base = config.adapter.id, str(config.adapter.public_url)
    notifications = static_notifications(config, channel.merchant)
    ours = await _document(norce, channel, adapter_id)
    static = await _document(norce, channel, STATIC)
    order = _mapping(static.get("order"))
    listed = order.get("notifications") or []
    if not isinstance(listed, list):
        raise NorceUnavailable(f"order.notifications of {STATIC} is no list, and is left as it is")
    others = [each for each in listed if not (isinstance(each, Mapping) and each.get("adapterId") == adapter_id)]
    return {
        adapter_id: {
            "active": True,
            **ours,
            "$schema": f"{base}/openapi/v1/schemas/{adapter_id}.json",
            "id": adapter_id,
            "adapter": {**_mapping(ours.get("adapter")), "publicUrl": base, "internalUrl": base},
            "callbacks": {**_mapping(ours.get("callbacks")), "secret": static_secret(config, channel.merchant)},
        },
        STATIC: {
            "$schema": f"{norce.base_url(channel.merchant)}/configuration/openapi/v1/schemas/configuration.json",
            "active": True,
            **static,
            "id": STATIC,
            "order": {**order, "notifications": [*others, *notifications]},
        },
    }


async def _document(norce: Norce, channel: Channel, name: str) -> dict[str, Any]:
    try:
        content = await norce.call(channel, "read_configuration", path={"name": name})
    except NotFound:
        return {}
    try:
        document = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NorceUnavailable(f"{name} is no JSON") from error
    if not isinstance(document, dict):
        raise NorceUnavailable(f"{name} is no JSON object, and is left as it is")
    return document


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
