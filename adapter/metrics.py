"""Every metric of the service, named in one table.

An attribute has the name of its metric, without the prefix `norce_adapter_` and the unit. Labels have few values: names
from the configuration or from a closed list, never an order id.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10)
SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600, 86400)


class Metrics:
    """The service's metrics, in a registry of their own."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        counter, gauge, fast, slow = self._counter, self._gauge, self._fast, self._slow

        self.callbacks = counter("callbacks_total", "Callbacks answered.", ["callback", "kind", "status"])
        self.calls_to_gone_names = counter(
            "calls_to_gone_names_total", "Calls to a callback, merchant or channel that is not configured.",
            ["callback", "merchant", "channel", "result"],
        )  # fmt: skip
        self.limits_reached = counter("limits_reached_total", "Times that a limit acted.", ["limit"])
        self.callback_duration = fast("callback_duration_seconds", "Time from request to response.", ["kind"])
        self.callback_deadline = gauge("callback_deadline_seconds", "The deadline for an answer.", ["callback"])
        self.caller_patience = fast("caller_patience_seconds", "Time until a caller hung up.", ["callback"])
        self.auth = counter("auth_total", "Callers identified or refused.", ["scheme", "key", "result"])

        self.notifications_received = counter(
            "notifications_received_total", "Notifications received.", ["merchant", "channel", "source"]
        )
        self.notifications_stored = counter("notifications_stored_total", "Notifications by result.", ["result"])
        self.notifications_not_matched = counter(
            "notifications_not_matched_total",
            "Notifications that do not match their callback's condition.",
            ["callback"],
        )
        self.notifications_missed = counter(
            "notifications_missed_total", "Notifications found only in Norce's event log.", ["callback", "merchant"]
        )
        self.orders_missing = counter(
            "orders_missing_total",
            "Orders found at Norce that a callback wants and that never came; each run counts what is still missing.",
            ["merchant", "channel"],
        )
        self.conditions_evaluated = counter("conditions_evaluated_total", "Conditions by result.", ["origin", "result"])

        self.verdict_duration = fast(
            "verdict_duration_seconds", "Time until the verdict of a route.", ["callback", "route", "verdict"]
        )
        self.verdicts_missing = counter("verdicts_missing_total", "Uses of no_answer.", ["callback", "route", "reason"])
        self.verdicts_slow = counter("verdicts_slow_total", "Verdicts beyond the soft limit.", ["callback", "route"])
        self.verdicts_unused = counter(
            "verdicts_unused_total",
            "Verdicts that were late or in shadow mode, and whether they would have changed the answer.",
            ["callback", "route", "kind", "verdict", "result"],
        )
        self.verdicts_dropped = counter("verdicts_dropped_total", "Verdicts that could not be recorded.")

        self.delivery_attempts = counter("delivery_attempts_total", "Attempts by outcome.", ["route", "outcome"])
        self.delivery_attempt_duration = slow(
            "delivery_attempt_duration_seconds", "Time from the claim to the record of an attempt.", ["route"]
        )
        self.delivery_end_to_end = slow("delivery_end_to_end_seconds", "Time from receipt to done.", ["route"])
        self.deliveries_shadow = counter(
            "deliveries_shadow_total", "Deliveries that a route in shadow mode recorded and did not send.", ["route"]
        )
        self.deliveries = gauge("deliveries", "Deliveries that wait or are dead letters.", ["route", "state"])
        self.oldest_waiting_age = gauge("oldest_waiting_age_seconds", "Age of the oldest waiting delivery.", ["route"])
        self.queue_paused = gauge("queue_paused", "1 while a queue is paused.", ["route", "merchant", "channel"])
        self.plugin_loops_replaced = counter(
            "plugin_loops_replaced_total", "Event loops of plugins replaced because a handler blocked them.",
            ["loop", "route"],
        )  # fmt: skip

        self.norce_requests = counter(
            "norce_requests_total", "Requests to Norce, by number of the token.", ["merchant", "token", "status"]
        )
        self.reconciliations = counter("reconciliations_total", "Readings of an event log.", ["merchant", "result"])
        self.order_reconciliations = counter(
            "order_reconciliations_total", "Comparisons of a channel's orders.", ["merchant", "result"]
        )
        self.configuration_documents = counter(
            "configuration_documents_total", "Documents of Norce's configuration that were new or unreadable.",
            ["merchant", "channel", "result"],
        )  # fmt: skip
        self.configuration_valid = gauge(
            "configuration_valid", "0 while a channel's document is invalid and the last valid one is in force.",
            ["merchant", "channel"],
        )  # fmt: skip
        self.channel_active = gauge(
            "channel_active", "0 while Norce's configuration has this adapter switched off.", ["merchant", "channel"]
        )
        self.store_available = gauge("store_available", "1 while the ledger can be written.")
        self.log_lines_dropped = counter(
            "log_lines_dropped_total",
            "Log lines that could not be written: a stopped reader, a full disk.",
        )
        self.build_info = gauge("build_info", "Always 1.", ["version"])
        self.build_info.labels(version).set(1)

    def set_ledger_gauges(
        self,
        *,
        deliveries: Mapping[tuple[str, str], int],
        oldest_waiting_seconds: Mapping[str, float],
        paused: Iterable[tuple[str, str, str]],
        store_available: bool,
    ) -> None:
        """Replace the gauges that are read from the ledger at each scrape."""
        for gauge in (self.deliveries, self.oldest_waiting_age, self.queue_paused):
            gauge.clear()
        for labels, count in deliveries.items():
            self.deliveries.labels(*labels).set(count)
        for route, age in oldest_waiting_seconds.items():
            self.oldest_waiting_age.labels(route).set(age)
        for queue in paused:
            self.queue_paused.labels(*queue).set(1)
        self.store_available.set(store_available)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        counter = Counter(f"norce_adapter_{name}", text, labels, registry=self.registry)
        # The library checks labels and takes a lock at each call, which takes five times as long.
        counter.labels = functools.cache(counter.labels)  # type: ignore[method-assign]
        return counter

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(f"norce_adapter_{name}", text, labels, buckets=buckets, registry=self.registry)
        histogram.labels = functools.cache(histogram.labels)  # type: ignore[method-assign]
        return histogram

    def _fast(self, name: str, text: str, labels: Sequence[str]) -> Histogram:
        return self._histogram(name, text, labels, FAST)

    def _slow(self, name: str, text: str, labels: Sequence[str]) -> Histogram:
        return self._histogram(name, text, labels, SLOW)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"norce_adapter_{name}", text, labels, registry=self.registry)
