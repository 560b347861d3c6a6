"""The stand-in for Norce is as strict as Norce: the stories that it is used in would not notice."""

import asyncio
import json

import httpx
import pytest

from tests.norce_stand_in import NorceStandIn

ORDER = {"id": "o1", "merchant": "norce", "channel": "1"}


@pytest.fixture
def norce() -> NorceStandIn:
    stand_in = NorceStandIn("a-token")
    stand_in.put(ORDER)
    return stand_in


def read(norce: NorceStandIn, order_id: str = "o1", **headers: str) -> httpx.Response:
    given = {"authorization": "Bearer a-token", "x-merchant": "norce", "x-channel": "1"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(norce.app), base_url="http://norce") as http:
            return await http.get(f"/order/api/v0/checkout/orders/{order_id}", headers=given)

    return asyncio.run(ask())


def test_the_stand_in_gives_an_order_as_norce_would(norce: NorceStandIn) -> None:
    answer = read(norce)

    assert answer.status_code == 200
    assert answer.json() == ORDER | {"lastModified": answer.json()["lastModified"]}


@pytest.mark.parametrize(
    ("order_id", "headers", "status", "code"),
    [
        ("o1", {"authorization": "Bearer wrong"}, 401, "unauthorized"),
        ("o2", {}, 404, "order-not-found"),
        ("o1", {"x_merchant": "other"}, 404, "order-not-found"),
        ("o1", {"x_channel": "2"}, 404, "order-not-found"),
    ],
    ids=["another token", "another order", "another merchant", "another channel"],
)
def test_the_stand_in_is_as_strict_as_norce(
    norce: NorceStandIn, order_id: str, headers: dict[str, str], status: int, code: str
) -> None:
    answer = read(norce, order_id, **headers)

    assert (answer.status_code, json.loads(answer.content)["code"]) == (status, code)
