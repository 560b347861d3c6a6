"""Properties of the simulator under random changes: states, hooks and notifications."""

import itertools
from typing import Any

import httpx
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from jsonpointer import resolve_pointer
from jsonschema import Draft202012Validator

from tests.simulators import shop

# Checkout protocol, section 3; deliberately not taken from the code.
MOVES = {
    ("checkout", "processing"), ("processing", "checkout"), ("processing", "accepted"), ("accepted", "completed"),
    ("accepted", "declined"), ("checkout", "removed"), ("processing", "removed"), ("accepted", "removed"),
}  # fmt: skip
STATUSES = ("checkout", "processing", "accepted", "completed", "declined", "removed")
SCOPES = ("/state/currentStatus", "/cart", "/cart/items", "/customer/billing", "/payments", "/shippings", "/consents",
          "/reference", "/attributes/a")  # fmt: skip
SCHEMAS = (
    None,
    {"const": "completed"},
    {"enum": ["processing", "r1", 1]},
    {"minItems": 2},
    {"contains": {"properties": {"state": {"const": "captured"}}, "required": ["state"]}},
    {"type": "object"},
)
NOTHING = object()
# Answers of hooks. Rules use their numbers, so that Hypothesis can shrink a case.
HOOKS: tuple[Any, ...] = (
    [],
    httpx.Response(400, json={"code": "refused"}),
    httpx.Response(418),
    [{"op": "add", "path": "/cart/attributes/mark", "value": 1}],
    [{"op": "add", "path": "/reference", "value": "r1"}, {"op": "add", "path": "/merchant", "value": "x"}],
    [{"op": "replace", "path": "/state/currentStatus", "value": "completed"}],
    [{"op": "add", "path": "/payments/-", "value": {"amount": 1}}],
)

few = st.integers(0, 3)


class Checkouts(RuleBasedStateMachine):
    """An order at Norce, with its changes, hooks and notifications."""

    @initialize()
    def begin(self) -> None:
        self.context = shop()
        self.norce = self.context.__enter__()
        self.order_id = self.norce.create(consents=[{"id": "c1", "required": True}])
        self.history = [self.norce.read(self.order_id)]
        self.registered: dict[str, tuple[str, Any]] = {}
        self.expected: dict[str, list[Any]] = {}
        self.hooks = 0

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.__exit__(None, None, None)

    def change(self, name: str, body: Any = None, **path: str) -> None:
        """Carry out an operation and record the notifications that have to follow."""
        norce, before = self.norce, self.history[-1]
        refusals = len([None for each in norce.simulator.journal.read(kind="hook") if each.status not in (200, None)])
        answer = norce.ask(name, body, order_id=self.order_id, headers={"x-adapterid": "own"}, **path)
        after = norce.read(self.order_id)
        refused = [each for each in norce.simulator.journal.read(kind="hook") if each.status not in (200, None)]
        if len(refused) > refusals:
            assert answer.status_code == 400
        if not answer.is_success:
            assert after == before
        for key, (scope, schema) in self.registered.items():
            old, new = (resolve_pointer(each, scope, NOTHING) for each in (before, after))
            if (
                new is not NOTHING
                and old != new
                and Draft202012Validator({} if schema is None else schema).is_valid(new)
            ):
                self.expected[key].append(new)
        self.history.append(after)

    @rule(quantities=st.lists(few, max_size=3))
    def cart(self, quantities: list[int]) -> None:
        items = [{"id": f"ci{n}", "quantity": q, "total": {"includingVat": q * 10}} for n, q in enumerate(quantities)]
        self.change("put_cart", {"items": items})

    @rule(city=st.sampled_from(["Umeå", "Boden"]))
    def billing(self, city: str) -> None:
        self.change("put_billing", {"city": city})

    @rule(value=few)
    def attributes(self, value: int) -> None:
        self.change("patch_attributes", {"a": value})

    @rule(value=few)
    def reference(self, value: int) -> None:
        self.change("put_reference", f"r{value}")

    @rule(checked=st.booleans())
    def consent(self, checked: bool) -> None:
        self.change("patch_consents", [{"id": "c1", "checked": checked}])

    @rule(status=st.sampled_from(STATUSES))
    def state(self, status: str) -> None:
        self.change("put_state", {"currentStatus": status})

    @rule(checked=st.just(True), number=st.integers(1, 4))
    def towards_the_end(self, checked: bool, number: int) -> None:
        """Move the order towards `completed`, which random moves seldom reach."""
        self.consent(checked)
        for status in STATUSES[1 : 1 + min(number, 3)]:
            self.state(status)

    @rule(amount=few)
    def payment(self, amount: int) -> None:
        self.change("add_payment", {"amount": amount})

    @rule(which=few, state=st.sampled_from(["captured", "removed", "intent"]))
    def payment_state(self, which: int, state: str) -> None:
        payments = self.history[-1]["payments"]
        if which < len(payments):
            self.change("put_payment", payments[which] | {"state": state}, payment_id=payments[which]["id"])

    @rule(amount=few)
    def shipping(self, amount: int) -> None:
        self.change("add_shipping", {"total": {"includingVat": amount}, "vatRate": 0})

    @rule(scope=st.sampled_from(SCOPES), schema=st.sampled_from(SCHEMAS))
    def notification(self, scope: str, schema: Any) -> None:
        if len(self.registered) == 4:
            return
        path = f"/n{len(self.registered)}"
        invoke = self.norce.receiver.to(path, None)
        self.norce.ask("add_notification", {"scope": scope, "schema": schema, "invoke": invoke}, order_id=self.order_id)
        self.registered[path], self.expected[path] = (scope, schema), []
        self.history.append(self.norce.read(self.order_id))

    @rule(scope=st.sampled_from(SCOPES), does=st.integers(0, len(HOOKS) - 1), own=st.booleans())
    def hook(self, scope: str, does: int, own: bool) -> None:
        if self.hooks == 3:
            return
        self.hooks += 1
        invoke = self.norce.receiver.to(f"/h{self.hooks}", HOOKS[does])
        target = ("/cart", "/reference", "/state", "/payments")[does % 4]
        body = {"adapterId": "own" if own else "b", "subscribeTo": scope, "target": target, "invoke": invoke}
        self.norce.ask("add_hook", body, order_id=self.order_id, status=200)
        self.history.append(self.norce.read(self.order_id))

    @rule(which=few)
    def no_hook(self, which: int) -> None:
        hooks = self.history[-1]["hooks"]
        if which < len(hooks):
            self.norce.ask("remove_hook", order_id=self.order_id, hook_id=hooks[which]["id"], status=200)
            self.history.append(self.norce.read(self.order_id))

    @invariant()
    def states_move_as_documented(self) -> None:
        state = self.history[-1]["state"]
        statuses = [each["status"] for each in state["transitions"]]

        assert statuses[0] == "checkout"
        assert statuses[-1] == state["currentStatus"]
        assert set(itertools.pairwise(statuses)) <= MOVES

    @invariant()
    def a_notification_is_sent_exactly_for_a_change_that_fits_its_schema(self) -> None:
        for path, values in self.expected.items():
            scope, _ = self.registered[path]
            assert [resolve_pointer(each, scope) for each in self.norce.receiver.bodies(path)] == values

    @invariant()
    def totals_and_ids_are_kept(self) -> None:
        order = self.history[-1]
        shippings = [each for each in order["shippings"] if each["state"] != "removed"]
        amounts = [each["total"]["includingVat"] for each in (order["cart"], *shippings)]

        assert order["merchant"] == "norce"
        assert order["total"]["includingVat"] == sum(amounts)
        assert all(each["id"] for part in ("payments", "shippings", "consents") for each in order[part])

    @invariant()
    def hooks_of_the_caller_are_not_called(self) -> None:
        own = {each["invoke"] for each in self.history[-1]["hooks"] if each["adapterId"] == "own"}

        assert not own & {str(each.url) for each in self.norce.receiver.got}


Checkouts.TestCase.settings = settings(max_examples=settings.default.max_examples // 2, stateful_step_count=30)
TestCheckouts = Checkouts.TestCase
