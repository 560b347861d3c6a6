"""Handlers that are wrong on purpose, one for each check of the conformance suites."""

import asyncio
import time
from contextlib import suppress
from typing import Annotated, Any

import httpx
import msgspec

from adapter.plugin import (
    Context,
    Done,
    HookHandler,
    Notification,
    NotificationHandler,
    Order,
    Outcome,
    Patch,
    Problem,
    Reject,
    Retry,
    Settings,
    Skip,
    Unknown,
    Url,
    ValidationHandler,
)
from adapter.testing import NetworkFault
from tests.testing.erp import ErpSettings, Export

Ctx = Context[ErpSettings]


# --- notifications --------------------------------------------------------------------------------------------------


class _Sends(Export):
    """Has no lookup of its own that would find what the next class gets wrong."""

    async def send(self, notification: Notification, context: Ctx) -> httpx.Response:
        return await context.http.post(f"{context.settings.url}/orders", json={"order": notification.order.id})

    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        raise NotImplementedError


class PretendsAfterRefusal(_Sends):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        with suppress(Retry):
            await self.send(notification, context)
        return Done()


class PretendsAfterReset(_Sends):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        with suppress(Unknown):
            await self.send(notification, context)
        return Done()


class RepeatsAfterReset(_Sends):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        try:
            answer = await self.send(notification, context)
        except Unknown:
            answer = await self.send(notification, context)
        return Done(answer.raise_for_status().json()["number"])


def repeats_after(status: int) -> type[_Sends]:
    class RepeatsAfterStatus(_Sends):
        async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
            answer = await self.send(notification, context)
            if answer.status_code == status:
                answer = await self.send(notification, context)
            return Done(answer.raise_for_status().json()["number"])

    return RepeatsAfterStatus


def pretends_after(status: int) -> type[_Sends]:
    class PretendsAfterStatus(_Sends):
        async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
            answer = await self.send(notification, context)
            return Done() if answer.status_code == status else Done(answer.raise_for_status().json()["number"])

    return PretendsAfterStatus


class SkipsWithoutAuthorization(_Sends):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        answer = await self.send(notification, context)
        return Skip("not-allowed") if answer.status_code == 401 else Done(answer.raise_for_status().json()["number"])


class BelievesEveryStatus200(_Sends):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        (await self.send(notification, context)).raise_for_status()
        return Done()


class LosesPatience(_Sends):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        try:
            async with asyncio.timeout(1):
                answer = await self.send(notification, context)
        except TimeoutError:
            answer = await self.send(notification, context)
        return Done(answer.raise_for_status().json()["number"])


class LooksUpSomethingElse(Export):
    async def lookup(self, notification: Notification, context: Ctx) -> Done | None:
        await context.http.get(f"{context.settings.url}/orders/0")
        return None


class SkipsEveryOrder(Export):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        return Skip("not-today")


class Sleeps(Export):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        time.sleep(1)  # noqa: ASYNC251 - this handler makes that mistake
        return await super().deliver(notification, context)


class GoesOn(Export):
    """Does not stop when it is cancelled."""

    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        while True:
            with suppress(asyncio.CancelledError, Outcome):
                return await super().deliver(notification, context)
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(10)


class QuotesTheAnswer(_Sends):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        answer = await self.send(notification, context)
        if answer.status_code == 422:
            raise Reject("refused", answer.text)
        return Done(answer.raise_for_status().json()["number"])


class KeepsTheEmail(Export):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        number = await self.post("orders", notification, context)
        return Done(number, {"email": notification.order.customer.billing.email or ""})


class LogsTheEmail(Export):
    log_fields = frozenset({"buyer"})

    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        context.log.info("order_seen", buyer=notification.order.customer.billing.email)
        return await super().deliver(notification, context)


class PrintsTheName(Export):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        print("order of", notification.order.customer.billing.family_name)  # noqa: T201
        return await super().deliver(notification, context)


class CallsAnotherHost(Export):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        with suppress(Outcome):
            await context.http.get("https://telemetry.example")
            raise AssertionError
        raise Retry("host-not-allowed")


class OpensAConnection(Export):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        with suppress(OSError):
            await asyncio.open_connection("127.0.0.1", 9)
        return await super().deliver(notification, context)


class OpensAConnectionInAThread(Export):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        with suppress(httpx.HTTPError, OSError):
            await asyncio.to_thread(httpx.get, "http://127.0.0.1:9", trust_env=False)
        return await super().deliver(notification, context)


class KeepsTheOrder(Export):
    """Keeps the order of one call for the next await."""

    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        self.notification = notification
        await context.http.get(f"{context.settings.url}/health")
        return await super().deliver(self.notification, context)


class KeepsACounter(Export):
    """Refuses an order while another is under way."""

    busy = False

    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        if self.busy:
            raise Reject("busy")
        self.busy = True
        try:
            return await super().deliver(notification, context)
        finally:
            self.busy = False


class Nested(Settings, frozen=True, kw_only=True):
    secret_name: str = ""


class UndescribedSettings(Settings, frozen=True, kw_only=True):
    url: Annotated[Url, msgspec.Meta(description="Where the ERP is.")]
    token: Annotated[Any, msgspec.Meta(description="The token.")]
    parts: Annotated[dict[str, Nested], msgspec.Meta(description="The parts.")] = msgspec.field(default_factory=dict)


class DescribesNothing(NotificationHandler[UndescribedSettings]):
    async def deliver(self, notification: Notification, context: Context[Any]) -> Done | Skip:
        return Done()


class HasABug(_Sends):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        return Done((await self.send(notification, context)).json()["number"])  # KeyError after an error


class ReturnsNothing(Export):
    async def deliver(self, notification: Notification, context: Ctx) -> Done | Skip:
        await super().deliver(notification, context)
        return None  # type: ignore[return-value]


F = NetworkFault
WRONG_EXPORTS: dict[str, list[type[NotificationHandler[Any]]]] = {
    "refused": [PretendsAfterRefusal],
    "reset-before": [PretendsAfterReset],
    "reset-after": [RepeatsAfterReset],
    "status-500": [repeats_after(500), HasABug],
    "status-502-before": [pretends_after(502)],
    "status-502-after": [repeats_after(502)],
    "status-503-before": [pretends_after(503)],
    "status-503-after": [repeats_after(503)],
    "status-401": [SkipsWithoutAuthorization, pretends_after(401), HasABug],
    "status-422": [pretends_after(422)],
    "status-429": [repeats_after(429), pretends_after(429)],
    "html-with-200": [BelievesEveryStatus200],
    "slow": [LosesPatience],
    "killed-after": [LooksUpSomethingElse],
    "clean": [SkipsEveryOrder, ReturnsNothing],
    "deadline": [Sleeps, GoesOn],
    "privacy": [QuotesTheAnswer, KeepsTheEmail, LogsTheEmail, PrintsTheName],
    "hosts": [CallsAnotherHost],
    "connections": [OpensAConnection, OpensAConnectionInAThread],
    "together": [KeepsTheOrder, KeepsACounter],
    "settings": [DescribesNothing],
}


# --- validations ----------------------------------------------------------------------------------------------------


class StockCheck(ValidationHandler[ErpSettings]):
    """Asks whether there is stock. Correct; the others are not."""

    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        answer = await self.ask(order, context)
        return [Problem("no-stock", "Sold out.")] if answer.raise_for_status().json()["stock"] == 0 else []

    async def ask(self, order: Order, context: Ctx) -> httpx.Response:
        return await context.http.get(f"{context.settings.url}/stock/{order.id}")


class StockCheckWithABug(StockCheck):
    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        return [] if (await self.ask(order, context)).json()["stock"] else [Problem("no-stock", "Sold out.")]


class InsistentStockCheck(StockCheck):
    """Asks again and again."""

    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        for _ in range(3):
            if (answer := await self.ask(order, context)).is_success:
                break
        return [Problem("no-stock", "Sold out.")] if answer.json()["stock"] == 0 else []


class ReturnsNone(StockCheck):
    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        return None  # type: ignore[return-value]


class Waits(StockCheck):
    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        with suppress(Outcome):
            return await super().validate(order, context)
        await asyncio.sleep(60)
        return []


class SleepsInACheck(StockCheck):
    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        time.sleep(0.1)  # noqa: ASYNC251 - this handler makes that mistake
        return []


class LogsThePhone(StockCheck):
    log_fields = frozenset({"buyer"})

    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        context.log.info("order_seen", buyer=order.customer.billing.phone)
        return []


class AsksAnotherHost(StockCheck):
    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        await context.http.get("https://telemetry.example")
        return []


class ConnectsInACheck(StockCheck):
    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        with suppress(OSError):
            await asyncio.open_connection("127.0.0.1", 9)
        return []


class MixesOrders(StockCheck):
    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        self.order = order
        await context.http.get(f"{context.settings.url}/stock/health")
        return await super().validate(self.order, context)


class AnswersOnlyOne(StockCheck):
    busy = False

    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        if self.busy:
            return [Problem("busy", "Please wait.")]
        self.busy = True
        await context.http.get(f"{context.settings.url}/stock/1")
        self.busy = False
        return []


class DescribesNoSettings(ValidationHandler[UndescribedSettings]):
    async def validate(self, order: Order, context: Context[Any]) -> list[Problem]:
        return []


class Reserves(StockCheck):
    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        (await context.http.post(f"{context.settings.url}/reservations")).raise_for_status()
        return []


class ReservesByReading(StockCheck):
    async def validate(self, order: Order, context: Ctx) -> list[Problem]:
        (await context.http.get(f"{context.settings.url}/reserve")).raise_for_status()
        return []


WRONG_CHECKS: dict[str, list[type[ValidationHandler[Any]]]] = {
    **{
        f"status-{each}": [StockCheckWithABug]
        for each in ("500", "502-before", "502-after", "503-before", "503-after", "401", "422")
    },
    "status-429": [StockCheckWithABug, InsistentStockCheck],
    "clean": [ReturnsNone],
    "deadline": [Waits, SleepsInACheck],
    "privacy": [LogsThePhone],
    "hosts": [AsksAnotherHost],
    "connections": [ConnectsInACheck],
    "together": [MixesOrders, AnswersOnlyOne],
    "settings": [DescribesNoSettings],
    "no-effects": [Reserves, ReservesByReading],
}


# --- hooks ----------------------------------------------------------------------------------------------------------


class FreightFee(HookHandler[ErpSettings]):
    """Adds a line for the freight, with right totals, once. Correct; the others are not."""

    async def change(self, order: Order, context: Ctx) -> list[Patch]:
        items = order.data["cart"]["items"]
        if any(each.get("sku") == "FEE" for each in items):
            return []
        fee = {"id": "fee", "sku": "FEE", "quantity": 1, "total": {"includingVat": 125.0, "excludingVat": 100.0}}
        total = order.cart.total
        return [
            Patch.replace("/cart/items", [*items, fee]),
            Patch.replace("/cart/total/includingVat", total.including_vat + 125),
            Patch.replace("/cart/total/excludingVat", total.excluding_vat + 100),
        ]


class ForgetsTheTotal(FreightFee):
    async def change(self, order: Order, context: Ctx) -> list[Patch]:
        return (await super().change(order, context))[:1]


class AddsAFeeEachTime(FreightFee):
    async def change(self, order: Order, context: Ctx) -> list[Patch]:
        fees = order.cart.attributes.get("fees", 0)
        return [Patch.add("/cart/attributes/fees", fees + 1)]


class PatchesTheCustomer(FreightFee):
    async def change(self, order: Order, context: Ctx) -> list[Patch]:
        return [Patch.add("/customer/attributes/fee", "yes")]


class ReplacesNothing(FreightFee):
    async def change(self, order: Order, context: Ctx) -> list[Patch]:
        return [Patch.replace("/cart/attributes/absent/fee", "yes")]


WRONG_HOOKS: dict[str, list[type[HookHandler[Any]]]] = {
    "second-round": [AddsAFeeEachTime],
    "target": [PatchesTheCustomer, ReplacesNothing],
    "totals": [ForgetsTheTotal],
}
