"""Conversions between milliseconds since 1970, aware UTC datetimes and timedeltas.

The ledger counts whole milliseconds; the rest of the code uses datetimes and timedeltas. Conversions use integers only,
and round parts of a millisecond down.
"""

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def to_datetime(milliseconds: int) -> datetime:
    """Return the aware UTC datetime of milliseconds since 1970."""
    return _EPOCH + timedelta(milliseconds=milliseconds)


def to_milliseconds(moment: datetime) -> int:
    """Return the milliseconds since 1970 of an aware datetime."""
    return (moment - _EPOCH) // _MILLISECOND


def in_milliseconds(duration: timedelta) -> int:
    """Return the whole milliseconds of a duration."""
    return duration // _MILLISECOND


def to_text(milliseconds: int) -> str:
    """Return the form that people and programs read: `2026-02-03T12:00:00.000Z`."""
    return to_datetime(milliseconds).isoformat(timespec="milliseconds").replace("+00:00", "Z")
