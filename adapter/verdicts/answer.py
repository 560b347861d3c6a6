"""The verdicts of the routes of a callback, and the answer that they make together.

Pure: values in, values out. A handler may return or raise anything; whatever is no verdict becomes the route's
`no_answer`.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from adapter.orders import Order
from adapter.plugin import Patch, Problem, Refuse
from adapter.routing.routes import Callback, Route
from adapter.routing.runner import DeadlinePassed, LoopAbandoned, leaves
from adapter.verdicts.patches import encode, merge


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The decision of one route, or its `no_answer`. Moments are monotonic."""

    route: Route
    decided: str  # approve or reject; for a hook accept, patch or refuse
    started_at: float
    ended_at: float
    problems: Sequence[Problem] = ()
    patches: Sequence[Patch] = ()
    refusal: Refuse | None = None
    missing: str | None = None  # why there is no decision; the other fields are then those of the `no_answer`
    error: BaseException | None = None

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of its problems or refusal, or the pointers that it patches."""
        if self.refusal is not None:
            return (self.refusal.code,)
        if self.decided == "patch":
            return tuple(patch.path for patch in self.patches)
        return tuple(problem.code for problem in self.problems)

    @property
    def stops(self) -> bool:
        """True if it refuses the order or the change."""
        return self.decided in ("reject", "refuse")

    @property
    def label(self) -> str:
        """The decision as logs and metrics name it."""
        return self.decided if self.missing is None else "no_answer"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The verdicts, in the order of the configuration, and what they amount to.

    The answer to a hook is the first refusal, or else the patches of all routes: `document` is their JSON Patch.
    """

    verdicts: Sequence[Verdict]
    refusal: Refuse | None = None
    patches: Sequence[Patch] = ()
    changed_by: Sequence[str] = ()  # the routes whose patches change the order
    document: bytes = b"[]"

    @property
    def problems(self) -> list[Problem]:
        return [problem for verdict in self.verdicts for problem in verdict.problems]

    @property
    def stops(self) -> bool:
        return self.refusal is not None or bool(self.problems)


def verdict_of(route: Route, result: Callable[[], Any], started_at: float, ended_at: float | None = None) -> Verdict:
    """Return the verdict of a handler.

    Args:
        result: Returns what the handler returned, or raises what it raised.
    """
    value: Any = None
    error: BaseException | None = None
    reason = "failed"
    try:
        value = result()
    except LoopAbandoned as abandoned:
        is_to_blame = abandoned.blocked_by is not None and abandoned.blocked_by.name == route.name
        error, reason = abandoned, "blocks" if is_to_blame else "held-up"
    except DeadlinePassed as passed:
        error, reason = passed, "late"
    except (Exception, asyncio.CancelledError) as raised:  # noqa: BLE001 - a plugin may raise anything
        error = raised
    took: dict[str, Any] = {"started_at": started_at, "ended_at": time.monotonic() if ended_at is None else ended_at}
    if route.callback.kind == "hook":
        if isinstance(value, list) and all(isinstance(each, Patch) for each in value):
            return Verdict(route=route, decided="patch" if value else "accept", patches=value, **took)
        for each in () if error is None else leaves(error):
            if isinstance(each, Refuse) and _is_text(each.message) and (each.inner is None or _is_text(each.inner)):
                # Otherwise the traceback keeps the order until the garbage collector's rare run.
                for kept in (error or each, each):
                    kept.with_traceback(None)
                return Verdict(route=route, decided="refuse", refusal=each, **took)
    elif isinstance(value, list) and all(isinstance(each, Problem) and _is_text(each.message) for each in value):
        return Verdict(route=route, decided="reject" if value else "approve", problems=value, **took)
    return no_answer(route, reason, error=error or TypeError("the handler returned something else"), **took)


def no_answer(
    route: Route, reason: str, *, started_at: float, ended_at: float | None = None, error: BaseException | None = None
) -> Verdict:
    """Return the verdict that stands in for a route without a decision."""
    approves, is_hook = route.no_answer == "approve", route.callback.kind == "hook"
    words = ("not-answered", "This could not be checked in time; please try again.")
    return Verdict(
        route=route,
        decided=("accept" if approves else "refuse") if is_hook else ("approve" if approves else "reject"),
        started_at=started_at,
        ended_at=time.monotonic() if ended_at is None else ended_at,
        problems=() if approves or is_hook else (Problem(*words),),
        refusal=Refuse(*words) if is_hook and not approves else None,
        missing=reason,
        error=error,
    )


def combine(callback: Callback, order: Order | None, verdicts: Sequence[Verdict]) -> Answer:
    """Return the answer that these verdicts make.

    A route whose patches cannot be used gets its `no_answer`.
    """
    patches: list[Patch] = []
    changed_by: list[str] = []
    if order is not None and any(verdict.patches for verdict in verdicts):
        patches, errors, added = merge(order.data, [verdict.patches for verdict in verdicts], callback.target)
        changed_by = [verdict.route.name for verdict, has_added in zip(verdicts, added, strict=True) if has_added]
        verdicts = [
            verdict
            if invalid is None
            else no_answer(
                verdict.route, invalid.reason, error=invalid, started_at=verdict.started_at, ended_at=verdict.ended_at
            )
            for verdict, invalid in zip(verdicts, errors, strict=True)
        ]
        if not patches:  # the order is as the patches want it
            verdicts = [
                msgspec.structs.replace(verdict, decided="accept") if verdict.decided == "patch" else verdict
                for verdict in verdicts
            ]
    refusal = next((verdict.refusal for verdict in verdicts if verdict.refusal is not None), None)
    document = encode(patches) if patches else b"[]"
    return Answer(
        verdicts=verdicts,
        refusal=refusal,
        patches=patches,
        changed_by=() if refusal is not None else changed_by,
        document=document,
    )


def _is_text(value: object) -> bool:
    """Return True if JSON can hold the text; otherwise it would spoil the whole answer."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
