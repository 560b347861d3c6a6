"""Schemas, patterns and values that are meant to fetch, to hang or to crash the process.

Each attack runs in a process of its own with a hard limit, since nothing in the same process could interrupt it: the
engine and Python's regular expressions both hold the interpreter. A limit that is reached, or a crash, fails the test.
"""

import json
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HARD_LIMIT = 120  # seconds for a whole batch. The slowest takes two or three on an idle machine; a hang takes hours.

PRELUDE = """
import json, sys, threading
from adapter.conditions import Condition, ConditionInvalid
from adapter.orders import MAX_DEPTH, NotAnOrder, decode

answers = {}

def attack(name, schema, *values, scope="/value"):
    try:
        condition = Condition(scope, schema).compile()
    except ConditionInvalid as refused:
        answers[name] = refused.code
        return
    evaluations = [condition.evaluate({"value": value}) for value in values]
    answers[name] = " ".join(evaluation.code or "matched" for evaluation in evaluations) or "compiled"

def nested(levels, leaf=1, wrap=lambda inner: {"a": inner}):
    for _ in range(levels):
        leaf = wrap(leaf)
    return leaf

def in_list(inner):
    return [inner]
"""


def run(attacks: str) -> dict[str, str]:
    """Run the attacks in a process; return for each the code of its refusal or of its evaluations."""
    script = PRELUDE + textwrap.dedent(attacks) + "\nprint(json.dumps(answers))"
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, capture_output=True, text=True, timeout=HARD_LIMIT, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    answers: dict[str, str] = json.loads(process.stdout)
    return answers


# Fetching ----------------------------------------------------------------------------------------------------------


@contextmanager
def trap() -> Iterator[tuple[str, list[str]]]:
    """A server that answers every request with the schema `true` and remembers it."""
    requests: list[str] = []

    class Trap(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Trap) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", requests
        finally:
            server.shutdown()
            thread.join()


def test_nothing_is_ever_fetched_from_the_network() -> None:
    with trap() as (address, requests):
        answers = run(f"""
            address = {address!r}
            attack("ref", {{"$ref": address + "/ref"}}, 1)
            attack("ref with a fragment", {{"$ref": address + "/ref#/$defs/a"}}, 1)
            attack("ref in an unused definition", {{"$defs": {{"a": {{"$ref": address + "/unused"}}}}}}, 1)
            attack("ref that the value does not reach", {{"properties": {{"a": {{"$ref": address + "/a"}}}}}}, 1)
            attack("ref relative to an id", {{"$id": address + "/base", "$ref": "other"}}, 1)
            attack("ref below another id", {{"items": {{"$id": address + "/x/", "items": {{"$ref": "y"}}}}}}, [[1]])
            attack("ref in contentSchema", {{"contentSchema": {{"$ref": address + "/content"}}}}, "1")
            attack("ref in an unknown keyword", {{"x-mine": {{"$ref": address + "/mine"}}}}, 1)
            attack("ref to an unknown keyword",
                   {{"$ref": "#/x-mine", "x-mine": {{"$ref": address + "/mine"}}}}, 1)
            attack("dynamic ref", {{"$dynamicRef": address + "/dynamic#a"}}, 1)
            attack("dialect", {{"$schema": address + "/dialect"}}, 1)
            attack("inner dialect", {{"$defs": {{"a": {{"$id": "a", "$schema": address + "/dialect"}}}}}}, 1)
            attack("id", {{"$id": address + "/id", "type": "integer"}}, 1)
            attack("value", {{"const": {{"$ref": address + "/value"}}}}, {{"$ref": address + "/value"}})
            attack("schema in the value", True, {{"$schema": address + "/value", "$ref": address + "/value"}})
        """)
        while_attacked = list(requests)
        urllib.request.urlopen(f"{address}/control").close()

    assert answers == {
        "ref": "ref_remote",
        "ref with a fragment": "ref_remote",
        "ref in an unused definition": "ref_remote",
        "ref that the value does not reach": "ref_remote",
        "ref relative to an id": "ref_remote",
        "ref below another id": "ref_remote",
        "ref in contentSchema": "ref_remote",
        "ref in an unknown keyword": "matched",
        "ref to an unknown keyword": "ref_remote",
        "dynamic ref": "dynamic_ref",
        "dialect": "dialect",
        "inner dialect": "dialect",
        "id": "matched",
        "value": "matched",
        "schema in the value": "matched",
    }
    assert while_attacked == []
    assert requests == ["/control"]  # the trap does work


def test_no_file_is_ever_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"const": "TOPSECRET"}')

    answers = run(f"""
        opened = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        attack("file", {{"$ref": {secret.as_uri()!r}}}, 1)
        attack("file in an unused definition", {{"$defs": {{"a": {{"$ref": {secret.as_uri()!r}}}}}}}, 1)
        attack("path", {{"$ref": {str(secret)!r}}}, 1)
        attack("path relative to a directory", {{"$id": {tmp_path.as_uri() + "/"!r}, "$ref": "secret.json"}}, 1)
        try:
            Condition("/value", {{"$ref": {secret.as_uri()!r}}}).compile()
        except ConditionInvalid as refused:
            answers["message"] = str("TOPSECRET" in str(refused))
        answers["opened"] = str({str(secret)!r} in opened)
    """)

    assert answers == {
        "file": "ref_remote",
        "file in an unused definition": "ref_remote",
        "path": "ref_remote",
        "path relative to a directory": "ref_remote",
        "message": "False",
        "opened": "False",
    }


# Fan-out and recursion ---------------------------------------------------------------------------------------------


def test_schemas_that_multiply_through_references_are_refused() -> None:
    answers = run("""
        def laughs(levels, keyword="allOf"):
            refs = lambda level: [{"$ref": f"#/$defs/d{level + 1}"}] * 2
            definitions = {f"d{level}": {keyword: refs(level)} for level in range(levels)}
            return {"$defs": definitions | {f"d{levels}": {"type": "string"}}, "$ref": "#/$defs/d0"}

        for keyword in "allOf", "anyOf", "oneOf", "prefixItems":
            attack(f"{keyword}, 30 levels", laughs(30, keyword), 1)
        attack("few levels", laughs(8), 1, "a")
        wide = {"$defs": {"a": {"enum": list(range(150))}}, "anyOf": [{"$ref": "#/$defs/a"}] * 150}
        attack("one large definition, often", wide, -1)
        alias = ["x"]
        for _ in range(40):
            alias = [alias] * 10
        attack("a document that names its own parts", {"enum": alias}, 1)
        endless = []
        endless += [endless, endless]
        attack("a document that contains itself", {"enum": endless}, 1)
    """)

    assert answers.pop("few levels") == "schema matched"
    assert answers.pop("a document that contains itself") in ("expansion", "too_deep")
    assert len(answers) == 6
    assert set(answers.values()) == {"expansion"}


def test_schemas_that_return_to_the_same_value_are_refused() -> None:
    answers = run("""
        attack("itself", {"$ref": "#"}, 1)
        attack("itself twice", {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}, 1)
        attack("its negation", {"not": {"$ref": "#"}}, 1)
        attack("its condition", {"if": {"$ref": "#"}, "then": False}, 1)
        attack("in turn", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, 1)
        attack("an anchor", {"$anchor": "a", "anyOf": [{"$ref": "#a"}]}, 1)
        attack("by its id", {"$id": "http://a/b", "oneOf": [{"$ref": "b"}]}, 1)
        attack("deep inside", {"items": {"properties": {"a": {"allOf": [{"$ref": "#/items/properties/a"}]}}}}, [])
        attack("a dependency", {"dependentSchemas": {"a": {"$ref": "#"}}}, {"a": 1})
        attack("a dependency of old", {"dependencies": {"a": {"$ref": "#"}}}, {"a": 1})
        for keyword in "allOf", "anyOf", "oneOf":
            refs = lambda i: [{"$ref": f"#/$defs/d{(i + step) % 12}"} for step in range(1, 12)]
            clique = {f"d{i}": {keyword: refs(i)} for i in range(12)}
            attack(f"twelve, each to all others, {keyword}", {"$defs": clique, "$ref": "#/$defs/d0"}, 1)
    """)

    assert len(answers) == 13
    assert set(answers.values()) == {"recursive_ref"}


def test_recursion_into_the_value_is_evaluated_fast_or_refused() -> None:
    """The first half would take 2 to the power of 64 steps if the engine did not remember results."""
    answers = run("""
        again = {"$ref": "#"}
        deep, deep_list = nested(64), nested(64, wrap=in_list)
        deepest = nested(MAX_DEPTH - 1), nested(MAX_DEPTH - 1, wrap=in_list)

        members = {"type": "object", "properties": {"a": again}}
        attack("plain", {"properties": {"a": again}}, deep, *deepest)
        attack("allOf", {"type": "object", "allOf": [members, members]}, deep)
        attack("anyOf", {"type": "object", "anyOf": [members, members]}, deep)
        attack("oneOf", {"type": "object", "oneOf": [members, members]}, deep)
        attack("if", {"type": "object", "if": members, "then": members, "else": members}, deep)
        attack("not", {"type": "object", "not": {"not": members}, "allOf": [members]}, deep)
        attack("patterns", {"type": "object", "patternProperties": {"a": again, "^a": again}}, deep)
        attack("lists", {"type": "array", "items": again, "contains": again}, deep_list)
        attack("unevaluated members", {"type": "object", "allOf": [members], "unevaluatedProperties": again}, deep)
        attack("unevaluated items", {"type": "array", "anyOf": [{"prefixItems": [again]}, {"contains": again}],
                                     "unevaluatedItems": False}, deep_list)
        attack("unique", {"type": "array", "uniqueItems": True, "items": again}, deep_list)

        def ring(length):
            refs = lambda i: [{"properties": {"a": {"$ref": f"#/$defs/d{(i + 1) % length}"}}}] * 2
            definitions = {f"d{i}": {"type": "object", "anyOf": refs(i)} for i in range(length)}
            return {"$defs": definitions, "$ref": "#/$defs/d0"}

        refs = [{"properties": {"a": {"$ref": f"#/$defs/d{i}"}}} for i in range(10)]
        clique = {f"d{i}": {"type": "object", "anyOf": refs} for i in range(10)}
        attack("a ring of 13", ring(13), deep)
        attack("a ring of 24", ring(24), deep)
        attack("ten, each to all", {"$defs": clique, "$ref": "#/$defs/d0"}, deep)
        many = [{"type": "object", "additionalProperties": again}] * 500 + [{"const": str(i)} for i in range(1500)]
        attack("many ways back for many scalars", {"anyOf": many}, {str(i): -1 for i in range(50_000)})
    """)

    assert answers.pop("plain") == "matched matched matched"
    assert answers.pop("a ring of 24") == "too_deep"
    assert answers.pop("a ring of 13") == "expansion"
    assert answers.pop("ten, each to all") == "expansion"
    assert answers.pop("many ways back for many scalars") == "expansion"
    assert answers.pop("unique") == "unique_items"
    refused = ("patterns", "lists", "unevaluated members", "unevaluated items")
    assert {answers.pop(each) for each in refused} == {"too_slow"}
    assert len(answers) == 5
    assert set(answers.values()) == {"schema"}


def test_the_longest_way_through_a_recursive_schema_does_not_crash_a_thread() -> None:
    answers = run("""
        def chain(length, last):
            step = lambda i: {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]}
            return {"$defs": {f"d{i}": step(i) for i in range(length)} | {f"d{length}": last}, "$ref": "#/$defs/d0"}

        back = {"$ref": "#/$defs/d0"}
        schemas = {"members": chain(3, {"additionalProperties": back}), "lists": chain(3, {"items": back})}

        def all_of_them():
            for name, schema in schemas.items():
                attack(name, schema, nested(MAX_DEPTH - 1), nested(MAX_DEPTH - 1, wrap=in_list))

        thread = threading.Thread(target=all_of_them)
        thread.start()
        thread.join()
        attack("a long way", chain(30, {"items": back}))
    """)

    assert answers == {"members": "matched matched", "lists": "matched matched", "a long way": "too_slow"}


def test_nested_unevaluated_keywords_are_refused() -> None:
    """Eighteen levels of the first, one kilobyte, took ten seconds."""
    answers = run("""
        def tower(levels, keyword, wrap, leaf):
            for _ in range(levels):
                leaf = wrap(leaf) | {keyword: False}
            return leaf

        members, items = {"patternProperties": {"a": True}}, {"contains": True}
        for name, wrap in {
            "allOf": lambda s: {"allOf": [s]},
            "anyOf": lambda s: {"anyOf": [s]},
            "oneOf": lambda s: {"oneOf": [s]},
            "if": lambda s: {"if": s},
            "allOf twice": lambda s: {"allOf": [{"allOf": [s]}]},
        }.items():
            attack(name, tower(14, "unevaluatedProperties", wrap, members), {f"a{i}": 1 for i in range(10)})
            attack(name + ", items", tower(14, "unevaluatedItems", wrap, items), [1] * 10)
        attack("few levels", tower(1, "unevaluatedProperties", lambda s: {"allOf": [s]}, members), {"a": 1}, {"b": 1})
        leaf = True
        for _ in range(14):
            leaf = {"allOf": [{"unevaluatedProperties": leaf}], "unevaluatedProperties": False}
        attack("one within the other", leaf, nested(20))
    """)

    assert answers.pop("few levels") == "matched schema"
    assert len(answers) == 11
    assert set(answers.values()) == {"too_slow"}


# Depth -------------------------------------------------------------------------------------------------------------


def test_deep_schemas_are_refused() -> None:
    answers = run("""
        def deep(levels, wrap):
            schema = True
            for _ in range(levels):
                schema = wrap(schema)
            return schema

        for levels in 65, 1_000, 100_000:
            attack(f"items {levels}", deep(levels, lambda s: {"items": s}), [])
            attack(f"allOf {levels}", deep(levels, lambda s: {"allOf": [s]}), 1)
            attack(f"not {levels}", deep(levels, lambda s: {"not": s}), 1)
            attack(f"const {levels}", {"const": deep(levels, in_list)}, [])
        for levels in 65, 1_000:
            chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(levels)}
            attack(f"references {levels}", {"$defs": chain | {f"d{levels}": True}, "$ref": "#/$defs/d0"}, 1)
            unknown = {f"x{i}": {"$ref": f"#/x{i + 1}"} for i in range(levels)}
            attack(f"references elsewhere {levels}", unknown | {f"x{levels}": True, "$ref": "#/x0"}, 1)
    """)

    assert len(answers) == 16
    assert {name for name, answer in answers.items() if answer != "too_deep"} == set()


def test_deep_orders_are_refused_before_a_condition_sees_them() -> None:
    answers = run("""
        for levels in 201, 1_000, 100_000:
            for name, begin, end in ("lists", b"[", b"]"), ("objects", b'{"a":', b"}"), ("both", b'[{"a":', b"}]"):
                try:
                    decode(begin * levels + b"1" + end * levels)
                except NotAnOrder as error:
                    answers[f"{name} {levels}"] = "refused"
    """)

    assert len(answers) == 9


# Regular expressions -----------------------------------------------------------------------------------------------


def test_patterns_that_backtrack_elsewhere_are_evaluated_fast() -> None:
    answers = run("""
        a = "a" * 50_000 + "!"
        for pattern in "^(a+)+$", "^(a|a)*$", "^(a|aa)+$", "^(a*)*b$", "(a*a*)*c", "^([a-zA-Z]+)*$":
            attack(pattern, {"pattern": pattern}, a)
        mail = r"^([a-zA-Z0-9_.-])+@(([a-zA-Z0-9-])+.)+([a-zA-Z0-9]{2,4})+$"
        attack("mail", {"pattern": mail}, "a@" + "a." * 25_000 + "!", "someone@example.com")
        attack("names", {"patternProperties": {"^(a+)+$": False}, "additionalProperties": False}, {a: 1})
        attack("names, unevaluated", {"patternProperties": {"^(a+)+$": True}, "unevaluatedProperties": False}, {a: 1})
        attack("names of names", {"propertyNames": {"pattern": "^(a+)+$"}}, {a: 1})
        attack("negated", {"not": {"pattern": "^(a+)+$"}}, a)
    """)

    assert answers.pop("mail") == "schema matched"
    assert answers.pop("negated") == "matched"
    assert len(answers) == 9
    assert set(answers.values()) == {"schema"}


def test_patterns_too_large_to_be_fast_are_refused() -> None:
    answers = run(r"""
        for pattern in (
            "(?:a{1,1000}){1,1000}", "a{1000000}", "(((a{30}){30}){30}){30}", r"\p{L}{1000}", r"(\w{100}){100}",
            "(" * 500 + ")" * 500, "^.*@.{1,40}$",
            "[01]*1[01]{400}2", "(?:0|1)*1(?:0|1){2000}[23]",
            "(?=a)b", "(?<=a)b", r"(a)\1", r"(?<n>a)\k<n>", "(a", "[b-a]", "*",
        ):
            attack(pattern, {"pattern": pattern}, "a")
    """)

    assert len(answers) == 16
    assert set(answers.values()) == {"pattern_unsupported"}


def test_patterns_that_remember_many_positions_are_refused() -> None:
    """The engine took 0.7 s for a MiB with the first."""
    answers = run(r"""
        for pattern in (
            "[01]*1[01]{100}2", "1[01]{12}2", "[01]*1" + "[01]" * 100 + "2", "(0|1)*1(0|1){11}[23]", "a.{12}b",
            "^.*@.{1,40}$", r"\d.{20}\d", r"\p{Lu}.{12}!", "(a|b)*a" + "(a|b)" * 12 + "c", r"(?:\s|\S)*\w(?:.|x){14}!",
        ):
            attack(pattern, {"pattern": pattern}, "a")
    """)

    assert len(answers) == 10
    assert set(answers.values()) == {"pattern_unsupported"}


def test_patterns_that_remember_few_positions_decide_the_largest_text() -> None:
    answers = run(r"""
        import random
        bits = format(random.Random(1).getrandbits(2**20), "b")
        parts = [bits[i:i + 1000] for i in range(0, 2**20, 1000)]
        attack("one text", {"pattern": "[01]*1[01]{9}2"}, bits)
        attack("in parts", {"items": {"pattern": "[01]*1[01]{9}2"}}, parts)
        attack("as names", {"propertyNames": {"pattern": "[01]*1[01]{9}2"}}, dict.fromkeys(parts))
        attack("many", {"anyOf": [{"pattern": f"[01]*1[01]{{{i % 9}}}2"} for i in range(20)]}, bits)
        for pattern in (
            "^.{1,40}$", "(.*a){12}b", r"^\p{L}+$", "^[^@]+@[^@]{1,40}[.][a-z]{2,10}$", r"^\d{6,8}-?\d{4}$",
            "^[A-Z]{2}-?[0-9]{9,12}$", "^(?:[a-z]{1,63}[.]){1,8}[a-z]{2,63}$", r"\w+\s\w{1,20}$", "a{1,1000}",
            "^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$", "^[0-9]{3} ?[0-9]{2}$", "^(SE)?[0-9]{10}$", r"\bfoo\b",
            "^(?<name>a|b)+?$", r"[\]\-a-z\d]{3,}x", "(^|,)x?(ab?){40}", "",
        ):
            attack("harmless " + pattern, {"not": {"not": {"pattern": pattern}}}, bits)
    """)

    assert {answers.pop("harmless ")} == {"matched"}
    few = {name: answers.pop(name) for name in ("one text", "in parts", "as names", "many")}
    assert few == {"one text": "schema", "in parts": "schema", "as names": "schema", "many": "too_slow"}
    assert len(answers) == 16
    assert set(answers.values()) == {"schema"}


# Large values ------------------------------------------------------------------------------------------------------


def test_large_values_are_evaluated_fast() -> None:
    answers = run("""
        numbers = list(range(150_000))
        unique = {"uniqueItems": True, "items": {"type": ["number", "string", "boolean", "null"]}}
        attack("unique numbers", unique, numbers, numbers + [1.0])
        attack("unique mixture", unique, [x for i in range(30_000) for x in (i, str(i), i + 0.5)] + [None, True])
        attack("unique fractions", unique, [i * 1e300 for i in range(100_000)])
        attack("contains", {"contains": {"properties": {"quantity": {"const": -1}}, "required": ["quantity"]}},
               [{"quantity": i} for i in range(70_000)], [{"quantity": 1e99}] * 50_000)
        price = {"properties": {"includingVat": {"multipleOf": 0.01}}}
        attack("fractions", {"items": {"properties": {"price": price}}},
               *([{"price": {"includingVat": each}}] * 30_000 for each in (1e308, 19.99, 19.999, 10000000000000.25)))
        attack("members", {"patternProperties": {"^a": True}, "unevaluatedProperties": False},
               {f"a{i}": 1 for i in range(10_000)})
        attack("a long text", {"minLength": 1, "pattern": "b$"}, "a" * 100_000)
    """)

    assert answers == {
        "unique numbers": "matched schema",
        "unique mixture": "matched",
        "unique fractions": "matched",
        "contains": "schema schema",
        "fractions": "matched matched schema matched",
        "members": "matched",
        "a long text": "schema",
    }


def test_schemas_that_are_slow_on_large_values_are_refused() -> None:
    """A thousand alternatives on a quarter of a million items took more than twelve seconds."""
    answers = run("""
        options = {"anyOf": [{"const": i} for i in range(1000)]}
        attack("alternatives", {"contains": options})
        attack("objects", {"contains": {"enum": [{"a": i} for i in range(9000)]}})
        attack("numbers", {"items": {"enum": [i / 4 for i in range(100)]}})
        attack("fractions", {"items": {"multipleOf": 0.01}})
        attack("names", {"patternProperties": {f"a{i}": True for i in range(300)}})
        attack("unique items of many arrays", {"items": {"uniqueItems": True, "items": {"type": "string"}}})
        attack("limits of bare numbers", {"items": {"maximum": 10}})
        attack("equality with bare numbers", {"contains": {"const": 1}})
        attack("fractions of members with short names", {"items": {"properties": {"vatRate": {"multipleOf": 0.01}}}})
        attack("an odd step", {"items": {"properties": {"quantity": {"multipleOf": 0.03}}}})
        attack("patterns", {"allOf": [{"pattern": f"a{i}"} for i in range(12)]})
        texts = {"uniqueItems": True, "items": {"type": "string"}}
        attack("recursive and unique", {"additionalProperties": {"$ref": "#"}, **texts})
        tags = {"items": {"properties": {"tags": texts}}}
        attack("unique tags", tags, [{"tags": ["a", "b"]}], [{"tags": ["a", "a"]}])
        attack("alternatives for one value", options, -1, 999)
        attack("many numbers for one value", {"enum": [i / 4 for i in range(19_000)]}, 0.25, 0.3)
    """)

    assert answers.pop("alternatives for one value") == "schema matched"
    assert answers.pop("many numbers for one value") == "matched schema"
    assert answers.pop("unique tags") == "matched schema"
    assert len(answers) == 12
    assert set(answers.values()) == {"too_slow"}


def test_numbers_beyond_64_bits_are_compared_fast() -> None:
    """The engine's own `uniqueItems` took twelve seconds for ten thousand of them."""
    answers = run("""
        unique = {"uniqueItems": True, "items": {"type": "number"}}
        attack("just beyond 64 bits", unique, [2**63 + i for i in range(40_000)])
        attack("one hash for all", unique, [(2**61 - 1) * i for i in range(40_000)])
        attack("4000 digits", unique, [10**4000 + i for i in range(250)])
        price = {"properties": {"includingVat": {"multipleOf": 0.01}}}
        attack("multiples", {"items": {"properties": {"price": price}}},
               [{"price": {"includingVat": 10**4000 + i}} for i in range(250)])
        limits = {"items": {"properties": {"quantity": {"minimum": -5, "maximum": 9}}}}
        attack("limits", limits, [{"quantity": -(10**20) - i} for i in range(50_000)])
        attack("far limits", {"properties": {"a": {"maximum": 10**400}}}, {"a": 10**400}, {"a": 10**400 + 1})
        attack("one", {"const": 1}, 10**4000)
        attack("one in the schema", {"const": 10**400}, 1, 10**400, 10**400 + 1)
    """)

    assert answers.pop("one in the schema") == "schema matched schema"
    assert answers.pop("one") == "schema"
    assert answers.pop("limits") == "schema"
    assert answers.pop("far limits") == "matched schema"
    assert len(answers) == 4
    assert set(answers.values()) == {"matched"}
