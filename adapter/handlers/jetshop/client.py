"""
The export itself: one PUT for each order, classified; one GET where nobody knows what became of the PUT.

`context.http` already raises the outcomes of what has no answer and of most statuses. Here stand only the answers that
mean something of their own under this project's contract (`contract.yaml`). An answer's text is never logged, stored or
shown: a destination that explains what it did not like may well quote the customer.
"""

import re
from base64 import b64encode
from datetime import timedelta
from hashlib import sha256
from typing import Any, NoReturn

import httpx
import msgspec
from jsonpointer import JsonPointer, JsonPointerException

from adapter.handlers.jetshop.contract import misses
from adapter.handlers.jetshop.mapping import canonical, order_key, payment_information, payment_path
from adapter.handlers.jetshop.settings import BasicAuth, BearerAuth, JetshopSettings
from adapter.plugin import (
    Context,
    Done,
    Misconfigured,
    Notification,
    NotificationHandler,
    Reject,
    Retry,
    Skip,
    Unknown,
)

MOST_PLACES = 10
_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}")


class JetshopExport(NotificationHandler[JetshopSettings]):
    """
    Exports the payment information of a completed order.

    Not `repeatable`: by our contract a PUT may be repeated, but nothing says that a destination keeps to it, so that a
    request without an answer is looked up. A document that is the lane's last one, byte for byte, is not sent again.
    """

    async def deliver(self, notification: Notification, context: Context[JetshopSettings]) -> Done | Skip:
        export = _Export(notification, context.settings)
        if context.previous is not None and context.previous.facts.get("payload") == export.hash:
            return Skip("nothing-changed")
        answer = await context.http.put(
            export.url,
            content=export.body,
            headers=_headers(context.settings)
            | {"Content-Type": "application/json", "Idempotency-Key": context.key(export.hash)},
        )
        _raise_special(answer, export, context)
        return export.done(answer.raise_for_status())

    async def lookup(self, notification: Notification, context: Context[JetshopSettings]) -> Done | None:
        """Done where the very document that would be sent now is stored; another document, or none, is None."""
        export = _Export(notification, context.settings)
        answer = await context.http.get(export.url, headers=_headers(context.settings))
        if answer.status_code == 404:
            return None
        _raise_special(answer, export, context)
        stored = _json(answer.raise_for_status())
        if stored == export.document:
            return Done(export.key, {"payload": export.hash, "result": "found"})
        if misses("PaymentInformation", stored):
            # It says neither what is stored nor that nothing is; the doubt remains.
            raise Retry(
                "jetshop-broken-answer", f"GET was answered {answer.status_code} with a body against the contract"
            )
        return None


class _Export:
    """One order as it would be sent now. Raises `Reject` where it cannot be."""

    def __init__(self, notification: Notification, settings: JetshopSettings) -> None:
        self.key = order_key(notification.order, settings)
        self.url = f"{settings.base_url}{payment_path(self.key, settings)}"
        self.document = payment_information(notification.order, settings)
        self.body = canonical(self.document)
        self.hash = sha256(self.body).hexdigest()

    def done(self, answer: httpx.Response) -> Done:
        result = _json(answer)
        against = (
            misses("ExportResult", result) if answer.status_code in (200, 201) else ["its status is unknown to it"]
        )
        if not against and result["orderKey"] != self.key:
            against = ["/orderKey is not the key of the request"]
        if against:
            raise Unknown(
                "jetshop-broken-answer",
                f"PUT was answered {answer.status_code}, against the contract: {'; '.join(against[:MOST_PLACES])}",
            )
        return Done(result.get("orderNumber") or self.key, {"payload": self.hash, "result": result["result"]})


def _raise_special(answer: httpx.Response, export: _Export, context: Context[JetshopSettings]) -> None:
    """Raises the outcome of an answer that means something of its own; returns for every other."""
    status = answer.status_code
    said = f"{answer.request.method} was answered {status}{_objections(answer, export.document)}"
    if status == 400:
        raise Reject("jetshop-bad-request", said)
    if status == 422:
        raise Reject("jetshop-validation", said)
    if status in (401, 403):
        raise Misconfigured("jetshop-unauthorized", f"{said}: check auth and shop_id")
    if status == 404:
        _raise_not_found(said, context)
    if status == 409:
        raise Reject("order-conflict", said)
    if 300 <= status < 400:
        raise Misconfigured("jetshop-redirected", f"{said}: base_url is not the address of the export itself")


def _raise_not_found(said: str, context: Context[JetshopSettings]) -> NoReturn:
    """The shop may create its order later than Norce completes it; who does so first is not documented."""
    grace = timedelta(seconds=context.settings.not_found_grace_seconds)
    if context.clock() - context.first_attempt_at < grace:
        raise Retry("jetshop-order-not-found", f"{said}: perhaps not there yet")
    raise Reject("jetshop-order-not-found", f"{said}, for longer than not_found_grace_seconds: check key_source")


def _headers(settings: JetshopSettings) -> dict[str, str]:
    auth = settings.auth
    headers = {"Accept": "application/json", **settings.headers}
    if isinstance(auth, BasicAuth):
        credentials = b64encode(f"{auth.username}:{auth.password.reveal()}".encode()).decode()
        headers["Authorization"] = f"Basic {credentials}"
    elif isinstance(auth, BearerAuth):
        headers["Authorization"] = f"Bearer {auth.token.reveal()}"
    else:
        headers[auth.name] = auth.value.reveal()
    return headers


def _json(answer: httpx.Response) -> Any:
    try:
        return msgspec.json.decode(answer.content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None  # null breaks every schema of the contract


def _objections(answer: httpx.Response, document: dict[str, Any]) -> str:
    """
    What may be shown of a refusal: its code, and which places of our own document it names.

    Its messages may not, and neither may a path that is none of ours: both are the other side's words.
    """
    problem = _json(answer)
    if not isinstance(problem, dict):
        return ""
    code = problem.get("code")
    shown = f" ({code})" if isinstance(code, str) and len(code) <= 64 and _CODE.fullmatch(code) else ""
    details = problem.get("details")
    paths = [detail.get("path") for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []
    places = [path for path in paths[:MOST_PLACES] if isinstance(path, str) and _is_place(path, document)]
    return shown + (f" for {', '.join(places)}" if places else "")


def _is_place(path: str, document: dict[str, Any]) -> bool:
    try:
        JsonPointer(path).resolve(document)
    except (JsonPointerException, TypeError):
        return False
    return path != ""
