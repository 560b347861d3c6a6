"""Validations and hooks, answered inside one deadline."""
