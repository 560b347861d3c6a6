"""Selects the routes for an order, and runs their handlers."""
