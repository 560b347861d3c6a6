"""`adapter.verdicts.circuit_breaker`: a route that misses its deadline again and again is not asked for a while."""

from datetime import timedelta

from adapter.identifiers import Channel
from adapter.verdicts.circuit_breaker import CircuitBreaker
from tests.ledgers import HandClock

KEY = ("one", Channel("norce", "1"))


def made(failures: int = 3) -> tuple[CircuitBreaker, HandClock]:
    clock = HandClock()
    return CircuitBreaker(failures=failures, open_for=timedelta(seconds=30), clock=clock), clock


def test_it_opens_after_so_many_misses_in_a_row_for_one_route_and_channel() -> None:
    breaker, _ = made()
    for _ in range(2):
        breaker.record(KEY, missed=True)
        assert not breaker.is_open(KEY)

    breaker.record(KEY, missed=True)

    assert breaker.is_open(KEY)
    assert not breaker.is_open(("one", Channel("norce", "2")))


def test_an_answer_in_between_resets_the_count() -> None:
    breaker, _ = made()
    for missed in (True, True, False, True, True):
        breaker.record(KEY, missed=missed)

    assert not breaker.is_open(KEY)


def test_when_the_time_is_up_one_call_tries_and_the_others_wait_for_its_result() -> None:
    breaker, clock = made(1)
    breaker.record(KEY, missed=True)
    clock.now += 29
    assert breaker.is_open(KEY)
    clock.now += 1

    assert [breaker.is_open(KEY) for _ in range(3)] == [False, True, True]
    breaker.record(KEY, missed=False)
    assert not breaker.is_open(KEY)


def test_a_try_that_misses_keeps_it_open_for_as_long_again_and_so_does_one_without_a_result() -> None:
    breaker, clock = made(3)
    for _ in range(3):
        breaker.record(KEY, missed=True)
    clock.now += 30
    assert not breaker.is_open(KEY)
    clock.now += 20
    breaker.record(KEY, missed=True)
    clock.now += 29

    assert breaker.is_open(KEY)
    clock.now += 1
    assert not breaker.is_open(KEY)  # this try never has a result
    clock.now += 30
    assert not breaker.is_open(KEY)


def test_it_never_opens_with_0_failures() -> None:
    breaker, _ = made(0)
    for _ in range(100):
        breaker.record(KEY, missed=True)

    assert not breaker.is_open(KEY)
