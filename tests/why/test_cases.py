"""The decision: every combination of facts has one case, and words for it."""

import re
from itertools import product
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.cli import main
from adapter.identifiers import Channel
from adapter.ledger.settlement import PausedBy, Reason, State
from adapter.why.cases import ORDER_CASES, ROUTE_CASES, Case, OnRoute, Standing, decide
from adapter.why.facts import STATUSES, AtNorce, Facts, NorceProblem, OnOrder, RouteFacts
from adapter.why.words import explain_order

NOW, EARLIER, LATER = "2026-02-03T12:00:00.000Z", "2026-02-03T11:00:00.000Z", "2026-02-03T13:00:00.000Z"
CASES: list[Case[Any]] = [*ORDER_CASES, *ROUTE_CASES]
moments = st.sampled_from([EARLIER, NOW, LATER])
DONE = {"delivered", "skipped", "superseded", "moved_on", "discarded", "shadow"}


@st.composite
def deliveries(draw: st.DrawFn) -> list[dict[str, object]]:
    """Return the deliveries of a lane, the newest first."""
    rows = []
    for number in range(draw(st.integers(0, 3)), 0, -1):
        state = draw(st.sampled_from([each.value for each in State]))
        reasons = [each.value for each in Reason if (each.value in DONE) is (state == "done")]
        tried = draw(st.integers(0, 2))
        rows.append(
            {
                "id": number,
                "notification_id": number,
                "state": state,
                "reason": None if state == "waiting" else draw(st.sampled_from(reasons)),
                "tries": tried,
                "next_at": draw(st.none() | moments),
                "in_doubt": draw(st.booleans()),
                "first_attempt_at": EARLIER if tried else None,
                "ended_at": None if state == "waiting" else EARLIER,
                "code": draw(st.none() | st.just("destination-busy")),
                "reference": draw(st.none() | st.just("4711")),
                "again_of": draw(st.none() | st.just(1)),
                "attempts": [],
            }
        )
    return rows


@st.composite
def routes(draw: st.DrawFn) -> RouteFacts:
    rows = draw(deliveries())
    decision = draw(st.sampled_from([None, "matched", "not_matched", "error"]))
    result = {"not_matched": "not_matched", "error": "error"}.get(decision or "", "matched")
    code = {"not_matched": draw(st.sampled_from(["schema", "scope_missing"])), "error": "engine"}.get(decision or "")
    scope = draw(st.sampled_from(["/state/currentStatus", "/country"]))
    condition = {"scope": scope, "kind": "string", "result": result, "code": code, "at": scope, "kind_at": "string"}
    return RouteFacts(
        route=draw(st.sampled_from(["export", "history"])),
        callback=draw(st.none() | st.just("order-status")),
        is_configured=draw(st.booleans()),
        is_shadow=draw(st.booleans()),
        on_order=draw(st.sampled_from(OnOrder)),
        arrivals=[{"id": 1, "received_at": EARLIER}] if draw(st.booleans()) else [],
        decision=decision,
        conditions=[condition | {"keyword": "const", "schema_at": "/const"}] if decision else [],
        wanted_statuses=draw(st.lists(st.sampled_from(STATUSES), max_size=2)),
        deliveries=rows,
        lane=draw(
            st.none()
            | st.fixed_dictionaries(
                {
                    "current_delivery_id": st.sampled_from([None, *(each["id"] for each in rows)]),
                    "is_held": st.booleans(),
                    "in_doubt": st.booleans(),
                }
            )
        ),
        queue=draw(
            st.none()
            | st.fixed_dictionaries(
                {
                    "state": st.sampled_from(["running", "paused", "probing"]),
                    "paused_by": st.sampled_from([None, *(each.value for each in PausedBy)]),
                    "paused_until": st.none() | moments | st.just("a person resumes it"),
                    "reason": st.none() | st.just("destination-busy"),
                    "waiting": st.integers(0, 3),
                    "running": st.just(0),
                }
            )
        ),
        pause=draw(st.none() | st.just({"who": "anna", "at": EARLIER})),
    )


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    is_known = draw(st.booleans())
    at_norce = draw(st.sampled_from(AtNorce))
    return Facts(
        asked="100245",
        now=NOW,
        channel=Channel("norce", "1") if is_known else None,
        order_id="order-1" if is_known else None,
        reference=draw(st.none() | st.just("100245")),
        at_norce=at_norce,
        problem=NorceProblem(words="Norce does not answer", detail="d") if at_norce is AtNorce.UNREADABLE else None,
        status=draw(st.none() | st.sampled_from(STATUSES)),
        changed_at=draw(st.none() | moments),
        is_channel_configured=draw(st.booleans()),
        is_switched_off=draw(st.booleans()),
        is_held=draw(st.booleans()),
        is_served=draw(st.booleans()),
        notifications=[{"id": 1, "callback": "c", "received_at": EARLIER, "source": "callback"}]
        if draw(st.booleans())
        else [],
        under_gone_names=[{"callback": "gone", "received_at": EARLIER}] if draw(st.booleans()) else [],
        verdicts=[
            {
                "at": EARLIER,
                "kind": draw(st.sampled_from(["answer", "late", "shadow"])),
                "route": "rules",
                "decided": draw(st.sampled_from(["reject", "refuse", "patch", "approve"])),
                "codes": draw(st.sampled_from([[], ["too-much"]])),
            }
        ]
        if draw(st.booleans())
        else [],
        routes=draw(st.lists(routes(), max_size=3)) if is_known else [],
    )


@given(facts())
def test_every_combination_of_facts_has_one_case_for_each_route_and_a_paragraph(facts: Facts) -> None:
    decisions = decide(facts)
    answer = explain_order(facts)

    assert len(decisions) == max(1, len(facts.routes))
    assert re.fullmatch(r"[^{}]{20,}[.]", answer.paragraph)
    assert "None" not in answer.paragraph
    assert all(line and "{" not in line for line in (*answer.lines, *answer.commands))


@given(facts())
def test_an_order_is_exported_only_if_a_route_has_delivered_it_and_nothing_of_it_is_open(facts: Facts) -> None:
    answer = explain_order(facts)

    current = [route.current for route in facts.routes]
    if answer.exported:
        assert any(route.delivered for route in facts.routes)
        assert all(each is None or each["state"] == "done" for each in current)
    if any(each is not None and each["state"] != "done" for each in current):
        assert not answer.exported


@given(facts())
def test_the_last_case_of_a_table_is_no_refuge(facts: Facts) -> None:
    """Only an order that its route wants, that carries its callback and that has not arrived ends in the last case."""
    for route in facts.routes:
        names = [each.name for each in ROUTE_CASES if each.holds(OnRoute(facts=facts, route=route))]

        if names == ["not-arrived"]:
            assert not route.deliveries
            assert not [*route.arrivals, *facts.under_gone_names]
            assert (route.decision, route.on_order) == ("matched", OnOrder.REGISTERED)


def test_every_case_has_a_name_of_its_own_and_an_open_one_has_a_remedy() -> None:
    assert len({each.name for each in CASES}) == len(CASES)
    assert [each.name for each in CASES if each.standing is Standing.OPEN and not each.remedies] == []


@pytest.mark.parametrize("remedy", sorted({each for case in CASES for each in case.remedies}))
def test_every_remedy_is_a_command_with_options_that_exist(remedy: str) -> None:
    words = remedy.replace("{of_channel}", "--merchant m --channel 1").split(" --why ")[0].split()[1:]
    command: click.Command = main
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words.pop(0))
        assert found is not None, remedy
        command = found

    options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= options
    if " --why " in remedy:
        assert "--why" in options


@pytest.mark.parametrize(("status", "wanted"), list(product(["checkout", "completed"], ["completed", "declined"])))
def test_a_purchase_that_goes_on_may_still_be_wanted(status: str, wanted: str) -> None:
    condition = {"scope": "/state/currentStatus", "result": "not_matched", "code": "schema"}
    route = RouteFacts(route="export", decision="not_matched", conditions=[condition], wanted_statuses=[wanted])

    may_come = OnRoute(facts=Facts(asked="", now=NOW, status=status), route=route).may_come

    assert may_come is ((status, wanted) == ("checkout", "completed"))
