"""
What Norce sends: validations, hooks and notifications, and the calls of payment actions.

Only this machine is ever called. A registered URL that leads elsewhere, as every sample's does, becomes an answer that
did not come, with its reason; no connection is opened, not even to look a name up.
"""

import asyncio
import contextlib
import ipaddress
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from adapter.conditions import Result
from adapter.moments import to_milliseconds
from adapter.sandbox.norce.orders import (
    WATCHED,
    Call,
    Refused,
    condition,
    is_touched,
    patched,
    same,
    settled,
    watched_by_hooks,
)
from adapter.sandbox.norce.records import Journal, Records, document_key
from adapter.sandbox.norce.switches import Switches
from adapter.sandbox.norce.versions import Order, as_version

MOST_ROUNDS = 10  # of hooks that patch what other hooks watch
LARGEST_ANSWER = 2_000_000
LONGEST_SHOWN = 2_000  # characters of an answer, in an event record
TOO_LATE, NOT_LOOPBACK = "too-late", "not-loopback"
_PLACEHOLDER = re.compile(r"\{(order_id|(?:order|configuration|config)\.[\w.-]+)\}")


class _NotLoopback(httpx.TransportError):
    """The address is not on this machine."""


class _LoopbackOnly(httpx.AsyncBaseTransport):
    """Stands in front of every connection, redirects included."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.scheme not in ("http", "https") or not _is_loopback(request.url.host):
            raise _NotLoopback(NOT_LOOPBACK)
        if (request.url.port or 0) > 65535:
            raise httpx.InvalidURL("there is no such port")
        return await self._transport.handle_async_request(request)

    async def aclose(self) -> None:
        await self._transport.aclose()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back. Without a status, `reason` says why nothing did."""

    status: int | None
    body: bytes = b""
    reason: str = ""

    @property
    def is_good(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def json(self) -> Any:
        """The body, or None where it is no JSON."""
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(self.body)
        return None


@dataclass(kw_only=True, eq=False)
class Callbacks:
    """Calls out, for one simulator. What is in flight can be waited for (`settled`)."""

    records: Records
    journal: Journal
    switches: Callable[[], Switches]
    now: Callable[[], datetime]
    sleep: Callable[[float], Awaitable[None]]
    chance: random.Random
    transport: httpx.AsyncBaseTransport | None

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        inner = self.transport or httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
        self._http = httpx.AsyncClient(transport=_LoopbackOnly(inner), trust_env=False, timeout=None)  # noqa: S113
        self._running: set[asyncio.Task[Any]] = set()

    # --- validations ---

    async def validations(self, order: Order, call: Call) -> list[dict[str, Any]]:
        """The errors of all, asked side by side."""
        answers = await asyncio.gather(*(self._validation(each, order, call) for each in order["validations"]))
        return [error for errors in answers for error in errors]

    async def _validation(self, validation: Mapping[str, Any], order: Order, call: Call) -> list[dict[str, Any]]:
        switches, adapter_id = call.switches, validation.get("adapterId")
        answer = await self.call(
            "validation",
            validation,
            order,
            method=switches.validation_method,
            seconds=switches.validation_seconds,
            body=as_version(order, "v0", switches) if switches.validation_body == "order" else None,
        )
        if answer.is_good or (answer.reason == TOO_LATE and switches.validation_too_late == "approve"):
            return []
        errors = answer.json() if answer.status == 400 else None
        if isinstance(errors, list) and errors and all(isinstance(each, dict) for each in errors):
            return [{"adapterId": adapter_id, **_told(each)} for each in errors]
        return [{"adapterId": adapter_id, "code": "validation-failed", "message": answer.reason or str(answer.status)}]

    # --- hooks ---

    async def hooks(self, base: Order, proposed: Order, touched: tuple[str, ...], call: Call) -> Order:
        """
        The order as it may be stored, after every hook that watches what changes has agreed. Raises `Refused`.

        A hook is asked again where a patch, its own included, has changed what it watches since it was asked.
        """
        switches = call.switches
        skipped = call.adapter_id if switches.adapter_id_skips_hooks else None
        asked = [
            (hook, watched)
            for hook, watched in self._in_order(base, switches)
            if skipped is None or hook.get("adapterId") != skipped
        ]
        seen = {hook["id"]: watched.value(base) for hook, watched in asked}
        forced = {
            hook["id"] for hook, _ in asked if switches.equal_write_triggers and is_touched(hook["scope"], touched)
        }
        was_patched = False
        for _ in range(MOST_ROUNDS):
            is_quiet = True
            for hook, watched in asked:
                value = watched.value(proposed)
                if same(value, seen[hook["id"]]) and hook["id"] not in forced:
                    continue
                is_quiet = False
                forced.discard(hook["id"])
                seen[hook["id"]] = value
                after = patched(proposed, await self._hook(hook, base, proposed, call), hook, switches)
                was_patched |= after is not proposed
                proposed = after
                if not switches.hook_sees_own_patch:
                    seen[hook["id"]] = watched.value(proposed)
            if is_quiet:
                return settled(base, proposed, call, was_patched=was_patched)
        raise Refused("order-error", f"The hooks do not agree after {MOST_ROUNDS} rounds.")

    def _in_order(self, order: Order, switches: Switches) -> list[tuple[dict[str, Any], Any]]:
        def place(pointer: Any) -> int:
            part = (pointer or "").split("/")[1:2]
            return WATCHED.index(part[0]) if part and part[0] in WATCHED else len(WATCHED)

        hooks = list(watched_by_hooks(order, switches))
        if switches.hook_order == "part":
            hooks.sort(key=lambda each: (place(each[0]["scope"]), place(each[0].get("target"))))
        elif switches.hook_order == "target":
            hooks.sort(
                key=lambda each: (
                    place(each[0].get("target")),
                    place(each[0]["scope"]),
                    each[0].get("adapterId") or "",
                )
            )
        elif switches.hook_order == "random":
            self.chance.shuffle(hooks)
        return hooks

    async def _hook(self, hook: Mapping[str, Any], base: Order, proposed: Order, call: Call) -> Any:
        """The patches it wants. Raises `Refused`."""
        switches = call.switches
        sent = base if switches.hook_sees == "current" else {**proposed, "lastModified": call.now}
        body = as_version(sent, hook.get("version") or switches.version_left_out, switches)
        answer = await self.call("hook", hook, proposed, seconds=switches.hook_seconds, body=body)
        if answer.is_good:
            return answer.json() if answer.body.strip() else []
        if answer.status != 400 and not switches.hook_failure_blocks:
            return []
        told = answer.json()
        if answer.status == 400 and isinstance(told, dict) and switches.hook_refusal_passed_on:
            raise Refused(str(told.get("code") or "order-error"), str(told.get("message") or "A hook refused."), 400)
        raise Refused("order-error", f"A hook did not agree: {answer.reason or answer.status}.")

    # --- notifications ---

    def notify(self, before: Order | None, after: Order, touched: tuple[str, ...], call: Call) -> None:
        """Records an event for every notification whose scope has changed to what its schema wants, and sends it."""
        switches = call.switches
        skipped = call.adapter_id if switches.adapter_id_skips_notifications else None
        for notification in after["notifications"]:
            compiled = condition(notification)
            if compiled is None or (skipped is not None and notification.get("adapterId") == skipped):
                continue
            scope = notification["scope"]
            has_changed = before is None or not same(compiled.value(before), compiled.value(after))
            if not has_changed and not (switches.equal_write_triggers and is_touched(scope, touched)):
                continue
            if compiled.evaluate(after).result is Result.MATCHED:
                self._start(self._deliver(self._record(notification, after, switches)))

    def _record(self, notification: Mapping[str, Any], order: Order, switches: Switches) -> str:
        version = notification.get("version") or switches.version_left_out
        now = self.now()
        event_id = str(_uuid7(now, self.chance))
        told = {name: notification.get(name) for name in ("adapterId", "reference", "description")}
        event = {
            "id": event_id,
            "createdAt": as_text(now),
            "merchant": order["merchant"],
            "channel": order["channel"],
            "orderId": order["id"],
            **told,
            "payload": {
                "notification": {"reference": None, "invoke": "", **notification},
                "order": as_version(order, version, switches),
            },
            "attempts": [],
            "_lost": self._happens(switches.notifications_lost),
        }
        self.records.keep("events", event_id, event)
        return event_id

    async def _deliver(self, event_id: str) -> None:
        switches, event = self.switches(), self.records.events[event_id]
        notification = event["payload"]["notification"]
        if event["_lost"]:
            return
        wait = (notification.get("delay") or 0) * switches.notification_delay_unit_seconds
        if self._happens(switches.notifications_reordered):
            wait += switches.held_back_seconds
        if wait > 0:
            await self.sleep(wait)
        for _ in range(2 if self._happens(switches.notifications_doubled) else 1):
            for attempt in range(1 + switches.notification_retries):
                if attempt:
                    await self.sleep(switches.notification_retry_seconds)
                if await self._attempt(event_id):
                    break

    async def _attempt(self, event_id: str) -> bool:
        switches, event = self.switches(), self.records.events[event_id]
        payload = event["payload"]
        answer = await self.call(
            "notification",
            payload["notification"],
            {**payload["order"], "id": event["orderId"], "merchant": event["merchant"], "channel": event["channel"]},
            seconds=switches.notification_seconds,
            method=payload["notification"].get("method", "POST"),
            more=payload["notification"].get("headers", {}),
            body=payload if switches.notification_body == "envelope" else payload["order"],
        )
        attempt = {
            "at": as_text(self.now()),
            "status": answer.status,
            "reason": answer.reason or None,
            "response": answer.body[:LONGEST_SHOWN].decode(errors="replace"),
        }
        current = self.records.events[event_id]
        self.records.keep("events", event_id, {**current, "attempts": [*current["attempts"], attempt]})
        good = {"2xx": range(200, 300), "200-202-204": (200, 202, 204), "200": (200,)}
        return answer.status in good[switches.notification_delivered]

    def retry(self, event_id: str) -> None:
        """Sends an event once more, as a person asks for it."""
        self._start(self._attempt(event_id))

    def resume(self) -> None:
        """Sends what was recorded before a restart and never left."""
        for event_id, event in self.records.events.items():
            if not event["attempts"]:
                self._start(self._deliver(event_id))

    # --- the call itself ---

    async def call(
        self,
        kind: str,
        registered: Mapping[str, Any],
        order: Order,
        *,
        seconds: float,
        method: str = "POST",
        body: Any = None,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> Answer:
        """One request to a registered URL, with more headers. Never raises; one that was not answered has a reason."""
        switches = self.switches()
        url = str(registered.get("invoke") or "")
        if switches.placeholders:
            url = self._filled(url, registered.get("adapterId"), order)
        headers = {"content-type": "application/json"} if body is not None else {}
        if switches.callback_merchant_and_channel:
            headers |= {"x-merchant": order["merchant"], "x-channel": order["channel"]}
        if switches.callback_authorization:
            headers["authorization"] = switches.callback_authorization
        if not switches.callback_connections_kept:
            headers["connection"] = "close"
        headers |= {name.lower(): value for name, value in more.items()}
        whose = {"order_id": order["id"], "merchant": order["merchant"], "channel": order["channel"]}
        content = None if body is None else msgspec.json.encode(body)
        return await self._written(kind, method, url, headers, content, seconds=seconds, **whose)

    async def fetch(self, url: str, *, seconds: float, merchant: str, channel: str) -> Answer:
        """A document of an adapter's: its configuration schema."""
        whose = {"order_id": None, "merchant": merchant, "channel": channel}
        return await self._written("schema", "GET", url, {}, None, seconds=seconds, **whose)

    async def _written(
        self, kind: str, method: str, url: str, headers: dict[str, str], content: bytes | None, *, seconds: float,
        **whose: str | None,
    ) -> Answer:  # fmt: skip
        """The answer, which the journal knows of."""
        began = time.monotonic()
        answer = await self._answer(method, url, headers, content, seconds=seconds)
        self.journal.write(
            url=url,
            at=as_text(self.now()),
            kind=kind,
            method=method,
            status=answer.status,
            took_ms=round((time.monotonic() - began) * 1000),
            note=answer.reason,
            **whose,
        )
        return answer

    async def _answer(
        self, method: str, url: str, headers: dict[str, str], content: bytes | None, *, seconds: float
    ) -> Answer:
        redirects = self.switches().callback_redirects
        try:
            async with (
                asyncio.timeout(seconds),
                self._http.stream(method, url, headers=headers, content=content, follow_redirects=redirects) as answer,
            ):
                read = bytearray()
                async for chunk in answer.aiter_bytes():
                    read += chunk
                    if len(read) > LARGEST_ANSWER:
                        return Answer(status=None, reason="too-large")
                return Answer(status=answer.status_code, body=bytes(read))
        except TimeoutError:
            return Answer(status=None, reason=TOO_LATE)
        except _NotLoopback:
            return Answer(status=None, reason=NOT_LOOPBACK)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return Answer(status=None, reason=type(error).__name__)

    def _filled(self, url: str, adapter_id: Any, order: Order) -> str:
        key = document_key(order["merchant"], order["channel"], str(adapter_id))
        document = self.records.documents.get(key, {})

        def fill(match: re.Match[str]) -> str:
            root, *names = ["order", "id"] if match[1] == "order_id" else match[1].split(".")
            value: Any = order if root == "order" else document
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if not isinstance(value, (str, int, float)):
                return match[0]
            return quote(str(value), safe="") if root == "order" else str(value)

        return _PLACEHOLDER.sub(fill, url)

    # --- what is in flight ---

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def settled(self) -> None:
        """Waits until everything that was to be sent has been answered, or has failed for good."""
        while self._running:
            await asyncio.gather(*self._running)

    async def aclose(self) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._http.aclose()

    def _happens(self, share: float) -> bool:
        return share > 0 and self.chance.random() < share


def as_text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _told(error: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: error[name] for name in ("adapterId", "code", "message") if isinstance(error.get(name), str)}
    return {"code": "validation-failed", **kept}


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _uuid7(now: datetime, chance: random.Random) -> uuid.UUID:
    """As Norce's bus gives them: they begin with the time."""
    milliseconds = to_milliseconds(now)
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | chance.getrandbits(12) << 64 | 2 << 62 | chance.getrandbits(62))
