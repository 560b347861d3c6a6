"""`adapter.routing.norce_check`: warnings about conditions, watches and targets that can have no effect."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from adapter import config as configuration
from adapter.conditions import CompiledCondition, Condition, ConditionInvalid, Result
from adapter.config import ConfigurationInvalid
from adapter.norce.api import schema
from adapter.norce.order_schema import OrderPart, order, part_at
from adapter.routing.norce_check import exclude, norce_warnings
from adapter.routing.order_comparison import compare
from adapter.routing.routes import build
from tests import ROOT

HEAD = """\
adapter: {id: an_adapter}
norce: {version: @VERSION@}
merchants: {norce: {tokens: ["${env:SECRET}"], channels: {"1": {}, "2": {}}}}
senders: {header_secrets: [{header: authorization, values: ["${env:SECRET}"]}]}
"""
SECRET = "canary-secret-value"
STATUS = "scope: /state/currentStatus"
BEFORE_THE_ROUTE = HEAD.count("\n") + 4


def warnings(folder: Path, text: str, version: str = "v0") -> list[tuple[int | None, str, str]]:
    path = folder / "config.yaml"
    path.write_text(HEAD.replace("@VERSION@", version) + text)
    config = configuration.load(path, {"SECRET": SECRET})
    return [(each.line, each.path, each.message) for each in norce_warnings(config, build(config))]


def of_callback(members: str, handler: str = "log") -> str:
    answered = "" if handler == "log" else ", no_answer: approve"
    settings = ", settings: {changes: [{scope: /id, path: /cart/attributes/a, value: 1}]}" if handler == "patch" else ""
    return f"callbacks:\n  it: {{{members}}}\nroutes:\n  r: {{callback: it, handler: {handler}{answered}{settings}}}\n"


def of_route(when: str, callback: str = STATUS) -> str:
    return (
        f"callbacks:\n  it: {{kind: notification, {callback}}}\n"
        f"routes:\n  r: {{callback: it, handler: log, when: {when}}}\n"
    )


# --- each row of what is warned about ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        (of_callback("kind: notification, scope: /status"), "callbacks.it.scope", "did you mean /state"),
        (of_callback(f"kind: notification, {STATUS}, schema: {{const: complete}}"),
         "callbacks.it.schema.const", "did you mean completed?"),
        (of_callback("kind: notification, scope: /state, schema: {const: completed}"),
         "callbacks.it.schema.const", "/state is an object; use /state/currentStatus"),
        (of_callback("kind: hook, watch: /attributes", "patch"),
         "callbacks.it.watch", "announces only changes of /state"),
        (of_callback("kind: hook, watch: /total", "patch"), "callbacks.it.watch", "announces only changes of /state"),
        (of_callback("kind: hook, watch: /customer/biling", "patch"),
         "callbacks.it.watch", "did you mean /customer/billing"),
        (of_callback("kind: hook, watch: /cart, target: /total", "patch"), "callbacks.it.target", "patch only /state"),
        (of_callback("kind: hook, watch: /cart, target: /cart/itms", "patch"),
         "callbacks.it.target", "did you mean /cart/items"),
        (of_callback("kind: hook, watch: /cart, target: /shippings/0", "patch"),
         "callbacks.it.target", "into the array /shippings"),
        ("callbacks:\n  it: {kind: notification, scope: /state}\n", "callbacks.it", "has no route"),
        ("callbacks:\n  it: {kind: validation}\n", "callbacks.it", "always approved"),
        ("logs: {}\n", "callbacks", "are missing"),
        (of_route(f"{{{STATUS}, schema: {{const: declined}}}}", f"{STATUS}, schema: {{enum: [accepted, completed]}}"),
         "routes.r.when", "the condition of its callback it excludes every value"),
        (of_route(f"{{{STATUS}, schema: {{const: declined}}}}",
                  "scope: /state, schema: {properties: {currentStatus: {enum: [accepted]}}}"),
         "routes.r.when", "the condition of its callback it excludes every value"),
        (of_route("[{scope: /country, schema: {const: SE}}, {scope: /country, schema: {not: {enum: [SE, NO]}}}]"),
         "routes.r.when", "exclude each other"),
        (of_route(f"{{{STATUS}, schema: {{enum: [completed, acepted]}}}}"),
         "routes.r.when.schema.enum[1]", "did you mean accepted?"),
        (of_route(f"{{{STATUS}, schema: {{enum: [Completed]}}}}"), "routes.r.when.schema.enum[0]", "completed?"),
        (of_route(f'{{{STATUS}, schema: {{pattern: "^complete$"}}}}'), "routes.r.when.schema", "can never hold"),
        (of_route(f"{{{STATUS}, schema: {{anyOf: [{{const: done}}, {{minLength: 30}}]}}}}"),
         "routes.r.when.schema.anyOf[0].const", "can never hold"),
        (of_route(f"{{{STATUS}, schema: {{$ref: '#/$defs/a', $defs: {{a: {{const: complete}}}}}}}}"),
         'routes.r.when.schema["$ref"].const', "did you mean completed?"),
        (of_route("{scope: /country, schema: {const: SWE}}"), "routes.r.when.schema.const", "matches ^[A-Za-z]{2}$"),
        (of_route('{scope: /total/includingVat, schema: {const: "100"}}'), "routes.r.when.schema.const", "a number"),
        (of_route("{scope: /total/includingVat, schema: {type: string}}"), "routes.r.when.schema.type", "a number"),
        (of_route("{scope: /cart/items, schema: {const: 3}}"), "routes.r.when.schema.const", "is an array"),
        (of_route("{scope: /state, schema: {required: [status]}}"),
         "routes.r.when.schema.required", "did you mean currentStatus?"),
        (of_route("{scope: /state, schema: {properties: {status: {const: completed}}}}"),
         "routes.r.when.schema.properties.status", "did you mean currentStatus?"),
        (of_route("{scope: /payments, schema: {contains: {properties: {state: {const: capturd}}}}}"),
         "routes.r.when.schema.contains.properties.state.const", "did you mean captured?"),
        (of_route("{scope: /payments/0/state}"), "routes.r.when.scope", "contains"),
        (of_route("{scope: /cart/items/0}"), "routes.r.when.scope", "contains"),
        (of_route("{scope: /customer/loyalty/promotions/x}"), "routes.r.when.scope", "contains"),
    ],
)  # fmt: skip
def test_what_can_have_no_effect_is_a_warning(tmp_path: Path, text: str, place: str, said: str) -> None:
    [(line, path, message)] = warnings(tmp_path, text)

    assert path == place
    assert said in message
    assert line is not None


def test_a_condition_in_the_settings_is_compared_at_the_strongest_place_that_has_it(tmp_path: Path) -> None:
    rule = "{scope: /customer/billing/mail, schema: {type: string}, code: a, message: a}"
    text = (
        "callbacks: {it: {kind: validation}}\n"
        f"routes: {{r: {{callback: it, handler: rules, no_answer: approve, settings: {{rules: [{rule}]}}}}}}\n"
    )
    in_one_channel = text.replace("/mail", "/email")
    head = HEAD.replace('"2": {}', f'"2": {{routes: {{r: {{settings: {{rules: [{rule}]}}}}}}}}')
    path = tmp_path / "other.yaml"
    path.write_text(head.replace("@VERSION@", "v0") + in_one_channel)
    config = configuration.load(path, {"SECRET": SECRET})

    assert [each[:2] for each in warnings(tmp_path, text)] == [(6, "routes.r.settings.rules[0].scope")]
    assert [(each.line, each.path) for each in norce_warnings(config, build(config))] == [
        (3, "merchants.norce.channels.2.routes.r.settings.rules[0].scope")
    ]


def test_a_condition_in_an_included_file_is_named_with_that_file(tmp_path: Path) -> None:
    (tmp_path / "merchants").mkdir()
    rule = "{scope: /customer/billing/mail, schema: {type: string}, code: a, message: a}"
    settings = f"{{routes: {{r: {{settings: {{rules: [{rule}]}}}}}}}}"
    text = 'merchants:\n  norce:\n    tokens: ["${env:SECRET}"]\n    channels: {"1": ' + settings + "}\n"
    (tmp_path / "merchants" / "norce.yaml").write_text(text)
    head = HEAD.replace("@VERSION@", "v0")
    included = head.replace(head.splitlines()[2], "include: merchants/*.yaml")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"{included}callbacks: {{it: {{kind: validation}}}}\n"
        f"routes: {{r: {{callback: it, handler: rules, no_answer: approve, settings: "
        f"{{rules: [{rule.replace('/mail', '/email')}]}}}}}}\n"
    )
    config = configuration.load(path, {"SECRET": SECRET})

    [warning] = norce_warnings(config, build(config))

    assert (Path(warning.file).name, warning.line) == ("norce.yaml", 4)


@pytest.mark.parametrize("member", ["watch: /payments/0/state", "watch: /payments/state"])
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_a_watch_through_an_array_is_an_error(tmp_path: Path, member: str, version: str) -> None:
    with pytest.raises(ConfigurationInvalid, match=r"callbacks\.it\.watch: points into the array /payments"):
        warnings(tmp_path, of_callback(f"kind: hook, {member}, version: {version}", "patch"))


def test_a_notifications_scope_through_an_array_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationInvalid, match=r"callbacks\.it\.scope: points into the array /cart/items"):
        warnings(tmp_path, of_callback("kind: notification, scope: /cart/items/0/quantity"))


PAYMENTS = "{{scope: /payments, schema: {{contains: {{required: [{0}], properties: {{{0}: {1}}}}}}}}}"


@pytest.mark.parametrize(
    ("member", "schema", "warned"),
    [("state", "{const: refunded}", ["v0"]), ("upsell", "{type: object}", ["v1"]), ("reference", "true", [])],
)
def test_the_order_is_that_of_the_configured_version(
    tmp_path: Path, member: str, schema: str, warned: list[str]
) -> None:
    rule = PAYMENTS.format(member, schema)[:-1] + ", code: a, message: a}"
    text = (
        "callbacks: {it: {kind: validation}}\n"
        f"routes: {{r: {{callback: it, handler: rules, no_answer: approve, settings: {{rules: [{rule}]}}}}}}\n"
    )

    assert [version for version in ("v0", "v1") if warnings(tmp_path, text, version)] == warned


def test_a_route_that_reads_the_order_again_is_compared_with_both_orders(tmp_path: Path) -> None:
    text = of_route(PAYMENTS.format("upsell", "true"))

    assert warnings(tmp_path, text) == []
    assert len(warnings(tmp_path, text, "v1")) == 1


# --- no false warnings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when",
    [
        "{scope: /attributes/shop/tags, schema: {const: 5}}",
        "{scope: /cart/attributes/anything/at/all}",
        "{scope: /customer/loyalty/promotions, schema: {minItems: 1}}",
        "{scope: /payments, schema: {contains: {properties: {attributes: {required: [x]}}}}}",
        "{scope: /payments, schema: {contains: {properties: {our-own: {const: 1}}}}}",
        f"{{{STATUS}, schema: {{not: {{const: complete}}}}}}",
        f"{{{STATUS}, schema: {{anyOf: [{{const: complete}}, {{const: completed}}]}}}}",
        f"{{{STATUS}, schema: {{if: {{const: a}}, then: {{const: b}}}}}}",
        f'{{{STATUS}, schema: {{pattern: "^comp"}}}}',
        f"{{{STATUS}, schema: {{type: [string, 'null']}}}}",
        f"{{{STATUS}, schema: {{enum: [completed, null]}}}}",
        "{scope: /reference, schema: {const: null}}",
        "{scope: /country, schema: {enum: [SE, se, NO]}}",
        "{scope: /cart/items, schema: {items: {properties: {quantity: {type: integer}}}}}",
        "{scope: /cart/items, schema: {contains: {properties: {quantity: {const: 2.0}}}}}",
        "{scope: /total/includingVat, schema: {type: integer}}",
        "{scope: /customer/type, schema: {const: Person}}",
        "{scope: /consents, schema: {contains: {properties: {checked: {const: true}}}}}",
        "{scope: /hooks, schema: {contains: {properties: {adapterId: {const: x}}}}}",
        "{scope: /country, schema: {$ref: '#/$defs/a', $defs: {a: {properties: {x: {$ref: '#/$defs/a'}}}}}}",
        "[{scope: /country, schema: {const: SE}}, {scope: /currency, schema: {const: SEK}}]",
    ],
)
def test_a_condition_that_can_hold_is_no_warning(tmp_path: Path, when: str) -> None:
    assert warnings(tmp_path, of_route(when)) == []


@pytest.mark.parametrize(
    "members",
    ["watch: /cart, target: /cart", "watch: /reference", "watch: /cart/attributes/x", "watch: /state/currentStatus"],
)
def test_a_hook_on_a_part_that_norce_lists_is_no_warning(tmp_path: Path, members: str) -> None:
    assert warnings(tmp_path, of_callback(f"kind: hook, {members}", "patch")) == []


SHIPPED = ["config.yaml", "deploy/config.yaml", "docs/scenarios.yaml", "adapter/sandbox/demo/config.yaml"]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_a_configuration_that_we_ship_has_no_warnings(tmp_path: Path, name: str, version: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    for mark, value in {"PORT": "1", "OPERATIONS_PORT": "2", "SOCKET": "s", "STORE": "a.db"}.items():
        text = text.replace(f"@{mark}@", value)
    text = text.replace("@NORCE@", "http://127.0.0.1:1").replace("@JETSHOP@", "http://127.0.0.1:1")
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("norce:\n  environment", f"norce:\n  version: {version}\n  environment", 1))
    for secret in ("norce-token", "url-key", "jetshop-password"):
        (tmp_path / secret).write_text("a-secret-of-many-bytes-1")
    names = ("NORCE_TOKEN", "NORCE_ADAPTER_URL_KEY", "JETSHOP_PASSWORD")
    environ = dict.fromkeys(names, "a-secret-of-many-bytes-1") | {"NORCE_ADAPTER_STORE_URL": "sqlite:///a.db"}
    config = configuration.load(path, environ)
    routes = build(config)

    assert [*routes.warnings, *norce_warnings(config, routes)] == []


# --- what is said to be impossible never happens ----------------------------------------------------------------------


MAX_DEPTH = 4  # of a generated order
KINDS = ["string", "number", "integer", "boolean", "object", "array", "null"]


@st.composite
def values(draw: st.DrawFn, part: OrderPart, depth: int = 0) -> Any:
    """Generate values that an order has at a part."""
    if part.values is not None:
        return draw(st.sampled_from(part.values))
    match draw(st.sampled_from(sorted(part.kinds))):
        case "null":
            return None
        case "string":
            pattern = part.rules.get("pattern")
            return draw(st.from_regex(pattern, fullmatch=True) if pattern else st.sampled_from(["a", "completed"]))
        case "number":
            return draw(st.sampled_from([0, 1, 3] if "integer" in part.rules["type"] else [0, 1.5, 2.0, 100]))
        case "boolean":
            return draw(st.booleans())
        case "array":
            size = draw(st.integers(0, 2)) if part.items and depth < MAX_DEPTH else 0
            return [draw(values(part.items, depth + 1)) for _ in range(size)]  # type: ignore[arg-type]
    if not part.members:
        return draw(st.sampled_from([{}, {"status": "completed"}]))
    names = set(part.rules.get("required", ()))
    if depth < MAX_DEPTH:
        names |= draw(st.sets(st.sampled_from(sorted(part.members)), max_size=4))
    return {name: draw(values(part.members[name], depth + 1)) for name in sorted(names)}


@st.composite
def schemas(draw: st.DrawFn, part: OrderPart, depth: int = 0) -> Any:
    """Generate schemas that have to do with a part, with typing errors."""
    some = st.one_of(values(part), st.sampled_from(["complete", "completed", "SWE", 1, 2.5, None, True, {}, []]))
    keywords = ["const", "enum", "type", "other"]
    if depth < 2:
        keywords += ["allOf", "anyOf", "oneOf", "not", "both", "unknown"]
        keywords += ["contains", "items"] * (part.items is not None) + ["properties", "required"] * bool(part.members)
    keyword = draw(st.sampled_from(keywords))
    match keyword:
        case "const":
            return {"const": draw(some)}
        case "enum":
            return {"enum": draw(st.lists(some, min_size=1, max_size=3))}
        case "type":
            return {"type": draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True))}
        case "allOf" | "anyOf" | "oneOf":
            return {keyword: draw(st.lists(schemas(part, depth + 1), min_size=1, max_size=2))}
        case "not":
            return {"not": draw(schemas(part, depth + 1))}
        case "both":
            both = [draw(schemas(part, depth + 1)) for _ in range(2)]
            return {**both[0], **both[1]} if all(isinstance(each, dict) for each in both) else both[0]
        case "unknown":
            return draw(st.sampled_from([{"required": ["status"]}, {"type": "object", "required": ["status"]}]))
        case "contains":
            assert part.items is not None
            return {"type": "array", "contains": draw(schemas(part.items, depth + 1))}
        case "items":
            assert part.items is not None
            return {"items": draw(schemas(part.items, depth + 1))}
        case "properties" | "required":
            name = draw(st.sampled_from(sorted(part.members)))
            forced = {"type": "object", "required": [name]} if keyword == "required" else {}
            return forced | {"properties": {name: draw(schemas(part.members[name], depth + 1))}}
    return draw(
        st.sampled_from([{"pattern": "^comp"}, {"pattern": "^x"}, {"minLength": 20}, {"minimum": 2}, False, {}])
    )


@st.composite
def conditions(draw: st.DrawFn, pointer: str, version: str) -> CompiledCondition:
    part = part_at(tuple(pointer.split("/")[1:]), version)
    assert part is not None
    given = draw(schemas(part))
    if draw(st.booleans()):
        given = {"$ref": "#/$defs/it", "$defs": {"it": given}}
    try:
        return Condition(pointer, given).compile()
    except ConditionInvalid:  # it could be too slow
        reject()


POINTERS = [
    "/state/currentStatus", "/state", "/country", "/total/includingVat", "/payments", "/cart/items", "/customer",
    "/consents", "/reference", "/shippings",
]  # fmt: skip


@st.composite
def orders(draw: st.DrawFn, pointer: str, version: str) -> dict[str, Any]:
    """Generate orders of a version with the part at a pointer."""
    name = pointer.split("/")[1]
    made: dict[str, Any] = {"merchant": "norce", "channel": "1", name: draw(values(order(version).members[name]))}
    jsonschema.Draft202012Validator(schema("order")).validate(made)
    return made


@given(st.data(), st.sampled_from(POINTERS), st.sampled_from(["v0", "v1"]))
def test_a_condition_that_is_said_never_to_hold_holds_for_no_order(data: Any, pointer: str, version: str) -> None:
    part = part_at(tuple(pointer.split("/")[1:]), version)
    condition = data.draw(conditions(pointer, version))
    if part is not None and any(finding.never for finding in compare(condition.schema, part)):
        for _ in range(3):
            assert condition.evaluate(data.draw(orders(pointer, version))).result is Result.NOT_MATCHED


@given(
    st.data(), st.sampled_from([("/state/currentStatus",) * 2, ("/state", "/state/currentStatus"), ("/country",) * 2])
)
def test_conditions_that_are_said_to_exclude_each_other_hold_together_for_no_order(
    data: Any, pointers: tuple[str, str]
) -> None:
    both = [data.draw(conditions(pointer, "v0")) for pointer in pointers]
    if exclude(*both, version="v0"):
        for _ in range(3):
            made = data.draw(orders(pointers[0], "v0"))
            assert {condition.evaluate(made).result for condition in both} != {Result.MATCHED}


@pytest.mark.parametrize("name", ["order-checkout", "order-completed"])
def test_every_value_of_a_sample_order_fits(name: str) -> None:
    sample = json.loads((ROOT / "adapter" / "sandbox" / "demo" / "orders" / f"{name}.json").read_text("utf-8"))

    assert order("v0").fits(sample)
