"""Receives callbacks from Norce. Start reading in `endpoints`."""
