"""Handlers and the configuration of their routes: which of them is wanted, and how it is run."""
