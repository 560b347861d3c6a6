"""`adapter.callbacks.limits`: what a caller may cause, and the report that a limit acted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from adapter.callbacks.limits import (
    MOST_AT_ONCE,
    MOST_WAITING,
    WARN_EVERY_SECONDS,
    ByteLimit,
    CallLimit,
    LargeBodies,
    LimitReport,
    Load,
    Overloaded,
)
from adapter.metrics import Metrics


class Seconds:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


def test_only_so_many_calls_of_a_key_run_at_once(clock: Seconds) -> None:
    limit = CallLimit("calls", at_once=3, a_minute=100, clock=clock)

    assert [limit.enter("o1") for _ in range(5)] == [True, True, True, False, False]
    assert limit.enter("o2")
    limit.leave("o1")
    assert [limit.enter("o1") for _ in range(2)] == [True, False]


def test_only_so_many_calls_of_a_key_begin_in_a_minute(clock: Seconds) -> None:
    limit = CallLimit("calls", at_once=1, a_minute=3, clock=clock)

    def call() -> bool:
        entered = limit.enter("o1")
        if entered:
            limit.leave("o1")
        return entered

    assert [call() for _ in range(5)] == [True, True, True, False, False]
    clock.now += 59.9
    assert not call()
    clock.now += 0.1
    assert [call() for _ in range(4)] == [True, True, True, False]


def test_calls_that_still_run_in_the_next_minute_count_as_running(clock: Seconds) -> None:
    limit = CallLimit("calls", at_once=2, a_minute=100, clock=clock)
    limit.enter("o1")
    limit.enter("o1")
    clock.now += 600

    assert not limit.enter("o1")
    limit.leave("o1")
    assert limit.enter("o1")


def test_idle_keys_take_no_memory(clock: Seconds) -> None:
    limit = CallLimit("calls", at_once=2, a_minute=100, clock=clock)
    for number in range(1000):
        limit.enter(f"o{number}")
        limit.leave(f"o{number}")
    clock.now += 60

    limit.enter("one-more")

    assert len(limit) == 1


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), st.integers(0, 3)),
            st.tuples(st.just("leave"), st.integers(0, 3)),
            st.tuples(st.just("wait"), st.integers(0, 70)),
        ),
        max_size=100,
    )
)
def test_calls_are_refused_exactly_beyond_the_limit(steps: list[tuple[str, int]]) -> None:
    """Compared with the definition. Minutes begin with the first call after the end of the last one."""
    clock = Seconds()
    limit = CallLimit("calls", at_once=3, a_minute=6, clock=clock)
    running, begun, ends = [0] * 4, [0] * 4, clock.now + 60
    for what, number in steps:
        if what == "wait":
            clock.now += number
        elif what == "leave" and running[number]:
            limit.leave(number)
            running[number] -= 1
        elif what == "enter":
            if clock.now >= ends:
                begun, ends = [0] * 4, clock.now + 60
            may = running[number] < 3 and begun[number] < 6
            assert limit.enter(number) == may
            running[number] += may
            begun[number] += may


def test_large_bodies_are_limited_for_each_key_and_in_all() -> None:
    limit = LargeBodies("large", least=10, of_key=200, in_all=500)

    assert [limit.enter("o1", 100) for _ in range(3)] == [True, True, False]
    assert [limit.enter("o2", 100), limit.enter("o2", 101), limit.enter("o3", 200)] == [True, False, True]
    assert not limit.enter("o4", 1)
    limit.leave("o1", 100)
    assert [limit.enter("o4", 100), limit.enter("o1", 1)] == [True, False]


def test_large_bodies_that_have_ended_take_no_memory() -> None:
    limit = LargeBodies("large", least=10, of_key=200, in_all=500)
    for number in range(100):
        assert limit.enter(number, 150)
        limit.leave(number, 150)

    assert limit._bytes == {}


def test_a_limit_that_acts_is_counted_and_logged_once_a_minute_with_the_count(clock: Seconds) -> None:
    metrics = Metrics("0")
    report = LimitReport(metrics, clock)
    with capture_logs() as logged:
        for _ in range(5):
            report.acted("order-calls")
        report.acted("order-reads")
        clock.now += WARN_EVERY_SECONDS
        report.acted("order-calls")
        clock.now += WARN_EVERY_SECONDS - 1
        report.acted("order-calls")

    assert [(line["limit"], line["count"], line["log_level"]) for line in logged] == [
        ("order-calls", 1, "warning"), ("order-reads", 1, "warning"), ("order-calls", 5, "warning"),
    ]  # fmt: skip
    assert metrics.registry.get_sample_value("norce_adapter_limits_reached_total", {"limit": "order-calls"}) == 7


@pytest.mark.parametrize(
    ("waiting", "running", "is_full"),
    [
        (0, MOST_AT_ONCE - 1, False),
        (0, MOST_AT_ONCE, True),
        (1, MOST_AT_ONCE, False),
        (MOST_WAITING - 1, MOST_WAITING - 1, False),
        (MOST_WAITING, MOST_WAITING, True),
    ],
)
def test_waiting_requests_count_only_towards_their_own_limit(waiting: int, running: int, is_full: bool) -> None:
    load = Load(waiting=lambda: waiting)
    load.running = running

    assert load.is_full() is is_full


def test_a_request_counts_while_it_runs() -> None:
    refused: list[str] = []
    load = Load(on_limit=refused.append)
    load.running = MOST_AT_ONCE - 1

    with load, pytest.raises(Overloaded), load:
        pass
    with load:
        pass

    assert load.running == MOST_AT_ONCE - 1
    assert refused == ["requests"]


# --- bytes -----------------------------------------------------------------------------------------------------------

SECONDS_OF_A_DAY = 86_400


def test_the_bytes_of_a_key_are_limited_and_come_back_over_a_day(clock: Seconds) -> None:
    limit = ByteLimit("order-bytes", most=SECONDS_OF_A_DAY * 10, seconds=SECONDS_OF_A_DAY, clock=clock)

    assert [limit.take("a", SECONDS_OF_A_DAY * 4) for _ in range(3)] == [True, True, False]
    assert limit.take("b", SECONDS_OF_A_DAY * 4)
    clock.now += SECONDS_OF_A_DAY / 5  # two tenths are forgotten
    assert [limit.take("a", SECONDS_OF_A_DAY * 4) for _ in range(2)] == [True, False]
    clock.now += SECONDS_OF_A_DAY
    assert [limit.take("a", SECONDS_OF_A_DAY * 5) for _ in range(3)] == [True, True, False]


def test_a_refused_body_does_not_count(clock: Seconds) -> None:
    limit = ByteLimit("order-bytes", most=100, seconds=SECONDS_OF_A_DAY, clock=clock)

    assert [limit.take("a", size) for size in (60, 60, 60, 40)] == [True, False, False, True]


def test_a_first_body_may_be_larger_than_the_limit(clock: Seconds) -> None:
    limit = ByteLimit("order-bytes", most=100, seconds=SECONDS_OF_A_DAY, clock=clock)

    assert [limit.take("a", size) for size in (1000, 1)] == [True, False]


def test_a_key_takes_memory_until_its_bytes_are_forgotten(clock: Seconds) -> None:
    limit = ByteLimit("order-bytes", most=SECONDS_OF_A_DAY, seconds=SECONDS_OF_A_DAY, clock=clock)
    for number in range(100):
        limit.take(number, 120)
    assert len(limit) == 100

    clock.now += 121
    limit.take("another", 1)

    assert len(limit) == 1
