"""All attacks, by name, and those that fit one configuration."""

from dataclasses import replace

from tests.attacks import connections, orders, outside
from tests.attacks.harness import Attack, only_notifications, unchanged
from tests.attacks.honest import RATES

ATTACKS = {**connections.ATTACKS, **orders.ATTACKS, **outside.ATTACKS}

COMBINED_FILES = 1024
COMBINED_RATES = RATES | {"hooks": 50.0, "notifications": 50.0}


def combined() -> dict[str, Attack]:
    """Return all attacks on connections and with signed URLs, to be run at the same time."""
    both = {**connections.ATTACKS, **orders.ATTACKS}
    return {
        name: replace(attack, configure=unchanged) if attack.configure is only_notifications else attack
        for name, attack in both.items()
    }
