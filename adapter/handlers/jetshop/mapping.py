"""The mapping of a completed order to the document of the contract. Pure.

All problems of an order are collected, so that a dead letter shows them at once. A problem names a member and a rule,
never a value, which may be an address in the wrong place.

Amounts are rounded before they are summed. Otherwise the exported sums would not add up.

Facts about Norce: https://docs.norce.io/api-reference/nco/openapi/order-read (members, states, `removed`). Norce sends
enumerations in either case, so case is ignored.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import reduce
from typing import Any
from urllib.parse import quote

import msgspec
from jsonpointer import JsonPointer

from adapter.handlers.jetshop.contract import violations
from adapter.handlers.jetshop.settings import JetshopSettings
from adapter.plugin import Order, Reject

MAX_PROBLEMS = 25
INVALID = "order-validation"  # this and the next are codes of Norce's own platform adapter
UNPAID = "payment-error"

_ARITHMETIC = Context(prec=60, rounding=ROUND_HALF_UP)
_MAX_EXPONENT = 11  # of an amount: the contract allows twelve digits before the point
_ZERO = Decimal(0)

# A member of a wrong type counts as absent in the view. Without one of these the document could be wrong.
_NEEDED_MEMBERS = re.compile(r"\$(\.cart|\.(total|payments|shippings|cart\.total|state|currency)([.\[].*)?)?")

_PAYMENT_TYPES = ("default", "prepaid", "voucher")
_CUSTOMER_TYPES = ("person", "organization")
# Returned money. Never exported, but named if the sums do not match, so that a person sees the reason.
_RETURNED = ("credited", "refunded", "cancelled")
_SHIPPINGS_LEFT_OUT = ("removed", "failed")
_CURRENCY = re.compile(r"[A-Za-z]{3}")
_COUNTRY = re.compile(r"[A-Za-z]{2}")
_CULTURE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def order_key(order: Order, settings: JetshopSettings) -> str:
    """Return the order's key in the shop: the first of `key_source` that has a value.

    Raises `Reject` if there is none.
    """
    for source in settings.key_source:
        # A reference of a wrong type counts as absent in the view, and the next source may name another order.
        if f"$.{source}" in order.set_aside or (source == "cart.reference" and "$.cart" in order.set_aside):
            raise Reject(INVALID, f"{source} is not text, so the order's key is unknown")
        if key := _key_from(order, source):
            if key in (".", ".."):
                raise Reject(INVALID, f"{source} cannot be part of an address")
            return key
    raise Reject(INVALID, f"no order key: none of {', '.join(settings.key_source)} has a value")


def payment_path(order_key: str, settings: JetshopSettings) -> str:
    """Return the path of the order's payment information, below `base_url`."""
    values = {"shopId": settings.shop_id, "orderKey": order_key}
    return re.sub(
        r"\{(shopId|orderKey)\}", lambda match: quote(values[match[1]], safe=""), settings.path_payment_information
    )


def payment_information(order: Order, settings: JetshopSettings) -> dict[str, Any]:
    """Return the document to send, which fits the contract.

    Raises `Reject` with all problems: `payment-error` if only the payments do not cover the order, `order-validation`
    otherwise.
    """
    return _Mapping(order, settings).document()


def canonical(document: dict[str, Any]) -> bytes:
    """Return the document as it is sent and hashed: with sorted keys and without white space."""
    return msgspec.json.encode(document, order="sorted")


class _Mapping:
    """The mapping of one order, with its problems."""

    def __init__(self, order: Order, settings: JetshopSettings) -> None:
        self.order = order
        self.settings = settings
        self.problems: list[tuple[str, str]] = []

    def document(self) -> dict[str, Any]:
        order = self.order
        self.unreadable_members()
        total = self.price(order.total, "total")
        currency = self.matching(order.currency, _CURRENCY, "currency", "three letters (ISO 4217)", needed=True)
        payments = self.payments(currency, total)
        shippings = self.shippings()
        document = _without_empty(
            {
                "schemaVersion": "1",
                "source": {
                    "system": "norce-checkout",
                    "orderId": self.needed(order.id, "id"),
                    "merchant": self.needed(order.merchant, "merchant"),
                    "channel": self.needed(order.channel, "channel"),
                },
                "orderReference": order.reference,
                "cartReference": order.cart.reference,
                "state": self.one_of(order.state.current_status, ("completed",), "state.currentStatus"),
                "completedAt": self.completed_at(),
                "currency": currency,
                "country": self.matching(order.country, _COUNTRY, "country", "two letters (ISO 3166-1)"),
                "culture": self.culture(),
                "totals": {
                    "order": total,
                    "cart": self.price(order.cart.total, "cart.total", absent={}),
                    "shipping": self.sum_of_prices([shipping["total"] for shipping in shippings]),
                    "payments": self.money_text(_sum(payment["amount"] for payment in payments)),
                },
                "customer": self.customer(),
            }
        )
        # The contract requires the lists even if they are empty.
        document["payments"] = [_without_empty(payment) for payment in payments]
        document["shippings"] = [_without_empty(shipping) for shipping in shippings]
        if not self.problems:
            for violation in violations("PaymentInformation", document):
                self.report(INVALID, f"the document violates the contract: {violation}")
        if self.problems:
            raise self.refusal()
        return document

    # --- problems ---

    def report(self, code: str, text: str) -> None:
        self.problems.append((code, text))

    def refusal(self) -> Reject:
        code = INVALID if any(code == INVALID for code, _ in self.problems) else UNPAID
        texts = list(dict.fromkeys(text for _, text in self.problems))
        more = [f"and {len(texts) - MAX_PROBLEMS} more"] if len(texts) > MAX_PROBLEMS else []
        return Reject(code, "; ".join(texts[:MAX_PROBLEMS] + more))

    def unreadable_members(self) -> None:
        for path in self.order.set_aside:
            if _NEEDED_MEMBERS.fullmatch(path):
                name = path.removeprefix("$").removeprefix(".") or "the order"
                self.report(INVALID, f"{name} holds a value of a wrong type")

    # --- single members ---

    def needed(self, value: str | None, member: str) -> str:
        if not value or not value.strip():
            self.report(INVALID, f"{member} is missing")
        return value or ""

    def one_of(self, value: str | None, allowed: Sequence[str], member: str) -> str:
        folded = (value or "").strip().lower()
        if folded not in allowed:
            self.report(INVALID, f"{member} is not {_either(allowed)}")
        return folded

    def matching(
        self, value: str | None, pattern: re.Pattern[str], member: str, rule: str, *, needed: bool = False
    ) -> str | None:
        if not value or not value.strip():
            if needed:
                self.report(INVALID, f"{member} is missing; it must be {rule}")
            return None
        if not pattern.fullmatch(value):
            self.report(INVALID, f"{member} is not {rule}")
        return value.upper()

    def culture(self) -> str | None:
        self.matching(self.order.culture, _CULTURE, "culture", "a language and a country such as sv-SE")
        return self.order.culture

    def completed_at(self) -> str | None:
        # An order may be completed more than once; the last time counts. Transitions are in order.
        for transition in reversed(self.order.state.transitions):
            if (transition.status or "").lower() == "completed":
                moment = _utc(transition.time_stamp)
                if moment is None:
                    self.report(INVALID, "state.transitions: the last completed has no valid timeStamp")
                return moment
        self.report(INVALID, "state.transitions: none is completed, so there is no time to export")
        return None

    # --- money ---

    def money(self, amount: Decimal | None, member: str) -> Decimal | None:
        """Return the rounded amount, or report the problem and return None."""
        if amount is None:
            self.report(INVALID, f"{member} is missing")
        elif not amount.is_finite():
            self.report(INVALID, f"{member} is not a finite number")
        elif amount < 0:
            self.report(INVALID, f"{member} is negative")
        elif amount and amount.adjusted() > _MAX_EXPONENT:
            self.report(INVALID, f"{member} has more than twelve digits before the decimal point")
        else:
            return self.rounded(amount)
        return None

    def rounded(self, amount: Decimal) -> Decimal:
        # `abs` turns negative zero into zero.
        return abs(amount.quantize(Decimal(1).scaleb(-self.settings.money_scale), context=_ARITHMETIC))

    def money_text(self, amount: Decimal) -> str:
        return f"{self.rounded(amount):f}"

    def price(self, price: Any, member: str, *, absent: dict[str, str] | None = None) -> dict[str, str]:
        if absent is not None and price.including_vat is None and price.excluding_vat is None:
            return absent
        including = self.money(price.including_vat, f"{member}.includingVat")
        excluding = self.money(price.excluding_vat, f"{member}.excludingVat")
        if including is None or excluding is None:
            return {}
        if including < excluding:
            self.report(INVALID, f"{member} is less with VAT than without")
            return {}
        return self.price_of(including, excluding)

    def price_of(self, including: Decimal, excluding: Decimal) -> dict[str, str]:
        return {
            "incVat": self.money_text(including),
            "exVat": self.money_text(excluding),
            "vat": self.money_text(_ARITHMETIC.subtract(including, excluding)),
        }

    def sum_of_prices(self, prices: Sequence[dict[str, str]]) -> dict[str, str]:
        if not prices or not all(prices):
            return {}
        return self.price_of(_sum(price["incVat"] for price in prices), _sum(price["exVat"] for price in prices))

    def vat_rate(self, rate: Decimal | None, total: dict[str, str], member: str) -> str:
        if rate is None and total:
            excluding, vat = Decimal(total["exVat"]), Decimal(total["vat"])
            rate = _ARITHMETIC.divide(vat, excluding) if excluding else vat
        if rate is None:
            return ""  # the price is a problem already
        if not rate.is_finite() or not 0 <= rate <= 1:
            self.report(INVALID, f"{member} is not a fraction from 0 to 1 (0.25 is 25 %)")
            return ""
        text = f"{abs(rate.quantize(Decimal('1E-8'), context=_ARITHMETIC)):f}"
        return text.rstrip("0").rstrip(".")

    # --- payments and shippings ---

    def payments(self, currency: str | None, total: dict[str, str]) -> list[dict[str, Any]]:
        exported = []
        left_out = []
        before = len(self.problems)
        for index, payment in enumerate(self.order.payments):
            at = f"payments[{index}]"
            state = (payment.state or "").strip().lower()
            if state not in self.settings.include_states:
                if state != "removed":
                    left_out.append(f"{at} is {state}" if state in _RETURNED else at)
                continue
            amount = self.money(payment.amount, f"{at}.amount")
            its_currency = (payment.currency or "").strip().upper() or currency  # without one, it is the order's
            if currency and its_currency != currency:
                self.report(UNPAID, f"{at}.currency is not the order's")
            exported.append(
                {
                    "id": self.needed(payment.id, f"{at}.id"),
                    "providerId": self.needed(payment.adapter_id, f"{at}.adapterId"),
                    "type": self.one_of(payment.type or "default", _PAYMENT_TYPES, f"{at}.type"),
                    "state": state,
                    "method": self.method(payment.adapter_id or "", payment.name or "", at),
                    "transactionId": payment.reference,
                    "amount": self.money_text(amount or _ZERO),
                    "currency": its_currency,
                }
            )
        # After a problem with a payment, a wrong sum would only repeat it.
        if total and len(self.problems) == before:
            self.compare(exported, Decimal(total["incVat"]), left_out)
        elif not exported and not total:
            self.none_to_export(left_out)
        return exported

    def compare(self, exported: Sequence[dict[str, Any]], total: Decimal, left_out: Sequence[str]) -> None:
        if not exported and total:
            self.none_to_export(left_out)
            return
        difference = abs(_ARITHMETIC.subtract(_sum(payment["amount"] for payment in exported), total))
        if difference > self.settings.amount_tolerance:
            self.report(
                UNPAID, "payments do not add up to total.includingVat within amount_tolerance" + _left_out(left_out)
            )

    def none_to_export(self, left_out: Sequence[str]) -> None:
        self.report(UNPAID, f"payments: none is {_either(self.settings.include_states)}" + _left_out(left_out))

    def method(self, adapter_id: str, name: str, at: str) -> dict[str, str | None]:
        for key in (f"{adapter_id}:{name}", adapter_id, name, "*"):
            if method := self.settings.method_map.get(key):
                return {"code": method.code, "name": method.name}
        if self.settings.unmapped == "fail":
            self.report(
                INVALID,
                f"{at} has no entry in method_map under adapterId:name, adapterId, name or * "
                "(add one, or set unmapped to passthrough)",
            )
        return {"code": adapter_id, "name": name}

    def shippings(self) -> list[dict[str, Any]]:
        exported = []
        for index, shipping in enumerate(self.order.shippings):
            if (shipping.state or "").strip().lower() in _SHIPPINGS_LEFT_OUT:
                continue
            at = f"shippings[{index}]"
            details = shipping.delivery_details
            total = self.price(shipping.total, f"{at}.total", absent=self.price_of(_ZERO, _ZERO))
            exported.append(
                {
                    "id": self.needed(shipping.id, f"{at}.id"),
                    "providerId": shipping.adapter_id,
                    "reference": shipping.reference,
                    "tmsReference": shipping.tms_reference,
                    "name": shipping.name,
                    "carrier": details.carrier,
                    "productReference": details.product.reference,
                    "pickupLocationReference": details.pickup_location.reference,
                    "total": total,
                    "vatRate": self.vat_rate(shipping.vat_rate, total, f"{at}.vatRate"),
                }
            )
        return exported

    # --- the customer ---

    def customer(self) -> dict[str, Any]:
        if self.settings.customer == "none":
            return {}
        customer = self.order.customer
        contact = {
            "type": self.one_of(customer.type, _CUSTOMER_TYPES, "customer.type") if customer.type else None,
            "email": customer.billing.email,
            "phone": customer.billing.phone,
        }
        if self.settings.customer == "contact":
            return contact
        return contact | {
            "billing": self.address(customer.billing, "customer.billing"),
            "shipping": self.address(customer.shipping, "customer.shipping"),
        }

    def address(self, address: Any, member: str) -> dict[str, str | None]:
        return {
            "firstName": address.given_name,
            "lastName": address.family_name,
            "company": address.organization_name,
            "careOf": address.care_of,
            "street": address.street_address,
            "street2": address.street_address2,
            "postalCode": address.postal_code,
            "city": address.city,
            "region": address.region,
            "countryCode": self.matching(address.country, _COUNTRY, f"{member}.country", "two letters (ISO 3166-1)"),
        }


def _key_from(order: Order, source: str) -> str:
    if source == "id":
        value: Any = order.id
    elif source == "reference":
        value = order.reference
    elif source == "cart.reference":
        value = order.cart.reference
    else:
        value = JsonPointer(source).resolve(order.data, None)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value if isinstance(value, str) and value.strip() else ""


def _sum(amounts: Iterable[str]) -> Decimal:
    return reduce(_ARITHMETIC.add, map(Decimal, amounts), _ZERO)


def _utc(text: str | None) -> str | None:
    """Return an ISO 8601 time in UTC and milliseconds. A time without a zone is in UTC."""
    try:
        moment = datetime.fromisoformat(text or "")
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree without null, blank text and empty objects."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            value = _without_empty(value)
        if value not in (None, {}) and not (isinstance(value, str) and not value.strip()):
            kept[name] = value
    return kept


def _left_out(payments: Sequence[str]) -> str:
    return f" (left out by their state: {', '.join(payments)})" if payments else ""


def _either(words: Sequence[str]) -> str:
    return " or ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]
