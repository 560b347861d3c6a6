"""Registration on every new order of a channel, by two documents in Norce's configuration.

Facts: checkout protocol, sections 8.2 and 9. Everybody who holds the merchant's token can read every document.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from adapter.config import Config
from adapter.config.model import NotificationCallbackConfig
from adapter.identifiers import Channel
from adapter.norce.client import Norce, NorceUnavailable, NotFound
from adapter.orders import NotAnOrder, decode
from adapter.registrations.on_orders import registration_body, static_url, url_secret

STATIC = "static_notifications"


async def channel_documents(config: Config, norce: Norce, channel: Channel) -> dict[str, dict[str, Any]]:
    """Return the two documents that register us on every new order, by name.

    Our own document gives our address and holds the secret. The channel's document lists the notifications. Everything
    else in them stays as Norce has it, including the entries of other adapters.

    Raises:
        NorceError: If a document cannot be read or is not understood.
        LookupError: If no secret or no public address is configured.
    """
    if config.adapter.public_url is None:
        raise LookupError("adapter.public_url is needed: Norce calls us there")
    adapter_id, base = config.adapter.id, str(config.adapter.public_url)
    secret = static_secret(config, channel.merchant)
    ours = await _read_document(norce, channel, adapter_id)
    static = await _read_document(norce, channel, STATIC)
    order = _mapping(static.get("order"))
    others = _of_others(order.get("notifications") or [], adapter_id)
    return {
        adapter_id: {
            "active": True,
            **ours,
            "$schema": f"{base}/openapi/v1/schemas/{adapter_id}.json",
            "id": adapter_id,
            "adapter": {**_mapping(ours.get("adapter")), "publicUrl": base, "internalUrl": base},
            "callbacks": {**_mapping(ours.get("callbacks")), "secret": secret},
        },
        STATIC: {
            "$schema": f"{norce.base_url(channel.merchant)}/configuration/openapi/v1/schemas/configuration.json",
            "active": True,
            **static,
            "id": STATIC,
            "order": {**order, "notifications": [*others, *static_notifications(config, channel.merchant)]},
        },
    }


async def documents_without_us(
    config: Config, norce: Norce, channel: Channel
) -> tuple[dict[str, dict[str, Any] | None], bool]:
    """Return the documents to change so that no new order is registered with us, by name.

    Returns:
        The new content of `static_notifications` without our entries if there are any, then None for our own document,
        which has to be removed, if there is one. And whether our own is the last document of the channel: Norce removes
        the channel with it.

    Raises:
        NorceError: If a document cannot be read or is not understood.
    """
    adapter_id = config.adapter.id
    try:
        content = await norce.call(channel, "list_configurations")
    except NotFound:
        return {}, False
    try:
        listed = decode(content, list[dict[str, Any]])
    except NotAnOrder as error:
        raise NorceUnavailable("the list of documents is not as documented") from error
    changes: dict[str, dict[str, Any] | None] = {}
    by_name = {each.get("id"): each for each in listed}
    order = _mapping(_mapping(by_name.get(STATIC)).get("order"))
    entries = order.get("notifications") or []
    others = _of_others(entries, adapter_id)
    if len(others) < len(entries):
        changes[STATIC] = {**by_name[STATIC], "order": {**order, "notifications": others}}
    if adapter_id in by_name:
        changes[adapter_id] = None
    return changes, set(by_name) == {adapter_id}


def _of_others(entries: Any, adapter_id: str) -> list[Any]:
    if not isinstance(entries, list):
        raise NorceUnavailable(f"order.notifications of {STATIC} is not a list; the document was left as it is")
    return [each for each in entries if not (isinstance(each, Mapping) and each.get("adapterId") == adapter_id)]


async def is_switched_off(config: Config, norce: Norce, channel: Channel) -> bool:
    """Return whether our document in Norce's configuration switches the channel off.

    With `norce.refresh: 0s` the documents have no effect, as in the service.

    Raises:
        NorceError: If the document cannot be read or is not understood.
    """
    if not config.norce.refresh:
        return False
    return (await _read_document(norce, channel, config.adapter.id)).get("active") is False


async def channels_at_norce(norce: Norce, merchant: str) -> list[Channel]:
    """Return the channels of a merchant that have a document in Norce's configuration.

    Raises:
        NorceError: If they cannot be read.
    """
    try:
        content = await norce.call(Channel(merchant, ""), "list_channels")
    except NotFound:
        return []
    try:
        return [Channel(merchant, name) for name in decode(content, list[str])]
    except NotAnOrder as error:
        raise NorceUnavailable("the list of channels is not as documented") from error


def static_notifications(config: Config, merchant: str) -> list[dict[str, Any]]:
    """Return the notifications that a channel's document adds to every new order.

    Norce fills in their address for each order, so they carry the secret of our document instead of a signature.
    """
    return [
        registration_body(config, name, callback, str(static_url(config, merchant, name)))
        for name, callback in config.callbacks.items()
        if isinstance(callback, NotificationCallbackConfig)
    ]


def static_secret(config: Config, merchant: str) -> str:
    """Return the secret for our document: the merchant's URL secret, quoted for a URL.

    Raises `LookupError` if no URL secret is good for this merchant alone.
    """
    secret = url_secret(config, merchant)
    if secret is None:
        raise LookupError(f"senders.url_secrets has no secret that is good for merchant {merchant} alone")
    return quote(secret.values[0].reveal(), safe="")


async def _read_document(norce: Norce, channel: Channel, name: str) -> dict[str, Any]:
    try:
        content = await norce.call(channel, "read_configuration", path={"name": name})
    except NotFound:
        return {}
    try:
        document = decode(content)
    except NotAnOrder as error:
        raise NorceUnavailable(f"{name} is not JSON") from error
    if not isinstance(document, dict):
        raise NorceUnavailable(f"{name} is not a JSON object; the document was left as it is")
    return document


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
