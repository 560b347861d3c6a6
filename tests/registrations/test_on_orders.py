"""Our callbacks on an order: what is put there, what is taken away, and whose are left alone."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Router

from adapter import config as configuration
from adapter.callbacks.senders import Senders
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.norce.api import BY_NAME, schema
from adapter.norce.client import Account, Norce, NorceRejected, NorceUnavailable, OrderNotFound
from adapter.plugin import Secret
from adapter.registrations.endpoint import AT_ONCE, MOST_OF_ALL, MOST_WAITING, Registrations, routes
from adapter.registrations.on_orders import Registered, Registrar, registrations, static_notifications, static_secret
from tests.simulators import TOKEN, Shop, shop

NEW, OLD = "a-new-key-of-32-bytes-0123456789", "an-old-key-of-32-bytes-012345678"
OURS = ("cart-changed", "order-rules", "order-status")

CHANNEL = Channel("norce", "1")
TREE: dict[str, Any] = {
    "adapter": {"id": "our_adapter", "public_url": "http://127.0.0.1:8080"},
    "merchants": {"norce": {"tokens": ["${env:TOKEN}"], "channels": {"1": {}}}},
    "senders": {"signed_urls": {"keys": {"old": "${env:OLD}"}}},
    "callbacks": {
        "order-status": {"kind": "notification", "scope": "/state/currentStatus", "schema": {"const": "completed"}},
        "order-rules": {"kind": "validation"},
        "cart-changed": {"kind": "hook", "watch": "/cart", "target": "/cart"},
    },
}


def configured(folder: Path, **changed: Any) -> Config:
    path = folder / "config.yaml"
    path.write_text(json.dumps(TREE | changed))
    return configuration.load(path, {"TOKEN": TOKEN, "OLD": OLD, "NEW": NEW, "STATIC": "a-static-secret"})


class Valid(httpx.AsyncBaseTransport):
    """On to the simulator, with every body held against its schema."""

    def __init__(self, simulator: Any) -> None:
        self._inner = httpx.ASGITransport(simulator.app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.content and request.method == "POST":
            place = request.url.path.rpartition("/")[2][:-1]
            Draft202012Validator(schema(BY_NAME[f"add_{place}"].body or "")).validate(json.loads(request.content))
        return await self._inner.handle_async_request(request)


class Far(Valid):
    """Others are served meanwhile."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        return await super().handle_async_request(request)


class Picky(Valid):
    """Takes no validations."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/validations"):
            return httpx.Response(400, json={"code": "order-validation", "message": "not here"})
        return await super().handle_async_request(request)


class Twice(Valid):
    """Somebody else takes away the same, a moment before."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            await super().handle_async_request(request)
        return await super().handle_async_request(request)


@contextmanager
def opened(norce: Shop, version: str = "v0", transport: httpx.AsyncBaseTransport | None = None) -> Iterator[Norce]:
    account = Account(base_url="http://norce/checkout", tokens=(Secret(TOKEN),))
    client = Norce(
        {"norce": account},
        adapter_id="our_adapter",
        timeout=timedelta(minutes=1),
        version=version,
        transport=transport or Valid(norce.simulator),
    )
    try:
        yield client
    finally:
        norce.loop.run(client.aclose())


def registered(norce: Shop, config: Config, order_id: str) -> Registered:
    with opened(norce, config.norce.version) as client:
        return norce.loop.run(Registrar(config, client).register(CHANNEL, order_id))


def ours_on(norce: Shop, order_id: str) -> dict[str, list[dict[str, Any]]]:
    order = norce.read(order_id)
    places = ("validations", "hooks", "notifications")
    return {place: [each for each in order[place] if each.get("adapterId") == "our_adapter"] for place in places}


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_all_callbacks_are_put_on_an_order_once_however_often_it_is_asked(tmp_path: Path, version: str) -> None:
    config = configured(tmp_path, norce={"version": version})
    with shop() as norce:
        order_id = norce.create()

        first = registered(norce, config, order_id)
        before = ours_on(norce, order_id)
        again = registered(norce, config, order_id)

        assert first == Registered(added=OURS)
        assert again == Registered(kept=OURS)
        assert ours_on(norce, order_id) == before
        assert [len(each) for each in before.values()] == [1, 1, 1]


def test_what_was_registered_with_one_version_is_known_with_the_other(tmp_path: Path) -> None:
    with shop() as norce:
        order_id = norce.create()

        registered(norce, configured(tmp_path, norce={"version": "v1"}), order_id)

        assert registered(norce, configured(tmp_path, norce={"version": "v0"}), order_id) == Registered(kept=OURS)


def test_what_is_on_the_order_is_what_norce_documents(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce:
        order_id = norce.create()
        registered(norce, config, order_id)

        order = norce.read(order_id)

    def signed(name: str) -> str:
        return Senders(config.senders).signed_url("http://127.0.0.1:8080", CHANNEL, order_id, name)

    [validation], [hook], [notification] = order["validations"], order["hooks"], order["notifications"]
    for each in (validation, hook, notification):
        del each["id"]
    assert validation == {"adapterId": "our_adapter", "url": signed("order-rules")}
    assert hook == {
        "adapterId": "our_adapter",
        "subscribeTo": "/cart",
        "target": "/cart",
        "invoke": signed("cart-changed"),
        "version": "v0",
    }
    del notification["description"]
    assert notification == {
        "adapterId": "our_adapter",
        "reference": "order-status",
        "scope": "/state/currentStatus",
        "schema": {"const": "completed"},
        "invoke": signed("order-status"),
        "version": "v0",
    }


def test_what_is_stale_goes_and_what_is_missing_comes(tmp_path: Path) -> None:
    with shop() as norce:
        order_id = norce.create()
        registered(norce, configured(tmp_path), order_id)
        callbacks = TREE["callbacks"] | {
            "order-status": {"kind": "notification", "scope": "/cart"},
            "addresses": {"kind": "hook", "watch": "/customer"},
        }
        del callbacks["order-rules"]

        done = registered(norce, configured(tmp_path, callbacks=callbacks), order_id)

        assert done.added == ("addresses", "order-status")
        assert done.kept == ("cart-changed",)
        assert len(done.removed) == 2
        assert "order-status" in done.removed
        ours = ours_on(norce, order_id)
        assert ours["validations"] == []
        assert sorted(each["subscribeTo"] for each in ours["hooks"]) == ["/cart", "/customer"]
        assert [each["scope"] for each in ours["notifications"]] == ["/cart"]


def test_one_that_is_there_twice_is_taken_away_once(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce:
        order_id = norce.create()
        registered(norce, config, order_id)
        [notification] = ours_on(norce, order_id)["notifications"]
        norce.ask("add_notification", {k: v for k, v in notification.items() if k != "id"}, order_id=order_id)

        assert registered(norce, config, order_id) == Registered(removed=("order-status",), kept=OURS)
        assert len(ours_on(norce, order_id)["notifications"]) == 1


def test_one_that_norce_refuses_keeps_no_other_away(tmp_path: Path) -> None:
    """An order without its notification is one that nobody exports, and no event log shows."""
    callbacks = dict(sorted(TREE["callbacks"].items(), key=lambda each: each[0] != "order-rules"))
    with shop() as norce, opened(norce, transport=Picky(norce.simulator)) as client:
        order_id = norce.create()
        registrar = Registrar(configured(tmp_path, callbacks=callbacks), client)

        with pytest.raises(NorceRejected, match="order-validation"):
            norce.loop.run(registrar.register(CHANNEL, order_id))

        assert [len(each) for each in ours_on(norce, order_id).values()] == [0, 1, 1]


def test_two_who_register_at_the_same_moment_put_each_there_once(tmp_path: Path) -> None:
    """A shop that does not wait for the answer, and asks again: a hook that is there twice patches twice."""
    with shop() as norce, opened(norce, transport=Far(norce.simulator)) as client:
        order_id = norce.create()
        registrar = Registrar(configured(tmp_path), client)

        async def both() -> list[Registered]:
            return await asyncio.gather(*(registrar.register(CHANNEL, order_id) for _ in range(2)))

        done = norce.loop.run(both())

        assert done == [Registered(added=OURS), Registered(kept=OURS)]
        assert [len(each) for each in ours_on(norce, order_id).values()] == [1, 1, 1]


def test_what_is_no_address_is_taken_away_like_any_other(tmp_path: Path) -> None:
    config = configured(tmp_path)
    odd = {"adapterId": "our_adapter", "scope": "/cart", "invoke": "http://[x/no-callback-of-ours"}
    with shop() as norce:
        order_id = norce.create(notifications=[odd])
        [there] = ours_on(norce, order_id)["notifications"]

        assert registered(norce, config, order_id) == Registered(added=OURS, removed=(there["id"],))


def test_two_who_take_the_same_away_are_both_done(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce, opened(norce, transport=Twice(norce.simulator)) as client:
        order_id = norce.create()
        registered(norce, config, order_id)

        done = norce.loop.run(Registrar(config, client).deregister(CHANNEL, order_id))

        assert done == Registered(removed=OURS)
        assert ours_on(norce, order_id) == {"validations": [], "hooks": [], "notifications": []}


def test_a_key_that_is_still_good_is_good_enough_and_a_retired_one_is_stale(tmp_path: Path) -> None:
    both = {"signed_urls": {"keys": {"new": "${env:NEW}", "old": "${env:OLD}"}}}
    new = {"signed_urls": {"keys": {"new": "${env:NEW}"}}}
    with shop() as norce:
        order_id = norce.create()
        registered(norce, configured(tmp_path), order_id)

        assert registered(norce, configured(tmp_path, senders=both), order_id) == Registered(kept=OURS)
        assert registered(norce, configured(tmp_path, senders=new), order_id) == Registered(added=OURS, removed=OURS)
        for entries in ours_on(norce, order_id).values():
            assert ["key=new" in str(each) for each in entries] == [True]


def test_a_signature_that_was_changed_is_stale(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with shop() as norce:
        order_id = norce.create()
        registered(norce, config, order_id)
        [validation] = ours_on(norce, order_id)["validations"]
        forged = {**validation, "url": validation["url"][:-1]}
        norce.ask("put_validation", forged, order_id=order_id, validation_id=validation["id"], status=200)

        done = registered(norce, config, order_id)

        assert (done.added, done.removed) == (("order-rules",), ("order-rules",))


def test_nobody_elses_are_touched(tmp_path: Path) -> None:
    config = configured(tmp_path)
    others = [{"adapterId": "another_adapter", "scope": "/cart", "invoke": "http://127.0.0.1:9/order-status"}]
    anonymous = [{"subscribeTo": "/cart", "invoke": "http://127.0.0.1:9/hook"}]
    with shop() as norce:
        order_id = norce.create(notifications=others, hooks=anonymous)
        before = norce.read(order_id)

        registered(norce, config, order_id)
        with opened(norce) as client:
            off = norce.loop.run(Registrar(config, client).deregister(CHANNEL, order_id))
            again = norce.loop.run(Registrar(config, client).deregister(CHANNEL, order_id))

        assert off == Registered(removed=OURS)
        assert again == Registered()
        after = norce.read(order_id)
        for place in ("validations", "hooks", "notifications"):
            assert after[place] == before[place]


def test_a_notification_of_the_channels_configuration_is_enough(tmp_path: Path) -> None:
    senders = TREE["senders"] | {"url_secrets": [{"parameter": "secret", "values": ["${env:STATIC}"]}]}
    config = configured(tmp_path, senders=senders)
    [standing] = static_notifications(config, "norce")
    with shop() as norce:
        order_id = norce.create(notifications=[standing])

        done = registered(norce, config, order_id)

        assert done == Registered(added=("cart-changed", "order-rules"), kept=OURS[2:])
        assert standing["invoke"] == (
            "{configuration.adapter.internalUrl}/api/v1/callbacks/orders/{order.id}/order-status"
            "?secret={configuration.callbacks.secret}"
        )


ALL = {"parameter": "all", "values": ["${env:OLD}"]}
ITS = {"parameter": "its", "values": ["${env:STATIC}"], "merchants": ["norce"]}


def test_a_static_registration_has_the_secret_that_speaks_for_this_merchant_alone(tmp_path: Path) -> None:
    merchants = TREE["merchants"] | {"other": TREE["merchants"]["norce"]}
    config = configured(tmp_path, merchants=merchants, senders={"url_secrets": [ALL, ITS]})

    assert static_secret(config, "norce") == "a-static-secret"
    assert "?its=" in static_notifications(config, "norce")[0]["invoke"]


@pytest.mark.parametrize("merchants", [None, ["norce", "other"]])
def test_a_static_registration_needs_such_a_secret(tmp_path: Path, merchants: list[str] | None) -> None:
    both = TREE["merchants"] | {"other": TREE["merchants"]["norce"]}
    senders = {"url_secrets": [ALL | ({} if merchants is None else {"merchants": merchants})]}

    for config in (configured(tmp_path), configured(tmp_path, merchants=both, senders=senders)):
        with pytest.raises(LookupError, match="url_secrets"):
            static_notifications(config, "norce")


def test_without_a_key_nothing_can_be_registered(tmp_path: Path) -> None:
    config = configured(tmp_path, senders={"url_secrets": [{"parameter": "secret", "values": ["${env:STATIC}"]}]})

    with pytest.raises(LookupError, match="signed_urls"):
        list(registrations(config, Senders(config.senders), CHANNEL, "o"))


def test_an_order_that_norce_does_not_know_is_not_registered_on(tmp_path: Path) -> None:
    with shop() as norce, pytest.raises(OrderNotFound):
        registered(norce, configured(tmp_path), "nobody")


# --- over HTTP --------------------------------------------------------------------------------------------------------

BEARER = {"authorization": f"Bearer {TOKEN}", "x-merchant": "norce", "x-channel": "1"}


class Broken:
    """A registrar whose Norce is as it is told to be."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def register(self, *_: Any) -> Registered:
        raise self._error

    deregister = register


def sent(registrar: Any, config: Config, method: str = "POST", order_id: str = "o-1", **given: Any) -> httpx.Response:
    switched_off = given.pop("switched_off", frozenset())

    async def send() -> httpx.Response:
        app = Router(routes=routes(Registrations(config, registrar, switched_off), "our_adapter", {}))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            url = f"http://adapter/api/v1/orders/{order_id}/registrations"
            return await http.request(method, url, headers=given.get("headers", BEARER))

    return asyncio.run(send())


class Works:
    """A registrar that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    async def register(self, *whose: Any) -> Registered:
        self.asked.append(("register", *whose))
        return Registered(added=("order-status",), kept=("order-rules",))

    async def deregister(self, *whose: Any) -> Registered:
        self.asked.append(("deregister", *whose))
        return Registered(removed=("order-status",))


def test_a_post_registers_and_a_delete_takes_off(tmp_path: Path) -> None:
    works = Works()

    posted = sent(works, configured(tmp_path))
    deleted = sent(works, configured(tmp_path), "DELETE")

    assert (posted.status_code, posted.json()) == (
        200,
        {"added": ["order-status"], "removed": [], "kept": ["order-rules"]},
    )
    assert (deleted.status_code, deleted.json()) == (200, {"added": [], "removed": ["order-status"], "kept": []})
    assert works.asked == [("register", CHANNEL, "o-1"), ("deregister", CHANNEL, "o-1")]


def test_a_header_secret_of_ours_is_as_good_as_a_token(tmp_path: Path) -> None:
    secrets = {"header_secrets": [{"header": "x-secret", "values": ["${env:STATIC}"], "merchants": ["norce"]}]}
    config = configured(tmp_path, senders=secrets)
    headers = {"x-secret": "a-static-secret", "x-merchant": "norce", "x-channel": "1"}

    assert sent(Works(), config, headers=headers).status_code == 200


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
def test_who_may_not_or_says_nonsense_is_told_so(
    tmp_path: Path, headers: dict[str, str], order_id: str, status: int, code: str
) -> None:
    works = Works()

    answer = sent(works, configured(tmp_path), headers=headers, order_id=order_id)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert works.asked == []


def test_a_signed_callback_url_opens_no_registration(tmp_path: Path) -> None:
    config = configured(tmp_path)
    url = Senders(config.senders).signed_url("http://adapter", CHANNEL, "o-1", "order-status")
    headers = {"x-merchant": "norce", "x-channel": "1"}

    answer = sent(Works(), config, order_id=f"o-1/registrations?{httpx.URL(url).query.decode()}&x=", headers=headers)

    assert answer.status_code in (401, 404)


FAILURES: list[tuple[Exception, int, str]] = [
    (OrderNotFound("canary"), 404, "order-not-found"),
    (NorceUnavailable("canary"), 503, "norce-unavailable"),
]


@pytest.mark.parametrize(("error", "status", "code"), FAILURES, ids=str)
def test_what_norce_does_not_do_is_told_with_its_code(tmp_path: Path, error: Exception, status: int, code: str) -> None:
    answer = sent(Broken(error), configured(tmp_path))

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert "canary" not in answer.text


def test_a_shop_that_registers_all_its_orders_at_once_leaves_norce_to_others(tmp_path: Path) -> None:
    class Slow:
        """Norce takes its time: as many as there are at a time, and the most there were."""

        def __init__(self) -> None:
            self.now = self.most = 0
            self.go = asyncio.Event()

        async def register(self, *_: Any) -> Registered:
            self.now += 1
            self.most = max(self.most, self.now)
            await self.go.wait()
            self.now -= 1
            return Registered()

    async def crowd() -> tuple[int, list[int], int]:
        slow = Slow()
        registrations = Registrations(configured(tmp_path), slow, ())  # type: ignore[arg-type]
        app = Router(routes=routes(registrations, "our_adapter", {}))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            url = "http://adapter/api/v1/orders/o/registrations"
            sent = [asyncio.create_task(http.post(url, headers=BEARER)) for _ in range(MOST_WAITING + 5)]
            while sum(each.done() for each in sent) < 5:  # noqa: ASYNC110 - those who are refused
                await asyncio.sleep(0)
            slow.go.set()
            answers = await asyncio.gather(*sent)
        return slow.most, sorted(answer.status_code for answer in answers), registrations.waiting

    most, statuses, left = asyncio.run(crowd())

    assert most == AT_ONCE
    assert statuses == [200] * MOST_WAITING + [503] * 5
    assert left == 0


class Silent:
    """Answers one merchant alone."""

    def __init__(self, *, but: str) -> None:
        self._but = but

    async def register(self, channel: Channel, *_: str) -> Registered:
        if channel.merchant != self._but:
            await asyncio.Event().wait()
        return Registered()


def crowded(config: Config, registrar: Any, whose: list[str]) -> list[int]:
    """What is answered at once to so many registrations one after the other; 0 where it waits."""

    async def crowd() -> list[int]:
        app = Router(routes=routes(Registrations(config, registrar, ()), "our_adapter", {}))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            url = "http://adapter/api/v1/orders/o/registrations"
            sent = [asyncio.create_task(http.post(url, headers=BEARER | {"x-merchant": each})) for each in whose]
            for _ in range(20):
                await asyncio.sleep(0)
            statuses = [each.result().status_code if each.done() else 0 for each in sent]
            for each in sent:
                each.cancel()
            await asyncio.gather(*sent, return_exceptions=True)
        return statuses

    return asyncio.run(crowd())


def test_a_merchant_whose_norce_is_silent_takes_nobody_elses_place(tmp_path: Path) -> None:
    config = configured(tmp_path, merchants=TREE["merchants"] | {"other": TREE["merchants"]["norce"]})

    statuses = crowded(config, Silent(but="other"), ["norce"] * MOST_WAITING + ["norce", "other"])

    assert statuses == [0] * MOST_WAITING + [503, 200]


def test_who_waits_at_the_end_of_a_shutdown_is_to_send_it_again(tmp_path: Path) -> None:
    async def stopped() -> httpx.Response:
        app = Router(routes=routes(Registrations(configured(tmp_path), Silent(but=""), ()), "our_adapter", {}))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            sent = asyncio.create_task(http.post("http://adapter/api/v1/orders/o/registrations", headers=BEARER))
            for _ in range(20):
                await asyncio.sleep(0)
            sent.cancel()  # as the server does
            return await sent

    answer = asyncio.run(stopped())

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_who_registers_leaves_room_for_notifications_though_norce_is_silent_for_all(tmp_path: Path) -> None:
    """Beyond so many that wait, every request is refused unread (`callbacks.protocol`)."""
    names = [f"merchant-{number}" for number in range(20)]
    config = configured(tmp_path, merchants=dict.fromkeys(names, TREE["merchants"]["norce"]))
    share = MOST_OF_ALL // 20

    statuses = crowded(config, Silent(but=names[-1]), [each for each in names for _ in range(share + 1)])

    assert statuses == ([0] * share + [503]) * 19 + [200] * (share + 1)


def test_nothing_is_registered_where_norce_has_switched_us_off_and_what_is_there_can_go(tmp_path: Path) -> None:
    off = frozenset({("norce", "1")})

    assert sent(Works(), configured(tmp_path), switched_off=off).status_code == 409
    assert sent(Works(), configured(tmp_path), "DELETE", switched_off=off).status_code == 200
