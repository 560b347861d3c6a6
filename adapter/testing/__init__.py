"""The test kit for authors of handlers: builders, fakes, `play` and conformance suites.

Everything runs in this process and without a network. Nothing here needs pytest, and any test runner can use it.
"""

from adapter.testing.builders import ABSENT, FakeNorce, HandClock, context, notification, order
from adapter.testing.conformance import CheckFailed, HandlerConformance, HookConformance, ValidationConformance
from adapter.testing.faults import FakeSystem, NetworkFault, SentRequest
from adapter.testing.play import PlayedAttempt, PlayedDelivery, PlayedVerdict, ask, play

__all__ = [
    "ABSENT",
    "CheckFailed",
    "FakeNorce",
    "FakeSystem",
    "HandClock",
    "HandlerConformance",
    "HookConformance",
    "NetworkFault",
    "PlayedAttempt",
    "PlayedDelivery",
    "PlayedVerdict",
    "SentRequest",
    "ValidationConformance",
    "ask",
    "context",
    "notification",
    "order",
    "play",
]
