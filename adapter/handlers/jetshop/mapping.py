"""
From a completed order to the document that the contract describes. Pure: an order and settings in, a dict out.

Every finding is collected before the order is refused, so that the person who reads the dead letter sees all of them
at once. A finding names a member and a rule, never a value: what does not fit may be an address in the wrong place.

Amounts are rounded first and summed afterwards. The other way round would be closer to the order by a fraction of a
cent, and would send sums that do not add up.

Facts about Norce: https://docs.norce.io/api-reference/nco/openapi/order-read (members, states, `removed`); enumerations
come in either case, so they are compared without it. The target is this project's own contract (`contract.yaml`).
"""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Any
from urllib.parse import quote

import msgspec
from jsonpointer import JsonPointer

from adapter.handlers.jetshop.contract import misses
from adapter.handlers.jetshop.settings import JetshopSettings
from adapter.plugin import Order, Reject

MOST_FINDINGS = 25
INVALID = "order-validation"  # from the error codes of Norce's own platform adapter, as is the next
UNPAID = "payment-error"

_ARITHMETIC = Context(prec=60, rounding=ROUND_HALF_UP)
_LARGEST_EXPONENT = 11  # of an amount: the contract has room for twelve digits before the point
_ZERO = Decimal(0)

# Members that count as absent where their type did not fit. Without these the document could not be right.
_NOT_TO_BE_GUESSED = re.compile(r"\$(\.cart|\.(total|payments|shippings|cart\.total|state|currency)([.\[].*)?)?")

_PAYMENT_TYPES = ("default", "prepaid", "voucher")
_CUSTOMER_TYPES = ("person", "organization")
# Money that went back. Named where the sums show it, so that a person sees why; never exported.
_GIVEN_BACK = ("credited", "refunded", "cancelled")
_SHIPPINGS_LEFT_OUT = ("removed", "failed")
_CURRENCY = re.compile(r"[A-Za-z]{3}")
_COUNTRY = re.compile(r"[A-Za-z]{2}")
_CULTURE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def order_key(order: Order, settings: JetshopSettings) -> str:
    """What the shop knows the order by: the first of `key_source` that has a value. Raises `Reject`."""
    for source in settings.key_source:
        # A reference of an odd type counts as absent in the view; the next source would then name another order.
        if f"$.{source}" in order.set_aside or (source == "cart.reference" and "$.cart" in order.set_aside):
            raise Reject(INVALID, f"{source} is not text, so that the order's key is not known")
        if key := _key_from(order, source):
            if key in (".", ".."):
                raise Reject(INVALID, f"{source} cannot be part of an address")
            return key
    raise Reject(INVALID, f"no order key: none of {', '.join(settings.key_source)} has a value")


def payment_path(order_key: str, settings: JetshopSettings) -> str:
    """The path of the order's payment information, below `base_url`."""
    values = {"shopId": settings.shop_id, "orderKey": order_key}
    return re.sub(
        r"\{(shopId|orderKey)\}", lambda match: quote(values[match[1]], safe=""), settings.path_payment_information
    )


def payment_information(order: Order, settings: JetshopSettings) -> dict[str, Any]:
    """
    The document to send, valid by the contract.

    Raises `Reject` with everything that stands against it: `payment-error` where only the payments do not cover the
    order, `order-validation` otherwise.
    """
    return _Mapping(order, settings).document()


def canonical(document: dict[str, Any]) -> bytes:
    """The document as it is sent and as it is hashed: sorted keys, no white space."""
    return msgspec.json.encode(document, order="sorted")


class _Mapping:
    """One order on its way into one document, and what was found on the way."""

    def __init__(self, order: Order, settings: JetshopSettings) -> None:
        self.order = order
        self.settings = settings
        self.findings: list[tuple[str, str]] = []

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
                    "cart": self.price(order.cart.total, "cart.total", optional=True),
                    "shipping": self.sum_of_prices([shipping["total"] for shipping in shippings]),
                    "payments": self.money_text(_sum(payment["amount"] for payment in payments)),
                },
                "customer": self.customer(),
            }
        )
        # Lists are needed even where they are empty.
        document["payments"] = [_without_empty(payment) for payment in payments]
        document["shippings"] = [_without_empty(shipping) for shipping in shippings]
        if not self.findings:
            for miss in misses("PaymentInformation", document):
                self.found(INVALID, f"the document breaks the contract: {miss}")
        if self.findings:
            raise self.refusal()
        return document

    # --- findings ---

    def found(self, code: str, text: str) -> None:
        self.findings.append((code, text))

    def refusal(self) -> Reject:
        code = INVALID if any(code == INVALID for code, _ in self.findings) else UNPAID
        texts = list(dict.fromkeys(text for _, text in self.findings))
        more = [f"and {len(texts) - MOST_FINDINGS} more"] if len(texts) > MOST_FINDINGS else []
        return Reject(code, "; ".join(texts[:MOST_FINDINGS] + more))

    def unreadable_members(self) -> None:
        for path in self.order.set_aside:
            if _NOT_TO_BE_GUESSED.fullmatch(path):
                name = path.removeprefix("$").removeprefix(".") or "the order"
                self.found(INVALID, f"{name} holds a value of a wrong type")

    # --- single members ---

    def needed(self, value: str | None, member: str) -> str:
        if not value or not value.strip():
            self.found(INVALID, f"{member} is missing")
        return value or ""

    def one_of(self, value: str | None, allowed: Sequence[str], member: str) -> str:
        folded = (value or "").strip().lower()
        if folded not in allowed:
            self.found(INVALID, f"{member} is not {_either(allowed)}")
        return folded

    def matching(
        self, value: str | None, pattern: re.Pattern[str], member: str, rule: str, *, needed: bool = False
    ) -> str | None:
        if not value or not value.strip():
            if needed:
                self.found(INVALID, f"{member} is missing; it must be {rule}")
            return None
        if not pattern.fullmatch(value):
            self.found(INVALID, f"{member} is not {rule}")
        return value.upper()

    def culture(self) -> str | None:
        self.matching(self.order.culture, _CULTURE, "culture", "a language and a country such as sv-SE")
        return self.order.culture

    def completed_at(self) -> str | None:
        """The last time, since an order may be completed more than once; transitions come in their order."""
        for transition in reversed(self.order.state.transitions):
            if (transition.status or "").lower() == "completed":
                moment = _utc(transition.time_stamp)
                if moment is None:
                    self.found(INVALID, "state.transitions: the last completed has no timeStamp that is a moment")
                return moment
        self.found(INVALID, "state.transitions: none is completed, so that there is no moment to export")
        return None

    # --- money ---

    def money(self, amount: Decimal | None, member: str) -> Decimal | None:
        """The amount, rounded; None where it cannot be exported, which was then found."""
        if amount is None:
            self.found(INVALID, f"{member} is missing")
        elif not amount.is_finite():
            self.found(INVALID, f"{member} is not a finite number")
        elif amount < 0:
            self.found(INVALID, f"{member} is negative")
        elif amount and amount.adjusted() > _LARGEST_EXPONENT:
            self.found(INVALID, f"{member} has more than twelve digits before the decimal point")
        else:
            return self.rounded(amount)
        return None

    def rounded(self, amount: Decimal) -> Decimal:
        # `abs` makes an ordinary zero of a negative one.
        return abs(amount.quantize(Decimal(1).scaleb(-self.settings.money_scale), context=_ARITHMETIC))

    def money_text(self, amount: Decimal) -> str:
        return f"{self.rounded(amount):f}"

    def price(self, price: Any, member: str, *, optional: bool = False) -> dict[str, str]:
        if optional and price.including_vat is None and price.excluding_vat is None:
            return {}
        including = self.money(price.including_vat, f"{member}.includingVat")
        excluding = self.money(price.excluding_vat, f"{member}.excludingVat")
        if including is None or excluding is None:
            return {}
        if including < excluding:
            self.found(INVALID, f"{member} is less with VAT than without")
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

    def vat_rate(self, rate: Decimal | None, member: str) -> str:
        if rate is None:
            self.found(INVALID, f"{member} is missing")
            return ""
        if not rate.is_finite() or not 0 <= rate <= 1:
            self.found(INVALID, f"{member} is not a fraction from 0 to 1 (0.25 is 25 %)")
            return ""
        text = f"{abs(rate.quantize(Decimal('1E-8'), context=_ARITHMETIC)):f}"
        return text.rstrip("0").rstrip(".")

    # --- payments and shippings ---

    def payments(self, currency: str | None, total: dict[str, str]) -> list[dict[str, Any]]:
        exported = []
        left_out = []
        before = len(self.findings)
        for index, payment in enumerate(self.order.payments):
            at = f"payments[{index}]"
            state = (payment.state or "").strip().lower()
            if state not in self.settings.include_states:
                if state != "removed":
                    left_out.append(f"{at} is {state}" if state in _GIVEN_BACK else at)
                continue
            amount = self.money(payment.amount, f"{at}.amount")
            if currency and (payment.currency or "").upper() != currency:
                self.found(UNPAID, f"{at}.currency is not the order's")
            exported.append(
                {
                    "id": self.needed(payment.id, f"{at}.id"),
                    "providerId": self.needed(payment.adapter_id, f"{at}.adapterId"),
                    "type": self.one_of(payment.type, _PAYMENT_TYPES, f"{at}.type"),
                    "state": state,
                    "method": self.method(payment.adapter_id or "", payment.name or "", at),
                    "transactionId": payment.reference,
                    "amount": self.money_text(amount or _ZERO),
                    "currency": (payment.currency or "").upper(),
                }
            )
        # A sum over payments that were not understood would only be a second name for the first finding.
        if total and len(self.findings) == before:
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
            self.found(
                UNPAID, "payments do not add up to total.includingVat within amount_tolerance" + _left_out(left_out)
            )

    def none_to_export(self, left_out: Sequence[str]) -> None:
        self.found(UNPAID, f"payments: none is {_either(self.settings.include_states)}" + _left_out(left_out))

    def method(self, adapter_id: str, name: str, at: str) -> dict[str, str | None]:
        for key in (f"{adapter_id}:{name}", adapter_id, name, "*"):
            if method := self.settings.method_map.get(key):
                return {"code": method.code, "name": method.name}
        if self.settings.unmapped == "fail":
            self.found(
                INVALID,
                f"{at} has no entry in method_map, which is asked for adapterId:name, adapterId, name and * "
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
                    "total": self.price(shipping.total, f"{at}.total"),
                    "vatRate": self.vat_rate(shipping.vat_rate, f"{at}.vatRate"),
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
    total = _ZERO
    for amount in amounts:
        total = _ARITHMETIC.add(total, Decimal(amount))
    return total


def _utc(text: str | None) -> str | None:
    """An ISO 8601 moment in UTC and milliseconds; one without a zone is UTC already, as all of Norce's are."""
    try:
        moment = datetime.fromisoformat(text or "")
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    """Without members that say nothing: null, blank text, and objects that are empty or become so."""
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
