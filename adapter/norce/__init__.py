"""Norce Checkout, as we call it."""
