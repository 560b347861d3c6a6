"""The tests: a folder for each package, `flows` for the whole service, `crash` for kills."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDERS = ROOT / "adapter" / "sandbox" / "demo" / "orders"
