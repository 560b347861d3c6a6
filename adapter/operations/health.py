"""The health of the service, which the probes report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Health:
    """The state of the service. A check returns True while its part works.

    A destination that is down does not make the service unready, because it must keep receiving callbacks.

    Attributes:
        optional: The names of checks that may fail while the service is ready.
    """

    started: bool = False
    stopping: bool = False
    is_held: bool = False  # the service delivers nothing: `serve --hold`
    checks: dict[str, Callable[[], bool]] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)

    def results(self) -> dict[str, bool]:
        """Return the result of every check."""
        checked = {name: check() for name, check in self.checks.items()}
        return {"started": self.started, "not_stopping": not self.stopping} | checked

    def is_ready(self, results: Mapping[str, bool]) -> bool:
        return all(is_well or name in self.optional for name, is_well in results.items())
