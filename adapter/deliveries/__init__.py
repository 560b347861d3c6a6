"""Deliveries: claimed, run by a handler, and recorded.

The next state of a delivery, its retries and the pauses of its queue are computed in `adapter.ledger.settlement`.
"""
