"""`adapter.deliveries.outcomes`: the outcome that an error of a handler means."""

from datetime import timedelta

import pytest

from adapter.deliveries.outcomes import is_bug, outcome_of
from adapter.ledger.settlement import Broken
from adapter.plugin import Misconfigured, Outcome, Reject, Retry, Unknown

RETRY, REJECT = Retry("busy"), Reject("refused")
MISCONFIGURED, UNKNOWN = Misconfigured("no-token"), Unknown("no-answer")


class OwnOutcome(Outcome):
    """An outcome of a plugin's own, which is a bug."""


class OwnRetry(Retry):
    """A retry of a plugin's own, which is a retry."""


GROUPS = {
    "one leaf": ([RETRY], RETRY),
    "retry and reject": ([RETRY, REJECT], REJECT),
    "reject and misconfigured": ([REJECT, MISCONFIGURED], MISCONFIGURED),
    "misconfigured and unknown": ([MISCONFIGURED, UNKNOWN], UNKNOWN),
    "all, in groups": ([RETRY, ExceptionGroup("", [REJECT, ExceptionGroup("", [UNKNOWN])]), MISCONFIGURED], UNKNOWN),
}


@pytest.mark.parametrize(("errors", "gravest"), GROUPS.values(), ids=GROUPS)
def test_a_group_is_the_gravest_of_its_outcomes(errors: list[Exception], gravest: Outcome) -> None:
    for given in (errors, errors[::-1]):
        assert outcome_of(ExceptionGroup("", given), sent=True, succeeded=False) is gravest


def test_of_several_delays_the_longest_counts() -> None:
    delays = [Retry("busy", after=timedelta(seconds=seconds)) for seconds in (5, 90, 7)]

    outcome = outcome_of(ExceptionGroup("", [RETRY, *delays]), sent=False, succeeded=False)

    assert outcome is delays[1]


@pytest.mark.parametrize("other", [RETRY, REJECT, MISCONFIGURED], ids=repr)
def test_a_bug_beside_an_outcome_is_a_bug(other: Exception) -> None:
    group = ExceptionGroup("", [other, KeyError("canary")])

    before, after = (outcome_of(group, sent=sent, succeeded=False) for sent in (False, True))

    assert (type(before), type(after)) == (Broken, Unknown)
    assert before.message == "the handler raised KeyError"


@pytest.mark.parametrize(
    ("error", "bug"),
    [
        (RETRY, False),
        (OwnRetry("mine"), False),
        (TimeoutError(), False),
        (OwnOutcome("mine"), True),
        (KeyError(), True),
    ],
    ids=repr,
)
def test_a_bug_is_neither_an_outcome_nor_a_time_limit(error: Exception, bug: bool) -> None:
    assert is_bug(error) is bug
