"""The table of connections: which of them are closed when there are too many."""

import itertools
from math import inf

import pytest

from adapter.callbacks.connection_table import ConnectionTable, network_of


class Open:
    """A connection that remembers whether it was closed."""

    def __init__(self, table: ConnectionTable, peer: str | None = "192.0.2.1", descriptor: int = 0) -> None:
        self.deadline = self.write_deadline = inf
        self.dropped = False
        self.refused_body = False
        self.table = table
        self.expired_at: float | None = None
        self.is_proxied = table.opened(self, peer, descriptor)

    def refuse_body(self) -> None:
        self.refused_body = True

    def drop(self) -> None:
        assert not self.dropped
        self.dropped = True
        self.table.closed(self)

    def expire(self, now: float) -> None:
        self.expired_at = now
        self.table.closed(self)

    def identify(self) -> "Open":
        self.table.identified(self)
        return self

    def forwarded(self, *fields: str) -> None:
        self.table.forwarded(self, [(b"x-forwarded-for", each.encode("latin-1")) for each in fields])


@pytest.fixture
def limits() -> list[str]:
    return []


@pytest.fixture
def table(limits: list[str]) -> ConnectionTable:
    return ConnectionTable(
        most=20, most_unidentified=3, trusted_proxies=["10.0.0.0/8", "2001:db8:1::/48"], on_limit=limits.append
    )


def dropped(connections: list[Open]) -> list[int]:
    return [number for number, each in enumerate(connections) if each.dropped]


# --- the connections of one address -----------------------------------------------------------------------------------


def test_beyond_its_limit_the_oldest_unidentified_connection_of_an_address_is_closed(
    table: ConnectionTable, limits: list[str]
) -> None:
    other = Open(table, "192.0.2.2")
    opened = [Open(table) for _ in range(5)]

    assert dropped(opened) == [0, 1]
    assert not other.dropped
    assert limits == ["unidentified-connections"] * 2


def test_an_identified_connection_does_not_count_for_its_address(table: ConnectionTable, limits: list[str]) -> None:
    opened = [Open(table).identify() for _ in range(15)]
    opened += [Open(table) for _ in range(3)]

    assert dropped(opened) == []
    assert limits == []


def test_a_connection_that_is_closed_makes_room_for_its_address(table: ConnectionTable) -> None:
    opened = [Open(table) for _ in range(3)]
    opened[1].drop()

    Open(table)

    assert dropped(opened) == [1]


def test_connections_of_a_unix_socket_have_no_address(table: ConnectionTable, limits: list[str]) -> None:
    opened = [Open(table, None) for _ in range(20)]

    assert dropped(opened) == []
    assert limits == []


@pytest.mark.parametrize(
    ("one", "other", "are_one"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("none:of:those", "none:of:those", True),
    ],
)
def test_addresses_of_one_network_count_together(one: str, other: str, are_one: bool) -> None:
    assert (network_of(one) == network_of(other)) is are_one


# --- all connections --------------------------------------------------------------------------------------------------


def test_beyond_the_total_strangers_make_room_for_each_other(table: ConnectionTable, limits: list[str]) -> None:
    """A flood from many addresses does not cost known callers their idle connections."""
    known = [Open(table).identify() for _ in range(9)]
    for each in known:
        table.idle(each)

    strangers = [Open(table, f"198.51.100.{number}") for number in range(50)]

    assert dropped(known) == []
    assert dropped(strangers) == [*range(39)]
    assert limits == ["connections"] * 39
    assert len(table) == 20


def test_beyond_the_total_idle_connections_make_room_for_new_ones(table: ConnectionTable) -> None:
    """A caller that keeps more connections than it uses does not shut out others. The longest idle goes first."""
    known = [Open(table).identify() for _ in range(20)]
    for each in reversed(known):
        table.idle(each)
    table.busy(known[19])

    new = [Open(table, "198.51.100.1") for _ in range(2)]

    assert dropped(known) == [17, 18]
    assert dropped(new) == []


def test_beyond_the_total_a_busy_connection_of_a_known_caller_is_never_closed(table: ConnectionTable) -> None:
    known = [Open(table).identify() for _ in range(20)]
    for each in known:
        table.idle(each)
        table.busy(each)

    new = Open(table)

    assert dropped(known) == []
    assert new.dropped


def test_beyond_the_highest_descriptor_a_connection_counts_as_one_beyond_the_total(limits: list[str]) -> None:
    """The service holds descriptors of other kinds. Without any, every connection that waits would be closed."""
    table = ConnectionTable(highest_descriptor=100, on_limit=limits.append)
    stranger = Open(table, descriptor=99)
    known = Open(table, descriptor=100).identify()
    table.idle(known)

    new = [Open(table, descriptor=101), Open(table, descriptor=102)]
    in_time = Open(table, descriptor=100)

    assert stranger.dropped
    assert (known.dropped, dropped(new), in_time.dropped) == (False, [0], False)
    assert limits == ["connections"] * 2


def test_a_connection_of_a_stranger_is_never_idle(table: ConnectionTable) -> None:
    """Otherwise it would leave the limit of its address by asking for anything."""
    opened = [Open(table) for _ in range(4)]
    for each in opened[1:]:
        table.idle(each)

    Open(table)

    assert dropped(opened) == [0, 1]


def test_nothing_is_left_of_connections_that_are_closed(table: ConnectionTable) -> None:
    for number in range(200):
        each = Open(table, f"198.51.100.{number}")
        if number % 2:
            each.identify()
            table.idle(each)
    for left in [*table._open]:
        table.closed(left)

    assert len(table) == 0
    assert (table._unidentified, table._idle, table._by_address) == ({}, {}, {})


# --- behind a proxy ---------------------------------------------------------------------------------------------------


def test_a_trusted_proxy_has_no_limit_of_its_own(table: ConnectionTable) -> None:
    opened = [Open(table, "10.1.2.3") for _ in range(20)]

    assert dropped(opened) == []
    assert all(each.is_proxied for each in opened)


def test_behind_a_trusted_proxy_the_forwarded_address_counts(table: ConnectionTable) -> None:
    opened = [Open(table, "10.1.2.3") for _ in range(8)]
    for each, last in zip(opened, itertools.cycle([1, 2])):
        each.forwarded(f"203.0.113.9, 198.51.100.{last}")

    assert dropped(opened) == [0, 1]


def test_a_later_address_replaces_the_one_before(table: ConnectionTable) -> None:
    opened = [Open(table, "10.1.2.3") for _ in range(4)]
    for each in opened[:3]:
        each.forwarded("198.51.100.1")
    opened[0].forwarded("198.51.100.2")

    opened[3].forwarded("198.51.100.1")

    assert dropped(opened) == []


@pytest.mark.parametrize(
    "fields",
    [
        ["198.51.100.1"],
        ["203.0.113.9, 198.51.100.1"],
        ["203.0.113.9", "198.51.100.1"],
        ["203.0.113.9,198.51.100.1 , 10.9.9.9,\t2001:db8:1::5"],
        ["198.51.100.1:4711"],
        ["nonsense, 198.51.100.1, [2001:db8:1::5]:443"],
        ["::ffff:198.51.100.1, ::ffff:10.0.0.1"],
    ],
)
def test_the_rightmost_address_that_is_no_trusted_proxy_counts(table: ConnectionTable, fields: list[str]) -> None:
    for _ in range(3):
        Open(table, "198.51.100.1")
    one = Open(table, "10.1.2.3")

    one.forwarded(*fields)

    assert len(table) == 3


@pytest.mark.parametrize(
    "fields",
    [[], [""], ["nonsense"], ["198.51.100.1, nonsense"], ["198.51.100.1, "], ["10.9.9.9"], ["\xff\xfe"],
     ["198.51.100.1, 1.2.3.4.5"], ["198.51.100.1, unknown, 10.9.9.9"]],
)  # fmt: skip
def test_a_malformed_address_is_ignored(table: ConnectionTable, fields: list[str]) -> None:
    opened = [Open(table, "10.1.2.3") for _ in range(4)]
    for each in opened:
        each.forwarded(*fields)

    assert dropped(opened) == []


def test_an_address_that_is_forwarded_by_anybody_else_does_not_count(table: ConnectionTable) -> None:
    opened = [Open(table, peer) for peer in ("192.0.2.1", "11.0.0.1", "2001:db8:2::1")]

    assert not any(each.is_proxied for each in opened)


def test_an_identified_connection_of_a_proxy_has_no_address(table: ConnectionTable) -> None:
    opened = [Open(table, "10.1.2.3").identify() for _ in range(4)]
    for each in opened:
        each.forwarded("198.51.100.1")

    assert dropped(opened) == []


# --- unfinished bodies ------------------------------------------------------------------------------------------------


def test_beyond_their_total_the_body_that_began_first_is_refused(limits: list[str]) -> None:
    table = ConnectionTable(most_body_bytes=100, on_limit=limits.append)
    opened = [Open(table) for _ in range(4)]
    for each in opened[:3]:
        table.hold_body(each, 10)
    table.hold_body(opened[0], 60)
    within = [each.refused_body for each in opened]

    table.hold_body(opened[3], 30)

    assert not any(within)
    assert [each.refused_body for each in opened] == [True, False, False, False]
    assert limits == ["unfinished-bodies"]


def test_a_body_that_is_complete_or_lost_makes_room(limits: list[str]) -> None:
    table = ConnectionTable(most_body_bytes=100, on_limit=limits.append)
    for number in range(20):
        each = Open(table)
        table.hold_body(each, 60)
        table.hold_body(each, 100)
        if number % 2:
            table.release_body(each)
        else:
            table.closed(each)

    assert limits == []


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_overdue_connections_are_ended_and_no_others(table: ConnectionTable) -> None:
    reading, writing, both, neither = (Open(table, None) for _ in range(4))
    reading.deadline = both.deadline = 5.0
    writing.write_deadline = both.write_deadline = 5.0
    neither.deadline = 5.1

    table.expire(5.0)

    assert [each.expired_at for each in (reading, writing, both, neither)] == [5.0, 5.0, 5.0, None]
