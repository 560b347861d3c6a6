"""`adapter.routing.routes`: selecting routes, and everything that can be wrong at start."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import pytest

from adapter import config as configuration
from adapter.conditions import Result
from adapter.config import ConfigurationInvalid
from adapter.identifiers import Channel
from adapter.orders import Order
from adapter.plugin import (
    Context,
    Done,
    HookHandler,
    Notification,
    NotificationHandler,
    Patch,
    Problem,
    Secret,
    Settings,
    Url,
    ValidationHandler,
)
from adapter.routing.routes import Routes, build, installed, wants

HEAD = """\
adapter: {id: an_adapter}
merchants:
  norce:
    tokens: ["${env:SECRET}"]
    channels:
      "1": {}
      "2": {routes: {export: {settings: {shop: two}}}}
  other:
    tokens: ["${env:SECRET}"]
    routes: {export: {settings: {shop: other}}}
    channels: {"1": {routes: {export: {settings: {shop: other-one}}}}}
senders: {header_secrets: [{header: authorization, values: ["${env:SECRET}"]}]}
"""
CALLBACKS = """\
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus, schema: {enum: [accepted, completed]}}
  order-rules: {kind: validation}
"""
SECRET = "canary-secret-value"


class Shop(Settings, frozen=True, kw_only=True):
    shop: Annotated[str, msgspec.Meta(description="Which shop.", max_length=20)] = "one"
    url: Url | None = None
    password: Secret | None = None

    def __post_init__(self) -> None:
        if self.shop == "closed":
            raise ValueError("this shop is closed")


class Forgetful(NotificationHandler[Shop]):
    async def deliver(self, notification: Notification, context: Context[Shop]) -> Done:
        return Done()


class Export(NotificationHandler[Shop]):
    repeatable = True

    async def deliver(self, notification: Notification, context: Context[Shop]) -> Done:
        return Done()


class Repeatable(NotificationHandler[Settings]):
    repeatable = True

    async def deliver(self, notification: Notification, context: Context[Settings]) -> Done:
        return Done()


class Check(ValidationHandler[Shop]):
    async def validate(self, order: Order, context: Context[Shop]) -> list[Problem]:
        return []


class Change(HookHandler[Shop]):
    async def change(self, order: Order, context: Context[Shop]) -> list[Patch]:
        return []


class Abstract(NotificationHandler[Settings]):
    """A class without its abstract method."""


class Demanding(Export):
    def __init__(self, shop: str) -> None:
        self.shop = shop


class Exploding(Export):
    def __init__(self) -> None:
        raise RuntimeError("no licence")


class Point:
    def __init__(self, name: str, class_: Any, package: str = "a-package") -> None:
        self.name = name
        self.dist = SimpleNamespace(name=package)
        self._class = class_

    def load(self) -> Any:
        if isinstance(self._class, BaseException):
            raise self._class
        return self._class


HANDLERS: dict[str, Any] = {
    "export": Export,
    "forgetful": Forgetful,
    "repeatable": Repeatable,
    "check": Check,
    "change": Change,
    "abstract": Abstract,
    "demanding": Demanding,
    "exploding": Exploding,
    "a-function": Export.deliver,
    "an-instance": Export(),
    "no-handler": dict,
    "not-there": ModuleNotFoundError("No module named 'erp'"),
    "broken": SyntaxError("invalid syntax"),
    "a-script": SystemExit(0),
}


def made(folder: Path, text: str, handlers: dict[str, Any] = HANDLERS, head: str = HEAD) -> Routes:
    path = folder / "config.yaml"
    path.write_text(head + text)
    points: Any = [Point(name, class_) for name, class_ in handlers.items()]
    return build(configuration.load(path, {"SECRET": SECRET}), points)


def problems(folder: Path, text: str) -> list[str]:
    """Return line, path and message of each problem. Lines count from the end of the common part."""
    with pytest.raises(ConfigurationInvalid) as raised:
        made(folder, text)
    first = HEAD.count("\n")
    return [f"{(each.line or 0) - first} {each.path}: {each.message}" for each in raised.value.problems]


def one_problem(folder: Path, text: str) -> str:
    [problem] = problems(folder, text)
    return problem


# --- built routes ---------------------------------------------------------------------------------------------------


def test_routes_belong_to_their_callback_in_the_order_of_the_file(tmp_path: Path) -> None:
    routes = made(
        tmp_path,
        CALLBACKS + "routes:\n"
        "  zeta: {callback: order-status, handler: export}\n"
        "  check: {callback: order-rules, handler: check, no_answer: approve}\n"
        "  export: {callback: order-status, handler: export}\n",
    )

    assert [route.name for route in routes.of("order-status")] == ["zeta", "export"]
    assert [route.name for route in routes.of("order-rules")] == ["check"]
    assert [route.name for route in routes.all] == ["zeta", "check", "export"]


def test_a_callback_without_routes_is_known(tmp_path: Path) -> None:
    assert made(tmp_path, export()).of("order-rules") == ()


def test_settings_are_merged_for_every_channel(tmp_path: Path) -> None:
    routes = made(tmp_path, CALLBACKS + "routes: {export: {callback: order-status, handler: export}}\n")

    [route] = routes.all
    assert {whose: settings.shop for whose, settings in route.settings.items()} == {  # type: ignore[attr-defined]
        ("norce", "1"): "one",
        ("norce", "2"): "two",
        ("other", "1"): "other-one",
    }


def test_a_route_knows_how_its_handler_ends_a_doubt(tmp_path: Path) -> None:
    routes = made(
        tmp_path,
        CALLBACKS + "routes: {export: {callback: order-status, handler: forgetful},"
        " again: {callback: order-status, handler: repeatable}}\n",
    )

    assert [(route.handling.looks_up, route.handling.repeatable) for route in routes.all] == [
        (False, False),
        (False, True),
    ]


def test_the_bundled_handlers_are_installed() -> None:
    assert {"rules", "log", "jetshop"} <= set(installed())


# --- selection -------------------------------------------------------------------------------------------------------

ROUTES = """\
routes:
  export: {callback: order-status, handler: export}
  completed: {callback: order-status, handler: repeatable, when: {scope: /state/currentStatus, schema: {const: completed}}}
  first-item: {callback: order-status, handler: repeatable, when: {scope: /items/0}}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("order", "callback", "wanted"),
    [
        ({"state": {"currentStatus": "completed"}}, "matched", {"export": "matched", "completed": "matched"}),
        ({"state": {"currentStatus": "accepted"}}, "matched", {"export": "matched"}),
        ({"state": {"currentStatus": "declined"}}, "not_matched", {}),
        ({}, "not_matched", {}),
        ({"state": {"currentStatus": None}}, "not_matched", {}),
        ({"state": "completed"}, "not_matched", {}),
        (
            {"state": {"currentStatus": "accepted"}, "items": [1]},
            "matched",
            {"export": "matched", "first-item": "error"},
        ),
        ({"state": [{"currentStatus": "x"}]}, "error", {"export": "error", "completed": "error"}),
    ],
    ids=["both", "the callback's alone", "neither", "nothing there", "null", "another shape", "an error in when",
         "an error in the callback's"],
)  # fmt: skip
def test_a_route_wants_orders_that_meet_both_conditions(
    tmp_path: Path, order: Any, callback: str, wanted: dict[str, str]
) -> None:
    routes = made(tmp_path, CALLBACKS + ROUTES)

    wanting = routes.wanting(routes.callbacks["order-status"], Channel("norce", "1"), order)

    assert wanting.callback.value == callback
    assert {route.name: result.value for route, result in wanting.routes} == wanted


@pytest.mark.parametrize(
    ("order", "results"),
    [
        ({"state": {"currentStatus": "completed"}}, ["matched", "matched", "not_matched"]),
        ({"state": {"currentStatus": "accepted"}}, ["matched", "not_matched", "not_matched"]),
        ({"state": {"currentStatus": "accepted"}, "items": [1]}, ["matched", "not_matched", "error"]),
        ({"state": {"currentStatus": "declined"}, "items": [1]}, ["not_matched"] * 3),
    ],
)
def test_wants_evaluates_both_conditions(tmp_path: Path, order: Any, results: list[str]) -> None:
    routes = made(tmp_path, CALLBACKS + ROUTES)

    assert [wants(route, order) for route in routes.all] == [Result(result) for result in results]


@pytest.mark.parametrize("order", [None, 1, "x", [], [[]], {"state": {}}], ids=repr)
def test_selecting_never_raises(tmp_path: Path, order: Any) -> None:
    routes = made(tmp_path, CALLBACKS + ROUTES)

    for route in routes.all:
        assert isinstance(wants(route, order), Result)
    assert isinstance(routes.wanting(routes.callbacks["order-status"], Channel("norce", "1"), order).callback, Result)


# --- problems -------------------------------------------------------------------------------------------------------


def export(**members: str) -> str:
    """Return a valid route `export` with these members changed."""
    said = {"callback": "order-status", "handler": "export"} | members
    return CALLBACKS + "routes:\n  export:\n" + "".join(f"    {name}: {value}\n" for name, value in said.items())


def test_the_problem_of_an_unknown_handler_names_the_installed_ones(tmp_path: Path) -> None:
    assert one_problem(tmp_path, export(handler="shopify")) == (
        "7 routes.export.handler: no installed handler has this name; installed: " + ", ".join(sorted(HANDLERS))
    )


def test_a_hook_has_a_deadline_a_soft_limit_and_a_target(tmp_path: Path) -> None:
    routes = made(
        tmp_path,
        "callbacks:\n"
        "  bare: {kind: hook, watch: /cart}\n"
        "  set: {kind: hook, watch: /cart, target: /cart/items, deadline: 500ms, soft_limit: 100ms}\n"
        "routes:\n"
        "  export: {callback: set, handler: change, no_answer: reject}\n"
        "  beside: {callback: set, handler: change, no_answer: approve, mode: shadow}\n",
    )

    bare, own = routes.callbacks["bare"], routes.callbacks["set"]
    assert (bare.kind, bare.condition, bare.deadline, bare.soft_limit, bare.target) == (
        "hook", None, timedelta(seconds=2), timedelta(seconds=1), None,
    )  # fmt: skip
    assert (own.deadline, own.soft_limit) == (timedelta(milliseconds=500), timedelta(milliseconds=100))
    assert own.target == "/cart/items"
    assert [(route.no_answer, route.shadow) for route in routes.of("set")] == [("reject", False), ("approve", True)]


@pytest.mark.parametrize("handler", ["check", "export"])
def test_a_hook_needs_a_hook_handler(tmp_path: Path, handler: str) -> None:
    text = f"callbacks: {{set: {{kind: hook, watch: /cart}}}}\nroutes:\n  export: {{callback: set, handler: {handler},"

    assert one_problem(tmp_path, f"{text} no_answer: approve}}\n") == (
        "3 routes.export.handler: is no HookHandler, but callback set is a hook"
    )


@pytest.mark.parametrize("handler", ["check", "a-function", "an-instance", "no-handler"])
def test_a_handler_of_another_kind_is_a_problem(tmp_path: Path, handler: str) -> None:
    assert one_problem(tmp_path, export(handler=handler)) == (
        "7 routes.export.handler: is no NotificationHandler, but callback order-status is a notification"
    )


def test_a_validation_needs_a_validation_handler(tmp_path: Path) -> None:
    text = export(callback="order-rules", no_answer="approve")

    assert one_problem(tmp_path, text) == (
        "7 routes.export.handler: is no ValidationHandler, but callback order-rules is a validation"
    )


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("not-there", "the handler cannot be imported: ModuleNotFoundError: No module named 'erp'"),
        ("broken", "the handler cannot be imported: SyntaxError: invalid syntax"),
        ("a-script", "the handler cannot be imported: SystemExit: 0"),
        ("exploding", "the handler cannot be created: RuntimeError: no licence"),
    ],
)
def test_a_handler_that_cannot_be_imported_or_created_is_a_problem(tmp_path: Path, handler: str, message: str) -> None:
    assert one_problem(tmp_path, export(handler=handler)) == f"7 routes.export.handler: {message}"


@pytest.mark.parametrize("handler", ["abstract", "demanding"])
def test_a_handler_class_that_cannot_be_created_is_a_problem(tmp_path: Path, handler: str) -> None:
    assert one_problem(tmp_path, export(handler=handler)).startswith(
        "7 routes.export.handler: the handler cannot be created: TypeError"
    )


@pytest.mark.parametrize(
    ("when", "at"),
    [
        ("{scope: state}", "scope"),
        ('{scope: ""}', "scope"),
        ("{scope: /state, schema: {type: nonsense}}", "schema"),
        ('{scope: /state, schema: {$ref: "http://127.0.0.1:9/x.json"}}', "schema"),
        ('{scope: /state, schema: {pattern: "(?=x)"}}', "schema"),
        ('{scope: /state, schema: {$schema: "http://json-schema.org/draft-07/schema#"}}', "schema"),
    ],
    ids=["no pointer", "empty", "no schema", "another document", "look-ahead", "another dialect"],
)
def test_a_condition_that_cannot_be_evaluated_safely_is_a_problem_at_its_line(
    tmp_path: Path, when: str, at: str
) -> None:
    assert one_problem(tmp_path, export(when=when)).startswith(f"8 routes.export.when.{at}: ")


def test_every_condition_of_a_list_must_hold(tmp_path: Path) -> None:
    when = "[{scope: /country, schema: {const: SE}}, {scope: /total, schema: {minimum: 100}}]"
    [route] = made(tmp_path, export(when=when)).all

    orders: list[Any] = [
        {"country": "SE", "total": 100},
        {"country": "SE", "total": 99},
        {"country": "NO", "total": 100},
    ]
    assert [wants(route, {"state": {"currentStatus": "completed"}} | order).value for order in orders] == [
        "matched", "not_matched", "not_matched",
    ]  # fmt: skip


def test_a_wrong_condition_of_a_list_is_a_problem_at_its_place(tmp_path: Path) -> None:
    assert one_problem(tmp_path, export(when="[{scope: /country}, {scope: total}]")).startswith(
        "8 routes.export.when[1].scope: "
    )


@pytest.mark.parametrize(
    ("keys", "served"),
    [
        ({}, ["norce 1", "norce 2", "other 1"]),
        ({"merchants": "[norce]"}, ["norce 1", "norce 2"]),
        ({"channels": '["1"]'}, ["norce 1", "other 1"]),
        ({"merchants": "[norce]", "channels": '["2"]'}, ["norce 2"]),
    ],
    ids=["all", "merchants", "channels", "both"],
)
def test_a_route_is_for_its_merchants_and_channels(tmp_path: Path, keys: dict[str, str], served: list[str]) -> None:
    routes = made(tmp_path, export(**keys))
    order = {"state": {"currentStatus": "completed"}}

    wanting = {
        f"{merchant} {name}": len(
            routes.wanting(routes.callbacks["order-status"], Channel(merchant, name), order).routes
        )
        for merchant, name in (("norce", "1"), ("norce", "2"), ("other", "1"))
    }

    assert [" ".join(channel) for channel in routes.all[0].settings] == served
    assert wanting == {each: int(each in served) for each in ("norce 1", "norce 2", "other 1")}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"merchants": "[nobody]"}, "routes.export.merchants[0]: must be a merchant"),
        ({"merchants": "[]"}, "routes.export: is for no configured channel"),
        ({"channels": '["3"]'}, "routes.export.channels[0]: must be a channel of its merchants"),
        (
            {"merchants": "[other]", "channels": '["2"]'},
            "routes.export.channels[0]: must be a channel of its merchants",
        ),
    ],
    ids=["merchant", "none", "channel", "channel of another merchant"],
)
def test_an_unknown_merchant_or_channel_of_a_route_is_a_problem(
    tmp_path: Path, keys: dict[str, str], problem: str
) -> None:
    assert problem in one_problem(tmp_path, export(**keys))


def test_settings_are_checked_only_for_the_channels_of_the_route(tmp_path: Path) -> None:
    text = export(merchants="[other]", settings="{shop: closed}")

    assert made(tmp_path, text).all[0].settings[Channel("other", "1")].shop == "other-one"  # type: ignore[attr-defined]


def test_the_condition_of_a_callback_without_routes_is_checked(tmp_path: Path) -> None:
    text = export().replace("routes:\n", "  unused: {kind: notification, scope: nowhere}\nroutes:\n")

    assert one_problem(tmp_path, text).startswith("4 callbacks.unused.scope: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{shop: 1}", "settings.shop: "),
        ("{shop: a-name-of-more-than-20-characters}", "settings.shop: "),
        ("{shap: one}", "settings.shap: "),
        ("{url: http://shop.example}", "settings.url: "),
        (f"{{password: {SECRET}}}", "settings.password: "),
    ],
)
def test_wrong_settings_are_a_problem_at_their_line(tmp_path: Path, settings: str, message: str) -> None:
    problem = problems(tmp_path, export(settings=settings))[0]

    assert problem.startswith(f"8 routes.export.{message}")
    assert SECRET not in problem


def test_a_wrong_setting_of_a_channel_is_a_problem_at_its_own_place(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text((HEAD + export()).replace("shop: two", "shop: 2").replace("shop: other}", "shop: other, x: 1}"))
    points: Any = [Point("export", Export)]

    with pytest.raises(ConfigurationInvalid) as raised:
        build(configuration.load(path, {"SECRET": SECRET}), points)

    assert [(each.line, each.path) for each in raised.value.problems] == [
        (7, "merchants.norce.channels.2.routes.export.settings.shop"),
        (10, "merchants.other.routes.export.settings.x"),
    ]


def test_a_problem_of_all_merchants_is_reported_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path, export(settings="{url: nowhere}"))) == 1


def test_inconsistent_settings_are_reported_with_the_handlers_message(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text((HEAD + export()).replace("shop: two", "shop: closed"))
    points: Any = [Point("export", Export)]

    with pytest.raises(ConfigurationInvalid, match="this shop is closed") as raised:
        build(configuration.load(path, {"SECRET": SECRET}), points)

    assert raised.value.problems[0].line == 7


def test_all_problems_are_reported_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "callbacks:\n"
        "  bad-scope: {kind: notification, scope: nowhere}\n"
        "  order-status: {kind: notification, scope: /state/currentStatus}\n"
        "  order-rules: {kind: validation}\n"
        "routes:\n"
        "  export: {callback: order-status, handler: export, settings: {unknown: 1}}\n"
        "  absent: {callback: order-status, handler: shopify}\n"
        "  wrong-kind: {callback: order-rules, handler: export, no_answer: approve}\n"
        "  fails: {callback: order-status, handler: not-there, when: {scope: /a, schema: {type: x}}}\n"
        "  cannot: {callback: order-status, handler: abstract}\n"
    )

    told = problems(tmp_path, text)

    assert [problem.partition(": ")[0] for problem in told] == [
        "2 callbacks.bad-scope.scope",
        "6 routes.export.settings.unknown",
        "7 routes.absent.handler",
        "8 routes.wrong-kind.handler",
        "9 routes.fails.when.schema",
        "9 routes.fails.handler",
        "10 routes.cannot.handler",
    ]


# --- conditions on passing states -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["checkout", "processing", "accepted"])
def test_a_condition_on_a_passing_state_is_a_warning_at_its_line(tmp_path: Path, state: str) -> None:
    text = export(when=f"{{scope: /state/currentStatus, schema: {{const: {state}}}}}")

    [warning] = made(tmp_path, text).warnings

    assert (warning.line, warning.path) == (HEAD.count("\n") + 8, "routes.export.when.schema")
    assert state in warning.message
    assert "enum" in warning.message


def test_a_callback_on_a_passing_state_is_a_warning(tmp_path: Path) -> None:
    text = export().replace("enum: [accepted, completed]", "const: accepted")

    assert [warning.path for warning in made(tmp_path, text).warnings] == ["callbacks.order-status.schema"]


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"when": "{scope: /state/currentStatus, schema: {const: completed}}"},
        {"when": "{scope: /state/currentStatus, schema: {enum: [processing, accepted]}}"},
        {"when": "{scope: /other, schema: {const: accepted}}"},
        {"when": "{scope: /state/currentStatus, schema: true}"},
        {"when": "{scope: /state/currentStatus, schema: {const: accepted}}", "refetch": "false"},
    ],
    ids=["none", "a last state", "an enum", "another scope", "any", "the order as it came"],
)
def test_other_conditions_are_no_warning(tmp_path: Path, members: dict[str, str]) -> None:
    assert made(tmp_path, export(**members)).warnings == ()


# --- orders that a shopper can write ----------------------------------------------------------------------------------

SIGNED = '{signed_urls: {keys: {k1: "${env:SECRET}"}}}'
IN_THE_QUERY = (
    '{url_secrets: [{parameter: secret, values: ["${env:SECRET}"]}],'
    ' header_secrets: [{header: authorization, values: ["${env:SECRET}"]}]}'
)


def head_with(senders: str) -> str:
    head = HEAD.replace("{id: an_adapter}", "{id: an_adapter, public_url: https://adapter.example}")
    return "".join(line for line in head.splitlines(True) if "senders:" not in line) + f"senders: {senders}\n"


@pytest.mark.parametrize("senders", [SIGNED, IN_THE_QUERY], ids=["signed URLs", "a secret in the URL"])
def test_a_route_that_exports_what_a_shopper_can_write_is_a_warning(tmp_path: Path, senders: str) -> None:
    [warning] = made(tmp_path, export(refetch="false"), head=head_with(senders)).warnings

    assert warning.path == "routes.export.refetch"
    assert "remove refetch: false" in warning.message


@pytest.mark.parametrize(
    ("senders", "members"),
    [(SIGNED, {}), (SIGNED, {"refetch": "true"}), (None, {"refetch": "false"})],
    ids=["the default", "reads the order", "a secret in a header"],
)
def test_an_order_that_a_shopper_cannot_write_is_no_warning(
    tmp_path: Path, senders: str | None, members: dict[str, str]
) -> None:
    head = HEAD if senders is None else head_with(senders)

    assert made(tmp_path, export(**members), head=head).warnings == ()


# --- handlers that cannot end a doubt ---------------------------------------------------------------------------------


class Asking(Forgetful):
    async def lookup(self, notification: Notification, context: Context[Shop]) -> Done | None:
        return None


class NotDone(Forgetful):
    not_done = frozenset({503})


class WithOtherClients(Forgetful):
    other_clients = True


@pytest.mark.parametrize(
    ("handler", "warns"),
    [(Forgetful, True), (WithOtherClients, True), (NotDone, True), (Asking, False), (Export, False)],
    ids=["sends", "has other clients", "knows a status", "can look up", "is repeatable"],
)
def test_a_handler_that_cannot_end_a_doubt_is_a_warning(
    tmp_path: Path, handler: type[NotificationHandler[Any]], warns: bool
) -> None:
    routes = made(tmp_path, export(handler="it"), {"it": handler})

    assert [warning.path for warning in routes.warnings] == ["routes.export.handler"] * warns


# --- mistakes in a handler class --------------------------------------------------------------------------------------


class Blocking(Export):
    def deliver(self, notification: Notification, context: Context[Shop]) -> Done:  # type: ignore[override]
        return Done()

    def lookup(self, notification: Notification, context: Context[Shop]) -> Done | None:  # type: ignore[override]
        return None


class Misspelt(Forgetful):
    repeatabel = True

    async def look_up(self, notification: Notification, context: Context[Shop]) -> Done | None:
        return None


class WithoutDeliver(NotificationHandler[Shop]):
    repeatable = True

    async def delivers(self, notification: Notification, context: Context[Shop]) -> Done:
        return Done()


def test_each_method_that_is_no_coroutine_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationInvalid) as raised:
        made(tmp_path, export(handler="it"), {"it": Blocking})

    assert [(each.path, each.message) for each in raised.value.problems] == [
        ("routes.export.handler", f"its method {name} is no coroutine; define it with async def")
        for name in ("deliver", "lookup")
    ]


def test_names_that_look_misspelt_are_warnings(tmp_path: Path) -> None:
    *misspelt, _no_lookup = made(tmp_path, export(handler="it"), {"it": Misspelt}).warnings

    assert [(each.path, each.message) for each in misspelt] == [
        ("routes.export.handler", f"its {name}, which it lacks; its author can rename it")
        for name in ("look_up looks like lookup", "repeatabel looks like repeatable")
    ]


def test_a_missing_method_is_a_problem_that_names_the_misspelt_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationInvalid) as raised:
        made(tmp_path, export(handler="it"), {"it": WithoutDeliver})

    [problem] = raised.value.problems
    assert problem.message.endswith("; delivers looks like deliver")


def built_from(folder: Path, *points: Point) -> Routes:
    path = folder / "config.yaml"
    path.write_text(HEAD + export())
    return build(configuration.load(path, {"SECRET": SECRET}), points)  # type: ignore[arg-type]


def test_a_name_that_two_packages_provide_is_a_problem_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationInvalid) as raised:
        built_from(tmp_path, Point("export", Export, "erp-b"), Point("export", Forgetful, "erp-a"))

    [problem] = raised.value.problems
    assert problem.path == "routes.export.handler"
    assert problem.message == "several packages provide a handler of this name: erp-a, erp-b; keep one"


def test_a_shared_name_that_no_route_uses_is_no_problem(tmp_path: Path) -> None:
    others = [Point("other", Export, "erp-a"), Point("other", Export, "erp-b")]

    assert len(built_from(tmp_path, Point("export", Export), *others).all) == 1


def test_a_package_that_is_found_twice_shares_no_name(tmp_path: Path) -> None:
    assert len(built_from(tmp_path, Point("export", Export), Point("export", Export)).all) == 1
