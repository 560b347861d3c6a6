"""OAuth2 for handlers: access tokens that all nodes share (`Context.auth`).

One node at a time fetches a token, and no deadline of a handler cancels it: the answer may hold a new refresh token,
and the one that was sent is then worth nothing. The new one is stored before it is used. If such an answer gets lost,
a person has to configure another refresh token.

Everything here runs on the service's own loop. The ready `httpx.Auth` runs on any loop.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime, timedelta
from hashlib import sha256
from typing import NamedTuple, Protocol
from urllib.parse import quote_plus

import httpx
import msgspec
import structlog

from adapter.outgoing import Outgoing, Traffic
from adapter.plugin import Misconfigured, OAuth2, Retry, Settings

log = structlog.get_logger(__name__)

REQUEST_WITHIN = timedelta(seconds=15)
LOCKED_FOR = 2 * REQUEST_WITHIN  # by a node that fetches a token; if it dies, another node may begin then
POLL = timedelta(milliseconds=200)  # while another node fetches the token
ENDS_EARLY = timedelta(seconds=30)  # a token is replaced so long before it ends
FRESH = timedelta(seconds=10)  # a token is not replaced so soon, although a destination refuses it

_CODE = re.compile(r"[a-z_]{1,64}")
_IN_A_HEADER = re.compile(r"[!-~]+")


class TokenEntry(NamedTuple):
    """A stored token, locked for this node."""

    content: bytes | None
    version: int  # counts the tokens that were stored
    locked_until: int


class TokenStore(Protocol):
    """The tokens of all nodes. Every method raises `Retry` if the store does not answer."""

    async def lock(self, merchant: str, name: str, locked_for: timedelta) -> TokenEntry | None:
        """Lock a token for this node and return it, or None while another node has it."""
        ...

    async def unlock(self, merchant: str, name: str, entry: TokenEntry, content: bytes | None = None) -> None:
        """End the lock, and store a new token unless another one was stored meanwhile."""
        ...


class AccessToken(msgspec.Struct, frozen=True, kw_only=True):
    """An access token, and the refresh token for the next one. Its `repr` shows neither."""

    access: str
    refresh: str | None
    obtained_at: datetime
    ends_at: datetime | None  # when it should be replaced; None: when a destination refuses it

    def __repr__(self) -> str:
        return "***"


class Login(NamedTuple):
    """A login of a merchant: the `OAuth2` in the settings of a handler."""

    merchant: str
    settings: Settings  # of the handler, whose hosts may be called
    oauth2: OAuth2

    @property
    def name(self) -> str:
        """Return a digest of everything that makes another token, without the client's secret."""
        own = self.oauth2
        refresh = own.refresh_token and own.refresh_token.reveal()
        parts = [str(own.token_url), own.client_id, own.scope, sorted(own.parameters.items()), refresh]
        return sha256(json.dumps(parts).encode()).hexdigest()


class AccessTokens:
    """The access tokens of all merchants. Create it on the service's own loop.

    Args:
        store: The tokens that all nodes share. Without it, no refresh token is used, because it may be the last time.
        outgoing: Creates the connections to the token endpoints.
        clock: Returns the time, the same on all nodes.
        poll: The pause before another look at a token that another node fetches.
    """

    def __init__(
        self,
        store: TokenStore | None,
        outgoing: Callable[[], Outgoing],
        clock: Callable[[], datetime],
        poll: timedelta = POLL,
    ) -> None:
        self._store = store
        self._make_outgoing = outgoing
        self._outgoing: Outgoing | None = None
        self._clock = clock
        self._poll = poll
        self._loop: asyncio.AbstractEventLoop | None = None
        with contextlib.suppress(RuntimeError):  # created outside of a loop, for tests: the loop of the request serves
            self._loop = asyncio.get_running_loop()
        self._known: dict[tuple[str, str], AccessToken] = {}
        self._fetching: dict[tuple[str, str], asyncio.Task[AccessToken]] = {}

    def auth(self, merchant: str, settings: Settings, oauth2: OAuth2) -> httpx.Auth:
        """Return the authentication of a handler's requests, for any loop."""
        login = Login(merchant, settings, oauth2)

        async def token(refused: AccessToken | None) -> AccessToken:
            work = self.token(login, refused)
            return await asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(work, self._loop or asyncio.get_running_loop())
            )

        return TokenAuth(token)

    async def token(self, login: Login, refused: AccessToken | None = None) -> AccessToken:
        """Return an access token, another than the one that was `refused` unless that is new.

        Raises:
            Retry: The token endpoint or the store does not answer.
            Misconfigured: The token endpoint refuses.
        """
        key = login.merchant, login.name
        known = self._known.get(key)
        if known is not None and self._is_usable(known, refused):
            return known
        if (task := self._fetching.get(key)) is None:
            task = self._fetching[key] = asyncio.create_task(self._replaced(login, key, refused))
            task.add_done_callback(lambda ended: (self._fetching.pop(key), ended.cancelled() or ended.exception()))
        return await asyncio.shield(task)

    async def aclose(self) -> None:
        """Wait for the tokens that are being fetched, and close the connections."""
        if self._fetching:
            await asyncio.wait(tuple(self._fetching.values()))
        if self._outgoing is not None:
            await self._outgoing.aclose()

    def _is_usable(self, token: AccessToken, refused: AccessToken | None) -> bool:
        now = self._clock()
        if refused is not None and token.access == refused.access and now - token.obtained_at >= FRESH:
            return False
        return token.ends_at is None or now < token.ends_at

    async def _replaced(self, login: Login, key: tuple[str, str], refused: AccessToken | None) -> AccessToken:
        """Return the token that another node has stored, or fetch one under the lock."""
        entry = None
        try:
            if self._store is not None:
                entry = await self._locked(self._store, key)
            elif login.oauth2.refresh_token is not None:
                raise Misconfigured("no-tokens", "only the running service uses a refresh token")
        except Retry:
            if login.oauth2.refresh_token is not None:  # a new one could not be stored
                raise
        stored = [
            self._known.get(key),
            None if entry is None or entry.content is None else msgspec.json.decode(entry.content, type=AccessToken),
        ]
        newest = max((each for each in stored if each is not None), key=lambda each: each.obtained_at, default=None)
        content = None
        try:
            if newest is None or not self._is_usable(newest, refused):
                newest = await self._fetched(login, newest)
                content = msgspec.json.encode(newest)
            self._known[key] = newest
        finally:
            if self._store is not None and entry is not None:
                try:
                    await self._store.unlock(*key, entry, content)
                except Retry as error:  # it is used from memory, and so is its refresh token
                    log.error("token_not_stored", merchant=login.merchant, exc_info=error)
        return newest

    async def _locked(self, store: TokenStore, key: tuple[str, str]) -> TokenEntry:
        while True:
            if (entry := await store.lock(*key, LOCKED_FOR)) is not None:
                return entry
            await asyncio.sleep(self._poll.total_seconds())

    async def _fetched(self, login: Login, last: AccessToken | None) -> AccessToken:
        own, now = login.oauth2, self._clock()
        form = dict(own.parameters)
        if own.scope is not None:
            form["scope"] = own.scope
        refresh = None
        if own.refresh_token is None:
            form["grant_type"] = "client_credentials"
        else:
            refresh = last.refresh if last is not None and last.refresh else own.refresh_token.reveal()
            form |= {"grant_type": "refresh_token", "refresh_token": refresh}
        auth = httpx.Auth()  # adds nothing
        if own.client_auth == "basic":
            auth = httpx.BasicAuth(quote_plus(own.client_id), quote_plus(own.client_secret.reveal()))  # RFC 6749, 2.3.1
        else:
            form |= {"client_id": own.client_id, "client_secret": own.client_secret.reveal()}
        if self._outgoing is None:
            self._outgoing = self._make_outgoing()
        http = self._outgoing.client(login.settings, now + REQUEST_WITHIN, self._clock, Traffic())
        answer = await http.post(
            own.token_url, data=form, auth=auth, headers={"accept": "application/json"}, extensions={"write": False}
        )
        status = answer.status_code
        if 300 <= status < 500 and status not in (408, 425, 429):
            raise Misconfigured("oauth2-refused", f"the request for a token was answered {status}{_reason(answer)}")
        body = answer.raise_for_status().json()
        try:
            told = msgspec.convert(body, _TokenAnswer, strict=False)
        except msgspec.ValidationError:
            told = _TokenAnswer(access_token="")
        if not _IN_A_HEADER.fullmatch(told.access_token) or told.token_type.lower() != "bearer":
            raise Misconfigured("oauth2-no-token", "the answer to the request for a token holds no bearer token")
        lifetime = None if told.expires_in is None else timedelta(seconds=min(max(told.expires_in, 0), 10**8))
        return AccessToken(
            access=told.access_token,
            refresh=told.refresh_token or refresh,
            obtained_at=now,
            ends_at=None if lifetime is None else now + lifetime - min(ENDS_EARLY, lifetime / 10),
        )


class TokenAuth(httpx.Auth):
    """An authentication by an access token, and by another one if the first is refused (401)."""

    def __init__(self, token: Callable[[AccessToken | None], Awaitable[AccessToken]]) -> None:
        self._token = token

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        await request.aread()  # it may be sent twice
        token = await self._token(None)
        request.headers["authorization"] = f"Bearer {token.access}"
        answer = yield request
        if answer.status_code == 401 and (other := await self._token(token)).access != token.access:
            request.headers["authorization"] = f"Bearer {other.access}"
            yield request


class _TokenAnswer(msgspec.Struct):
    """The answer of a token endpoint (RFC 6749, 5.1)."""

    access_token: str
    token_type: str = "bearer"  # noqa: S105
    expires_in: float | None = None
    refresh_token: str | None = None


def _reason(answer: httpx.Response) -> str:
    """Return the error code of an answer (RFC 6749, 5.2), and nothing else of it."""
    try:
        body = answer.json()
    except Retry:
        return ""
    code = body.get("error") if isinstance(body, dict) else None
    return f": {code}" if isinstance(code, str) and _CODE.fullmatch(code) else ""
