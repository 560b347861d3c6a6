"""Norce's APIs: the table of their operations, and the client that calls them."""
