"""Deliveries: claimed, run by a handler, and recorded."""
