"""The two reconciliations, built from the configuration."""

from collections.abc import Container

from adapter.callbacks.intake import Intake
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.ledger.key_values import Watermarks
from adapter.ledger.store import Store
from adapter.metrics import Metrics
from adapter.norce.client import Norce
from adapter.reconciliation.events import Reconciliation
from adapter.reconciliation.orders import OrderReconciliation


def reconciliation(config: Config, norce: Norce, intake: Intake, store: Store, metrics: Metrics) -> Reconciliation:
    return Reconciliation(
        norce,
        intake,
        Watermarks(store),
        channels=config.channels,
        adapter_id=config.adapter.id,
        overlap=config.reconciliation.overlap,
        remembered=config.store.retention.rows,
        metrics=metrics,
        clock=store.clock,
    )


def order_reconciliation(
    config: Config,
    norce: Norce,
    intake: Intake,
    store: Store,
    metrics: Metrics,
    switched_off: Container[Channel] = (),
) -> OrderReconciliation:
    return OrderReconciliation(
        norce,
        intake,
        store,
        channels=config.channels,
        switched_off=switched_off,
        remembered=config.store.retention.rows,
        metrics=metrics,
    )
