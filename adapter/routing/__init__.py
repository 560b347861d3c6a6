"""Routing: selects the routes for an order, and runs their handlers."""
