"""A handler for the warehouse, a destination that ignores idempotency keys and ships at every request."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import msgspec

from adapter.plugin import Context, Done, Notification, NotificationHandler, Retry, Settings, Url


class WarehouseSettings(Settings, frozen=True, kw_only=True):
    url: Annotated[Url, msgspec.Meta(description="Where the warehouse takes orders.")]


class WarehouseExport(NotificationHandler[WarehouseSettings]):
    """Ships each snapshot of an order. It is not repeatable, but has a lookup."""

    async def deliver(self, notification: Notification, context: Context[WarehouseSettings]) -> Done:
        answer = await context.http.post(_address(notification, context))
        if answer.status_code == 503:
            raise Retry("warehouse-busy", after=timedelta(milliseconds=50))
        return Done(answer.raise_for_status().json()["number"])

    async def lookup(self, notification: Notification, context: Context[WarehouseSettings]) -> Done | None:
        answer = await context.http.get(_address(notification, context))
        return None if answer.status_code == 404 else Done(answer.raise_for_status().json()["number"])


def _address(notification: Notification, context: Context[WarehouseSettings]) -> str:
    order = notification.order
    return f"{context.settings.url}/shipments/{order.data['reference']}/{order.data['lastModified']}"


def install(folder: Path, name: str = "warehouse", handler: str = "tests.crash.warehouse:WarehouseExport") -> Path:
    """Write the metadata of a distribution with this handler into a folder for the path of the service."""
    metadata = folder / f"tests_{name}-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tests-{name}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[norce_adapter.handlers]\n{name} = {handler}\n")
    return folder
