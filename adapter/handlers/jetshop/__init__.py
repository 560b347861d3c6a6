"""The handler `jetshop`: exports the payment information of a completed order to Jetshop.

Jetshop publishes no contract for this export, so it follows our own (`contract.yaml`).
"""

from adapter.handlers.jetshop.client import JetshopExport

__all__ = ["JetshopExport"]
