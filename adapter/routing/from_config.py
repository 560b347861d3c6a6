"""Parts of lower layers, built from the configuration that they cannot import."""

from collections.abc import Mapping

import httpx

from adapter.config import Config
from adapter.ledger.binding import Binding
from adapter.ledger.claims import QueueKey
from adapter.ledger.maintenance import Retention
from adapter.ledger.settlement import PausePolicy
from adapter.metrics import Metrics
from adapter.norce.client import Account, Norce, base_url

LOOPBACK = "localhost"
LOOPBACK_HOSTS = frozenset({LOOPBACK, "127.0.0.1", "::1"})


def queue_keys(config: Config) -> list[QueueKey]:
    return [QueueKey(*each) for each in config.queue_keys]


def ledger_binding(config: Config) -> Binding:
    """Return the Norce that the ledger of this configuration belongs to.

    All addresses of this host count as one Norce: a simulator takes another port at each start.
    """
    if (given := config.norce.base_url) is None:
        return Binding(config.norce.environment, config.adapter.id)
    url = httpx.URL(given)
    return Binding(LOOPBACK if url.host in LOOPBACK_HOSTS else str(url), config.adapter.id)


def sandbox_port(config: Config) -> int | None:
    """Return the port of the configured Norce if it is on this machine, as a sandbox is."""
    _, host, port = config.norce.base_url.origin if config.norce.base_url else ("", "", 0)
    return port if host in LOOPBACK_HOSTS else None


def pause_policy(config: Config) -> PausePolicy:
    given = config.queues
    return PausePolicy(after_failures=given.pause_after, first=given.first_pause, longest=given.max_pause)


def retention(config: Config) -> Retention:
    given = config.store.retention
    return Retention(
        bodies=given.bodies,
        bodies_of_dead_letters=given.bodies_of_dead_letters,
        unwanted=given.unwanted,
        rows=given.rows,
        verdicts=given.verdicts,
        uses=given.uses,
    )


def norce_accounts(config: Config) -> Mapping[str, Account]:
    """Return the address and the tokens of every merchant at Norce."""
    return {
        name: Account(
            base_url=str(config.norce.base_url or base_url(config.norce.environment, merchant.slug)),
            tokens=merchant.tokens,
        )
        for name, merchant in config.merchants.items()
    }


def norce_client(config: Config, metrics: Metrics, transport: httpx.AsyncBaseTransport | None = None) -> Norce:
    """Return a client for Norce on the running event loop."""
    for name, merchant in config.merchants.items():
        for number, _ in enumerate(merchant.tokens, 1):
            metrics.norce_requests.labels(name, str(number), "200")  # show the count of an unused token as 0
    return Norce(
        norce_accounts(config),
        adapter_id=config.adapter.id,
        timeout=config.norce.timeout,
        version=config.norce.version,
        transport=transport,
        used=lambda merchant, token, status: metrics.norce_requests.labels(merchant, str(token), str(status)).inc(),
    )
