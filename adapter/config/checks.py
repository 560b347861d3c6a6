"""Checks of keys that depend on each other: keys that need, exclude or name other keys."""

import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Any

from adapter.config.convert import Converter, list_of
from adapter.config.model import (
    ONLY_FOR_ANSWERS,
    ONLY_FOR_NOTIFICATIONS,
    SLUG,
    SLUG_IN_WORDS,
    OperationsConfig,
    ServerConfig,
    StoreConfig,
    ValidationCallbackConfig,
)
from adapter.config.problems import HOW_TO_REFER, Reference, under
from adapter.plugin import Secret

SHORTEST_URL_KEY_BYTES = 16
LONGEST_SOCKET_PATH_BYTES = 107  # sun_path has 108 on Linux, the last of which is a zero
IN_A_HEADER = re.compile(r"(merchants.+\.tokens|senders\.header_secrets\[\d+\]\.values)\[\d+\]")
PARAMETERS_OF_SIGNED_URLS = ("merchant", "channel", "key", "sig")


def _members(tree: Any, *keys: str) -> Mapping[str, Any]:
    """Return the mapping at these keys, or an empty one."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def check_together(tree: Mapping[str, Any], converter: Converter) -> None:
    """Report the keys that do not fit together.

    Args:
        tree: The file as a plain tree.
        converter: The converter of that tree, which has the converted values and takes the problems.
    """
    _check_addresses(tree, converter)
    _check_senders(tree, converter)
    _check_merchants(tree, converter)
    _check_callbacks(tree, converter)
    _check_routes(tree, converter)


def _check_addresses(tree: Mapping[str, Any], converter: Converter) -> None:
    url = converter.values.get("store.url", StoreConfig().url)
    if not re.fullmatch(r"sqlite:///(?!:memory:)[^?#]+|postgresql\+psycopg://[^\s]+", url):
        remedy = "must be sqlite:/// and the path of a file, or postgresql+psycopg://user@host/database"
        converter.report("store.url", remedy)
    if re.search(r"//[^/@]*:[^/@]*@", url) and not isinstance(url, Reference):
        converter.report("store.url", f"holds a password; give the whole address by reference: {HOW_TO_REFER}")
    server, operations = (
        converter.values.get(f"{name}.port") if "port" in _members(tree, name) else default.port
        for name, default in (("server", ServerConfig()), ("operations", OperationsConfig()))
    )
    if server and server == operations:
        converter.report("operations.port", "must be another port than server.port")
    for index, proxy in enumerate(converter.values.get("server.trusted_proxies") or ()):
        try:
            ip_network(proxy)
        except ValueError:
            at = f"server.trusted_proxies[{index}]"
            converter.report(at, "must be an address or a network without host bits, such as 10.1.2.3 or 10.0.0.0/8")
    socket = converter.values.get("operations.socket")
    if isinstance(socket, str) and (size := len(os.fsencode(socket))) > LONGEST_SOCKET_PATH_BYTES:
        longest = f"a Unix socket's path has at most {LONGEST_SOCKET_PATH_BYTES} bytes"
        converter.report("operations.socket", f"is too long with {size} bytes: {longest}, so give a shorter one")


def _check_senders(tree: Mapping[str, Any], converter: Converter) -> None:
    senders = _members(tree, "senders")
    if not any(senders.get(kind) for kind in ("signed_urls", "header_secrets", "url_secrets")):
        converter.report(
            "senders",
            "has no kind of caller; configure signed_urls, header_secrets or url_secrets, "
            'such as signed_urls: {keys: {k1: "${env:NORCE_ADAPTER_URL_KEY}"}}',
        )
    elif not senders.get("signed_urls") and not senders.get("header_secrets"):
        for name in _members(tree, "callbacks"):
            if (kind := _members(tree, "callbacks", name).get("kind")) in ("validation", "hook"):
                converter.report(
                    under("callbacks", name),
                    f"is a {kind}, which no caller may call: senders.url_secrets are for notifications only; "
                    "configure signed_urls or header_secrets",
                )
    adapter = _members(tree, "adapter")
    if senders.get("signed_urls") and adapter and adapter.get("public_url") is None:
        converter.report("adapter.public_url", "is missing; signed URLs (senders.signed_urls) begin with it")
    for name in _members(senders, "signed_urls", "keys"):
        at = under("senders.signed_urls.keys", name)
        if isinstance(key := converter.values.get(at), Secret) and len(key.reveal().encode()) < SHORTEST_URL_KEY_BYTES:
            converter.report(at, f"is too short: a key has at least {SHORTEST_URL_KEY_BYTES} bytes")
    merchants = _members(tree, "merchants")
    for kind in ("header_secrets", "url_secrets"):
        entries = senders.get(kind)
        for entry in range(len(entries) if isinstance(entries, list) else 0):
            at = f"senders.{kind}[{entry}]"
            for index, merchant in enumerate(converter.values.get(f"{at}.merchants") or ()):
                if merchant not in merchants:
                    converter.report(f"{at}.merchants[{index}]", f"must be a merchant: {list_of(merchants, merchant)}")
            if converter.values.get(f"{at}.parameter") in PARAMETERS_OF_SIGNED_URLS:
                taken = list_of(PARAMETERS_OF_SIGNED_URLS, join="and")
                converter.report(f"{at}.parameter", f"must be another name; {taken} belong to signed URLs")


def _check_merchants(tree: Mapping[str, Any], converter: Converter) -> None:
    for at, value in converter.values.items():
        if (
            IN_A_HEADER.fullmatch(at)
            and isinstance(value, Secret)
            and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", value.reveal())
        ):
            converter.report(at, "must be visible ASCII text, because it is sent in a header")
    routes, replaced = _members(tree, "routes"), "base_url" in _members(tree, "norce")
    for name, merchant in _members(tree, "merchants").items():
        at = under("merchants", name)
        if isinstance(merchant, Mapping) and "slug" not in merchant and not re.match(SLUG, name) and not replaced:
            converter.report(
                f"{at}.slug", f"is missing, and the merchant's name cannot replace it; it must be {SLUG_IN_WORDS}"
            )
        channels = _members(merchant, "channels")
        places = {at: merchant} | {under(f"{at}.channels", channel): channels[channel] for channel in channels}
        for place, level in places.items():
            for route in _members(level, "routes"):
                if route not in routes:
                    converter.report(under(f"{place}.routes", route), f"must be a route: {list_of(routes, route)}")


def _check_callbacks(tree: Mapping[str, Any], converter: Converter) -> None:
    for name in _members(tree, "callbacks"):
        at = under("callbacks", name)
        soft_limit = converter.values.get(f"{at}.soft_limit")
        deadline = converter.values.get(f"{at}.deadline", ValidationCallbackConfig().deadline)
        if soft_limit is not None and soft_limit >= deadline:
            converter.report(f"{at}.soft_limit", "must be shorter than the deadline")


def _check_routes(tree: Mapping[str, Any], converter: Converter) -> None:
    callbacks = _members(tree, "callbacks")
    for name in _members(tree, "routes"):
        route, at = _members(tree, "routes", name), under("routes", name)
        callback = converter.values.get(f"{at}.callback")
        if callback is not None and callback not in callbacks:
            converter.report(f"{at}.callback", f"must be a callback: {list_of(callbacks, callback)}")
        _check_addressees(tree, converter, at)
        kind = _members(callbacks, callback or "").get("kind")
        if kind in ("validation", "hook"):
            if "no_answer" not in route:
                converter.report(
                    f"{at}.no_answer",
                    "is missing; it must be approve or reject, the verdict if the answer is late, broken or missing",
                )
            for key in ONLY_FOR_NOTIFICATIONS:
                if key in route:
                    converter.report(f"{at}.{key}", f"is for notifications only; remove it from the route of a {kind}")
        elif kind == "notification":
            for key in ONLY_FOR_ANSWERS:
                if key in route:
                    converter.report(
                        f"{at}.{key}", "is for validations and hooks only; remove it from the route of a notification"
                    )


def _check_addressees(tree: Mapping[str, Any], converter: Converter, at: str) -> None:
    """Report the merchants and channels of a route that are not configured."""
    merchants = _members(tree, "merchants")
    given = converter.values.get(f"{at}.merchants")
    for index, merchant in enumerate(given or ()):
        if merchant not in merchants:
            converter.report(f"{at}.merchants[{index}]", f"must be a merchant: {list_of(merchants, merchant)}")
    channels = [
        name for each in merchants if given is None or each in given for name in _members(merchants[each], "channels")
    ]
    for index, channel in enumerate(converter.values.get(f"{at}.channels") or ()):
        if channel not in channels:
            names = list_of(sorted(set(channels)), channel) if channels else "they have none"
            converter.report(f"{at}.channels[{index}]", f"must be a channel of its merchants: {names}")
