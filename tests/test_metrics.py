"""`adapter.metrics`: every metric is in the table, is used, and has few labels without personal data."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

import adapter
from adapter import metrics as metrics_module
from adapter.metrics import Metrics

PACKAGE = Path(adapter.__file__).parent
TABLE = {name: value for name, value in vars(Metrics("0")).items() if isinstance(value, MetricWrapperBase)}
# What a label may say: names from the configuration or from a closed list. An order's id, say, is neither.
LABELS = {
    "callback", "channel", "key", "kind", "limit", "loop", "merchant", "origin", "outcome", "reason", "result", "route",
    "scheme", "source", "state", "status", "token", "verdict", "version",
}  # fmt: skip


def labels_of(metric: MetricWrapperBase) -> tuple[str, ...]:
    return metric._labelnames


def elsewhere() -> str:
    """The package without the table itself."""
    return "\n".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py") if path != Path(metrics_module.__file__))


def uses() -> Iterator[tuple[str, ast.Call]]:
    """Every `….<metric>.labels(…)` in the package, the table included."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "labels":
                assert isinstance(node.func.value, ast.Attribute), path
                yield node.func.value.attr, node


def test_the_table_is_not_empty() -> None:
    assert len(TABLE) >= 16


@pytest.mark.parametrize("name", TABLE)
def test_every_metric_is_used(name: str) -> None:
    set_at_a_scrape = {"deliveries", "oldest_waiting_age", "queue_paused", "store_available", "build_info"}

    assert re.search(rf"metrics\.{name}\b", elsewhere()) or name in set_at_a_scrape


@pytest.mark.parametrize("name", TABLE)
def test_an_attribute_is_named_like_its_metric_without_prefix_and_unit(name: str) -> None:
    [family] = TABLE[name].collect()

    assert family.name in (f"norce_adapter_{name}", f"norce_adapter_{name}_seconds")  # a counter's family has no _total
    assert family.documentation.endswith(".")
    assert family.type != "histogram" or family.name.endswith("_seconds")


@pytest.mark.parametrize("name", TABLE)
def test_labels_are_from_the_closed_list(name: str) -> None:
    assert set(labels_of(TABLE[name])) <= LABELS


def test_no_label_is_taken_from_an_order_or_a_request() -> None:
    for name, call in uses():
        given = {node.id for each in call.args for node in ast.walk(each) if isinstance(node, ast.Name)}
        given |= {node.attr for each in call.args for node in ast.walk(each) if isinstance(node, ast.Attribute)}
        assert not given & {"order_id", "order", "body", "raw", "headers", "query", "message", "reference"}, name


def test_every_use_gives_as_many_labels_as_the_table_says() -> None:
    for name, call in uses():
        if not any(isinstance(argument, ast.Starred) for argument in call.args):
            assert len(call.args) == len(labels_of(TABLE[name])), name


def test_gauges_that_are_set_at_a_scrape_replace_those_before() -> None:
    metrics = Metrics("0")
    metrics.set_ledger_gauges(
        deliveries={("export", "waiting"): 3, ("export", "dead"): 1},
        oldest_waiting_seconds={"export": 60.0},
        paused=[("export", "norce", "1")],
        store_available=False,
    )
    metrics.set_ledger_gauges(
        deliveries={("export", "dead"): 2}, oldest_waiting_seconds={}, paused=[], store_available=True
    )

    told = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if re.search("deliveries$|oldest|paused|available", sample.name)
    }
    assert told == {("norce_adapter_deliveries", "export", "dead"): 2, ("norce_adapter_store_available",): 1}


def test_two_services_in_one_process_count_apart() -> None:
    one, other = Metrics("0"), Metrics("0")
    one.notifications_stored.labels("new").inc()

    assert one.registry.get_sample_value("norce_adapter_notifications_stored_total", {"result": "new"}) == 1
    assert other.registry.get_sample_value("norce_adapter_notifications_stored_total", {"result": "new"}) is None
