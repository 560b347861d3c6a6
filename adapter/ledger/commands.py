"""
What people do to the ledger: replay, discard, pause, resume. Each is written down with who and why.

A command over many deliveries goes in steps, each its own transaction, so that it holds nobody up and may be broken
off anywhere: whoever starts it again goes on where it stopped, for what is done no longer matches.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, insert, select, update

from adapter.deliveries import Reason, State
from adapter.ledger.claims import pausing_of, queue_columns
from adapter.ledger.matching import By, Matching, joined
from adapter.ledger.rearm import locked_lanes, rearm
from adapter.ledger.schema import actions, deliveries, lanes, queues
from adapter.ledger.store import Store
from adapter.pauses import FOR_EVER, RUNNING, PausedBy

MOST_A_STEP = 500


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    A part of a replay or a discard: at most `most` deliveries after the one called `after`. `action` is the number
    under which the first step wrote it down.

    `unknown` says what becomes of dead letters whose effect nobody knows: they are left out; looked up first, where the
    handler can; or sent, for the person has looked and nothing is there.
    """

    matching: Matching
    by: By
    most: int = MOST_A_STEP
    after: int = 0
    action: int | None = None
    unknown: Literal["leave", "look-up", "send"] = "leave"


class Stepped(msgspec.Struct, frozen=True, kw_only=True):
    """What a step did. `after` is where the next one begins; None when there is no more."""

    changed: int
    after: int | None
    action: int


class Pause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Queues to pause or resume: all of a route, or of one merchant or channel. At least the route must be given."""

    route: str
    by: By
    merchant: str | None = None
    channel: str | None = None


class Commands:
    """Raises `StoreUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = store.clock

    async def do(self, name: str, body: bytes) -> Any:
        """
        A command by its name, with what it needs as JSON; its answer as plain values.

        Raises `KeyError` where there is no such command, and `msgspec.ValidationError`.
        """
        kind, method = {
            "replay": (Step, self.replay),
            "discard": (Step, self.discard),
            "pause": (Pause, self.pause),
            "resume": (Pause, self.resume),
        }[name]
        asked = msgspec.json.decode(body, type=kind)
        return msgspec.to_builtins(await method(asked))  # type: ignore[operator]

    async def replay(self, step: Step) -> Stepped:
        """Dead letters are owed again, with their whole schedule."""
        return await self._store.write(self._replay, step)

    async def discard(self, step: Step) -> Stepped:
        """Dead letters are done with, whatever became of them, and their lanes go on."""
        return await self._store.write(self._discard, step)

    async def pause(self, pause: Pause) -> int:
        """Nothing of these queues is tried until a person resumes them; how many there are."""
        return await self._store.write(self._pause, pause)

    async def resume(self, pause: Pause) -> int:
        """They run again at once, whatever paused them; how many there are."""
        return await self._store.write(self._resume, pause)

    # --- in the writer's thread, inside its transaction ---

    def _replay(self, connection: Connection, steps: Sequence[Step]) -> list[Stepped]:
        answers = []
        for step in steps:
            conditions = [] if step.unknown != "leave" else [deliveries.c.reason != Reason.UNKNOWN.value]
            letters = self._letters(connection, step, conditions)
            pairs = [(letter.id, letter.lane_id) for letter in letters]
            changed = rearm(connection, pairs, self._clock(), nothing_happened=step.unknown == "send")
            if changed:
                self._store.database.tell(connection.connection.cursor())
            answers.append(self._stepped(connection, "replay", step, letters, changed))
        return answers

    def _discard(self, connection: Connection, steps: Sequence[Step]) -> list[Stepped]:
        answers = []
        d = deliveries.c
        for step in steps:
            letters = self._letters(connection, step, [])
            now, changed = self._clock(), 0
            lane = {row.id: row for row in locked_lanes(connection, {letter.lane_id for letter in letters})}
            for letter in letters:
                if lane[letter.lane_id].holder is not None and lane[letter.lane_id].current_delivery_id == letter.id:
                    continue  # its handler has not let go of its thread, and the lane could not go on
                done = {"state": State.DONE.value, "reason": Reason.DISCARDED.value, "ended_at": now}
                dead = (d.id == letter.id) & (d.state == State.DEAD.value)
                if connection.execute(update(deliveries).where(dead).values(done)).rowcount == 1:
                    changed += 1
                    self._let_go(connection, lane[letter.lane_id], letter.id, now)
            if changed:
                self._store.database.tell(connection.connection.cursor())
            answers.append(self._stepped(connection, "discard", step, letters, changed))
        return answers

    def _let_go(self, connection: Connection, lane: Any, delivery_id: int, now: int) -> None:
        """A lane that the letter had stopped goes on, and its doubt is the person's now."""
        if lane.current_delivery_id != delivery_id:
            return
        waiting = (deliveries.c.lane_id == lane.id) & (deliveries.c.state == State.WAITING.value)
        more = connection.execute(select(deliveries.c.id).where(waiting).limit(1)).first()
        after = {"current_delivery_id": None, "settled": lane.claim, "next_at": None if more is None else now}
        connection.execute(update(lanes).where(lanes.c.id == lane.id).values(after))

    def _letters(self, connection: Connection, step: Step, conditions: Sequence[Any]) -> Sequence[Any]:
        d = deliveries.c
        dead = (d.state == State.DEAD.value, d.id > step.after, *conditions, *step.matching.conditions())
        return connection.execute(joined(d.id, d.lane_id).where(*dead).order_by(d.id).limit(step.most)).all()

    def _stepped(
        self, connection: Connection, command: str, step: Step, letters: Sequence[Any], changed: int
    ) -> Stepped:
        action = step.action
        if action is None:
            action = self._written(connection, command, step.by, step.matching.said(), changed)
        elif changed:
            of = actions.c.id == action
            connection.execute(update(actions).where(of).values(changed=actions.c.changed + changed))
        return Stepped(changed=changed, action=action, after=letters[-1].id if len(letters) == step.most else None)

    def _pause(self, connection: Connection, pauses: Sequence[Pause]) -> list[int]:
        return [self._set(connection, "pause", pause) for pause in pauses]

    def _resume(self, connection: Connection, pauses: Sequence[Pause]) -> list[int]:
        return [self._set(connection, "resume", pause) for pause in pauses]

    def _set(self, connection: Connection, command: str, pause: Pause) -> int:
        given = {"route": pause.route, "merchant": pause.merchant, "channel": pause.channel}
        given = {name: value for name, value in given.items() if value is not None}
        meant = [queues.c[name] == value for name, value in given.items()]
        rows = connection.execute(select(queues).where(*meant).order_by(queues.c.id).with_for_update(key_share=True))
        changed = 0
        for row in rows.all():
            changed += 1
            after = RUNNING
            if command == "pause":
                of = {"paused_until": FOR_EVER, "paused_by": PausedBy.PERSON, "reason": pause.by.why}
                after = replace(pausing_of(row), **of)  # type: ignore[arg-type]
            connection.execute(update(queues).where(queues.c.id == row.id).values(queue_columns(after)))
        self._written(connection, command, pause.by, msgspec.json.encode(given).decode(), changed)
        self._store.database.tell(connection.connection.cursor())
        return changed

    def _written(self, connection: Connection, command: str, by: By, matching: str, changed: int) -> int:
        row = {"at": self._clock(), "command": command, "who": by.who, "why": by.why, "matching": matching}
        key = connection.execute(insert(actions).values(row | {"changed": changed})).inserted_primary_key
        assert key is not None
        return int(key[0])
