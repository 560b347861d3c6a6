"""
Every metric there is, in one table. Labels are bounded: names from the configuration, never an order id.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import metrics as library

FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10)
SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600, 86400)


class _Known:
    """A metric that finds labels it has seen at once: the library checks and locks first, five times as long."""

    _metrics: dict[tuple[str, ...], Any]

    def labels(self, *values: str) -> Any:
        return self._metrics.get(values) or library.MetricWrapperBase.labels(self, *values)  # type: ignore[type-var]


class Counter(_Known, library.Counter):  # type: ignore[misc]
    pass


class Gauge(_Known, library.Gauge):  # type: ignore[misc]
    pass


class Histogram(_Known, library.Histogram):  # type: ignore[misc]
    pass


class Metrics:
    """The service's metrics, in a registry of their own. All names begin with `norce_adapter_`."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        counter, gauge, histogram = (self._maker(kind) for kind in (Counter, Gauge, Histogram))
        self.callbacks = counter("callbacks_total", "Callbacks answered.", ["callback", "kind", "status"])
        self.refused = counter("callbacks_refused_total", "Callbacks answered 503 unread: too many at once.")
        self.callback_duration = histogram(
            "callback_duration_seconds", "From the body's arrival to the answer; for notifications, the accept time.",
            ["kind"], buckets=FAST,
        )  # fmt: skip
        self.auth = counter("auth_total", "Callers identified, or refused.", ["scheme", "key", "result"])
        self.norce_requests = counter(
            "norce_requests_total", "Requests to Norce, by the number of the token (from 1).",
            ["merchant", "token", "status"],
        )  # fmt: skip
        self.received = counter(
            "notifications_received_total", "Notifications parsed.", ["merchant", "channel", "source"]
        )
        self.stored = counter("notifications_stored_total", "Notifications by what became of them.", ["result"])
        self.configuration = counter(
            "configuration_documents_total", "Documents of Norce's configuration that were new, or could not be read.",
            ["merchant", "channel", "result"],
        )  # fmt: skip
        self.configuration_valid = gauge(
            "configuration_valid", "0 while a channel's document is wrong, and the last good one holds.",
            ["merchant", "channel"],
        )  # fmt: skip
        self.channel_active = gauge(
            "channel_active", "0 while Norce's configuration has us switched off.", ["merchant", "channel"]
        )
        self.missed = counter(
            "notifications_missed_total", "Notifications that never came, found in Norce's event log.",
            ["callback", "merchant"],
        )  # fmt: skip
        self.reconciliations = counter(
            "reconciliations_total", "Readings of a merchant's event log, by how they ended.", ["merchant", "result"]
        )
        self.conditions = counter("conditions_evaluated_total", "Conditions decided.", ["origin", "result"])
        self.disagreements = counter(
            "notifications_disagreed_total",
            "Notifications whose callback's condition does not hold here.",
            ["callback"],
        )
        self.verdict_duration = histogram(
            "verdict_duration_seconds", "Verdicts, from the asking of the route; to be seen against the deadline.",
            ["callback", "route", "verdict"], buckets=FAST,
        )  # fmt: skip
        self.deadline = gauge("callback_deadline_seconds", "When a callback is answered at the latest.", ["callback"])
        self.no_answers = counter(
            "verdicts_missing_total", "Verdicts that are the route's no_answer.", ["callback", "route", "reason"]
        )
        self.slow_verdicts = counter("verdicts_slow_total", "Verdicts past the soft limit.", ["callback", "route"])
        self.unheard_verdicts = counter(
            "verdicts_unheard_total",
            "Verdicts that came late, after the caller hung up, or from a shadow; and whether the answer was the same.",
            ["callback", "route", "kind", "verdict", "result"],
        )
        self.patience = histogram(
            "caller_patience_seconds", "How long callers waited that hung up.", ["callback"], buckets=FAST
        )
        self.verdicts_dropped = counter("verdicts_dropped_total", "Late verdicts that could not be written down.")
        self.attempts = counter("delivery_attempts_total", "Attempts by how they ended.", ["route", "outcome"])
        self.attempt_duration = histogram(
            "delivery_attempt_duration_seconds", "From the claim to the record.", ["route"], buckets=SLOW
        )
        self.end_to_end = histogram("delivery_end_to_end_seconds", "From receipt to done.", ["route"], buckets=SLOW)
        self.loops_replaced = counter(
            "plugins_loops_replaced_total", "Loops of the plugins' that a handler held, and was left with.",
            ["loop", "route"],
        )  # fmt: skip
        self.deliveries = gauge("deliveries", "Deliveries waiting or dead.", ["route", "state"])
        self.oldest_waiting = gauge("oldest_waiting_age_seconds", "Age of the oldest waiting delivery.", ["route"])
        self.queue_paused = gauge("queue_paused", "1 while the queue is paused.", ["route", "merchant", "channel"])
        self.store_available = gauge("store_available", "1 while the ledger can be written.")
        self.build_info = gauge("build_info", "1.", ["version"])
        self.build_info.labels(version).set(1)

    def show(
        self,
        *,
        deliveries: Mapping[tuple[str, str], int],
        oldest_waiting_seconds: Mapping[str, float],
        paused: Iterable[tuple[str, str, str]],
        store_available: bool,
    ) -> None:
        """Puts what is read from the ledger at each scrape into the gauges."""
        for gauge in (self.deliveries, self.oldest_waiting, self.queue_paused):
            gauge.clear()
        for labels, count in deliveries.items():
            self.deliveries.labels(*labels).set(count)
        for route, age in oldest_waiting_seconds.items():
            self.oldest_waiting.labels(route).set(age)
        for queue in paused:
            self.queue_paused.labels(*queue).set(1)
        self.store_available.set(store_available)

    def loop_replaced(self, loop: str, route: str) -> None:
        self.loops_replaced.labels(loop, route).inc()

    def text(self) -> bytes:
        """All of it, in the Prometheus text format."""
        return generate_latest(self.registry)

    def _maker(self, kind: type) -> Callable:  # type: ignore[type-arg]
        def make(name: str, text: str, labels: tuple[str, ...] | list[str] = (), **options: object) -> object:
            return kind(f"norce_adapter_{name}", text, labels, registry=self.registry, **options)

        return make
