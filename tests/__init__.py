"""The tests: a folder for each package, `flows` for the whole service, `crash` for kills."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDERS = ROOT / "adapter" / "sandbox" / "demo" / "orders"
# Seconds that a test waits for something that will happen. Only a hang reaches this limit, however slow the machine is.
PATIENCE = 120.0
