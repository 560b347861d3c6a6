"""An ERP for the tests of the kit: a fake system, its settings, and an export in two steps with a lookup."""

import json
from typing import Annotated, Any

import httpx
import msgspec

from adapter.plugin import Context, Done, Notification, NotificationHandler, Secret, Settings, Skip, Url

SETTINGS = {"url": "https://erp.example", "token": "secret"}


class ErpSettings(Settings, frozen=True, kw_only=True):
    url: Annotated[Url, msgspec.Meta(description="Where the ERP is.")]
    token: Annotated[Secret, msgspec.Meta(description="The token.")]


class FakeErp:
    """Numbers every order that it gets, and confirms the numbers that it is asked to."""

    def __init__(self) -> None:
        self.effects: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        what, _, key = request.url.path.strip("/").partition("/")
        if request.method == "POST":
            self.effects.append(f"{what} {json.loads(request.content)['order']}")
            return httpx.Response(201, json={"number": f"N-{len(self.effects)}"})
        found = f"{what} {key}" in self.effects
        return httpx.Response(200, json={"number": "N-1"}) if found else httpx.Response(404)


class Export(NotificationHandler[ErpSettings]):
    """Sends one request, and looks it up."""

    async def deliver(self, notification: Notification, context: Context[ErpSettings]) -> Done | Skip:
        return Done(await self.post("orders", notification, context))

    async def lookup(self, notification: Notification, context: Context[ErpSettings]) -> Done | None:
        number = await self.find("orders", notification, context)
        return None if number is None else Done(number)

    async def post(self, what: str, notification: Notification, context: Context[ErpSettings]) -> str:
        body = {"order": notification.order.id, "reference": notification.order.reference}
        headers = {"authorization": f"Bearer {context.settings.token.reveal()}"}
        answer = await context.http.post(f"{context.settings.url}/{what}", json=body, headers=headers)
        return answer.raise_for_status().json()["number"]

    async def find(self, what: str, notification: Notification, context: Context[ErpSettings]) -> Any:
        answer = await context.http.get(f"{context.settings.url}/{what}/{notification.order.id}")
        return None if answer.status_code == 404 else answer.raise_for_status().json()["number"]


class ExportInTwoSteps(Export):
    """Sends an order, then its invoice. Each step is left out if it is there."""

    async def deliver(self, notification: Notification, context: Context[ErpSettings]) -> Done | Skip:
        number = await self.find("orders", notification, context) or await self.post("orders", notification, context)
        await self.post("invoices", notification, context)
        return Done(number)

    async def lookup(self, notification: Notification, context: Context[ErpSettings]) -> Done | None:
        number = await self.find("invoices", notification, context)
        return None if number is None else Done(number)
