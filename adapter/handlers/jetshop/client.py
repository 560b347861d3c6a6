"""The handler class: one PUT for each order, and a GET if its result is unknown.

`context.http` raises the outcome of a missing answer and of most statuses. This module adds the answers that have a
meaning of their own in our contract (`contract.yaml`). The text of an answer is never logged, stored or shown, because
it may quote the customer.
"""

import re
from base64 import b64encode
from datetime import timedelta
from hashlib import sha256
from typing import Any

import httpx
import msgspec
from jsonpointer import JsonPointer, JsonPointerException

from adapter.handlers.jetshop.contract import violations
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

MAX_PLACES = 10
NO_ORDER = "norce-adapter-check"  # a key that no shop gives to an order
REJECTED = {400: "jetshop-bad-request", 409: "order-conflict", 422: "jetshop-validation"}
_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}")


class JetshopExport(NotificationHandler[JetshopSettings]):
    """The handler `jetshop`.

    It is not `repeatable`. Our contract allows a repeated PUT, but a destination may not keep to it, so a PUT without
    an answer is looked up. The lookup compares whole documents, so it finds the effect of a resend, too: if an earlier
    delivery sent the same document, nothing is left to update.
    """

    lookup_by_key = True

    async def deliver(self, notification: Notification, context: Context[JetshopSettings]) -> Done | Skip:
        """Send the payment information, unless it equals the last document of this order.

        A resend is sent in any case: a person wants the shop to have it.
        """
        export = _Export(notification, context.settings)
        previous = None if context.is_resend else context.previous
        if previous is not None and previous.facts.get("payload") == export.hash:
            return Skip("nothing-changed")
        answer = await context.http.put(
            export.url,
            content=export.body,
            headers=_headers(context.settings)
            | {"Content-Type": "application/json", "Idempotency-Key": context.key(export.hash)},
        )
        _check_status(answer, export, context)
        return export.done(answer.raise_for_status())

    async def lookup(self, notification: Notification, context: Context[JetshopSettings]) -> Done | None:
        """Return Done if the destination has exactly the document that would be sent now."""
        export = _Export(notification, context.settings)
        answer = await context.http.get(export.url, headers=_headers(context.settings))
        if answer.status_code == 404:
            return None
        _check_status(answer, export, context)
        stored = _decoded(answer.raise_for_status())
        if stored == export.document:
            return Done(export.key, {"payload": export.hash, "result": "found"})
        if violations("PaymentInformation", stored):
            # Such an answer does not show whether the export is stored, so the doubt remains.
            raise Retry("jetshop-broken-answer", f"{export.answered(answer)}, against the contract")
        return None

    async def check_credentials(self, context: Context[JetshopSettings]) -> None:
        """Read the payment information of an order that the shop cannot have."""
        settings = context.settings
        url = f"{settings.base_url}{payment_path(NO_ORDER, settings)}"
        answer = await context.http.get(url, headers=_headers(settings))
        if answer.status_code != 404:
            answer.raise_for_status()


class _Export:
    """One order as it would be sent now. Raises `Reject` if it cannot be sent."""

    def __init__(self, notification: Notification, settings: JetshopSettings) -> None:
        self.key = order_key(notification.order, settings)
        self.path = settings.path_payment_information
        self.url = f"{settings.base_url}{payment_path(self.key, settings)}"
        self.document = payment_information(notification.order, settings)
        self.body = canonical(self.document)
        self.hash = sha256(self.body).hexdigest()

    def answered(self, answer: httpx.Response) -> str:
        """Name the request, without the order's key, and the status of its answer."""
        return f"{answer.request.method} {self.path} was answered {answer.status_code}"

    def done(self, answer: httpx.Response) -> Done:
        result = _decoded(answer)
        if answer.status_code not in (200, 201):
            against = ["the status is not in it"]
        else:
            against = violations("ExportResult", result)
            if not against and result["orderKey"] != self.key:
                against = ["/orderKey is not the key of the request"]
        if against:
            raise Unknown(
                "jetshop-broken-answer",
                f"{self.answered(answer)}, against the contract: {'; '.join(against[:MAX_PLACES])}",
            )
        return Done(result.get("orderNumber") or self.key, {"payload": self.hash, "result": result["result"]})


def _check_status(answer: httpx.Response, export: _Export, context: Context[JetshopSettings]) -> None:
    """Raise the outcome of a status that has a meaning of its own; return for every other."""
    status = answer.status_code
    message = export.answered(answer) + _objections(answer, export.document)
    if status in REJECTED:
        raise Reject(REJECTED[status], message)
    if status in (401, 403):
        raise Misconfigured("jetshop-unauthorized", f"{message}: check auth and shop_id")
    if status == 404:
        # The shop may create its order later than Norce completes it. The order of the two is not documented.
        grace = timedelta(seconds=context.settings.not_found_grace_seconds)
        if context.clock() - context.first_attempt_at < grace:
            raise Retry("jetshop-order-not-found", f"{message}: perhaps not there yet")
        raise Reject("jetshop-order-not-found", f"{message}, for longer than not_found_grace_seconds: check key_source")
    if 300 <= status < 400:
        raise Misconfigured("jetshop-redirected", f"{message}: base_url is not the address of the export")


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


def _decoded(answer: httpx.Response) -> Any:
    try:
        return msgspec.json.decode(answer.content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None  # violates every schema of the contract


def _objections(answer: httpx.Response, document: dict[str, Any]) -> str:
    """Return the parts of a refusal that may be shown: its code, and places in our document.

    Its messages and other paths may not, since they may quote the customer.
    """
    problem = _decoded(answer)
    if not isinstance(problem, dict):
        return ""
    code = problem.get("code")
    shown = f" ({code})" if isinstance(code, str) and len(code) <= 64 and _CODE.fullmatch(code) else ""
    details = problem.get("details")
    paths = [detail.get("path") for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []
    places = [path for path in paths[:MAX_PLACES] if isinstance(path, str) and _is_place(path, document)]
    return shown + (f" for {', '.join(places)}" if places else "")


def _is_place(path: str, document: dict[str, Any]) -> bool:
    try:
        JsonPointer(path).resolve(document)
    except (JsonPointerException, TypeError):
        return False
    return path != ""
