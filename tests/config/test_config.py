"""`adapter.config`: a complete configuration, or every problem with its line and the allowed values."""

import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from adapter.config import (
    Config,
    ConfigProblem,
    ConfigurationInvalid,
    load,
    read_settings,
)
from adapter.config.model import NotificationCallbackConfig, ValidationCallbackConfig, merged
from adapter.config.problems import Reference
from adapter.config.yaml_source import LARGEST_FILE_BYTES
from adapter.identifiers import Channel
from adapter.plugin import Secret, Settings, Url
from tests import ROOT
from tests.config.reference import generated

CANARY = "canary-9f8e7d6c5b4a"
ENVIRON = {
    "NORCE_TOKEN": f"{CANARY}-token",
    "NORCE_ADAPTER_URL_KEY": f"{CANARY}-url-key",
    "NORCE_ADAPTER_OPERATIONS_TOKEN": f"{CANARY}-operations",
    "NORCE_ADAPTER_SECRET": f"{CANARY}-header",
    "NORCE_ADAPTER_STATIC": f"{CANARY}-static",
    "JETSHOP_PASSWORD": f"{CANARY}-password",
    "SHORT": "too-short",
    "EMPTY": "",
    "PORT": "9090",
}

# Small and valid; the tables below change one piece of it.
VALID = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
merchants:
  norce:
    tokens: ["${env:NORCE_TOKEN}"]
    routes: {}
    channels:
      "1":
        routes: {}
senders: {signed_urls: {keys: {k1: "${env:NORCE_ADAPTER_URL_KEY}"}}}
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus}
  order-rules: {kind: validation}
routes:
  export: {callback: order-status, handler: log}
  refuse: {callback: order-rules, handler: rules, no_answer: approve}
"""


REFERENCE = ROOT / "config.yaml"


def everything_commented_in(text: str) -> str:
    """Return the reference with its commented keys, those without a space after the hash, uncommented."""
    return re.sub(r"^( *)#(?=[^\s#])", r"\1", text, flags=re.MULTILINE)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def read(file: Path, text: str, environ: Mapping[str, str] = ENVIRON) -> Config:
    file.write_text(text, encoding="utf-8")
    return load(file, environ)


def problems_of(file: Path, text: str | bytes, environ: Mapping[str, str] = ENVIRON) -> tuple[ConfigProblem, ...]:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationInvalid) as raised:
        load(file, environ)
    return raised.value.problems


def changed(old: str, new: str) -> str:
    assert VALID.count(old) == 1, old
    return VALID.replace(old, new)


# --- a valid file ---------------------------------------------------------------------------------------------------


def test_a_missing_key_has_its_default(file: Path) -> None:
    config = read(file, VALID)

    assert (config.server.host, config.server.port) == ("0.0.0.0", 8080)
    assert config.server.receive_timeout == timedelta(seconds=10)
    assert (config.operations.host, config.operations.port, config.operations.token) == ("127.0.0.1", 8081, None)
    assert config.store.url == "sqlite:///data/adapter.db"
    assert (config.norce.environment, config.norce.base_url) == ("playground", None)
    assert (config.dispatcher.slots, config.dispatcher.grace) == (32, timedelta(seconds=20))
    assert config.merchants["norce"].slug == "norce"
    assert config.routes["export"].refetch
    assert config.routes["export"].retry.schedule[0] == timedelta(seconds=5)
    assert config.routes["export"].retry.schedule[-1] == timedelta(days=1)


def test_a_callback_has_the_type_of_its_kind(file: Path) -> None:
    callbacks = read(file, VALID).callbacks

    assert callbacks["order-status"] == NotificationCallbackConfig(scope="/state/currentStatus", schema=True)
    assert callbacks["order-rules"] == ValidationCallbackConfig(deadline=timedelta(seconds=2))
    assert [callback.kind for callback in callbacks.values()] == ["notification", "validation"]


def test_a_configuration_cannot_be_changed(file: Path) -> None:
    config = read(file, VALID)

    with pytest.raises(AttributeError):
        config.server.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("500ms", timedelta(milliseconds=500)),
        ("2s", timedelta(seconds=2)),
        ("5m", timedelta(minutes=5)),
        ("2h", timedelta(hours=2)),
        ("1d", timedelta(days=1)),
    ],
)
def test_a_duration_is_written_with_its_unit(file: Path, text: str, duration: timedelta) -> None:
    config = read(file, changed("handler: log", f"handler: log, retry: {{schedule: [{text}]}}"))

    assert config.routes["export"].retry.schedule == (duration,)


def test_yaml_is_1_2(file: Path) -> None:
    text = changed("handler: log", "handler: log, settings: {a: NO, b: 012, c: 0o14, d: 2024-01-01, e: 1e3, f: ~}")

    found = read(file, text).routes["export"].settings

    assert found == {"a": "NO", "b": 12, "c": 12, "d": "2024-01-01", "e": 1000.0, "f": None}


def test_yaml_is_1_2_even_if_the_file_declares_another_version(file: Path) -> None:
    config = read(file, "%YAML 1.1\n---\n" + changed("handler: log", "handler: log, settings: {a: NO}"))

    assert config.routes["export"].settings == {"a": "NO"}


def test_a_name_of_digits_need_not_be_quoted(file: Path) -> None:
    assert list(read(file, changed('"1":', "1:")).merchants["norce"].channels) == ["1"]


def test_an_alias_has_the_value_of_its_anchor(file: Path) -> None:
    text = changed("handler: log", "handler: log, settings: {a: &it {b: 1}, c: *it}")

    assert read(file, text).routes["export"].settings == {"a": {"b": 1}, "c": {"b": 1}}


# --- references -----------------------------------------------------------------------------------------------------


def test_a_secret_comes_from_the_environment_or_from_a_file_beside_the_configuration(file: Path) -> None:
    (file.parent / "secret").write_text("from-a-file\n")

    config = read(file, changed('["${env:NORCE_TOKEN}"]', '["${env:NORCE_TOKEN}", "${file:secret}"]'))

    assert config.merchants["norce"].tokens == (Secret(ENVIRON["NORCE_TOKEN"]), Secret("from-a-file"))


def test_only_the_last_line_break_of_a_secret_file_is_removed(file: Path) -> None:
    (file.parent / "secret").write_bytes(b" two\nlines of text \r\n")

    config = read(file, changed("${env:NORCE_ADAPTER_URL_KEY}", "${file:secret}"))

    assert config.senders.signed_urls is not None
    assert config.senders.signed_urls.keys["k1"].reveal() == " two\nlines of text "


@pytest.mark.parametrize("token", ["dör", "two\nlines", " led", "trailed "], ids=repr)
def test_a_token_that_no_header_can_hold_is_a_problem_without_its_value(file: Path, token: str) -> None:
    (file.parent / "secret").write_text(f"{CANARY}{token}" if token != " led" else token + CANARY)

    with pytest.raises(ConfigurationInvalid) as refused:
        read(file, changed("${env:NORCE_TOKEN}", "${file:secret}"))

    (problem,) = refused.value.problems
    assert (problem.line, problem.path) == (4, "merchants.norce.tokens[0]")
    assert "visible ASCII" in problem.message
    assert CANARY not in str(problem)


def test_other_values_may_be_references_too(file: Path) -> None:
    text = changed("an_adapter", '"${env:NORCE_TOKEN}"') + 'server: {port: "${env:PORT}"}\n'

    config = read(file, text)

    assert config.adapter.id == ENVIRON["NORCE_TOKEN"]
    assert config.server.port == 9090


def test_no_repr_of_a_configuration_shows_a_referenced_value(file: Path) -> None:
    text = changed("an_adapter", '"${env:NORCE_TOKEN}"').replace(
        "handler: log", 'handler: log, settings: {password: "${env:JETSHOP_PASSWORD}", list: ["${env:NORCE_TOKEN}"]}'
    )

    config = read(file, text)

    assert CANARY in config.adapter.id
    assert CANARY not in repr(config) + str(config)
    assert "${env:JETSHOP_PASSWORD}" in repr(config)


# --- problems -------------------------------------------------------------------------------------------------------

SETTINGS = "handler: log, settings: "
PROBLEMS: dict[str, tuple[str, str, int, str, str]] = {
    # what is changed, into what, and the line, the path and the words of the problem
    "unknown key": (
        "adapter: {id",
        "adapter: {idd: x, id",
        1,
        "adapter.idd",
        "allowed: id or public_url; did you mean id",
    ),
    "unknown section": ("senders:", "sender: {}\nsenders:", 9, "sender", "did you mean senders?"),
    "missing key": ("id: an_adapter, ", "", 1, "adapter.id", "is missing; it must be text of 1 to 64 characters"),
    "missing section": (
        "adapter: {id: an_adapter, public_url: https://adapter.example}",
        "server: {}",
        1,
        "adapter",
        "is missing; it must be a mapping",
    ),
    "empty text": ("an_adapter", '""', 1, "adapter.id", "text of 1 to 64 characters"),
    "empty value": ("an_adapter", "", 1, "adapter.id", "text of 1 to 64 characters"),
    "number for text": ("an_adapter", "5", 1, "adapter.id", ": put it in quotes"),
    "not an address": ("https://adapter.example", "ftp://x", 1, "adapter.public_url", "must be an https:// address"),
    "number for an address": (
        "https://adapter.example",
        "5",
        1,
        "adapter.public_url",
        "an https:// address",
    ),
    "no public address to sign": (
        ", public_url: https://adapter.example",
        "",
        1,
        "adapter.public_url",
        "is missing; signed URLs",
    ),
    "nothing for a public address to sign": (
        "public_url: https://adapter.example",
        "public_url: null",
        1,
        "adapter.public_url",
        "is missing; signed URLs",
    ),
    "port too large": (
        "senders:",
        "server: {port: 65536}\nsenders:",
        9,
        "server.port",
        "a whole number, at least 0 and at most 65535",
    ),
    "text for a number": (
        "senders:",
        "server: {port: many}\nsenders:",
        9,
        "server.port",
        "a whole number, at least 0 and at most 65535",
    ),
    "one port twice": ("senders:", "operations: {port: 8080}\nsenders:", 9, "operations.port", "another port"),
    "socket path too long": (
        "senders:",
        f"operations: {{socket: {'d/' * 60}}}\nsenders:",
        9,
        "operations.socket",
        "is too long with 120 bytes: a Unix socket's path has at most 107 bytes, so give a shorter one",
    ),
    "socket path with a NUL": ("senders:", 'operations: {socket: "a\\0b"}\nsenders:', 9, "operations.socket", "path"),
    "bare number for a duration": (
        "senders:",
        "norce: {timeout: 5}\nsenders:",
        9,
        "norce.timeout",
        "such as 500ms, 2s, 5m, 2h or 1d, from 100ms to 1m: write its unit",
    ),
    "duration too long": (
        "kind: validation",
        "kind: validation, deadline: 11s",
        12,
        "callbacks.order-rules.deadline",
        "from 100ms to 10s",
    ),
    "duration too short": (
        "handler: log",
        "handler: log, timeout: 99ms",
        14,
        "routes.export.timeout",
        "from 100ms to 10m",
    ),
    "duration without sense": ("handler: log", "handler: log, timeout: soon", 14, "routes.export.timeout", "2s, 5m"),
    "item of a list": (
        "handler: log",
        "handler: log, retry: {schedule: [1s, 2x]}",
        14,
        "routes.export.retry.schedule[1]",
        "a duration such as 500ms",
    ),
    "not one of": (
        "senders:",
        "norce: {environment: prod}\nsenders:",
        9,
        "norce.environment",
        "must be playground, stage or production",
    ),
    "yes is text": (
        "handler: log",
        "handler: log, refetch: yes",
        14,
        "routes.export.refetch",
        "must be true or false",
    ),
    "mapping for a list": (
        'tokens: ["${env:NORCE_TOKEN}"]',
        "tokens: {}",
        4,
        "merchants.norce.tokens",
        "a list of 1 to 2 items, each a secret by reference: ${env:NAME} or ${file:PATH}",
    ),
    "no token": ('tokens: ["${env:NORCE_TOKEN}"]', "tokens: []", 4, "merchants.norce.tokens", "a list of 1 to 2 items"),
    "text for a mapping": (
        '      "1":\n        routes: {}',
        "      x: y",
        7,
        "merchants.norce.channels.x",
        "must be a mapping",
    ),
    "no channel": ('\n      "1":\n        routes: {}', " {}", 6, "merchants.norce.channels", "of at least 1 entry"),
    "name that cannot be a header": ('"1"', '"ö 1"', 7, 'merchants.norce.channels["ö 1"]', "visible ASCII"),
    "no slug": (
        "  norce:\n",
        "  Norce_AB:\n",
        3,
        "merchants.Norce_AB.slug",
        "is missing, and the merchant's name cannot replace it",
    ),
    "slug that is no host name": (
        "    routes: {}\n    ch",
        "    slug: a.b\n    ch",
        5,
        "merchants.norce.slug",
        "a part of a host name",
    ),
    "merchant's unknown route": (
        "    routes: {}\n    ch",
        "    routes: {exprt: {}}\n    ch",
        5,
        "merchants.norce.routes.exprt",
        "must be a route: export or refuse; did you mean export?",
    ),
    "channel's unknown route": (
        "        routes: {}",
        "        routes: {x: {}}",
        8,
        "merchants.norce.channels.1.routes.x",
        "must be a route: export or refuse",
    ),
    "literal secret": (
        "${env:NORCE_TOKEN}",
        CANARY,
        4,
        "merchants.norce.tokens[0]",
        "is a secret, which is given by reference only: ${env:NAME} or ${file:PATH}",
    ),
    "variable not set": (
        "${env:NORCE_TOKEN}",
        "${env:NOT_SET}",
        4,
        "merchants.norce.tokens[0]",
        "${env:NOT_SET} is an environment variable that is not set",
    ),
    "variable empty": ("${env:NORCE_TOKEN}", "${env:EMPTY}", 4, "merchants.norce.tokens[0]", "${env:EMPTY} is empty"),
    "file not there": (
        "${env:NORCE_TOKEN}",
        "${file:nope}",
        4,
        "merchants.norce.tokens[0]",
        "${file:nope} cannot be read: no such file or directory",
    ),
    "file is a directory": (
        "${env:NORCE_TOKEN}",
        "${file:.}",
        4,
        "merchants.norce.tokens[0]",
        "${file:.} cannot be read: is a directory",
    ),
    "part of a value": (
        "${env:NORCE_TOKEN}",
        "Bearer ${env:NORCE_TOKEN}",
        4,
        "merchants.norce.tokens[0]",
        "not the whole value; write ${env:NAME} or ${file:PATH} alone",
    ),
    "reference without a name": (
        "${env:NORCE_TOKEN}",
        "${env:}",
        4,
        "merchants.norce.tokens[0]",
        "write ${env:NAME}",
    ),
    "no caller is accepted": (
        '{signed_urls: {keys: {k1: "${env:NORCE_ADAPTER_URL_KEY}"}}}',
        "{}",
        9,
        "senders",
        "configure signed_urls, header_secrets or url_secrets, such as signed_urls: {keys:",
    ),
    "validation that no caller may call": (
        'senders: {signed_urls: {keys: {k1: "${env:NORCE_ADAPTER_URL_KEY}"}}}',
        'senders: {url_secrets: [{parameter: secret, values: ["${env:SHORT}"]}]}',
        12,
        "callbacks.order-rules",
        "is a validation, which no caller may call: senders.url_secrets are for notifications only",
    ),
    "key too short": (
        "${env:NORCE_ADAPTER_URL_KEY}",
        "${env:SHORT}",
        9,
        "senders.signed_urls.keys.k1",
        "at least 16 bytes",
    ),
    "secret for a merchant unknown": (
        "senders: {",
        'senders: {header_secrets: [{header: x, values: ["${env:SHORT}"], merchants: [nocre]}], ',
        9,
        "senders.header_secrets[0].merchants[0]",
        "must be a merchant: norce",
    ),
    "secret in a parameter of ours": (
        "senders: {",
        'senders: {url_secrets: [{parameter: sig, values: ["${env:SHORT}"]}], ',
        9,
        "senders.url_secrets[0].parameter",
        "merchant, channel, key and sig belong",
    ),
    "not a list of secrets": (
        "senders: {",
        "senders: {header_secrets: 5, ",
        9,
        "senders.header_secrets",
        "must be a list",
    ),
    "callback's name": (
        "  order-rules:",
        "  Order_Rules: {kind: validation}\n  order-rules:",
        12,
        "callbacks.Order_Rules",
        "the name must be kebab-case",
    ),
    "kind missing": (
        "kind: validation",
        "",
        12,
        "callbacks.order-rules.kind",
        "is missing; it must be notification, validation or hook",
    ),
    "kind unknown": (
        "kind: validation",
        "kind: validate",
        12,
        "callbacks.order-rules.kind",
        "must be notification, validation or hook",
    ),
    "hook without a watched part": (
        "kind: validation",
        "kind: hook",
        12,
        "callbacks.order-rules.watch",
        "is missing",
    ),
    "hook that watches no part": (
        "kind: validation",
        "kind: hook, watch: cart",
        12,
        "callbacks.order-rules.watch",
        "must be a JSON pointer to a part of the order, such as /cart",
    ),
    "hook that watches all": (
        "kind: validation",
        'kind: hook, watch: ""',
        12,
        "callbacks.order-rules.watch",
        "must be a JSON pointer to a part of the order",
    ),
    "target that is no pointer": (
        "kind: validation",
        "kind: hook, watch: /cart, target: /cart~2",
        12,
        "callbacks.order-rules.target",
        "must be a JSON pointer to a part of the order",
    ),
    "order of an unknown version": (
        "kind: validation",
        "kind: hook, watch: /cart, version: v2",
        12,
        "callbacks.order-rules.version",
        "must be v0 or v1",
    ),
    "soft limit at the default deadline": (
        "kind: validation",
        "kind: validation, soft_limit: 2s",
        12,
        "callbacks.order-rules.soft_limit",
        "must be shorter than the deadline",
    ),
    "soft limit beyond its deadline": (
        "kind: validation",
        "kind: hook, watch: /cart, deadline: 500ms, soft_limit: 600ms",
        12,
        "callbacks.order-rules.soft_limit",
        "must be shorter than the deadline",
    ),
    "misses below nothing": (
        "senders:",
        "circuit_breaker: {orders: -1}\nsenders:",
        9,
        "circuit_breaker.orders",
        "at least 0 and at most 1000",
    ),
    "notification without scope": (
        ", scope: /state/currentStatus",
        "",
        11,
        "callbacks.order-status.scope",
        "is missing",
    ),
    "validation with scope": (
        "kind: validation",
        "kind: validation, scope: /x",
        12,
        "callbacks.order-rules.scope",
        "is not a key here; allowed: kind, deadline or soft_limit",
    ),
    "schema of neither kind": (
        ", scope: /state/currentStatus",
        ", scope: /s, schema: 5",
        11,
        "callbacks.order-status.schema",
        "must be true or false or a mapping",
    ),
    "route without such a callback": (
        "callback: order-status",
        "callback: order-statsu",
        14,
        "routes.export.callback",
        "must be a callback: order-status or order-rules; did you mean order-status?",
    ),
    "no_answer missing": (", no_answer: approve", "", 15, "routes.refuse.no_answer", "must be approve or reject"),
    "no_answer of a notification": (
        "handler: log",
        "handler: log, no_answer: reject",
        14,
        "routes.export.no_answer",
        "is for validations and hooks only",
    ),
    "mode unknown": (
        "no_answer: approve",
        "no_answer: approve, mode: dry-run",
        15,
        "routes.refuse.mode",
        "must be enforce or shadow",
    ),
    "no_answer of a hook missing": (
        "validation}\nroutes:\n  export: {callback: order-status, handler: log}\n"
        "  refuse: {callback: order-rules, handler: rules, no_answer: approve}",
        "hook, watch: /cart}\nroutes:\n  change: {callback: order-rules, handler: rules}",
        14,
        "routes.change.no_answer",
        "must be approve or reject",
    ),
    "refetch of a validation": (
        "handler: rules",
        "handler: rules, refetch: false",
        15,
        "routes.refuse.refetch",
        "is for notifications only",
    ),
    "timeout of a validation": (
        "handler: rules",
        "handler: rules, timeout: 1s",
        15,
        "routes.refuse.timeout",
        "is for notifications only",
    ),
    "another database": ("senders:", "store: {url: mysql://x}\nsenders:", 9, "store.url", "must be sqlite:///"),
    "database in memory": (
        "senders:",
        "store: {url: 'sqlite:///:memory:'}\nsenders:",
        9,
        "store.url",
        "must be sqlite:///",
    ),
    "PostgreSQL": (
        "senders:",
        "store: {url: postgresql://db/adapter}\nsenders:",
        9,
        "store.url",
        "or postgresql+psycopg://",
    ),
    "key twice": ("routes:\n  export", "callbacks: {}\nroutes:\n  export", 13, "callbacks", "twice, first in line 10"),
    "merge key": (
        "handler: log",
        "handler: log, settings: {a: &a {}, <<: *a}",
        14,
        "routes.export.settings",
        "merge keys",
    ),
    "tag": (
        "handler: log",
        SETTINGS + "{a: !python/object x}",
        14,
        "routes.export.settings.a",
        "tags (!name) are not allowed",
    ),
    "not a number": ("handler: log", SETTINGS + "{a: .nan}", 14, "routes.export.settings.a", "a finite number"),
}


@pytest.mark.parametrize(("old", "new", "line", "path", "words"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_a_problem_names_its_line_its_path_and_the_allowed_values(
    file: Path, old: str, new: str, line: int, path: str, words: str
) -> None:
    problems = problems_of(file, changed(old, new))

    assert [(problem.line, problem.path) for problem in problems] == [(line, path)]
    assert words in problems[0].message
    assert str(problems[0]) == f"{file}:{line}: {path}: {problems[0].message}"
    assert CANARY not in str(problems[0])


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(file: Path) -> None:
    text = """\
adapter: {id: "", nam: x}
server: {port: many}
store: {url: "mysql://x"}
merchants:
  norce:
    tokens: ["${env:NOT_SET}", literal]
    channels: {"1": {routes: {nope: {}}}}
callbacks:
  b: {kind: hook, deadline: 5}
  c: {kind: validation, deadline: 1h}
routes:
  r: {callback: c, handler: Log, timeout: 5s, no_answer: maybe}
  s: {callback: d, handler: log, when: {scope: 5}}
"""

    problems = problems_of(file, text)

    assert {(problem.line, problem.path) for problem in problems} == {
        (1, "adapter.id"),
        (1, "adapter.nam"),
        (1, "senders"),
        (2, "server.port"),
        (3, "store.url"),
        (6, "merchants.norce.tokens[0]"),
        (6, "merchants.norce.tokens[1]"),
        (7, "merchants.norce.channels.1.routes.nope"),
        (9, "callbacks.b.watch"),
        (9, "callbacks.b.deadline"),
        (10, "callbacks.c.deadline"),
        (12, "routes.r.handler"),
        (12, "routes.r.timeout"),
        (12, "routes.r.no_answer"),
        (13, "routes.s.callback"),
        (13, "routes.s.when.scope"),
    }
    lines = [problem.line or 0 for problem in problems]
    assert lines == sorted(lines)
    assert len(problems) == len(set(problems))


BROKEN_FILES: dict[str, tuple[bytes, int | None, str]] = {
    "empty": (b"", None, "must be a mapping"),
    "a list": (b"- a\n", None, "must be a mapping"),
    "not UTF-8": (b"a: b\nc: \xff\n", 2, "is not UTF-8"),
    "not YAML": (b"a: b\nc: d: e\n", 2, "is not YAML: mapping values are not allowed here"),
    "a tab": (b"a:\n\tb: c\n", 2, "is not YAML"),
    "a control character": (b"a: b\nc: \x00\n", 2, "control characters"),
    "two documents": (b"a: b\n---\nc: d\n", 2, "is not YAML"),
    "an alias that is a secret by mistake": (f"a: *{CANARY}\n".encode(), 1, "undefined alias"),
    "too deep": (b"a: " + b"[" * 1000, None, "nested too deeply"),
    "deep": (b"a: " + b"[" * 100 + b"]" * 100, 1, "in 64 levels"),
    "an alias within itself": (b"a: &a [*a]\n", 1, "in 64 levels"),
    "too large": (b"#" * (LARGEST_FILE_BYTES + 1), None, "larger than 1048576 bytes"),
    "a billion laughs": (
        "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10 if n else ['x'])}]\n" for n in range(10)).encode(),
        1,
        "aliases expanded",
    ),
}


@pytest.mark.parametrize(("raw", "line", "words"), BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_a_file_that_holds_no_configuration_is_one_problem(
    file: Path, raw: bytes, line: int | None, words: str
) -> None:
    problems = problems_of(file, raw)

    assert [(problem.line, problem.path) for problem in problems] == [(line, "")]
    assert words in problems[0].message
    assert CANARY not in str(problems[0])


@pytest.mark.parametrize(
    ("name", "words"), [("nope.yaml", "no such file"), (".", "is a directory"), ("\0", "not the name")]
)
def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigurationInvalid) as raised:
        load(tmp_path / name, ENVIRON)

    assert [problem.line for problem in raised.value.problems] == [None]
    assert words in str(raised.value)


JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["2s", "${env:PORT}", "${file:x}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places_in(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for step in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*path, step)
        yield from places_in(tree[step], (*path, step))


@given(data=st.data())
@settings(max_examples=settings.default.max_examples // 2)
def test_any_value_in_any_place_is_accepted_or_is_a_problem(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tree = YAML(typ="safe", pure=True).load(VALID)
    for _ in range(3):
        path = data.draw(st.sampled_from(list(places_in(tree))))
        target = tree
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = data.draw(JUNK)
    file = tmp_path_factory.getbasetemp() / "junk.yaml"
    file.write_bytes(msgspec.json.encode(tree))  # JSON is YAML

    try:
        shown = repr(load(file, ENVIRON))
    except ConfigurationInvalid as invalid:
        shown = str(invalid)

    assert shown
    assert CANARY not in shown


# --- settings -------------------------------------------------------------------------------------------------------


class Basic(msgspec.Struct, frozen=True, kw_only=True, tag="basic", tag_field="type", forbid_unknown_fields=True):
    username: str
    password: Secret


class Bearer(msgspec.Struct, frozen=True, kw_only=True, tag="bearer", tag_field="type", forbid_unknown_fields=True):
    token: Secret


class ShopSettings(Settings, frozen=True, kw_only=True):
    base_url: Url
    shop_id: Annotated[str, msgspec.Meta(pattern="^[0-9]+$")] = "1"
    auth: Basic | Bearer | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    pause: timedelta = timedelta(0)
    numbers: tuple[int, ...] = ()
    low: int = 0
    high: int = 10

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low must not be above high (of {self.shop_id})")


LEVELS = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
senders: {signed_urls: {keys: {k1: "${env:NORCE_ADAPTER_URL_KEY}"}}}
callbacks:
  order-status: {kind: notification, scope: /state/currentStatus}
routes:
  export:
    callback: order-status
    handler: shop
    settings:
      base_url: https://shop.example
      headers: {a: route, b: route, c: route}
      numbers: [1, 2, 3]
merchants:
  norce:
    tokens: ["${env:NORCE_TOKEN}"]
    routes:
      export:
        settings:
          headers: {b: merchant, c: merchant}
          shop_id: "2"
    channels:
      "1":
        routes:
          export:
            settings:
              headers: {c: channel}
              numbers: [4]
      "2": {}
"""
AT_ROUTE = "routes.export.settings"
AT_MERCHANT = "merchants.norce.routes.export.settings"
AT_CHANNEL = "merchants.norce.channels.1.routes.export.settings"


def settings_of(file: Path, text: str, channel: str = "1") -> ShopSettings | tuple[ConfigProblem, ...]:
    config = read(file, text)
    return read_settings(config, ShopSettings, *config.settings("export", Channel("norce", channel)))


def test_a_channel_overrides_its_merchant_and_a_merchant_overrides_the_route(file: Path) -> None:
    found = settings_of(file, LEVELS)

    assert found == ShopSettings(
        base_url=Url("https://shop.example"),
        shop_id="2",
        headers={"a": "route", "b": "merchant", "c": "channel"},
        numbers=(4,),
    )


def test_a_channel_without_settings_has_those_of_its_merchant(file: Path) -> None:
    found = settings_of(file, LEVELS, channel="2")

    assert isinstance(found, ShopSettings)
    assert found.headers == {"a": "route", "b": "merchant", "c": "merchant"}
    assert found.numbers == (1, 2, 3)


@pytest.mark.parametrize(
    ("trees", "result"),
    [
        (({"a": 1}, {"a": 2}, {}), {"a": 2}),
        (({"a": {"b": 1, "c": 1}}, {"a": {"c": 2}}, {"a": {"d": 3}}), {"a": {"b": 1, "c": 2, "d": 3}}),
        (({"a": [1, 2]}, {"a": [3]}, {}), {"a": [3]}),
        (({"a": {"b": 1}}, {"a": None}, {}), {"a": None}),
        (({"a": 1}, {"a": {"b": 1}}, {"a": {"c": 1}}), {"a": {"b": 1, "c": 1}}),
    ],
    ids=["replaced", "merged", "list replaced", "null replaces", "mapping over value"],
)
def test_mappings_are_merged_and_other_values_replaced(
    trees: tuple[dict[str, Any], ...], result: dict[str, Any]
) -> None:
    before = [msgspec.json.encode(tree) for tree in trees]

    assert merged(*trees) == result
    assert [msgspec.json.encode(tree) for tree in trees] == before


SETTINGS_PROBLEMS: dict[str, tuple[str, str, int, str, str]] = {
    "at the route": ("https://shop.example", "ftp://shop", 10, f"{AT_ROUTE}.base_url", "must be an https:// address"),
    "at the merchant": ('shop_id: "2"', "shop_id: x", 20, f"{AT_MERCHANT}.shop_id", "must be text matching ^[0-9]+$"),
    "at the channel": ("{c: channel}", "{c: 5}", 26, f"{AT_CHANNEL}.headers.c", ": put it in quotes"),
    "weaker, beside a stronger": (
        "{b: merchant, c: merchant}",
        "{b: 5}",
        19,
        f"{AT_MERCHANT}.headers.b",
        "must be text",
    ),
    "item of the stronger list": ("[4]", "[4, x]", 27, f"{AT_CHANNEL}.numbers[1]", "must be a whole number"),
    "missing everywhere": (
        "base_url: https://shop.example",
        "low: 1",
        9,
        f"{AT_ROUTE}.base_url",
        "is missing; it must be an https:// address",
    ),
    "unknown": ('shop_id: "2"', "shopid: x", 20, f"{AT_MERCHANT}.shopid", "did you mean shop_id?"),
    "together, by the strongest": ("numbers: [4]", "low: 11", 24 + 1, AT_CHANNEL, "low must not be above high"),
    "literal secret": (
        "numbers: [4]",
        f"auth: {{type: bearer, token: {CANARY}}}",
        27,
        f"{AT_CHANNEL}.auth.token",
        "given by reference only",
    ),
    "type of a union": (
        "numbers: [4]",
        "auth: {type: digest}",
        27,
        f"{AT_CHANNEL}.auth.type",
        "must be basic or bearer",
    ),
    "missing in a union": (
        "numbers: [4]",
        'auth: {type: basic, password: "${env:NORCE_TOKEN}"}',
        27,
        f"{AT_CHANNEL}.auth.username",
        "is missing; it must be text",
    ),
    "duration": ("numbers: [4]", "pause: 5", 27, f"{AT_CHANNEL}.pause", "write its unit"),
}


@pytest.mark.parametrize(
    ("old", "new", "line", "path", "words"), SETTINGS_PROBLEMS.values(), ids=SETTINGS_PROBLEMS.keys()
)
def test_a_problem_in_settings_is_shown_where_the_value_comes_from(
    file: Path, old: str, new: str, line: int, path: str, words: str
) -> None:
    assert LEVELS.count(old) == 1

    problems = settings_of(file, LEVELS.replace(old, new))

    assert isinstance(problems, tuple)
    assert [(problem.line, problem.path) for problem in problems] == [(line, path)]
    assert words in problems[0].message
    assert CANARY not in str(problems[0])


def test_all_problems_of_settings_are_reported_at_once(file: Path) -> None:
    text = LEVELS.replace("https://shop.example", "x").replace('shop_id: "2"', "shop_id: x").replace("[4]", "[x, y]")

    problems = settings_of(file, text)

    assert isinstance(problems, tuple)
    assert len(problems) == 4


def test_a_handler_without_settings_accepts_none(file: Path) -> None:
    config = read(file, LEVELS)

    problems = read_settings(config, Settings, *config.settings("export", Channel("norce", "2")))

    assert isinstance(problems, tuple)
    assert problems[0].message == "is not a key here; allowed: no key at all"


def test_secrets_in_settings_are_read_and_stay_hidden(file: Path) -> None:
    text = LEVELS.replace("numbers: [4]", 'auth: {type: bearer, token: "${env:JETSHOP_PASSWORD}"}')

    found = settings_of(file, text)

    assert isinstance(found, ShopSettings)
    assert found.auth == Bearer(token=Secret(ENVIRON["JETSHOP_PASSWORD"]))
    assert CANARY not in repr(found)


class Pin(Secret):
    __slots__ = ()


class PinSettings(Settings, frozen=True, kw_only=True):
    pin: Pin


def test_a_subclass_of_secret_in_a_plugin_is_given_by_reference_too(file: Path) -> None:
    config = read(file, LEVELS)

    found = read_settings(config, PinSettings, {"pin": Reference("1234", "${env:PIN}")}, [AT_ROUTE])
    problems = read_settings(config, PinSettings, {"pin": "1234"}, [AT_ROUTE])

    assert isinstance(found, PinSettings)
    assert type(found.pin) is Pin
    assert isinstance(problems, tuple)
    assert "given by reference only" in problems[0].message


@pytest.mark.parametrize("word", ["secret", "reference", "which", "is", "a"])
def test_a_secret_that_is_a_common_word_masks_no_sentence_of_ours(file: Path, word: str) -> None:
    text = LEVELS.replace('shop_id: "2"', "auth: {type: bearer, token: plain}")
    environ = dict.fromkeys(ENVIRON, word) | {"NORCE_ADAPTER_URL_KEY": "a-key-of-at-least-thirty-two-bytes"}
    config = read(file, text, environ)

    problems = read_settings(config, ShopSettings, *config.settings("export", Channel("norce", "2")))

    assert isinstance(problems, tuple)
    assert "is a secret, which is given by reference only: ${env:NAME} or ${file:PATH}" in str(problems[0])


class Told(Settings, frozen=True, kw_only=True):
    """Settings of a plugin whose message has a value in each way that has to be masked."""

    text: str
    more: Mapping[str, Any] = {}

    def __post_init__(self) -> None:
        raise ValueError(f"text is {self.text}, {self.text!r}, x{self.text}y, pre_{self.text} or {self.more}")


@pytest.mark.parametrize("secret", ["4711", "s3cret", "pass-word", "korrekthästbatteri", "a.b*c", "Ångström 7"])
def test_a_plugins_message_shows_no_part_of_a_referenced_secret(file: Path, secret: str) -> None:
    given = Reference(secret, "${env:SECRET}")
    tree = {"text": given, "more": {"deep": [given]}}

    problems = read_settings(read(file, LEVELS), Told, tree, [AT_ROUTE])

    assert isinstance(problems, tuple)
    assert secret not in problems[0].message
    assert problems[0].message.startswith("text is ***, ")


def test_a_short_word_is_masked_only_as_a_word(file: Path) -> None:
    tree = {"text": Reference("is", "${env:SECRET}")}

    problems = read_settings(read(file, LEVELS), Told, tree, [AT_ROUTE])

    assert isinstance(problems, tuple)
    assert problems[0].message == "text *** ***, '${env:SECRET}', xisy, pre_*** or {}"


def test_a_plugins_message_about_a_referenced_value_is_masked(file: Path) -> None:
    text = LEVELS.replace('shop_id: "2"', 'shop_id: "${env:PORT}"').replace("numbers: [4]", "low: 11")

    problems = settings_of(file, text)

    assert isinstance(problems, tuple)
    assert problems[0].message == "low must not be above high (of ***)"


def test_a_later_problem_is_shown_at_its_line(file: Path) -> None:
    config = read(file, LEVELS)

    assert config.problem("routes.export.handler", "is not installed") == ConfigProblem(
        file=str(file), line=8, path="routes.export.handler", message="is not installed"
    )
    assert config.problem("routes.export.when.schema", "is not there").line == 6


# --- the reference --------------------------------------------------------------------------------------------------


def test_the_reference_is_a_valid_configuration() -> None:
    config = load(REFERENCE, ENVIRON)

    assert config.adapter.id == "jetshop_adapter"
    assert set(config.routes) == {"export-payment", "swedish-orders-have-an-id", "many-pay-less"}


def test_the_reference_tells_editors_where_its_schema_is() -> None:
    assert REFERENCE.read_text().startswith("# yaml-language-server: $schema=./config.schema.json\n")


@pytest.mark.parametrize("name", ["config.yaml", "config.schema.json"])
def test_the_generated_files_are_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text("utf-8") == generated()[name], "run `make docs`"


def test_the_reference_is_valid_with_every_comment_uncommented(file: Path) -> None:
    other = file.parent / "merchants" / "other.yaml"
    other.parent.mkdir()
    other.write_text('merchants: {other: {tokens: ["${env:NORCE_TOKEN}"], channels: {"1": {}}}}')

    config = read(file, everything_commented_in(REFERENCE.read_text()))

    assert set(config.merchants) == {"norce", "other"}
    assert config.senders.header_secrets
    assert config.norce.base_url == "http://localhost:8090/checkout"
