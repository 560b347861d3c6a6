"""Callbacks: receiving, authenticating and answering them. Start in `endpoints`."""
