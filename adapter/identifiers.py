"""Identifiers: `Channel` is a merchant and its channel as one value."""

from typing import NamedTuple


class Channel(NamedTuple):
    """A sales channel of a merchant. Channel names are unique only within their merchant."""

    merchant: str
    name: str
