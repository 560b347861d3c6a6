"""`why`: each reason for which an order is, or is not, at its destination, on both stores."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from adapter.identifiers import Channel
from adapter.ledger.commands import Commands, QueueChange, Step
from adapter.ledger.inbox import Wanted
from adapter.ledger.key_values import StoredDocuments
from adapter.ledger.queries import Author, DeliveryFilter
from adapter.plugin import Misconfigured, Reject, Retry, Skip, Unknown
from adapter.why.cases import ORDER_CASES, ROUTE_CASES
from tests.cli.test_cli import NOTHING_MATCHED, STORE
from tests.ledgers import BROKEN, CONDITION, HOUR, MOVED_ON, NOON, Ends, delivered, in_doubt, receipt, waiting
from tests.why.conftest import Site

pytestmark = pytest.mark.usefixtures("logging_as_before")

ANNA = Author(who="anna@duty", why="the shop moves")
CHECKOUT = {"state": {"currentStatus": "checkout"}}


def received(site: Site, **members: Any) -> None:
    site.receive(site.order(**members))


def attempted(site: Site, ends: Ends, **settled: Any) -> None:
    received(site)
    site.ledger.settle(site.ledger.claim_one(), ends, **settled)


def paused_by(site: Site, result: Any) -> None:
    """Let other orders fail, so that the queue pauses, while the order waits."""
    others = [site.order(f"other-{number}") for number in range(5)]
    for each in others:
        site.receive(each)
    claims = site.ledger.claim()
    received(site)
    for claim in claims:
        site.ledger.settle(claim, Ends(result, due=NOON + HOUR))


def commands(site: Site) -> Commands:
    return Commands(site.ledger.store)


# --- the arrangements, by the name of the case that they lead to ---


def done(site: Site) -> None:
    attempted(site, delivered("4711"))


def skipped(site: Site) -> None:
    attempted(site, Ends(Skip("no-payment"), "skipped"))


def moved_on(site: Site) -> None:
    attempted(site, MOVED_ON)
    site.order(state={"currentStatus": "declined"})


def discarded(site: Site) -> None:
    received(site)
    step = Step(matching=DeliveryFilter(order_id="order-1", state="waiting"), by=ANNA)
    site.ledger.do(commands(site).discard(step))


def orphaned(site: Site) -> None:
    received(site)
    site.config["routes"]["export"]["merchants"] = ["annan"]


def shadow(site: Site) -> None:
    order = site.order()
    wanted = (Wanted(queue_id=site.ledger.export, refetch=True, shadow=True),)
    site.ledger.receive(msgspec.structs.replace(receipt("order-1"), wanted=wanted, body=json.dumps(order).encode()))


def shadow_waits(site: Site) -> None:
    received(site)
    site.config["routes"]["export"]["mode"] = "shadow"


def outcome_unknown(site: Site) -> None:
    attempted(site, Ends(Unknown("connection-lost"), "unknown"))


def rejected(site: Site) -> None:
    attempted(site, Ends(Reject("no-such-shop", "The shop says no."), "rejected"))


def exhausted(site: Site) -> None:
    received(site)
    site.ledger.settle(site.ledger.claim_one(), waiting(NOON + HOUR))
    site.move_clock(NOON + HOUR)
    site.ledger.settle(site.ledger.claim_one(), Ends(Retry("destination-busy"), "exhausted"))


def condition_failed(site: Site) -> None:
    attempted(site, CONDITION)


def broken(site: Site) -> None:
    attempted(site, BROKEN)


def not_served(site: Site) -> None:
    received(site)
    site.ledger.rows("UPDATE processes SET lease_until = 0")


def sending(site: Site) -> None:
    received(site)
    site.ledger.claim_one()


def switched_off(site: Site) -> None:
    received(site)
    document = StoredDocuments(site.ledger.store).keep(Channel("fjallboden", "1"), b'{"active": false}')
    site.ledger.do(document)


def paused_by_person(site: Site) -> None:
    received(site)
    site.ledger.do(commands(site).pause(QueueChange(route="export", by=ANNA)))


def paused_credentials(site: Site) -> None:
    paused_by(site, Misconfigured("jetshop-unauthorized"))


def paused_busy(site: Site) -> None:
    others = site.order("other-1")
    site.receive(others)
    claim = site.ledger.claim_one()
    received(site)
    site.ledger.settle(claim, Ends(Retry("destination-busy", after=timedelta(minutes=7)), due=NOON + HOUR))


def paused_failures(site: Site) -> None:
    paused_by(site, Retry("destination-unreachable"))


def doubtful(site: Site) -> None:
    attempted(site, in_doubt(NOON + HOUR))


def retried(site: Site) -> None:
    attempted(site, waiting(NOON + 2 * HOUR))


def due(site: Site) -> None:
    received(site)


def gone_at_norce(site: Site) -> None:
    site.receive(site.order(), wanted=False)
    site.norce.simulator.records.orders.clear()


def undecidable(site: Site) -> None:
    site.config["routes"]["export"]["when"] = [{"scope": "/payments/0/state"}]
    site.order()


def failed_purchase(site: Site) -> None:
    site.order(state={"currentStatus": "declined"})


def not_wanted(site: Site) -> None:
    site.receive(site.order(country="NO"), wanted=False)


def callback_gone(site: Site) -> None:
    site.receive(site.order(), wanted=False)
    site.config["callbacks"]["purchases"] = site.config["callbacks"].pop("order-status")
    site.config["routes"]["export"]["callback"] = "purchases"


def never_registered(site: Site) -> None:
    site.order(registered=False, **CHECKOUT)


def registered_otherwise(site: Site) -> None:
    site.order(**CHECKOUT)
    site.config["adapter"]["public_url"] = "https://moved.example"


def state_not_reached(site: Site) -> None:
    site.order(**CHECKOUT)


def refused(site: Site) -> None:
    site.order(**CHECKOUT)
    site.ledger.rows(
        "INSERT INTO verdicts (at, kind, callback, route, merchant, channel, order_id, decided, codes, took_ms) VALUES "
        f"({NOON}, 'answer', 'order-rules', 'limits', 'fjallboden', '1', 'order-1', 'reject', '[\"too-much\"]', 1)"
    )


def refused_without_an_answer(site: Site) -> None:
    refused(site)
    site.ledger.rows("UPDATE verdicts SET decided = 'failed', codes = '[\"late\"]', answered = 'reject'")


def unread(site: Site) -> None:
    site.receive(site.order(), wanted=False)
    site.ledger.rows("UPDATE notifications SET body = NULL")
    site.config["norce"]["base_url"] = "http://127.0.0.1:1"


def overlooked(site: Site) -> None:
    site.receive(site.order(), wanted=False)


def not_arrived(site: Site) -> None:
    site.order()


def channel_gone(site: Site) -> None:
    site.receive(site.order(), wanted=False)
    del site.config["merchants"]["fjallboden"]


def callback_unknown(site: Site) -> None:
    site.receive(site.order(), wanted=False)
    site.config["routes"]["export"]["merchants"] = ["annan"]


def no_route(site: Site) -> None:
    site.order()
    site.config["routes"]["export"]["merchants"] = ["annan"]


def unknown(_site: Site) -> None:
    pass


def unreadable(site: Site) -> None:
    site.config["norce"]["base_url"] = "http://127.0.0.1:1"


COMPLETED = "Order order-1 (reference 100245) is in the state completed at Norce. "
ANSWERS: dict[Callable[[Site], None], tuple[str, str]] = {
    done: (
        "done",
        COMPLETED
        + "It was sent by “export”, and has been in the receiving system since 2026-02-03 12:00 UTC, with the "
        "number 4711.",
    ),
    skipped: (
        "skipped",
        COMPLETED + "“export” found nothing to send for it (“no-payment”, 2026-02-03 12:00 UTC).",
    ),
    moved_on: (
        "moved-on",
        "Order order-1 (reference 100245) is in the state declined at Norce. “export” did not send it: when we "
        "read the order once more (2026-02-03 12:00 UTC), it was no longer one to send.",
    ),
    discarded: (
        "discarded",
        COMPLETED + "“export” does not send it, because one of us decided so (2026-02-03 12:00 UTC).",
    ),
    shadow: (
        "shadow",
        COMPLETED + "“export” is on trial: it would have sent the order (2026-02-03 12:00 UTC), and has sent nothing.",
    ),
    shadow_waits: (
        "shadow-waits",
        COMPLETED
        + "It waits to be sent by “export”, which is on trial at the moment and sends nothing. It is sent as soon "
        "as the trial ends.",
    ),
    orphaned: (
        "orphaned",
        COMPLETED
        + "It was to be sent by “export”, which is not set up any more for this merchant and channel. Nothing "
        "happens with it unless we set it up again.",
    ),
    outcome_unknown: (
        "outcome-unknown",
        COMPLETED
        + "“export” sent it (2026-02-03 12:00 UTC) and got no clear answer, so it may be in the receiving system or"
        " not. One of us has to look for it there before it is sent again.",
    ),
    rejected: (
        "rejected",
        COMPLETED
        + "“export” could not send it: it was refused with “no-such-shop” (2026-02-03 12:00 UTC). It is sent once "
        "more when the cause has been corrected.",
    ),
    exhausted: (
        "exhausted",
        COMPLETED
        + "“export” could not send it: 2 attempts failed between 2026-02-03 12:00 UTC and 2026-02-03 13:00 UTC, the"
        " last one with “destination-busy”. It is not tried again by itself.",
    ),
    condition_failed: (
        "condition-failed",
        COMPLETED
        + "“export” did not send it, because our rule that selects orders cannot be applied to this one. We have to"
        " correct the rule.",
    ),
    broken: (
        "broken",
        COMPLETED
        + "“export” did not send it, because our own program failed on this order (2026-02-03 12:00 UTC). Nothing "
        "was sent. We have to correct the program.",
    ),
    not_served: (
        "not-served",
        COMPLETED + "It waits to be sent by “export”, and our service does not run at the moment.",
    ),
    sending: (
        "sending",
        COMPLETED + "“export” is sending it at this moment.",
    ),
    switched_off: (
        "switched-off",
        COMPLETED
        + "It waits to be sent by “export”: our adapter is switched off for channel 1 in Norce's configuration. It "
        "is sent as soon as it is switched on there.",
    ),
    paused_by_person: (
        "paused-by-person",
        COMPLETED
        + "It waits to be sent by “export”, which one of us has paused since 2026-02-03 12:00 UTC. It is sent as "
        "soon as one of us resumes it.",
    ),
    paused_credentials: (
        "paused-credentials",
        COMPLETED
        + "It waits to be sent by “export”: the receiving system refuses our credentials. We try with one order "
        "again at 2026-02-03 12:01 UTC, and send the others as soon as it is taken.",
    ),
    paused_busy: (
        "paused-busy",
        COMPLETED
        + "It waits to be sent by “export”: the receiving system asked us to wait until 2026-02-03 12:07 UTC.",
    ),
    paused_failures: (
        "paused-failures",
        COMPLETED
        + "It waits to be sent by “export”: several orders in a row could not be sent. We try with one order again "
        "at 2026-02-03 12:01 UTC, and send the others as soon as it is taken.",
    ),
    doubtful: (
        "in-doubt",
        COMPLETED
        + "“export” sent it (2026-02-03 12:00 UTC) and got no clear answer. At 2026-02-03 13:00 UTC we look whether"
        " it has arrived, before anything is sent again.",
    ),
    retried: (
        "waiting",
        COMPLETED + "“export” could not send it yet: 1 attempt failed, the last one at 2026-02-03 12:00 UTC with "
        "“destination-busy”. The next attempt is at 2026-02-03 14:00 UTC.",
    ),
    due: (
        "due",
        COMPLETED + "It waits for its turn to be sent by “export” (orders that wait: 1).",
    ),
    gone_at_norce: (
        "gone-at-norce",
        "Order order-1 (reference 100245) is not at Norce any more. Norce never told us about it, so “export” has sent "
        "nothing.",
    ),
    undecidable: (
        "undecidable",
        COMPLETED
        + "“export” cannot tell whether to send it: our rule cannot be applied to this order. We have to correct "
        "it.",
    ),
    failed_purchase: (
        "failed-purchase",
        "Order order-1 (reference 100245) is in the state declined at Norce. “export” sends an order only when it"
        " is completed, so nothing is sent.",
    ),
    not_wanted: (
        "not-wanted",
        COMPLETED + "“export” does not send orders like this one: its country is not as it has to be.",
    ),
    callback_gone: (
        "callback-gone",
        COMPLETED
        + "Norce told us about the order (2026-02-03 12:00 UTC), but under the name “order-status”, which is not "
        "in use any more, so “export” did not send it.",
    ),
    never_registered: (
        "never-registered",
        "Order order-1 (reference 100245) is in the state checkout at Norce. The order was created without the "
        "request to tell us about it (order-status), so Norce does not tell us when it is completed. It is not "
        "sent by itself.",
    ),
    registered_otherwise: (
        "registered-otherwise",
        "Order order-1 (reference 100245) is in the state checkout at Norce. The order has an outdated request to"
        " tell us about it (order-status), so we may not hear from Norce when it is completed.",
    ),
    state_not_reached: (
        "state-not-reached",
        "Order order-1 (reference 100245) is in the state checkout at Norce. The purchase is not finished, and "
        "“export” sends the order when it is completed.",
    ),
    refused: (
        "refused",
        "Order order-1 (reference 100245) is in the state checkout at Norce. The purchase is not finished: our check "
        "“limits” refused it with “too-much” (2026-02-03 12:00 UTC). “export” sends the order when it is completed.",
    ),
    refused_without_an_answer: (
        "refused",
        "Order order-1 (reference 100245) is in the state checkout at Norce. The purchase is not finished: our check "
        "“limits” refused it with “late” (2026-02-03 12:00 UTC). “export” sends the order when it is completed.",
    ),
    unread: (
        "unread",
        "Order order-1 cannot be read from Norce now (Norce does not answer), so this is as far as we know. We "
        "cannot tell whether “export” has to send it, because we keep no copy of the order.",
    ),
    overlooked: (
        "overlooked",
        COMPLETED
        + "Norce told us about the order (2026-02-03 12:00 UTC), but “export” was not to send it then. As it is set"
        " up today, “export” would; a person has to start that.",
    ),
    not_arrived: (
        "not-arrived",
        COMPLETED
        + "It is ready to be sent by “export”, but Norce's message about it has not reached us. We look for missing"
        " messages regularly, and can do so at once.",
    ),
    channel_gone: (
        "channel-gone",
        "Order order-1 (reference 100245) cannot be read from Norce now (its merchant is not set up in our "
        "service), so this is as far as we know. Merchant fjallboden with channel 1 is not set up in our service "
        "any more, so nothing is sent.",
    ),
    callback_unknown: (
        "callback-unknown",
        COMPLETED
        + "Norce told us about the order (2026-02-03 12:00 UTC), but nothing is set up in our service that acts on "
        "it, so nothing was sent.",
    ),
    no_route: (
        "no-route",
        COMPLETED + "Nothing is set up in our service that sends orders of merchant fjallboden, channel 1.",
    ),
    unknown: (
        "unknown",
        "Norce has no order with the id, the reference or the cart order-1, and nothing about it has reached us. "
        "Please check the number.",
    ),
    unreadable: (
        "unreadable",
        "Norce cannot be read at the moment (Norce does not answer), and nothing about order-1 has reached us.",
    ),
}


@pytest.mark.parametrize("arrange", ANSWERS, ids=lambda each: each.__name__)
def test_each_reason_has_its_answer(site: Site, arrange: Callable[[Site], None]) -> None:
    case, paragraph = ANSWERS[arrange]
    arrange(site)

    answer = site.ask_one()

    assert (answer["case"], answer["paragraph"]) == (case, paragraph)
    assert answer["exported"] is (case == "done")


def test_every_case_has_an_arrangement() -> None:
    names = {each.name for each in ORDER_CASES} | {each.name for each in ROUTE_CASES}

    # A service that holds its queues is a process: see the flows. A ledger never has superseded deliveries alone.
    assert names - {case for case, _ in ANSWERS.values()} == {"held", "superseded"}


# --- which orders -----------------------------------------------------------------------------------------------------


def test_an_order_is_found_by_its_reference_and_by_its_cart(site: Site) -> None:
    site.receive(site.order(reference="100245", cart={"reference": "cart-7", "items": []}))
    site.order("order-2", reference="100246", cart={"reference": "cart-8", "items": []})

    found = [site.ask_one(asked)["facts"]["order_id"] for asked in ("order-1", "100245", "cart-7", "CART-8")]

    assert found == ["order-1", "order-1", "order-1", "order-2"]


def test_an_order_that_the_ledger_does_not_have_is_not_taken_for_one_whose_id_begins_so(site: Site) -> None:
    site.receive(site.order("order-12"))
    site.order("order-1", reference="100246", registered=False, **CHECKOUT)

    answer = site.ask_one("100246")

    assert (answer["facts"]["order_id"], answer["case"]) == ("order-1", "never-registered")
    assert answer["facts"]["notifications"] == []


def test_an_order_is_found_by_the_beginning_of_its_id_and_by_the_number_of_the_destination(site: Site) -> None:
    done(site)

    assert [site.ask_one(asked)["facts"]["order_id"] for asked in ("order-", "4711")] == ["order-1", "order-1"]


def test_each_order_of_a_reference_is_answered(site: Site) -> None:
    done(site)
    site.order("order-2", state={"currentStatus": "removed"})

    answers = site.ask("100245")
    printed = site.print("100245")

    assert [(each["facts"]["order_id"], each["case"]) for each in answers] == [
        ("order-1", "done"),
        ("order-2", "failed-purchase"),
    ]
    assert printed.exit_code == NOTHING_MATCHED
    assert printed.stdout.startswith("2 orders have the reference 100245.\n")


def test_the_search_can_be_limited_to_a_merchant_and_a_channel(site: Site) -> None:
    received(site)
    site.order("order-2", merchant="annan", registered=False)

    assert {each["facts"]["order_id"] for each in site.ask("100245")} == {"order-1", "order-2"}
    assert site.ask_one("100245", "--merchant", "annan")["facts"]["order_id"] == "order-2"
    assert site.ask_one("100245", "--channel", "9")["case"] == "unknown"
    assert site.ask_one("order-1", "--merchant", "annan")["case"] == "unknown"


def test_a_token_that_norce_refuses_is_named(site: Site) -> None:
    received(site)
    site.config["merchants"]["fjallboden"]["tokens"] = ["${env:URL_KEY}"]

    answer = site.ask_one()

    assert "(Norce refuses our token)" in answer["paragraph"]
    assert answer["case"] == "due"


# --- what is said besides ---------------------------------------------------------------------------------------------


def test_several_routes_are_answered_together_and_the_order_is_exported_when_none_is_open(site: Site) -> None:
    site.config["routes"]["history"] = site.config["routes"]["export"]
    site.config["routes"]["norway"] = site.config["routes"]["export"] | {
        "when": {"scope": "/country", "schema": {"const": "NO"}}
    }
    order, queues = site.order(), [(site.ledger.export, True), (site.ledger.history, True)]
    site.ledger.receive(receipt("order-1", NOON, wanted=queues, body=json.dumps(order).encode()))
    site.ledger.settle(site.ledger.claim_one(site.ledger.export), delivered("4711"))

    waits = site.ask_one()
    site.ledger.settle(site.ledger.claim_one(site.ledger.history), delivered("h-1"))
    ends = site.ask_one()

    assert (waits["case"], waits["exported"]) == ("due", False)
    assert waits["paragraph"].count("4711") == waits["paragraph"].count("“history”") == 1
    assert (ends["case"], ends["exported"]) == ("done", True)
    assert "norway" not in ends["paragraph"]


def test_an_update_that_waits_names_the_version_that_is_there(site: Site) -> None:
    attempted(site, delivered("4711"))
    site.ledger.clock.now += HOUR
    site.receive(site.order())

    answer = site.ask_one()

    assert (answer["case"], answer["exported"]) == ("due", False)
    assert answer["paragraph"].endswith(
        "An earlier version of it has been there since 2026-02-03 12:00 UTC, with the number 4711."
    )


def test_an_order_that_is_exported_stays_so_if_a_later_event_has_nothing_to_send(site: Site) -> None:
    attempted(site, delivered("4711"))
    site.ledger.clock.now += HOUR
    site.receive(site.order())
    site.ledger.settle(site.ledger.claim_one(), Ends(Skip("nothing-changed"), "skipped"))

    assert site.ask_one()["case"] == "done"


def test_a_letter_that_stops_the_order_counts_more_than_what_waits_behind_it(site: Site) -> None:
    outcome_unknown(site)
    site.ledger.clock.now += HOUR
    site.receive(site.order())

    assert site.ask_one()["case"] == "outcome-unknown"


def test_a_route_for_failed_purchases_keeps_no_order_from_being_exported(site: Site) -> None:
    site.config["routes"]["export"]["when"] = {"scope": "/state/currentStatus", "schema": {"enum": ["accepted"]}}
    site.config["callbacks"]["order-status"]["schema"] = {"enum": ["accepted", "declined"]}
    site.config["routes"]["history"] = site.config["routes"]["export"] | {
        "when": {"scope": "/state/currentStatus", "schema": {"const": "declined"}}
    }
    site.receive(site.order(state={"currentStatus": "accepted"}))
    site.ledger.settle(site.ledger.claim_one(), delivered("4711"))

    assert site.ask_one()["exported"]


def test_the_facts_name_states_places_and_moments_and_no_value_of_the_order(site: Site) -> None:
    canary = "canary-value"
    paused_by_person(site)
    site.order(country=canary, customer={"type": "person", "billing": {"email": canary}})

    printed = site.print()
    answer = site.ask_one()

    assert canary not in printed.stdout + printed.stderr + json.dumps(answer)
    assert printed.exit_code == NOTHING_MATCHED
    assert printed.stdout.splitlines() == [
        answer["paragraph"],
        "",
        "Facts",
        "  order order-1 of fjallboden, channel 1, reference 100245, cart 56393",
        "  at Norce: completed, changed 2026-02-03 08:16 UTC",
        "    callback order-status: registered",
        "  channel: configured, and switched on in Norce's configuration",
        "  service: running",
        "  received: 1 notification",
        "    notification 1: order-status, 2026-02-03 12:00 UTC, source callback",
        "  route export (callback order-status, does not want the order): paused-by-person",
        "    condition /state/currentStatus (string) holds",
        "    condition /state/currentStatus (string) holds",
        "    condition /country (string) does not hold: const fails at /country (string); in the schema at /const",
        "    queue: paused by person until a person resumes it: the shop moves; 1 wait, 0 running",
        "    paused by anna@duty at 2026-02-03 12:00 UTC",
        "    delivery 1 for notification 1: waiting, next at 2026-02-03 12:00 UTC",
        "",
        "Commands that help",
        '  norce-adapter queues resume export --merchant fjallboden --channel 1 --why "…"',
    ]


def test_the_commands_fit_the_order_and_can_be_pasted(site: Site) -> None:
    site.receive(site.order("order 1; true", registered=False, **CHECKOUT), wanted=False)

    register, bring = site.ask_one("order 1; true")["commands"]

    assert register == "norce-adapter register 'order 1; true' --merchant fjallboden --channel 1"
    assert bring == 'norce-adapter reconcile --orders --since 2026-02-03T08:12:41.318Z --bring --why "…"'


def test_without_a_ledger_the_command_says_so(site: Site) -> None:
    site.config["store"]["url"] = f"sqlite:///{site.folder}/none.db"

    assert site.print().exit_code == STORE
