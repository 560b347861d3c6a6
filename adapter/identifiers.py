"""Identifiers that belong together."""

from typing import NamedTuple


class Channel(NamedTuple):
    """A sales channel of a merchant. Channel names are unique only within their merchant."""

    merchant: str
    name: str
