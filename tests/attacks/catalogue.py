"""All attacks, by name, and those that fit one configuration."""

from dataclasses import replace

from tests.attacks import connections, orders, outside
from tests.attacks.harness import Attack, only_notifications, unchanged
from tests.attacks.honest import RATES

ATTACKS = {**connections.ATTACKS, **orders.ATTACKS, **outside.ATTACKS}

COMBINED_FILES = 1024
COMBINED_RATES = RATES | {"hooks": 50.0, "notifications": 50.0}


COMBINED = (
    "trailers",
    "trailer-authorization",
    "silence",
    "slow-bodies",
    "endless-bodies",
    "unread-answers",
    "drip-heads",
    "validation-flood",
    "circuit-breaker",
    "large-hook",
    "white-space",
    "last-modified",
    "url-secret",
)


def combined() -> dict[str, Attack]:
    """Return attacks on connections and with signed URLs that run at the same time, on one configuration."""
    return {
        name: replace(attack, configure=unchanged) if attack.configure is only_notifications else attack
        for name, attack in ((name, ATTACKS[name]) for name in COMBINED)
    }
