"""Identifiers: channels of merchants, and references as the ledger keeps them."""

from typing import NamedTuple

LONGEST_REFERENCE = 200


class Channel(NamedTuple):
    """A sales channel of a merchant. Channel names are unique only within their merchant."""

    merchant: str
    name: str


def kept_reference(value: object) -> str | None:
    """Return the first 200 characters of a reference, or None if they are not printable.

    Every database and terminal takes the result, whatever a caller or a handler gave.
    """
    cut = value[:LONGEST_REFERENCE] if isinstance(value, str) else ""
    return cut if cut and cut.isprintable() else None
