"""The conformance suites: the behaviour of every good handler, whatever the network does.

A suite is a class. Name the handler, its settings and a fake system. Its checks are methods `test_…`, which pytest and
other runners find:

    class TestErp(HandlerConformance[ErpExport]):
        settings = {"url": "https://erp.example", "token": "secret"}
        system = FakeErp

A check that cannot pass with your system is waived with a reason: `waivers = {"html-with-200": "the ERP answers without
a body"}`. It is then skipped; if it passes all the same, it fails, so that no waiver outlives its reason.

A package may name a suite in the entry-point group `norce_adapter.conformance`, under the name of its handler.
`norce-adapter handlers list --conformance` then shows the result.
"""

import contextlib
import io
import json
import unittest
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, get_args

import msgspec

from adapter.config.convert import is_struct, unwrap
from adapter.config.problems import under
from adapter.orders import Order
from adapter.outgoing import is_write
from adapter.plugin import (
    Done,
    HookHandler,
    NotificationHandler,
    Outcome,
    Settings,
    Skip,
    ValidationHandler,
    can_look_up,
)
from adapter.routing.routes import Handler
from adapter.sandbox.norce.orders import money
from adapter.testing import builders
from adapter.testing.faults import NORCE_HOST, RETRY_AFTER, FakeSystem, NetworkFault
from adapter.testing.play import RUNNING, Played, PlayedDelivery, PlayedVerdict, Stage, personal_texts
from adapter.verdicts.patches import PatchInvalid

H = TypeVar("H", bound=Handler)
N = TypeVar("N", bound=NotificationHandler[Any])
V = TypeVar("V", bound=ValidationHandler[Any])
K = TypeVar("K", bound=HookHandler[Any])
Plan = Mapping[int, NetworkFault]  # faults by the number of their request
NO_FAULT: Plan = {}
LONGEST_EFFECT = 200  # characters that tell an effect from others


class CheckFailed(AssertionError):
    """A handler does not conform. The message says what it did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The result of one check: it passed if there is no `failure`, or a `waiver`."""

    name: str
    failure: str | None
    waiver: str | None  # its reason


def _method(name: str) -> str:
    return f"test_{name.replace('-', '_')}"


def _test_of(check: Callable[[Any], None], name: str) -> Callable[[Any], None]:
    """Return the test of a check, which applies its waiver."""

    def test(self: Any) -> None:
        reason = self.waivers.get(name)
        try:
            check(self)
        except CheckFailed as failure:
            if reason is None:
                raise
            raise unittest.SkipTest(f"waived: {reason}") from failure
        if reason is not None:
            raise CheckFailed(f"{name} is waived, but passes; remove the waiver")

    test.__doc__ = check.__doc__
    return test


class _Suite(ABC, Generic[H]):
    """The checks of every kind of handler.

    Attributes:
        settings: As in `config.yaml`. Here, a secret is plain text.
        system: Creates a fake system for each play: a class or a function. See `adapter.testing.faults`.
        order: An order with which the handler does all its work.
        waivers: The reasons of the waived checks, by their names.
    """

    handler: ClassVar[Any]
    settings: ClassVar[Mapping[str, Any] | Settings] = {}
    system: ClassVar[Callable[[], FakeSystem] | None] = None
    order: ClassVar[Order] = builders.order({"/customer/billing/nationalIdentificationNumber": "19811218-9876"})
    waivers: ClassVar[Mapping[str, str]] = {}
    checks: ClassVar[dict[str, Callable[[Any], None]]] = {}  # by name
    _played: ClassVar[dict[Any, Any]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        given = [each for base in getattr(cls, "__orig_bases__", ()) for each in get_args(base)]
        cls.handler = next((each for each in given if isinstance(each, type)), getattr(cls, "handler", None))
        names = dict.fromkeys(
            name for each in reversed(cls.__mro__) for name in vars(each) if name.startswith("check_")
        )
        cls.checks = {name.removeprefix("check_").replace("_", "-"): getattr(cls, name) for name in names}
        for name, check in cls.checks.items():
            setattr(cls, _method(name), _test_of(check, name))
        cls._played = {}
        if unknown := cls.waivers.keys() - cls.checks.keys():
            raise TypeError(f"there is no check {', '.join(sorted(unknown))}; there are {', '.join(cls.checks)}")
        if not all(reason.strip() for reason in cls.waivers.values()):
            raise TypeError("a waiver needs a reason")

    @classmethod
    def results(cls) -> list[CheckResult]:
        """Run every check."""
        results = []
        for name in cls.checks:
            failure = waiver = None
            try:
                getattr(cls(), _method(name))()
            except unittest.SkipTest as skipped:
                failure, waiver = str(skipped.__cause__), cls.waivers[name]
            except Exception as error:  # noqa: BLE001 - a fake system may raise anything
                failure = f"{type(error).__name__}: {error}"
            results.append(CheckResult(name=name, failure=failure, waiver=waiver))
        return results

    # --- plays ---

    @abstractmethod
    def _play_on(self, stage: Stage, orders: Sequence[Order]) -> list[Any]: ...

    def _play_all(self, orders: Sequence[Order], plan: Plan = NO_FAULT) -> list[Any]:
        """Play with a new system; keep what is printed."""
        make, printed = type(self).system, io.StringIO()
        stage = Stage(
            self.handler, orders, None if make is None else make(), settings=self.settings, faults=plan,
            timeout=builders.TIMEOUT if issubclass(self.handler, NotificationHandler) else builders.DEADLINE,
        )  # fmt: skip
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            played = self._play_on(stage, orders)
        for each in played:
            each.log.append({"event": "printed", "text": printed.getvalue()})
        return played

    def _play(self, plan: Plan = NO_FAULT) -> Any:
        key = tuple(plan.items())
        if key not in self._played:
            (self._played[key],) = self._play_all([self.order], plan)
        return self._played[key]

    def _plans(self, fault: NetworkFault) -> Iterator[Plan]:
        """Yield a plan for each request of the handler, in which it meets the fault."""
        for number, _ in enumerate(self._play().requests):
            yield {number: fault}

    def _plays(self, *faults: NetworkFault) -> Iterator[tuple[Any, str]]:
        """Yield every play with these faults, and where they happen."""
        for fault in faults:
            for plan in self._plans(fault):
                played = self._play(plan)
                met = [f"{_named(each)}: {each.fault.says}" for each in played.requests if each.fault is not None]
                yield played, f" ({'; then '.join(met)})"

    def _every_play(self) -> Iterator[tuple[Any, str]]:
        yield self._play(), ""
        yield from self._plays(*NetworkFault)

    # --- checks ---

    def _check_fault(self, fault: NetworkFault) -> None:
        """Check every play with a fault for bugs, and for requests that a 429 has put off."""
        for played, where in self._plays(fault):
            _check_no_bug(played, where)
            asked_at = {each.request.url.host: each.at for each in played.requests if each.status == 429}
            for each in played.requests:
                waited = each.at - asked_at.get(each.request.url.host, each.at)
                if 0 < waited < RETRY_AFTER.total_seconds():
                    raise CheckFailed(f"a request is sent {waited:.0f} s after a 429 with Retry-After: 120{where}")

    def check_deadline(self) -> None:
        """Every call ends at its deadline, and none blocks its thread."""
        for played, where in self._every_play():
            for sentence in played.blocking:
                raise CheckFailed(sentence + where)
            waits_for_norce = any(
                each.fault is NetworkFault.SLOW and each.request.url.host == NORCE_HOST for each in played.requests
            )
            if _goes_on(played) and not waits_for_norce:
                raise CheckFailed(f"the handler goes on after its deadline{where}")

    def check_privacy(self) -> None:
        """No message, fact, reference, log line or printed text contains data of the customer."""
        personal = {each.casefold() for each in personal_texts(self.order)}
        for played, where in self._every_play():
            for place, text in _shown_texts(played):
                if any(each in text.casefold() for each in personal):
                    raise CheckFailed(f"{place} contains personal data{where}")

    def check_hosts(self) -> None:
        """Every request goes to a host in the settings."""
        for played, where in self._every_play():
            if any("host-not-allowed" in text for _, text in _shown_texts(played)):
                raise CheckFailed(f"a request goes to a host that no Url in the settings has{where}")

    def check_connections(self) -> None:
        """Every connection is one of the context, unless `other_clients` is declared."""
        for played, where in self._every_play():
            for sentence in played.connections:
                raise CheckFailed(sentence + where)

    def check_settings(self) -> None:
        """Every setting has a description."""
        for path in _undescribed(self.handler.settings_type, ""):
            raise CheckFailed(f"the setting {path} has no description; use Annotated and msgspec.Meta(description=…)")

    def check_together(self) -> None:
        """Calls at the same time do not mix their orders."""
        base, alone = self.order, self._play()
        orders = [
            builders.order({"/id": f"{base.id}{number}", "/reference": f"{base.reference or ''}77{number}"}, base=base)
            for number in (1, 2, 3)
        ]
        together = self._play_all(orders)
        for sent in together[0].requests:
            if any(
                each.id in sent.text or str(each.reference) in sent.text for each in orders if each.id != sent.order_id
            ):
                raise CheckFailed(f"{_named(sent)} for one order carries the id or the reference of another; keep no "
                                  "state in the handler")  # fmt: skip
        if any(_summary(each) != _summary(alone) for each in together):
            raise CheckFailed(
                f"calls at the same time end as {', '.join(map(_summary, together))}; alone: {_summary(alone)}"
            )


def _fault_check(fault: NetworkFault) -> Callable[[Any], None]:
    def check(self: Any) -> None:
        self._check_fault(fault)

    check.__doc__ = f"Every request of the handler meets this: {fault.says}."
    return check


for _fault in NetworkFault:
    setattr(_Suite, f"check_{_fault.name.lower()}", _fault_check(_fault))


class HandlerConformance(_Suite[N]):
    """The suite for notification handlers: exactly one effect, or a dead letter with a reason.

    Every request meets each fault of `NetworkFault`: those of a clean delivery, and those that follow when the process
    was killed after a write. Then the effects must be those of a clean delivery. Only a dead letter may lack some, and
    none may be there twice.
    """

    def _play_on(self, stage: Stage, orders: Sequence[Order]) -> list[Any]:
        return stage.deliver([builders.notification(each) for each in orders])

    def _plans(self, fault: NetworkFault) -> Iterator[Plan]:
        yield from super()._plans(fault)
        for number, sent in enumerate(self._play().requests):
            if is_write(sent.request) and (can_look_up(self.handler) or self.handler.repeatable):
                killed = {number: NetworkFault.KILLED_AFTER}
                for following in range(number + 1, len(self._play(killed).requests)):
                    yield {**killed, following: fault}

    def check_clean(self) -> None:
        """Without faults the order is delivered, and the fake system shows the effect."""
        played = self._play()
        _check_no_bug(played, "")
        if played.reason != "delivered":
            raise CheckFailed(f"without faults, the delivery ends as {played.reason}: {played.outcome}")
        if type(self).system is not None and not played.effects:
            raise CheckFailed("without faults there is no effect; look at `effects` of the fake system")

    def _check_fault(self, fault: NetworkFault) -> None:
        super()._check_fault(fault)
        expected = _counted(self._play().effects)
        for played, where in self._plays(fault):
            found = _counted(played.effects)
            for effect in found - expected:
                raise CheckFailed(f"an effect is there {found[effect]} times: {effect}{where}")
            for effect in expected - found:
                if played.reason in ("delivered", "skipped"):
                    raise CheckFailed(f"the delivery is {played.reason} without its effect: {effect}{where}")


class _VerdictSuite(_Suite[H]):
    """The checks of validations and hooks."""

    kind: ClassVar[str]
    target: ClassVar[str] = "/cart"

    def _play_on(self, stage: Stage, orders: Sequence[Order]) -> list[Any]:
        return stage.answer(orders, kind=self.kind, target=self.target)

    def check_clean(self) -> None:
        """Without faults there is a verdict."""
        played = self._play()
        _check_no_bug(played, "")
        if played.missing is not None:
            raise CheckFailed(f"without faults there is no verdict: {played.missing}: {played.error}")

    def check_no_effects(self) -> None:
        """The handler has no effects, because it is asked again for the same purchase."""
        for played, where in self._every_play():
            for sent in played.requests:
                if is_write(sent.request):
                    mark = "extensions={'write': False}"
                    raise CheckFailed(f"{_named(sent)} is a write; if it only asks, send it with {mark}{where}")
            for effect in _counted(played.effects):
                raise CheckFailed(f"there is an effect: {effect}{where}")


class ValidationConformance(_VerdictSuite[V]):
    """The suite for validations: an end inside the deadline whatever happens, and no effects."""

    kind = "validation"


class HookConformance(_VerdictSuite[K]):
    """The suite for hooks: that of validations, and patches that end, stay inside and add up.

    Give an `order` that the hook patches, and the `target` of its callback.
    """

    kind = "hook"

    def check_second_round(self) -> None:
        """The order with the patches of the hook gets no more patches."""
        (second,) = self._play_all([builders.order(base=self._play().order)])
        for patch in second.patches:
            raise CheckFailed(f"{patch.path} is patched in the patched order, too, so the hook is called without end")

    def check_target(self) -> None:
        """Every patch applies to the order and stays inside the target."""
        for played, where in self._every_play():
            if isinstance(played.error, PatchInvalid):
                raise CheckFailed(f"{played.error}{where}")

    def check_totals(self) -> None:
        """The totals inside the target that were right are right after the patches."""
        for place in _wrong_totals(self._play().order) - _wrong_totals(self.order.data):
            if f"{place}/".startswith(f"{self.target}/"):
                raise CheckFailed(f"after the patches, {place} is not the sum of its parts; patch it, too")


def _named(sent: Any) -> str:
    return f"{sent.request.method} {sent.request.url.path}"


def _check_no_bug(played: Played, where: str) -> None:
    for error in played.errors:
        raise CheckFailed(f"the handler raised {type(error).__name__}: {error}{where}") from error
    if any("handler-failed" in text for _, text in _shown_texts(played)):
        raise CheckFailed(f"the handler returned something else than an outcome{where}")


def _goes_on(played: Played) -> bool:
    if isinstance(played, PlayedVerdict):
        return played.missing in ("late", "blocks")
    return isinstance(played, PlayedDelivery) and played.reason == RUNNING


def _summary(played: Played) -> str:
    """Return the result of a call, without what differs between orders."""
    if isinstance(played, PlayedVerdict):
        return f"{played.missing or 'answered'} with {len(played.problems)} problems, {len(played.patches)} patches"
    return played.reason if isinstance(played, PlayedDelivery) else ""


def _shown_texts(played: Played) -> Iterator[tuple[str, str]]:
    """Yield every text of the handler that people may see, with its place."""
    for each in played.attempts if isinstance(played, PlayedDelivery) else ():
        match each.outcome:
            case Done(reference=reference, facts=facts):
                yield "the reference", str(reference)
                yield "a fact", json.dumps(dict(facts), ensure_ascii=False, default=str)
            case Skip(reason=reason):
                yield "the reason of a Skip", reason
            case Outcome() as outcome:
                yield f"the message of {type(outcome).__name__}", str(outcome)
    for line in played.log:
        yield f"the log line {line['event']}", json.dumps(line, ensure_ascii=False)


def _counted(effects: list[Any]) -> Counter[str]:
    texts = (json.dumps(each, sort_keys=True, ensure_ascii=False, default=repr) for each in effects)
    return Counter(text[:LONGEST_EFFECT] for text in texts)


def _undescribed(type_: Any, path: str, known: frozenset[Any] = frozenset()) -> Iterator[str]:
    """Yield the path of every setting without a description."""
    base, _ = unwrap(type_)
    if not is_struct(base):
        for argument in get_args(base):
            yield from _undescribed(argument, path, known)
    elif base not in known:
        for each in msgspec.structs.fields(base):
            at = under(path, each.encode_name)
            if not any(isinstance(note, msgspec.Meta) and note.description for note in unwrap(each.type)[1]):
                yield at
            yield from _undescribed(each.type, at, known | {base})


def _wrong_totals(order: Mapping[str, Any]) -> set[str]:
    """Return the pointers of the totals that are not the sum of their parts."""
    cart = order.get("cart") or {}
    shippings = [each for each in order.get("shippings") or () if each.get("state") != "removed"]
    sums = {"/cart/total": (cart, cart.get("items") or []), "/total": (order, [cart, *shippings])}

    def amount(of: Mapping[str, Any], name: str) -> float:
        return money((of.get("total") or {}).get(name))

    return {
        f"{place}/{name}"
        for place, (whole, parts) in sums.items()
        for name in ("includingVat", "excludingVat")
        if amount(whole, name) != money(sum(amount(each, name) for each in parts))
    }
