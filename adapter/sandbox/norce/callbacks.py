"""The callbacks that Norce sends: validations, hooks and notifications.

Only loopback addresses are called. A callback to any other address, like those in every sample, counts as not
answered, with the reason `not-loopback`; the simulator opens no connection and resolves no name.
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
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from adapter.conditions import CompiledCondition, Result
from adapter.moments import to_milliseconds, to_text
from adapter.norce.api import V0
from adapter.sandbox.norce.orders import (
    WATCHED,
    ApiRequest,
    Refused,
    after_patches,
    condition,
    patched,
    same,
    watching_hooks,
)
from adapter.sandbox.norce.records import Records
from adapter.sandbox.norce.switches import Switches
from adapter.sandbox.norce.versions import Order, as_version

MAX_ROUNDS = 10  # of hooks that patch what other hooks watch
MAX_ANSWER_BYTES = 2_000_000
MAX_SHOWN_BYTES = 2_000  # of an answer, in an event record
HELD_BACK_SECONDS = 1.0
DELIVERED = (200, 202, 204)
TOO_LATE, NOT_LOOPBACK = "too-late", "not-loopback"
_PLACEHOLDER = re.compile(r"\{(order_id|(?:order|configuration|config)\.[\w.-]+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallbackAnswer:
    """The answer to a callback. Without a status, `reason` says why there is none."""

    status: int | None
    body: bytes = b""
    reason: str = ""

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def json(self) -> Any:
        """Return the body, or None if it is not JSON."""
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(self.body)
        return None


@dataclass(kw_only=True, eq=False)
class Callbacks:
    """The client side of a simulator. It sends notifications in the background."""

    records: Records
    switches: Callable[[], Switches]
    now: Callable[[], datetime]
    sleep: Callable[[float], Awaitable[None]]
    chance: random.Random
    transport: httpx.AsyncBaseTransport | None

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        self._http = httpx.AsyncClient(transport=self.transport, limits=limits, trust_env=False, timeout=None)  # noqa: S113
        self._running: set[asyncio.Task[Any]] = set()

    # --- validations ---

    async def validations(self, order: Order, switches: Switches) -> list[dict[str, Any]]:
        """Call all validations of the order in parallel and return their errors."""
        answers = await asyncio.gather(*(self._validate(each, order, switches) for each in order["validations"]))
        return [error for errors in answers for error in errors]

    async def _validate(
        self, validation: Mapping[str, Any], order: Order, switches: Switches
    ) -> list[dict[str, Any]]:  # fmt: skip
        answer = await self.call("validation", validation, order, seconds=switches.validation_seconds)
        if answer.is_success or answer.reason == TOO_LATE:
            return []
        adapter_id, errors = validation.get("adapterId"), answer.json() if answer.status == 400 else None
        if isinstance(errors, list) and errors and all(isinstance(each, dict) for each in errors):
            return [{"adapterId": adapter_id, **_validation_error(each)} for each in errors]
        return [{"adapterId": adapter_id, "code": "validation-failed", "message": answer.reason or str(answer.status)}]

    # --- hooks ---

    async def hooks(self, base: Order, proposed: Order, request: ApiRequest) -> Order:
        """Call the hooks that watch what changes, and return the order to store.

        A hook is called again if a patch, even its own, changes what it watches. Hooks of the adapter that makes the
        change are not called.

        Raises:
            Refused: A hook refuses, fails, or the hooks do not come to an end.
        """
        hooks = [
            (hook, watched)
            for hook, watched in _in_order(base)
            if request.adapter_id is None or hook.get("adapterId") != request.adapter_id
        ]
        seen = {hook["id"]: watched.value(base) for hook, watched in hooks}
        before_patches = proposed
        for _ in range(MAX_ROUNDS):
            is_quiet = True
            for hook, watched in hooks:
                value = watched.value(proposed)
                if same(value, seen[hook["id"]]):
                    continue
                is_quiet = False
                seen[hook["id"]] = value
                patches = await self._call_hook(hook, proposed, request)
                proposed = patched(proposed, patches, hook.get("target"))
            if is_quiet:
                after = proposed if proposed is before_patches else after_patches(base, proposed, request)
                return {**after, "lastModified": request.now}
        raise Refused("order-error", f"The hooks do not agree after {MAX_ROUNDS} rounds.")

    async def _call_hook(self, hook: Mapping[str, Any], proposed: Order, request: ApiRequest) -> Any:
        body = as_version({**proposed, "lastModified": request.now}, hook.get("version") or V0)
        answer = await self.call("hook", hook, proposed, seconds=request.switches.hook_seconds, body=body)
        if answer.is_success:
            return answer.json() if answer.body.strip() else []
        refusal = answer.json()
        if answer.status == 400 and isinstance(refusal, dict):
            raise Refused(
                str(refusal.get("code") or "order-error"), str(refusal.get("message") or "A hook refused."), 400
            )
        raise Refused("order-error", f"A hook did not agree: {answer.reason or answer.status}.")

    # --- notifications ---

    def notify(self, before: Order, after: Order) -> None:
        """Record and send an event for each notification whose scope has changed and matches."""
        for notification in after["notifications"]:
            compiled = condition(notification)
            if compiled is None or same(compiled.value(before), compiled.value(after)):
                continue
            if compiled.evaluate(after).result is Result.MATCHED:
                event_id = self._record(notification, after)
                if not self.happens(self.switches().notifications_lost):
                    self._start(self._deliver(event_id))

    def _record(self, notification: Mapping[str, Any], order: Order) -> str:
        now = self.now()
        event_id = str(_uuid7(now, self.chance))
        self.records.events[event_id] = {
            "id": event_id,
            "createdAt": to_text(to_milliseconds(now)),
            "merchant": order["merchant"],
            "channel": order["channel"],
            "orderId": order["id"],
            **{name: notification.get(name) for name in ("adapterId", "reference", "description")},
            "payload": {
                "notification": {"reference": None, "invoke": "", **notification},
                "order": as_version(order, notification.get("version") or V0),
            },
            "attempts": [],
        }
        return event_id

    async def _deliver(self, event_id: str) -> None:
        switches = self.switches()
        wait = self.records.events[event_id]["payload"]["notification"].get("delay") or 0
        if self.happens(switches.notifications_reordered):
            wait += HELD_BACK_SECONDS
        if wait > 0:
            await self.sleep(wait)
        for _ in range(2 if self.happens(switches.notifications_doubled) else 1):
            for attempt in range(1 + switches.notification_retries):
                if attempt:
                    await self.sleep(switches.notification_retry_seconds)
                if await self._attempt(event_id):
                    break

    async def _attempt(self, event_id: str) -> bool:
        event, switches = self.records.events[event_id], self.switches()
        payload = event["payload"]
        body = payload if switches.notification_body == "envelope" else payload["order"]
        order = {**payload["order"], "id": event["orderId"], "merchant": event["merchant"], "channel": event["channel"]}
        seconds = switches.notification_seconds
        answer = await self.call("notification", payload["notification"], order, seconds=seconds, body=body)
        attempt = {
            "at": to_text(to_milliseconds(self.now())),
            "status": answer.status,
            "reason": answer.reason or None,
            "response": answer.body[:MAX_SHOWN_BYTES].decode(errors="replace"),
        }
        event["attempts"].append(attempt)
        return answer.status in DELIVERED

    def retry(self, event_id: str) -> None:
        """Send an event once more, as a person can ask Norce to do."""
        self._start(self._attempt(event_id))

    # --- requests ---

    async def call(
        self, kind: str, registered: Mapping[str, Any], order: Order, *, seconds: float, body: Any = None
    ) -> CallbackAnswer:
        """POST to a registered URL. Never raises: a call without an answer returns a reason."""
        url = self._with_placeholders(str(registered.get("invoke") or ""), registered.get("adapterId"), order)
        whose = {"order_id": order["id"], "merchant": order["merchant"], "channel": order["channel"]}
        headers = {"x-merchant": order["merchant"], "x-channel": order["channel"]}
        if authorization := self.switches().callback_authorization:
            headers["authorization"] = authorization
        if body is None:
            return await self._send(kind, "POST", url, headers, None, seconds=seconds, **whose)
        headers["content-type"] = "application/json"
        return await self._send(kind, "POST", url, headers, msgspec.json.encode(body), seconds=seconds, **whose)

    async def fetch(self, url: str, *, seconds: float, merchant: str, channel: str) -> CallbackAnswer:
        """GET a document of an adapter, such as its configuration schema. Never raises."""
        whose = {"order_id": None, "merchant": merchant, "channel": channel}
        return await self._send("schema", "GET", url, {}, None, seconds=seconds, **whose)

    async def _send(
        self, kind: str, method: str, url: str, headers: dict[str, str], content: bytes | None, *, seconds: float,
        **whose: str | None,
    ) -> CallbackAnswer:  # fmt: skip
        began = time.monotonic()
        answer = await self._answer(method, url, headers, content, seconds)
        self.records.journal.add(
            url=url,
            at=to_text(to_milliseconds(self.now())),
            kind=kind,
            method=method,
            status=answer.status,
            took_ms=round((time.monotonic() - began) * 1000),
            note=answer.reason,
            **whose,
        )
        return answer

    async def _answer(
        self, method: str, url: str, headers: dict[str, str], content: bytes | None, seconds: float
    ) -> CallbackAnswer:
        body = bytearray()
        try:
            target = httpx.URL(url)
            if not _is_loopback(target):
                return CallbackAnswer(status=None, reason=NOT_LOOPBACK)
            if (target.port or 0) > 65535:
                raise httpx.InvalidURL("there is no such port")
            async with (
                asyncio.timeout(seconds),
                self._http.stream(method, target, headers=headers, content=content) as response,
            ):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        return CallbackAnswer(status=None, reason="too-large")
                return CallbackAnswer(status=response.status_code, body=bytes(body))
        except TimeoutError:
            return CallbackAnswer(status=None, reason=TOO_LATE)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return CallbackAnswer(status=None, reason=type(error).__name__)

    def _with_placeholders(self, url: str, adapter_id: Any, order: Order) -> str:
        document = self.records.documents.get((order["merchant"], order["channel"], str(adapter_id)), {})

        def fill(match: re.Match[str]) -> str:
            root, *names = ["order", "id"] if match[1] == "order_id" else match[1].split(".")
            value: Any = order if root == "order" else document
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if not isinstance(value, (str, int, float)):
                return match[0]
            return quote(str(value), safe="") if root == "order" else str(value)

        return _PLACEHOLDER.sub(fill, url)

    # --- background work ---

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def wait_until_idle(self) -> None:
        """Wait until every notification was answered or has failed for good."""
        while self._running:
            await asyncio.gather(*self._running)

    async def aclose(self) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._http.aclose()

    def happens(self, share: float) -> bool:
        """Decide at random, with this probability."""
        return share > 0 and self.chance.random() < share


def _in_order(order: Order) -> list[tuple[dict[str, Any], CompiledCondition]]:
    def place(pointer: str | None) -> int:
        part = f"{pointer or ''}/".split("/")[1]
        return WATCHED.index(part) if part in WATCHED else len(WATCHED)

    return sorted(watching_hooks(order), key=lambda each: (place(each[0]["scope"]), place(each[0].get("target"))))


def _validation_error(error: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: error[name] for name in ("adapterId", "code", "message") if isinstance(error.get(name), str)}
    return {"code": "validation-failed", **known}


def _is_loopback(url: httpx.URL) -> bool:
    if url.scheme not in ("http", "https"):
        return False
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(url.host).is_loopback
    return url.host == "localhost"


def _uuid7(now: datetime, chance: random.Random) -> uuid.UUID:
    # Norce's event ids are UUIDs of version 7, which begin with the time.
    milliseconds = to_milliseconds(now)
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | chance.getrandbits(12) << 64 | 2 << 62 | chance.getrandbits(62))
