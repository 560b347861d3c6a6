"""The operations port: health, metrics and commands."""
