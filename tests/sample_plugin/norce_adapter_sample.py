"""Handlers of a separate distribution: a correct one, and some that wait, block or spin."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from adapter.plugin import (
    Context,
    Done,
    HookHandler,
    Notification,
    NotificationHandler,
    Order,
    Patch,
    Problem,
    Refuse,
    Reject,
    Settings,
    Skip,
    Url,
    ValidationHandler,
)

LONG = 600.0  # seconds: longer than any test waits


class ErpSettings(Settings, frozen=True, kw_only=True):
    url: Annotated[Url, msgspec.Meta(description="Where the ERP is.")]
    company: Annotated[int, msgspec.Meta(ge=1, description="The company's number in the ERP.")] = 1


class ErpExport(NotificationHandler[ErpSettings]):
    """Exports orders to an ERP, one PUT each."""

    async def deliver(self, notification: Notification, context: Context[ErpSettings]) -> Done | Skip:
        order = notification.order
        if order.reference is None:
            raise Reject("erp-no-reference", "the order has no /reference")
        document = {"company": context.settings.company, "reference": order.reference, "currency": order.currency}
        answer = await context.http.put(f"{context.settings.url}/orders/{order.id}", json=document)
        return Done(answer.raise_for_status().json()["number"])

    async def lookup(self, notification: Notification, context: Context[ErpSettings]) -> Done | None:
        answer = await context.http.get(f"{context.settings.url}/orders/{notification.order.id}")
        return None if answer.status_code == 404 else Done(answer.raise_for_status().json()["number"])


class CallsSettings(Settings, frozen=True, kw_only=True):
    calls: Annotated[str, msgspec.Meta(description="A file; each call adds a line to it.")]


class WaitsSettings(CallsSettings, frozen=True, kw_only=True):
    until: Annotated[str, msgspec.Meta(description="A file; a call ends when there is one.")]


class Waits(NotificationHandler[WaitsSettings]):
    """Records that it was called, and waits for a file."""

    other_clients = True  # the file

    async def deliver(self, notification: Notification, context: Context[WaitsSettings]) -> Done | Skip:
        _record_call(context.settings, f"deliver {notification.order.id}")
        try:
            while not _exists(context.settings.until):  # noqa: ASYNC110 - another process creates the file
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            _record_call(context.settings, f"cancelled {notification.order.id}")
            raise
        return Done(f"waited-{notification.order.id}")

    async def lookup(self, notification: Notification, context: Context[WaitsSettings]) -> Done | None:
        _record_call(context.settings, f"lookup {notification.order.id}")
        return None


class Sleeps(NotificationHandler[CallsSettings]):
    """Blocks its thread, as no handler should."""

    other_clients = True  # the file

    async def deliver(self, notification: Notification, context: Context[CallsSettings]) -> Done | Skip:
        _record_call(context.settings, f"deliver {notification.order.id}")
        time.sleep(LONG)  # noqa: ASYNC251 - this handler makes that mistake
        return Done()


class SleepsInAThread(NotificationHandler[CallsSettings]):
    """Does its blocking work in another thread, as it should, but takes minutes."""

    other_clients = True  # the file, and the thread

    async def deliver(self, notification: Notification, context: Context[CallsSettings]) -> Done | Skip:
        _record_call(context.settings, f"deliver {notification.order.id}")
        await asyncio.to_thread(time.sleep, LONG)
        return Done()


class SleepingCheck(ValidationHandler[CallsSettings]):
    """Blocks its thread, as no handler should, while a shopper waits."""

    async def validate(self, order: Order, context: Context[CallsSettings]) -> list[Problem]:
        _record_call(context.settings, f"validate {order.id}")
        time.sleep(LONG)  # noqa: ASYNC251 - this handler makes that mistake
        return []


class StallSettings(Settings, frozen=True, kw_only=True):
    how: Annotated[Literal["waits", "blocks", "spins"], msgspec.Meta(description="How it stalls.")]


class Stalls(HookHandler[StallSettings]):
    """Never answers: waits for ever, blocks its thread, or computes in four threads at once."""

    async def change(self, order: Order, context: Context[StallSettings]) -> list[Patch]:
        if context.settings.how == "waits":
            await asyncio.Event().wait()
        elif context.settings.how == "blocks":
            time.sleep(LONG)  # noqa: ASYNC251 - this handler makes that mistake
        else:
            for _ in range(3):
                threading.Thread(target=_spin, daemon=True).start()
            _spin()
        return []


class SlowOrderSettings(Settings, frozen=True, kw_only=True):
    slow: Annotated[str, msgspec.Meta(description="How the ids of the slow orders begin.")]


class SlowForSomeOrders(HookHandler[SlowOrderSettings]):
    """Waits for ever for some orders and refuses all others."""

    async def change(self, order: Order, context: Context[SlowOrderSettings]) -> list[Patch]:
        if (order.id or "").startswith(context.settings.slow):
            await asyncio.Event().wait()
        raise Refuse("refused", "This change is not allowed.")


def _spin() -> None:
    ends = time.monotonic() + LONG
    while time.monotonic() < ends:
        pass


def _record_call(settings: CallsSettings, line: str) -> None:
    with Path(settings.calls).open("a") as file:
        file.write(line + "\n")


def _exists(path: str) -> bool:
    return Path(path).exists()
