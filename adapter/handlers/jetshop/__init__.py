"""
`jetshop`: exports the payment information of a completed order to Jetshop.

What is sent, and where, is this project's own contract (`contract.yaml`). Jetshop publishes none for this.
"""

from adapter.handlers.jetshop.client import JetshopExport

__all__ = ["JetshopExport"]
