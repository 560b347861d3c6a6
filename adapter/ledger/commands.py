"""Commands of people that change the ledger: retry, resend, discard, pause and resume.

Each is stored with the person and the reason. A command over many deliveries runs in steps. Each step is a short
transaction, so that it does not delay other writers. An interrupted command can be started again: deliveries that
are changed already no longer match. A resend is resumed by its action instead: what it has sent again still matches.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from sqlalchemy import ColumnElement, Connection, and_, insert, select, update

from adapter.identifiers import Channel
from adapter.ledger.claims import queue_columns, queue_state
from adapter.ledger.dead_letters import after_doubt, lock_lanes, retry_dead_letters
from adapter.ledger.queries import ORPHANED, Author, DeliveryFilter, Id, Text, check_one_order, joined
from adapter.ledger.resends import LeftOut, ResendFilter, add_resends
from adapter.ledger.schema import actions, deliveries, lanes, queues
from adapter.ledger.selection import LaneDelivery, next_deliveries
from adapter.ledger.settlement import FOR_EVER, RUNNING, PausedBy, Reason, State
from adapter.ledger.store import Store

MAX_PER_STEP = 500


class NoSuchCommand(Exception):
    """There is no command of this name."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__("no command of this name")
        self.names = list(names)


class QueueOrphaned(ValueError):
    """A delivery is in a queue whose route, merchant or channel is no longer configured."""

    def __init__(self, delivery_id: int, route: str, channel: Channel) -> None:
        super().__init__(
            f"delivery {delivery_id}: its queue, {route} of {channel.merchant}/{channel.name}, is {ORPHANED}. "
            "Discard it, or configure the route, merchant and channel again"
        )


class QueueInShadow(ValueError):
    """A delivery is on a route in shadow mode, which sends nothing."""

    def __init__(self, delivery_id: int, route: str) -> None:
        super().__init__(
            f"delivery {delivery_id}: its route {route} is in shadow mode, so it would wait; remove mode: shadow first"
        )


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step of a retry, resend or discard, over the deliveries that match.

    `unknown` decides about dead letters whose effect is unknown: `leave` them out; `look-up` the effect first, if the
    handler can; or `send` them, because a person has looked and found no effect. A delivery that became unknown after
    that look must not be sent, so `send` needs ids or `ended_before`.
    """

    matching: DeliveryFilter
    by: Author
    most: Annotated[int, Meta(ge=1, le=MAX_PER_STEP)] = MAX_PER_STEP
    after: Id = 0  # the delivery after which this step begins
    action: Id | None = None  # the row of the first step in the table of actions
    unknown: Literal["leave", "look-up", "send"] = "leave"

    def __post_init__(self) -> None:
        if self.unknown == "send" and not self.matching.ids and self.matching.ended_before is None:
            raise ValueError(
                "`send` needs the ids of the deliveries that you have looked up, or `ended_before` (--until)"
            )
        if self.matching.state not in (None, State.DEAD.value, State.WAITING.value):
            raise ValueError("`state` must be `dead` or `waiting`")


class StepResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result of a step."""

    changed: int
    after: int | None  # where the next step begins; None after the last one
    action: int
    left_out: Mapping[LeftOut, Sequence[int]] = {}  # of a resend: the ids of deliveries, by the cause


class QueueChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pause or resume of all queues of a route, or of those of one merchant or channel."""

    route: Text
    by: Author
    merchant: Text | None = None
    channel: Text | None = None


class ChangeAtNorce(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of many orders or documents at Norce, to be recorded."""

    command: Literal["register", "deregister", "write-documents", "remove-documents"]
    by: Author
    given: Mapping[Text, Text]
    changed: Annotated[int, Meta(ge=0)] = 0
    action: Id | None = None  # the record of its beginning


class Commands:
    """The commands on an open ledger. All methods raise `StoreUnavailable`.

    Args:
        configured: The ids of the configured queues; None if every queue is configured. Any other queue is orphaned:
            nothing is retried or resent in it.
        shadows: The ids of the queues whose routes are in shadow mode. Nothing is retried or resent in them either.
        refetching: The routes that read the order again.
    """

    def __init__(
        self,
        store: Store,
        configured: Collection[int] | None = None,
        *,
        shadows: Collection[int] = (),
        refetching: Collection[str] = (),
    ) -> None:
        self._store = store
        self._configured = configured
        self._shadows = shadows
        self._refetching = refetching
        self._clock = store.clock

    async def run(self, name: str, body: bytes) -> Any:
        """Run a command by its name and return its result as plain values.

        Args:
            name: The name of the command.
            body: Its arguments, as JSON.

        Raises:
            NoSuchCommand: There is no command of this name.
            ValueError: The body does not fit the command.
        """
        types: dict[str, type[msgspec.Struct]] = {
            **dict.fromkeys(("retry", "resend", "discard"), Step),
            **dict.fromkeys(("pause", "resume"), QueueChange),
            "record": ChangeAtNorce,
        }
        if name not in types:
            raise NoSuchCommand(types)
        arguments = msgspec.json.decode(body, type=types[name])
        return msgspec.to_builtins(await getattr(self, name)(arguments))

    async def retry(self, step: Step) -> StepResult:
        """Make dead letters wait again, with their whole schedule.

        Deliveries of orphaned queues and of routes in shadow mode are left out.

        Raises:
            ValueError: The step asks for waiting deliveries.
            QueueOrphaned: The step names the id of a delivery in an orphaned queue.
            QueueInShadow: The step names the id of a delivery on a route in shadow mode.
        """
        if step.matching.state == State.WAITING.value:
            raise ValueError("only dead letters can be retried")
        return await self._store.run(self._step, "retry", step)

    async def resend(self, step: Step) -> StepResult:
        """Deliver again what has ended, each as a new delivery.

        A dead letter is ended as discarded. The first step only records the command: it sends nothing, and returns the
        action that the next steps need. They use the conditions that are recorded there, and each can be repeated.

        Deliveries of orphaned queues and of routes in shadow mode are left out.

        Raises:
            ValueError: The conditions do not fit a resend, or there is no such action.
            QueueOrphaned: The step names the id of a delivery in an orphaned queue.
            QueueInShadow: The step names the id of a delivery on a route in shadow mode.
        """
        ResendFilter.of(step.matching, step.unknown, self._refetching)
        return await self._store.run(self._resend, step)

    async def discard(self, step: Step) -> StepResult:
        """Mark dead letters or waiting deliveries as done, and let their lanes go on.

        A delivery that is being attempted stays: its handler cannot be undone.
        """
        return await self._store.run(self._step, "discard", step)

    async def record(self, change: ChangeAtNorce) -> StepResult:
        """Record a change that a command makes at Norce."""

        def write(connection: Connection) -> int:
            return record_action(
                connection, change.command, change.by, change.given, change.changed, self._clock(), change.action
            )

        return StepResult(changed=change.changed, after=None, action=await self._store.run(write))

    async def pause(self, change: QueueChange) -> int:
        """Pause queues until a person resumes them. Returns their number."""
        return await self._store.run(self._change_queues, "pause", change)

    async def resume(self, change: QueueChange) -> int:
        """Let paused queues run again at once, whatever paused them. Returns their number."""
        return await self._store.run(self._change_queues, "resume", change)

    def can_be_sent(self) -> list[ColumnElement[bool]]:
        """Return conditions for `joined`: the queue is configured and not in shadow mode."""
        conditions: list[ColumnElement[bool]] = []
        if self._shadows:
            conditions.append(queues.c.id.not_in(self._shadows))
        if self._configured is not None:
            conditions.append(queues.c.id.in_(self._configured))
        return conditions

    # --- in the writer's thread, inside its transaction ---

    def refuse_unsendable(self, connection: Connection, ids: Collection[int]) -> None:
        """Raise `QueueOrphaned` or `QueueInShadow` if one of these deliveries would only wait."""
        conditions = self.can_be_sent()
        if not conditions or not ids:
            return
        columns = (deliveries.c.id, queues.c.id.label("queue_id"), queues.c.route, queues.c.merchant, queues.c.channel)
        unsendable = joined(*columns).where(deliveries.c.id.in_(ids), ~and_(*conditions))
        row = connection.execute(unsendable.order_by(deliveries.c.id).limit(1)).first()
        if row is not None and row.queue_id in self._shadows:
            raise QueueInShadow(row.id, row.route)
        if row is not None:
            raise QueueOrphaned(row.id, row.route, Channel(row.merchant, row.channel))

    def _step(self, connection: Connection, command: str, step: Step) -> StepResult:
        more = []
        if command == "retry":
            self.refuse_unsendable(connection, step.matching.ids)
            more = self.can_be_sent()
        if step.after == 0:
            check_one_order(connection, step.matching)
        leaves_unknown = command == "retry" and step.unknown == "leave"
        reasons = [reason for reason in Reason if reason is not Reason.UNKNOWN or not leaves_unknown]
        found, after = self._matching(connection, step, reasons, more)
        changed = 0
        if found and command == "retry":
            sends = step.unknown == "send"
            changed = retry_dead_letters(connection, found, self._clock(), reasons=reasons, ends_doubt=sends)
        elif found:
            changed = self._discard(connection, found, step.matching.state or State.DEAD.value)
        if changed:
            self._store.database.notify(connection)
        given = step.matching.given()
        if command == "retry" and not leaves_unknown:
            given["unknown"] = step.unknown
        action = record_action(connection, command, step.by, given, changed, self._clock(), step.action)
        return StepResult(changed=changed, after=after, action=action)

    def _matching(
        self, connection: Connection, step: Step, reasons: Collection[Reason], more: Iterable[ColumnElement[bool]]
    ) -> tuple[list[LaneDelivery], int | None]:
        """Return the next deliveries that match, and where the next step begins.

        `more` holds further conditions.
        """
        d, ids, is_waiting = deliveries.c, step.matching.ids, step.matching.state == State.WAITING.value
        chosen = [d.state == (State.WAITING if is_waiting else State.DEAD).value]
        matching = [*step.matching.conditions(), *more]
        if ids:
            chosen.append(d.id.in_(ids))
        if not is_waiting:
            matching.append(d.reason.in_([reason.value for reason in reasons]))
        in_ranges = is_waiting and not ids
        return next_deliveries(connection, chosen, matching, after=step.after, most=step.most, in_ranges=in_ranges)

    def _resend(self, connection: Connection, step: Step) -> StepResult:
        if step.action is None:
            check_one_order(connection, step.matching)
            self.refuse_unsendable(connection, step.matching.ids)
            given = step.matching.given() | ({} if step.unknown == "leave" else {"unknown": step.unknown})
            action = record_action(connection, "resend", step.by, given, 0, self._clock())
            return StepResult(changed=0, after=step.after, action=action)
        row = connection.execute(select(actions).where(actions.c.id == step.action)).one_or_none()
        if row is None or row.command != "resend":
            raise ValueError(f"no resend has the number {step.action}; `norce-adapter store actions` lists them")
        given = msgspec.json.decode(row.matching)
        unknown = given.pop("unknown", "leave")
        matching = msgspec.convert(given, DeliveryFilter)
        made = {"command": row.id, "ended_until": row.at, "further": self.can_be_sent()}
        selection = ResendFilter.of(matching, unknown, self._refetching, **made)
        found, after = selection.find(connection, after=step.after, most=step.most)
        sent, left_out = add_resends(connection, selection, found, self._clock()) if found else ([], {})
        if sent:
            self._discard(connection, sent, State.DEAD.value)
            changed = actions.c.changed + len(sent)
            connection.execute(update(actions).where(actions.c.id == row.id).values(changed=changed))
            self._store.database.notify(connection)
        return StepResult(changed=len(sent), after=after, action=row.id, left_out=left_out)

    def _discard(self, connection: Connection, found: Collection[LaneDelivery], state: str) -> int:
        d = deliveries.c
        locked = lock_lanes(connection, {each.lane_id for each in found})
        # A delivery that is being attempted stays, and so does a letter whose blocked handler still holds the lane.
        held = {lane.current_delivery_id for lane in locked if lane.holder is not None}
        free = [each.delivery_id for each in found if each.delivery_id not in held]
        now = self._clock()
        done = {"state": State.DONE.value, "reason": Reason.DISCARDED.value, "ended_at": now}
        discarded = update(deliveries).where(d.id.in_(free), d.state == state).values(done).returning(d.id)
        ids = connection.execute(discarded).scalars().all()
        # The person's decision ends the doubt, but a request in doubt has its time before the next delivery. The lane
        # is due even if nothing waits in it: a claim notices that.
        lane = lanes.c
        continues = {"current_delivery_id": None, "settled": lane.claim, "next_at": after_doubt(now)}
        stopped = lane.id.in_([each.lane_id for each in found]) & lane.current_delivery_id.in_(ids)
        connection.execute(update(lanes).where(stopped).values(continues))
        return len(ids)

    def _change_queues(self, connection: Connection, command: str, change: QueueChange) -> int:
        given = {"route": change.route, "merchant": change.merchant, "channel": change.channel}
        given = {name: value for name, value in given.items() if value is not None}
        conditions = [queues.c[name] == value for name, value in given.items()]
        locked = select(queues).where(*conditions).order_by(queues.c.id).with_for_update(key_share=True)
        rows = connection.execute(locked).all()
        for row in rows:
            after = RUNNING
            if command == "pause":
                after = replace(
                    queue_state(row), paused_until=FOR_EVER, paused_by=PausedBy.PERSON, reason=change.by.why
                )
            connection.execute(update(queues).where(queues.c.id == row.id).values(queue_columns(after)))
        record_action(connection, command, change.by, given, len(rows), self._clock())
        self._store.database.notify(connection)
        return len(rows)


def record_action(
    connection: Connection,
    command: str,
    by: Author,
    given: Mapping[str, Any],
    changed: int,
    now: int,
    action: int | None = None,
) -> int:
    """Store a command, or add to the row of its first step. Returns the id of the row."""
    row = {"command": command, "who": by.who, "why": by.why, "matching": msgspec.json.encode(given).decode()}
    if action is not None:
        same = [actions.c[name] == value for name, value in row.items()]
        add = update(actions).where(actions.c.id == action, *same).values(changed=actions.c.changed + changed)
        if connection.execute(add).rowcount == 1:
            return action
    key = connection.execute(insert(actions).values(row | {"at": now, "changed": changed}))
    assert key.inserted_primary_key is not None
    return int(key.inserted_primary_key[0])
