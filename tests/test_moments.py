from datetime import UTC, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from adapter.moments import in_milliseconds, to_datetime, to_milliseconds, to_text


@given(st.integers(min_value=0, max_value=200_000_000_000_000))
def test_milliseconds_survive_the_way_there_and_back(milliseconds: int) -> None:
    assert to_milliseconds(to_datetime(milliseconds)) == milliseconds


def test_a_datetime_of_another_zone_is_the_same_moment() -> None:
    stockholm = datetime(2026, 2, 3, 13, tzinfo=timezone(timedelta(hours=1)))

    assert to_datetime(to_milliseconds(stockholm)) == datetime(2026, 2, 3, 12, tzinfo=UTC)


def test_parts_of_a_millisecond_are_rounded_down() -> None:
    assert to_milliseconds(datetime(1970, 1, 1, 0, 0, 1, 999, tzinfo=UTC)) == 1000
    assert in_milliseconds(timedelta(microseconds=1999)) == 1


def test_text_names_milliseconds_and_utc() -> None:
    assert to_text(1_770_120_000_000) == "2026-02-03T12:00:00.000Z"
