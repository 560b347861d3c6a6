"""The cases: every reason for which an order is, or is not, at its destination.

The first case of a table that holds gives the answer. `ORDER_CASES` are about an order without any route,
`ROUTE_CASES` about an order on one route. `says` is for the merchant; `remedies` are for the person who operates the
service. `words` fills in both.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from adapter.why.facts import FAILED_STATUSES, LAST_STATUSES, AtNorce, Facts, OnOrder, RouteFacts


class Standing(Enum):
    """The kinds of cases. An order is exported if one route has exported it and none is open."""

    EXPORTED = "exported"
    OPEN = "open"  # the order is not there yet, or has to be put there by a person
    CLOSED = "closed"  # nothing was sent, and nothing has to be
    UNRELATED = "unrelated"  # the route is for other orders


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Case(Generic[T]):
    """One reason, with its sentence and the commands that help."""

    name: str
    standing: Standing
    holds: Callable[[T], bool]
    _: KW_ONLY
    says: str
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OnRoute:
    """An order on one route."""

    facts: Facts
    route: RouteFacts

    @property
    def is_unsent(self) -> bool:
        return self.route.current is None

    def state_is(self, state: str, reason: str | None = None) -> bool:
        """Return whether the current delivery has this state and, if given, this reason."""
        current = self.route.current
        return current is not None and current["state"] == state and reason in (None, current["reason"])

    def waits_in_queue(self, state: str, paused_by: str | None = None) -> bool:
        """Return whether the current delivery waits in a queue of this state and pause."""
        queue = self.route.queue
        waits = self.state_is("waiting") and queue is not None and queue["state"] == state
        return waits and (paused_by is None or (queue or {})["paused_by"] == paused_by)

    def lane_is(self, name: str) -> bool:
        """Return whether the current delivery waits in a lane with this property."""
        return self.state_is("waiting") and self.route.lane is not None and bool(self.route.lane[name])

    @property
    def waits_for_a_retry(self) -> bool:
        current = self.route.current
        waits = self.state_is("waiting") and current is not None and current["tries"] > 0
        return waits and (current or {}).get("next_at") is not None and (current or {})["next_at"] > self.facts.now

    @property
    def needs_message(self) -> bool:
        """Return whether a message from Norce is still to come, or missing."""
        return not self.route.arrivals or self.may_come

    @property
    def may_come(self) -> bool:
        """Return whether the route may want the order once the purchase goes on."""
        wanted = self.route.wanted_statuses
        for_success = not wanted or any(each not in FAILED_STATUSES for each in wanted)
        return self.route.awaits_status and self.facts.status not in LAST_STATUSES and for_success


OPEN, CLOSED = Standing.OPEN, Standing.CLOSED
_AGAIN = "norce-adapter why {asked}"
_REGISTER = "norce-adapter register {order} {of_channel}"
_RETRY = 'norce-adapter deliveries retry {delivery} --why "…"'
_RESEND = 'norce-adapter deliveries resend {delivery} --why "…"'
_BACKFILL = 'norce-adapter deliveries backfill {route_name} {of_channel} --why "…" --dry-run'
_BRING = 'norce-adapter reconcile --orders --since {created_at} --bring --why "…"'

ORDER_CASES: tuple[Case[Facts], ...] = (
    Case(
        "unreadable",
        OPEN,
        lambda o: o.order_id is None and o.at_norce is AtNorce.UNREADABLE,
        says="Norce cannot be read at the moment ({problem}), and nothing about {asked} has reached us.",
        remedies=(_AGAIN,),
    ),
    Case(
        "unknown",
        OPEN,
        lambda o: o.order_id is None,
        says="Norce has no order with the id, the reference or the cart {asked}, and nothing about it has reached us. "
        "Please check the number.",
        remedies=("norce-adapter orders list",),
    ),
    Case(
        "channel-gone",
        OPEN,
        lambda o: not o.is_channel_configured,
        says="Merchant {merchant} with channel {channel} is not set up in our service any more, so nothing is sent.",
        remedies=("norce-adapter check",),
    ),
    Case(
        "callback-unknown",
        OPEN,
        lambda o: bool(o.notifications),
        says="Norce told us about the order ({received}), but nothing is set up in our service that acts on it, so "
        "nothing was sent.",
        remedies=("norce-adapter check", "norce-adapter notifications list --order {order}"),
    ),
    Case(
        "no-route",
        OPEN,
        lambda _: True,
        says="Nothing is set up in our service that sends orders of merchant {merchant}, channel {channel}.",
        remedies=("norce-adapter check",),
    ),
)

ROUTE_CASES: tuple[Case[OnRoute], ...] = (
    # --- there is a delivery: done ---
    Case(
        "done",
        Standing.EXPORTED,
        lambda o: o.state_is("done") and o.route.delivered is not None,
        says="It was sent by {route}, and has been in the receiving system since {delivered_at}{number}.",
        remedies=('norce-adapter deliveries resend {delivered} --why "…"',),
    ),
    Case(
        "skipped",
        CLOSED,
        lambda o: o.state_is("done", "skipped"),
        says="{route} found nothing to send for it ({code}, {ended_at}).",
        remedies=("norce-adapter deliveries show {delivery}", _RESEND),
    ),
    Case(
        "moved-on",
        CLOSED,
        lambda o: o.state_is("done", "moved_on"),
        says="{route} did not send it: when we read the order once more ({ended_at}), it was no longer one to send.",
        remedies=("norce-adapter explain {notification}",),
    ),
    Case(
        "discarded",
        CLOSED,
        lambda o: o.state_is("done", "discarded"),
        says="{route} does not send it, because one of us decided so ({ended_at}).",
        remedies=("norce-adapter store actions", _RESEND),
    ),
    Case(
        "shadow",
        CLOSED,
        lambda o: o.state_is("done", "shadow"),
        says="{route} is on trial: it would have sent the order ({ended_at}), and has sent nothing.",
        remedies=(_BACKFILL,),
    ),
    Case(
        "superseded",
        CLOSED,
        lambda o: o.state_is("done"),
        says="{route} did not act on it, because a later message about the order took its place.",
        remedies=("norce-adapter deliveries list --order {order}",),
    ),
    # --- there is a delivery: it is not done ---
    Case(
        "orphaned",
        OPEN,
        lambda o: not o.is_unsent and not o.route.is_configured,
        says="It was to be sent by {route}, which is not set up any more for this merchant and channel. Nothing "
        "happens with it unless we set it up again.{earlier}",
        remedies=("norce-adapter queues list", 'norce-adapter deliveries discard {delivery} --state {state} --why "…"'),
    ),
    Case(
        "outcome-unknown",
        OPEN,
        lambda o: o.state_is("dead", "unknown"),
        says="{route} sent it ({attempted_at}) and got no clear answer, so it may be in the receiving system or not. "
        "One of us has to look for it there before it is sent again.{earlier}",
        remedies=(
            'norce-adapter deliveries discard {delivery} --why "it is there"',
            'norce-adapter deliveries retry {delivery} --unknown send --why "it is not there"',
            'norce-adapter deliveries retry {delivery} --unknown look-up --why "…"',
        ),
    ),
    Case(
        "rejected",
        OPEN,
        lambda o: o.state_is("dead", "rejected"),
        says="{route} could not send it: it was refused with {code} ({ended_at}). It is sent once more when the cause "
        "has been corrected.{earlier}",
        remedies=("norce-adapter deliveries show {delivery}", _RETRY),
    ),
    Case(
        "exhausted",
        OPEN,
        lambda o: o.state_is("dead", "exhausted"),
        says="{route} could not send it: {tries} failed between {first_attempt_at} and {ended_at}, the last one with "
        "{code}. It is not tried again by itself.{earlier}",
        remedies=("norce-adapter deliveries show {delivery}", _RETRY),
    ),
    Case(
        "condition-failed",
        OPEN,
        lambda o: o.state_is("dead", "condition"),
        says="{route} did not send it, because our rule that selects orders cannot be applied to this one. We have to "
        "correct the rule.{earlier}",
        remedies=("norce-adapter explain {notification}", _RETRY),
    ),
    Case(
        "broken",
        OPEN,
        lambda o: o.state_is("dead"),
        says="{route} did not send it, because our own program failed on this order ({ended_at}). Nothing was sent. We"
        " have to correct the program.{earlier}",
        remedies=("norce-adapter deliveries show {delivery}", _RETRY),
    ),
    Case(
        "not-served",
        OPEN,
        lambda o: o.state_is("waiting") and not o.facts.is_served,
        says="It waits to be sent by {route}, and our service does not run at the moment.{earlier}",
        remedies=("norce-adapter serve",),
    ),
    Case(
        "sending",
        OPEN,
        lambda o: o.lane_is("is_held"),
        says="{route} is sending it at this moment.{earlier}",
        remedies=(_AGAIN,),
    ),
    Case(
        "held",
        OPEN,
        lambda o: o.state_is("waiting") and o.facts.is_held,
        says="It waits to be sent by {route}: our service holds everything back for maintenance.{earlier}",
        remedies=("norce-adapter serve",),
    ),
    Case(
        "shadow-waits",
        OPEN,
        lambda o: o.state_is("waiting") and o.route.is_shadow,
        says="It waits to be sent by {route}, which is on trial at the moment and sends nothing. It is sent as soon as "
        "the trial ends.{earlier}",
        remedies=("norce-adapter check",),
    ),
    Case(
        "switched-off",
        OPEN,
        lambda o: o.state_is("waiting") and o.facts.is_switched_off,
        says="It waits to be sent by {route}: our adapter is switched off for channel {channel} in Norce's "
        "configuration. It is sent as soon as it is switched on there.{earlier}",
        remedies=("norce-adapter config norce {of_channel}",),
    ),
    Case(
        "paused-by-person",
        OPEN,
        lambda o: o.waits_in_queue("paused", "person"),
        says="It waits to be sent by {route}, which one of us has paused{paused_at}. It is sent as soon as one of us "
        "resumes it.{earlier}",
        remedies=('norce-adapter queues resume {route_name} {of_channel} --why "…"',),
    ),
    Case(
        "paused-credentials",
        OPEN,
        lambda o: o.waits_in_queue("paused", "misconfigured"),
        says="It waits to be sent by {route}: the receiving system refuses our credentials. We try with one order "
        "again at {paused_until}, and send the others as soon as it is taken.{earlier}",
        remedies=(
            "norce-adapter check --online",
            "norce-adapter config show --route {route_name} {of_channel}",
            'norce-adapter queues resume {route_name} {of_channel} --why "…"',
        ),
    ),
    Case(
        "paused-busy",
        OPEN,
        lambda o: o.waits_in_queue("paused", "retry_after"),
        says="It waits to be sent by {route}: the receiving system asked us to wait until {paused_until}.{earlier}",
        remedies=('norce-adapter queues resume {route_name} {of_channel} --why "…"',),
    ),
    Case(
        "paused-failures",
        OPEN,
        lambda o: o.waits_in_queue("paused"),
        says="It waits to be sent by {route}: several orders in a row could not be sent. We try with one order again "
        "at {paused_until}, and send the others as soon as it is taken.{earlier}",
        remedies=('norce-adapter queues resume {route_name} {of_channel} --why "…"',),
    ),
    Case(
        "in-doubt",
        OPEN,
        lambda o: o.lane_is("in_doubt"),
        says="{route} sent it ({attempted_at}) and got no clear answer. At {next_at} we look whether it has arrived, "
        "before anything is sent again.{earlier}",
        remedies=("norce-adapter deliveries show {delivery}",),
    ),
    Case(
        "waiting",
        OPEN,
        lambda o: o.waits_for_a_retry,
        says="{route} could not send it yet: {tries} failed, the last one at {attempted_at} with {code}. The next "
        "attempt is at {next_at}.{earlier}",
        remedies=("norce-adapter deliveries show {delivery}",),
    ),
    Case(
        "due",
        OPEN,
        lambda o: o.state_is("waiting"),
        says="It waits for its turn to be sent by {route} ({ahead}).{earlier}",
        remedies=(_AGAIN,),
    ),
    # --- there is no delivery ---
    Case(
        "gone-at-norce",
        Standing.UNRELATED,
        lambda o: o.facts.at_norce is AtNorce.MISSING,
        says="Norce never told us about it, so {route} has sent nothing.",
    ),
    Case(
        "undecidable",
        OPEN,
        lambda o: o.route.decision == "error",
        says="{route} cannot tell whether to send it: our rule cannot be applied to this order. We have to correct it.",
        remedies=("norce-adapter check",),
    ),
    Case(
        "failed-purchase",
        CLOSED,
        lambda o: o.route.awaits_status and o.facts.status in FAILED_STATUSES,
        says="{route} sends an order only when it is {wanted}, so nothing is sent.",
    ),
    Case(
        "not-wanted",
        Standing.UNRELATED,
        lambda o: o.route.decision == "not_matched" and not o.may_come,
        says="{route} does not send orders like this one: {failing}.",
        remedies=("norce-adapter explain {notification}",),
    ),
    Case(
        "callback-gone",
        OPEN,
        lambda o: o.route.decision == "matched" and not o.route.arrivals and bool(o.facts.under_gone_names),
        says="Norce told us about the order ({gone_at}), but under the name {gone}, which is not in use any more, so "
        "{route} did not send it.",
        remedies=(_REGISTER, _BRING),
    ),
    Case(
        "never-registered",
        OPEN,
        lambda o: o.needs_message and o.route.on_order is OnOrder.MISSING,
        says="The order was created without the request to tell us about it ({callback}), so Norce does not tell us "
        "when it is {wanted}. It is not sent by itself.",
        remedies=(_REGISTER, _BRING),
    ),
    Case(
        "registered-otherwise",
        OPEN,
        lambda o: o.needs_message and o.route.on_order is OnOrder.OUTDATED,
        says="The order has an outdated request to tell us about it ({callback}), so we may not hear from Norce when "
        "it is {wanted}.",
        remedies=(_REGISTER, _BRING),
    ),
    Case(
        "unread",
        OPEN,
        lambda o: o.route.decision is None or (o.needs_message and o.route.on_order is OnOrder.UNREAD),
        says="We cannot tell whether {route} has to send it, because we keep no copy of the order.",
        remedies=(_AGAIN,),
    ),
    Case(
        "refused",
        OPEN,
        lambda o: o.may_come and o.facts.refusal is not None,
        says="The purchase is not finished: our check {check} refused it with {codes} ({refused_at}). {route} sends "
        "the order when it is {wanted}.",
        remedies=("norce-adapter verdicts list --order {order}",),
    ),
    Case(
        "state-not-reached",
        OPEN,
        lambda o: o.may_come,
        says="The purchase is not finished, and {route} sends the order when it is {wanted}.",
        remedies=(_AGAIN,),
    ),
    Case(
        "overlooked",
        OPEN,
        lambda o: bool(o.route.arrivals),
        says="Norce told us about the order ({received}), but {route} was not to send it then. As it is set up today, "
        "{route} would; a person has to start that.",
        remedies=(_BACKFILL,),
    ),
    Case(
        "not-arrived",
        OPEN,
        lambda _: True,
        says="It is ready to be sent by {route}, but Norce's message about it has not reached us. We look for missing "
        "messages regularly, and can do so at once.",
        remedies=("norce-adapter reconcile", _BRING),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The case of an order on a route, or of an order without any route."""

    case: Case[Any]
    route: RouteFacts | None = None


def decide(facts: Facts) -> list[Decision]:
    """Return one decision for each route, the most important first, or one for the order."""
    if not facts.routes:
        return [Decision(case=next(each for each in ORDER_CASES if each.holds(facts)))]
    on_routes = [OnRoute(facts=facts, route=route) for route in facts.routes]
    decisions = [
        Decision(case=next(case for case in ROUTE_CASES if case.holds(each)), route=each.route) for each in on_routes
    ]
    importance = [Standing.OPEN, Standing.EXPORTED, Standing.CLOSED, Standing.UNRELATED]
    return sorted(decisions, key=lambda each: importance.index(each.case.standing))


def is_exported(decisions: list[Decision]) -> bool:
    """Return whether the order is at its destination, on every route that is to send it."""
    standings = {each.case.standing for each in decisions}
    return Standing.EXPORTED in standings and Standing.OPEN not in standings
