"""The public endpoint for registrations: who may register, and what is answered."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Router

from adapter.callbacks.senders import Senders
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.norce.client import NorceRefused, NorceRejected, NorceUnavailable, OrderNotFound
from adapter.registrations.endpoint import MAX_AT_ONCE, MAX_IN_TOTAL, Registrations, routes
from adapter.registrations.on_orders import CallbacksRejected, Registered
from tests.registrations.stage import CHANNEL, TREE, configured
from tests.simulators import TOKEN

URL = "http://adapter/api/v1/orders/o-1/registrations"
BEARER = {"authorization": f"Bearer {TOKEN}", "x-merchant": "norce", "x-channel": "1"}


class FakeRegistrar:
    """Remembers its calls. Raises `error`, if given."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.calls: list[tuple[Any, ...]] = []

    async def register(self, *arguments: Any) -> Registered:
        self.calls.append(("register", *arguments))
        if self._error is not None:
            raise self._error
        return Registered(added=("order-status",), kept=("order-rules",))

    async def deregister(self, *arguments: Any) -> Registered:
        self.calls.append(("deregister", *arguments))
        return Registered(removed=("order-status",))


class SilentRegistrar:
    """Never ends, except for one merchant."""

    def __init__(self, *, but: str = "") -> None:
        self._but = but

    async def register(self, channel: Channel, *_: Any) -> Registered:
        if channel.merchant != self._but:
            await asyncio.Event().wait()
        return Registered()


def client(config: Config, registrar: Any, switched_off: Any = ()) -> httpx.AsyncClient:
    app = Router(routes=routes(Registrations(config, registrar, switched_off), "our_adapter", {}))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app))


def send(registrar: Any, config: Config, method: str = "POST", url: str = URL, **given: Any) -> httpx.Response:
    async def work() -> httpx.Response:
        async with client(config, registrar, given.get("switched_off", ())) as http:
            return await http.request(method, url, headers=given.get("headers", BEARER))

    return asyncio.run(work())


def test_post_registers_and_delete_removes(tmp_path: Path) -> None:
    registrar = FakeRegistrar()

    posted = send(registrar, configured(tmp_path))
    deleted = send(registrar, configured(tmp_path), "DELETE")

    added = {"added": ["order-status"], "removed": [], "kept": ["order-rules"]}
    assert (posted.status_code, posted.json()) == (200, added)
    assert (deleted.status_code, deleted.json()) == (200, {"added": [], "removed": ["order-status"], "kept": []})
    assert registrar.calls == [("register", CHANNEL, "o-1"), ("deregister", CHANNEL, "o-1")]


def test_a_header_secret_is_as_good_as_a_token(tmp_path: Path) -> None:
    secrets = {"header_secrets": [{"header": "x-secret", "values": ["${env:STATIC}"], "merchants": ["norce"]}]}
    config = configured(tmp_path, senders=secrets)
    headers = {"x-secret": "a secret & more", "x-merchant": "norce", "x-channel": "1"}

    assert send(FakeRegistrar(), config, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "order_id", "status", "code"),
    [
        ({}, "o-1", 401, "unauthorized"),
        (BEARER | {"authorization": "Bearer another"}, "o-1", 401, "unauthorized"),
        (BEARER | {"authorization": TOKEN}, "o-1", 401, "unauthorized"),
        (BEARER | {"x-merchant": "another"}, "o-1", 401, "unauthorized"),
        (BEARER | {"x-channel": ""}, "o-1", 400, "order-bad-request"),
        (BEARER | {"x-channel": "2"}, "o-1", 404, "configuration-not-found"),
        (BEARER, "x" * 65, 400, "order-bad-request"),
        (BEARER, "%7Border.id%7D", 400, "order-bad-request"),
    ],
)
def test_a_caller_without_permission_or_with_a_wrong_request_is_refused(
    tmp_path: Path, headers: dict[str, str], order_id: str, status: int, code: str
) -> None:
    registrar = FakeRegistrar()

    answer = send(registrar, configured(tmp_path), url=URL.replace("o-1", order_id), headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (answer.headers.get("connection") == "close") is (status == 401)
    assert registrar.calls == []


def test_a_signed_callback_url_does_not_authorize_a_registration(tmp_path: Path) -> None:
    config = configured(tmp_path)
    url = Senders(config.senders).signed_url("http://adapter", CHANNEL, "o-1", "order-status")

    answer = send(
        FakeRegistrar(),
        config,
        url=f"{URL}?{httpx.URL(url).query.decode()}",
        headers={"x-merchant": "norce", "x-channel": "1"},
    )

    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OrderNotFound("canary"), 404, "order-not-found"),
        (NorceUnavailable("canary"), 503, "norce-unavailable"),
        (NorceRefused("check the tokens"), 502, "norce-refused"),
    ],
    ids=str,
)
def test_an_error_of_norce_is_answered_with_its_code(tmp_path: Path, error: Exception, status: int, code: str) -> None:
    answer = send(FakeRegistrar(error), configured(tmp_path))

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert "canary" not in answer.text


def test_the_answer_names_the_callback_that_norce_rejects(tmp_path: Path) -> None:
    rejected = CallbacksRejected({"order-rules": NorceRejected("Norce answered 400", "order-validation")}, Registered())

    answer = send(FakeRegistrar(rejected), configured(tmp_path))

    assert answer.status_code == 502
    assert answer.json() == {"code": "norce-rejected", "message": "order-rules: Norce answered 400"}


def statuses(config: Config, merchants: list[str]) -> list[int]:
    """Send a registration for each while Norce answers `answered` alone; return the statuses, 0 while one waits."""

    async def work() -> list[int]:
        async with client(config, SilentRegistrar(but="answered")) as http:
            sent = [asyncio.create_task(http.post(URL, headers=BEARER | {"x-merchant": each})) for each in merchants]
            for _ in range(20):
                await asyncio.sleep(0)
            found = [each.result().status_code if each.done() else 0 for each in sent]
            for each in sent:
                each.cancel()
            await asyncio.gather(*sent, return_exceptions=True)
        return found

    return asyncio.run(work())


def test_too_many_registrations_of_one_merchant_are_refused_and_leave_room_for_others(tmp_path: Path) -> None:
    config = configured(tmp_path, merchants=dict.fromkeys(("norce", "answered"), TREE["merchants"]["norce"]))

    found = statuses(config, ["norce"] * (MAX_AT_ONCE + 1) + ["answered"])

    assert found == [0] * MAX_AT_ONCE + [503, 200]


def test_registrations_leave_room_for_notifications_if_norce_answers_nobody(tmp_path: Path) -> None:
    """The server refuses every request, unread, if too many of any kind wait."""
    names = [f"merchant-{number}" for number in range(MAX_IN_TOTAL // MAX_AT_ONCE + 1)]
    config = configured(tmp_path, merchants=dict.fromkeys(names, TREE["merchants"]["norce"]))

    found = statuses(config, [each for each in names for _ in range(MAX_AT_ONCE)])

    assert found == [0] * MAX_IN_TOTAL + [503] * (len(found) - MAX_IN_TOTAL)


def test_a_registration_that_has_ended_leaves_its_place(tmp_path: Path) -> None:
    async def work() -> set[int]:
        async with client(configured(tmp_path), FakeRegistrar(NorceUnavailable("down"))) as http:
            return {(await http.post(URL, headers=BEARER)).json()["code"] for _ in range(MAX_AT_ONCE + 1)}

    assert asyncio.run(work()) == {"norce-unavailable"}


def test_a_registration_that_a_shutdown_interrupts_is_answered_503(tmp_path: Path) -> None:
    async def work() -> httpx.Response:
        async with client(configured(tmp_path), SilentRegistrar()) as http:
            sent = asyncio.create_task(http.post(URL, headers=BEARER))
            for _ in range(20):
                await asyncio.sleep(0)
            sent.cancel()  # as the server does
            return await sent

    answer = asyncio.run(work())

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_a_channel_that_norce_has_switched_off_registers_nothing_and_still_removes(tmp_path: Path) -> None:
    off = {CHANNEL}

    assert send(FakeRegistrar(), configured(tmp_path), switched_off=off).status_code == 409
    assert send(FakeRegistrar(), configured(tmp_path), "DELETE", switched_off=off).status_code == 200
