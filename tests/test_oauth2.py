"""`adapter.oauth2`: access tokens that all nodes share, on both databases."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import parse_qs

import httpx
import pytest

from adapter.config.json_schema import changeable
from adapter.ledger.key_values import StoredTokens
from adapter.ledger.store import Store
from adapter.moments import to_datetime
from adapter.oauth2 import AccessTokens, Login, TokenEntry, TokenStore
from adapter.outgoing import Outgoing, Traffic
from adapter.plugin import Misconfigured, OAuth2, Outcome, Retry, Secret, Settings, Url
from tests.asynchronous import asynchronous
from tests.databases import rows
from tests.ledgers import NOON, HandClock

API = "https://erp.example"
TOKENS = "https://login.example/oauth/token"
T = TypeVar("T")


class ErpSettings(Settings, frozen=True, kw_only=True):
    url: Url = Url(API)
    login: OAuth2


def login(**more: Any) -> ErpSettings:
    given: dict[str, Any] = {"token_url": Url(TOKENS), "client_id": "adapter", "client_secret": Secret("canary-secret")}
    return ErpSettings(login=OAuth2(**given | more))


REFRESHES = login(refresh_token=Secret("canary-refresh-0"))


class Erp:
    """A system with its token endpoint: each token and each refresh token is issued once, and counted."""

    def __init__(self) -> None:
        self.issued = 0
        self.valid: set[str] = set()
        self.refresh = "canary-refresh-0"
        self.forms: list[dict[str, str]] = []
        self.heads: list[str | None] = []
        self.requests: list[tuple[str, bytes]] = []
        self.answer: dict[str, Any] | httpx.Response = {"expires_in": 3600}
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()
        self.go_on.set()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url != TOKENS:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            self.requests.append((request.method, request.content))
            return httpx.Response(200 if given in self.valid else 401, json={"token": given})
        form = {name: values[0] for name, values in parse_qs(request.content.decode()).items()}
        self.forms.append(form)
        self.heads.append(request.headers.get("authorization"))
        self.asked.set()
        await self.go_on.wait()
        if isinstance(self.answer, httpx.Response):
            return self.answer
        if form["grant_type"] == "refresh_token" and form["refresh_token"] != self.refresh:
            return httpx.Response(400, json={"error": "invalid_grant", "error_description": "canary"})
        self.issued += 1
        token = f"canary-token-{self.issued}"
        self.valid = {token}
        told = {"access_token": token, "token_type": "Bearer", **self.answer}
        if form["grant_type"] == "refresh_token":
            self.refresh = told["refresh_token"] = f"canary-refresh-{self.issued}"
        return httpx.Response(200, json=told)


class Node:
    """A node with its own connection to the ledger."""

    def __init__(self, erp: Erp, clock: HandClock, store: TokenStore | None) -> None:
        self.erp, self.clock = erp, clock
        self.tokens = AccessTokens(store, self.outgoing, self.now, poll=timedelta(0))

    def now(self) -> Any:
        return to_datetime(self.clock.now)

    def outgoing(self) -> Outgoing:
        return Outgoing(httpx.MockTransport(self.erp))

    async def token(self, settings: ErpSettings, merchant: str = "fjallboden") -> str:
        return (await self.tokens.token(Login(merchant, settings, settings.login))).access

    async def send(
        self, settings: ErpSettings, method: str = "POST", traffic: Traffic | None = None, **more: Any
    ) -> Any:
        """Send a request as a handler does. Return the token that it was accepted with."""
        http = self.outgoing().client(settings, self.now() + timedelta(minutes=1), self.now, traffic or Traffic())
        auth = self.tokens.auth("fjallboden", settings, settings.login)
        return (await http.request(method, f"{API}/orders", auth=auth, **more)).raise_for_status().json()["token"]


Nodes = Callable[[], Node]


def on_nodes(url: str, work: Callable[[Erp, Nodes, HandClock], Coroutine[Any, Any, T]]) -> T:
    """Run work with nodes that share a ledger. On SQLite, they share its only writer as well."""

    async def run() -> T:
        erp, clock = Erp(), HandClock()
        with ExitStack() as stack:
            only: list[Store] = []

            def node() -> Node:
                if not only or url.startswith("postgresql"):
                    only.append(Store.open(url, clock=clock))
                    stack.callback(only[-1].close)
                return Node(erp, clock, StoredTokens(only[-1]))

            return await asyncio.wait_for(work(erp, node, clock), 120)

    return asyncio.run(run())


# --- requests for tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "form", "head"),
    [
        ({}, {"grant_type": "client_credentials"}, "Basic YWRhcHRlcjpjYW5hcnktc2VjcmV0"),
        (
            {"client_id": "a:b", "client_secret": Secret("ö")},
            {"grant_type": "client_credentials"},
            "Basic YSUzQWI6JUMzJUI2",
        ),
        (
            {"client_auth": "body", "scope": "orders invoices", "parameters": {"audience": "erp"}},
            {
                "grant_type": "client_credentials", "client_id": "adapter", "client_secret": "canary-secret",
                "scope": "orders invoices", "audience": "erp",
            },
            None,
        ),
    ],
    ids=["in a header", "encoded", "in the body"],
)  # fmt: skip
@asynchronous
async def test_a_client_asks_for_a_token(more: dict[str, Any], form: dict[str, str], head: str | None) -> None:
    erp = Erp()

    assert await Node(erp, HandClock(), None).token(login(**more)) == "canary-token-1"

    assert (erp.forms, erp.heads) == ([form], [head])


REFUSALS: dict[str, tuple[httpx.Response, type[Outcome], str]] = {
    "the client": (
        httpx.Response(401, json={"error": "invalid_client"}),
        Misconfigured,
        "answered 401: invalid_client",
    ),
    "the grant": (httpx.Response(400, json={"error": "invalid_grant"}), Misconfigured, "answered 400: invalid_grant"),
    "another reason": (httpx.Response(400, json={"error": "Canary!"}), Misconfigured, "was answered 400"),
    "a page": (httpx.Response(404, text="<html>canary"), Misconfigured, "was answered 404"),
    "a redirect": (httpx.Response(302, headers={"location": API}), Misconfigured, "was answered 302"),
    "no token": (httpx.Response(200, json={"canary": 1}), Misconfigured, "holds no bearer token"),
    "another kind": (httpx.Response(200, json={"access_token": "a", "token_type": "mac"}), Misconfigured, "no bearer"),
    "two lines": (httpx.Response(200, json={"access_token": "canary\nx"}), Misconfigured, "no bearer token"),
    "busy": (httpx.Response(429, headers={"retry-after": "7"}), Retry, "was answered 429"),
    "failing": (httpx.Response(503), Retry, "was answered 503"),
    "a page in place of JSON": (httpx.Response(200, text="canary"), Retry, "not JSON"),
}


@pytest.mark.parametrize(("answer", "kind", "message"), REFUSALS.values(), ids=REFUSALS)
@asynchronous
async def test_a_token_that_is_not_given_is_no_doubt(answer: httpx.Response, kind: type[Outcome], message: str) -> None:
    erp, traffic = Erp(), Traffic()
    erp.answer = answer

    with pytest.raises(kind) as raised:
        await Node(erp, HandClock(), None).send(login(), traffic=traffic)

    assert message in raised.value.message
    assert "canary" not in str(raised.value).lower()
    assert not traffic.close()
    assert erp.requests == []


@asynchronous
async def test_only_a_host_in_the_settings_gets_the_secret() -> None:
    erp, node = Erp(), Node(Erp(), HandClock(), None)
    other = OAuth2(token_url=Url("https://other.example/token"), client_id="a", client_secret=Secret("canary"))

    with pytest.raises(Misconfigured, match="host-not-allowed"):
        await node.tokens.token(Login("fjallboden", login(), other))

    assert erp.forms == []


def test_norce_may_not_change_a_login() -> None:
    assert changeable(ErpSettings) == frozenset()


@asynchronous
async def test_without_a_ledger_no_refresh_token_is_used_up() -> None:
    """`check --online` runs beside the service, whose refresh token it must not use."""
    erp = Erp()

    with pytest.raises(Misconfigured, match="only the running service"):
        await Node(erp, HandClock(), None).token(REFRESHES)

    assert erp.forms == []


def test_no_repr_shows_a_token() -> None:
    async def shown() -> str:
        node = Node(Erp(), HandClock(), None)
        token = await node.tokens.token(Login("fjallboden", login(), login().login))
        return repr([token, login(), node.tokens.auth("fjallboden", login(), login().login)])

    assert "canary" not in asyncio.run(shown())


# --- tokens of several nodes ----------------------------------------------------------------------------------------


def test_nodes_share_a_token_of_a_merchant(store_url: str) -> None:
    async def work(erp: Erp, node: Nodes, clock: HandClock) -> list[str]:
        one, other = node(), node()
        await asyncio.gather(*(each.token(login()) for each in (one, other, one, other)))
        other_scope = login(scope="invoices")
        return [
            await one.token(login()),
            await other.token(login()),
            await other.token(login(), "annan"),
            await one.token(other_scope),
            await node().token(login()),
        ]

    assert on_nodes(store_url, work) == [f"canary-token-{number}" for number in (1, 1, 2, 3, 1)]
    assert rows(store_url, "SELECT count(*), max(locked_until) FROM tokens") == [(3, 0)]


def test_a_token_is_replaced_shortly_before_it_ends(store_url: str) -> None:
    async def work(erp: Erp, node: Nodes, clock: HandClock) -> list[str]:
        one, seen = node(), []
        for lifetime, after in ((3600, 3569), (3600, 1), (60, 53), (60, 1), (None, 10**6), (-1, 0)):
            erp.answer = {} if lifetime is None else {"expires_in": lifetime}
            clock.now += after * 1000
            seen.append(await one.token(login()))
        return seen

    seen = on_nodes(store_url, work)

    # The first lives 3,600 s less 30 s, the second 60 s less a tenth.
    assert seen == [f"canary-token-{number}" for number in (1, 1, 1, 1, 2, 2)]


def test_a_rotated_refresh_token_is_used_by_the_next_node_and_after_a_restart(store_url: str) -> None:
    async def work(erp: Erp, node: Nodes, clock: HandClock) -> list[str]:
        seen = []
        for each in (node(), node(), node()):
            seen.append(await each.token(REFRESHES))
            clock.now += 3600 * 1000
        return [*seen, *(form["refresh_token"] for form in erp.forms)]

    tokens, refreshed = (lambda seen: (seen[:3], seen[3:]))(on_nodes(store_url, work))

    assert tokens == ["canary-token-1", "canary-token-2", "canary-token-3"]
    assert refreshed == ["canary-refresh-0", "canary-refresh-1", "canary-refresh-2"]


def test_one_node_at_a_time_uses_the_refresh_token(store_url: str) -> None:
    """A second use of a rotated refresh token makes many servers revoke all of them."""

    async def work(erp: Erp, node: Nodes, clock: HandClock) -> list[str]:
        erp.go_on.clear()
        nodes = [node(), node(), node()]
        asking = [asyncio.create_task(each.token(REFRESHES)) for each in nodes]
        await erp.asked.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        erp.go_on.set()
        return [*(await asyncio.gather(*asking)), str(len(erp.forms))]

    assert on_nodes(store_url, work) == ["canary-token-1"] * 3 + ["1"]


def test_another_node_goes_on_if_one_dies_while_it_fetches_a_token(store_url: str) -> None:
    async def work(erp: Erp, node: Nodes, clock: HandClock) -> str:
        dead = node().tokens._store
        assert dead is not None
        entry = await dead.lock(
            "fjallboden", Login("fjallboden", REFRESHES, REFRESHES.login).name, timedelta(seconds=30)
        )
        assert entry == TokenEntry(None, 0, NOON + 30_000)
        waiting = asyncio.create_task(node().token(REFRESHES))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not waiting.done()
        clock.now += 30_000
        token = await waiting
        # The node was only suspended. What it has now must not replace what is newer.
        await dead.unlock("fjallboden", Login("fjallboden", REFRESHES, REFRESHES.login).name, entry, b"{}")
        return token

    assert on_nodes(store_url, work) == "canary-token-1"
    ((content,),) = rows(store_url, "SELECT content FROM tokens")
    assert json.loads(bytes(content))["refresh"] == "canary-refresh-1"


def test_a_handler_that_is_cancelled_costs_no_refresh_token(store_url: str) -> None:
    async def work(erp: Erp, node: Nodes, clock: HandClock) -> str:
        erp.go_on.clear()
        one = node()
        asking = asyncio.create_task(one.token(REFRESHES))
        await erp.asked.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        erp.go_on.set()
        await one.tokens.aclose()
        return await node().token(REFRESHES)

    assert on_nodes(store_url, work) == "canary-token-1"


# --- requests with a token ------------------------------------------------------------------------------------------


def test_a_request_that_is_answered_401_is_sent_once_more_with_another_token(store_url: str) -> None:
    async def work(erp: Erp, node: Nodes, clock: HandClock) -> list[Any]:
        one, other, traffic = node(), node(), Traffic()
        first = await one.send(REFRESHES)
        await other.token(REFRESHES)
        erp.valid.clear()  # revoked
        clock.now += 60_000
        second = await one.send(REFRESHES, json={"number": 7}, traffic=traffic)
        third = await other.send(REFRESHES)  # it knows the first token only, and finds the second in the ledger
        assert (traffic.succeeded, traffic.unanswered) == (True, 0)
        return [first, second, third, len(erp.forms), erp.requests]

    sent = b'{"number":7}'
    assert on_nodes(store_url, work) == [
        "canary-token-1",
        "canary-token-2",
        "canary-token-2",
        2,
        [("POST", b""), ("POST", sent), ("POST", sent), ("POST", b""), ("POST", b"")],
    ]


def test_a_second_401_is_misconfigured_and_asks_for_no_third_token(store_url: str) -> None:
    class Refusing(Erp):
        async def __call__(self, request: httpx.Request) -> httpx.Response:
            if request.url == TOKENS:
                return await super().__call__(request)
            self.requests.append((request.method, request.content))
            return httpx.Response(401)

    async def work(_erp: Erp, node: Nodes, clock: HandClock) -> list[int]:
        one = node()
        one.erp = erp = Refusing()
        counts = []
        for wait in (60_000, 0, 60_000):
            with pytest.raises(Misconfigured, match="destination-unauthorized"):
                await one.send(login())
            counts.append((len(erp.requests), len(erp.forms)))
            clock.now += wait
        return counts  # type: ignore[return-value]

    # A token that is new is not replaced at once: the destination would be asked for ever.
    assert on_nodes(store_url, work) == [(1, 1), (3, 2), (4, 2)]


@pytest.mark.parametrize(("settings", "kind"), [(login(), None), (REFRESHES, Retry)], ids=["client", "refresh token"])
@asynchronous
async def test_without_the_ledger_only_a_client_gets_a_token(settings: ErpSettings, kind: type[Outcome] | None) -> None:
    """Shoppers wait for validations, which need no ledger. A new refresh token that is not stored would be lost."""

    class Down:
        async def lock(self, merchant: str, name: str, locked_for: timedelta) -> TokenEntry | None:
            raise Retry("store-unavailable")

        async def unlock(self, merchant: str, name: str, entry: TokenEntry, content: bytes | None = None) -> None:
            raise AssertionError

    erp = Erp()
    node = Node(erp, HandClock(), Down())
    if kind is None:
        assert [await node.token(settings) for _ in range(2)] == ["canary-token-1"] * 2
    else:
        with pytest.raises(kind):
            await node.token(settings)
        assert erp.forms == []
