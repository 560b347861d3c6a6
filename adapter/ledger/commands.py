"""
What people do to the ledger: retry, discard, pause, resume. Each is written down with who and why.

A command over many deliveries goes in steps, each its own transaction and none of them long, so that it holds nobody up
and may be broken off anywhere: whoever starts it again goes on where it stopped, for what is done no longer matches.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from sqlalchemy import Connection, insert, select, update

from adapter.ledger.claims import queue_columns, queue_state
from adapter.ledger.queries import Author, DeliveryFilter, Id, Text, joined
from adapter.ledger.retry import DeadLetter, lock_lanes, retry_dead_letters
from adapter.ledger.schema import actions, deliveries, lanes, queues
from adapter.ledger.settlement import FOR_EVER, RUNNING, PausedBy, Reason, State
from adapter.ledger.store import Store

MOST_A_STEP = 500
MOST_LOOKED_AT = 2_000  # in a step, however few of them are meant


class NoSuchCommand(Exception):
    """Nobody knows a command of this name."""


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    A part of a retry or a discard: at most `most` deliveries after the one called `after`. `action` is the number
    under which the first step wrote it down.

    `unknown` says what becomes of dead letters whose effect nobody knows: they are left out; looked up first, where the
    handler can; or sent, for the person has looked and nothing is there. Nobody has looked at what became unknown after
    that, so `send` wants to know which they are, or until when.
    """

    matching: DeliveryFilter
    by: Author
    most: Annotated[int, Meta(ge=1, le=MOST_A_STEP)] = MOST_A_STEP
    after: Id = 0
    action: Id | None = None
    unknown: Literal["leave", "look-up", "send"] = "leave"

    def __post_init__(self) -> None:
        if self.unknown == "send" and not self.matching.ids and self.matching.until is None:
            raise ValueError("to send unknown ones again, say which you have looked at: their ids, or until when")


class Stepped(msgspec.Struct, frozen=True, kw_only=True):
    """What a step did. `after` is where the next one begins; None when there is no more."""

    changed: int
    after: int | None
    action: int


class Pause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Queues to pause or resume: all of a route, or of one merchant or channel. At least the route must be given."""

    route: Text
    by: Author
    merchant: Text | None = None
    channel: Text | None = None


class Commands:
    """Raises `StoreUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = store.clock

    async def do(self, name: str, body: bytes) -> Any:
        """
        A command by its name, with what it needs as JSON; its answer as plain values.

        Raises `NoSuchCommand`, and `ValueError` where the body is not what the command needs.
        """
        kinds = {"retry": Step, "discard": Step, "pause": Pause, "resume": Pause}
        if name not in kinds:
            raise NoSuchCommand(f"There is no command {name}; there are: {', '.join(kinds)}.")
        asked = msgspec.json.decode(body, type=kinds[name])
        return msgspec.to_builtins(await getattr(self, name)(asked))

    async def retry(self, step: Step) -> Stepped:
        """Dead letters are owed again, with their whole schedule."""
        return await self._store.write(self._steps, ("retry", step))

    async def discard(self, step: Step) -> Stepped:
        """Dead letters are done with, whatever became of them, and their lanes go on."""
        return await self._store.write(self._steps, ("discard", step))

    async def pause(self, pause: Pause) -> int:
        """Nothing of these queues is tried until a person resumes them; how many there are."""
        return await self._store.write(self._pauses, ("pause", pause))

    async def resume(self, pause: Pause) -> int:
        """They run again at once, whatever paused them; how many there are."""
        return await self._store.write(self._pauses, ("resume", pause))

    # --- in the writer's thread, inside its transaction ---

    def _steps(self, connection: Connection, items: Sequence[tuple[str, Step]]) -> list[Stepped]:
        return [self._step(connection, command, step) for command, step in items]

    def _step(self, connection: Connection, command: str, step: Step) -> Stepped:
        leaves = command == "retry" and step.unknown == "leave"
        reasons = [reason for reason in Reason if reason is not Reason.UNKNOWN or not leaves]
        letters, after = self._letters(connection, step, reasons)
        changed = 0
        if letters and command == "retry":
            sends = step.unknown == "send"
            changed = retry_dead_letters(connection, letters, self._clock(), reasons=reasons, ends_doubt=sends)
        elif letters:
            changed = self._let_go(connection, letters)
        if changed:
            self._store.database.notify(connection)
        asked = step.matching.given() | ({"unknown": step.unknown} if command == "retry" and not leaves else {})
        return Stepped(
            changed=changed,
            after=after,
            action=self._written(connection, command, step.by, asked, changed, step.action),
        )

    def _letters(
        self, connection: Connection, step: Step, reasons: Collection[Reason]
    ) -> tuple[list[DeadLetter], int | None]:
        """The next dead letters that are meant, each with its lane, and after which of all the next step begins."""
        d = deliveries.c
        dead = select(d.id).where(d.state == State.DEAD.value, d.id > step.after)
        if step.matching.ids:
            dead = dead.where(d.id.in_(step.matching.ids))
        looked_at = connection.execute(dead.order_by(d.id).limit(MOST_LOOKED_AT)).scalars().all()
        meant = (d.id.in_(looked_at), d.reason.in_([reason.value for reason in reasons]), *step.matching.conditions())
        found = connection.execute(joined(d.id, d.lane_id).where(*meant).order_by(d.id).limit(step.most))
        letters = [DeadLetter(row.id, row.lane_id) for row in found]
        if len(letters) == step.most:
            return letters, letters[-1].delivery_id
        return letters, looked_at[-1] if len(looked_at) == MOST_LOOKED_AT else None

    def _let_go(self, connection: Connection, letters: Collection[DeadLetter]) -> int:
        """Discards them. A lane that one had stopped goes on, and its doubt is the person's now."""
        d = deliveries.c
        locked = lock_lanes(connection, {letter.lane_id for letter in letters})
        # Not where its handler has not let go of its thread: the lane could not go on.
        held = {lane.current_delivery_id for lane in locked if lane.holder is not None}
        free = [letter.delivery_id for letter in letters if letter.delivery_id not in held]
        dead = d.id.in_(free) & (d.state == State.DEAD.value)
        now = self._clock()
        done = {"state": State.DONE.value, "reason": Reason.DISCARDED.value, "ended_at": now}
        ids = connection.execute(update(deliveries).where(dead).values(done).returning(d.id)).scalars().all()
        # Due even where nothing waits: whoever claims it sees that.
        goes_on = {"current_delivery_id": None, "settled": lanes.c.claim, "next_at": now}
        stopped = lanes.c.id.in_([letter.lane_id for letter in letters]) & lanes.c.current_delivery_id.in_(ids)
        connection.execute(update(lanes).where(stopped).values(goes_on))
        return len(ids)

    def _pauses(self, connection: Connection, items: Sequence[tuple[str, Pause]]) -> list[int]:
        return [self._set(connection, command, pause) for command, pause in items]

    def _set(self, connection: Connection, command: str, pause: Pause) -> int:
        asked = {"route": pause.route, "merchant": pause.merchant, "channel": pause.channel}
        asked = {name: value for name, value in asked.items() if value is not None}
        meant = [queues.c[name] == value for name, value in asked.items()]
        locked = select(queues).where(*meant).order_by(queues.c.id).with_for_update(key_share=True)
        rows = connection.execute(locked).all()
        for row in rows:
            after = RUNNING
            if command == "pause":
                after = replace(queue_state(row), paused_until=FOR_EVER, paused_by=PausedBy.PERSON, reason=pause.by.why)
            connection.execute(update(queues).where(queues.c.id == row.id).values(queue_columns(after)))
        self._written(connection, command, pause.by, asked, len(rows))
        self._store.database.notify(connection)
        return len(rows)

    def _written(
        self,
        connection: Connection,
        command: str,
        by: Author,
        asked: Mapping[str, Any],
        changed: int,
        action: int | None = None,
    ) -> int:
        """Writes down what was done, in the row of the command's first step where that is the same command still."""
        row = {"command": command, "who": by.who, "why": by.why, "matching": msgspec.json.encode(asked).decode()}
        if action is not None:
            same = [actions.c[name] == value for name, value in row.items()]
            more = update(actions).where(actions.c.id == action, *same).values(changed=actions.c.changed + changed)
            if connection.execute(more).rowcount == 1:
                return action
        key = connection.execute(insert(actions).values(row | {"at": self._clock(), "changed": changed}))
        assert key.inserted_primary_key is not None
        return int(key.inserted_primary_key[0])
