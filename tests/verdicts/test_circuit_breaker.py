"""`adapter.verdicts.circuit_breaker`: a route that misses its deadline for most orders is not asked for a while."""

from collections.abc import Iterable
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from adapter.identifiers import Channel
from adapter.verdicts.circuit_breaker import CircuitBreaker
from tests.ledgers import HandClock

KEY = ("one", Channel("norce", "1"))


def made(orders: int = 20) -> tuple[CircuitBreaker, HandClock]:
    clock = HandClock()
    return CircuitBreaker(orders=orders, open_for=timedelta(seconds=30), clock=clock), clock


def record(breaker: CircuitBreaker, orders: Iterable[str], *, missed: bool = True) -> None:
    for order_id in orders:
        breaker.record(KEY, order_id, missed=missed)


def named(count: int, prefix: str = "o") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def test_it_opens_when_more_than_half_of_the_last_20_orders_missed_on_one_route_and_channel() -> None:
    breaker, _ = made()
    record(breaker, named(10))
    assert not breaker.is_open(KEY, "another")

    record(breaker, ["o10"])

    assert breaker.is_open(KEY, "another")
    assert not breaker.is_open(("one", Channel("norce", "2")), "another")


def test_an_order_that_misses_a_hundred_times_counts_once() -> None:
    breaker, _ = made()
    record(breaker, ["flooding"] * 100)
    record(breaker, named(9))

    assert not breaker.is_open(KEY, "another")


def test_the_last_result_of_an_order_counts() -> None:
    breaker, _ = made()
    record(breaker, named(10))
    record(breaker, named(5), missed=False)
    record(breaker, named(5, "p"))
    assert not breaker.is_open(KEY, "another")

    record(breaker, ["one-more"])

    assert breaker.is_open(KEY, "another")


def test_orders_before_the_last_20_do_not_count() -> None:
    breaker, _ = made()
    record(breaker, named(10))
    record(breaker, named(20, "p"), missed=False)
    record(breaker, named(10))

    assert not breaker.is_open(KEY, "another")


def test_an_order_that_repeats_displaces_no_other() -> None:
    """Otherwise one order could keep the circuit breaker of a broken route closed, or open."""
    breaker, _ = made()
    record(breaker, named(10))
    record(breaker, ["flooding"] * 100, missed=False)
    assert not breaker.is_open(KEY, "another")

    record(breaker, ["o10"])

    assert breaker.is_open(KEY, "another")


def test_when_the_time_is_up_one_call_tries_and_the_others_wait_for_its_result() -> None:
    breaker, clock = made(1)
    record(breaker, ["o0"])
    clock.now += 29
    assert breaker.is_open(KEY, "o1")
    clock.now += 1

    assert [breaker.is_open(KEY, order_id) for order_id in ("o1", "o2", "o3")] == [False, True, True]
    record(breaker, ["o1"], missed=False)
    assert not breaker.is_open(KEY, "o0")


def test_a_success_closes_it_and_forgets_the_misses() -> None:
    breaker, clock = made()
    record(breaker, named(11))
    clock.now += 30
    assert not breaker.is_open(KEY, "trial")
    record(breaker, ["trial"], missed=False)

    record(breaker, named(10))
    assert not breaker.is_open(KEY, "another")
    record(breaker, ["o10"])

    assert breaker.is_open(KEY, "another")


def test_an_order_that_missed_does_not_make_the_try() -> None:
    """An order that always misses, and calls all the time, would keep it open for ever."""
    breaker, clock = made()
    record(breaker, named(11))
    clock.now += 30

    assert all(breaker.is_open(KEY, order_id) for order_id in named(11))
    assert not breaker.is_open(KEY, "another")


def test_a_try_that_misses_keeps_it_open_for_as_long_again_and_so_does_one_without_a_result() -> None:
    breaker, clock = made(3)
    record(breaker, named(2))
    clock.now += 30
    assert not breaker.is_open(KEY, "first-try")
    clock.now += 20
    record(breaker, ["first-try"])
    clock.now += 29

    assert breaker.is_open(KEY, "second-try")
    clock.now += 1
    assert not breaker.is_open(KEY, "second-try")  # it never has a result
    clock.now += 30
    assert not breaker.is_open(KEY, "third-try")


def test_it_never_opens_with_0_orders() -> None:
    breaker, _ = made(0)
    record(breaker, named(100))

    assert not breaker.is_open(KEY, "another")


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=200), st.integers(1, 20))
def test_it_is_open_exactly_after_a_miss_with_most_of_the_last_orders_missed(
    results: list[tuple[int, bool]], orders: int
) -> None:
    """Compared with the definition, up to the first time that it opens."""
    breaker, _ = made(orders)
    for count, (number, missed) in enumerate(results, 1):
        breaker.record(KEY, str(number), missed=missed)
        last: dict[int, bool] = {}
        for seen, result in reversed(results[:count]):
            if len(last) < orders:
                last.setdefault(seen, result)
        is_open = missed and sum(last.values()) > orders / 2
        assert breaker.is_open(KEY, "another") == is_open
        if is_open:
            return
