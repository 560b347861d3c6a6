"""Handlers for an ERP: an export in two steps, a stock check, and the freight."""
