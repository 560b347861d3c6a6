"""The health of the service, which the probes report."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Health:
    """The state of the service. A check returns True while its part works.

    A destination that is down does not make the service unready, because it must keep receiving callbacks.
    """

    started: bool = False
    stopping: bool = False
    is_held: bool = False  # the service delivers nothing: `serve --hold`
    checks: dict[str, Callable[[], bool]] = field(default_factory=dict)

    def results(self) -> dict[str, bool]:
        """Return the result of every check. The service is ready if all are True."""
        checked = {name: check() for name, check in self.checks.items()}
        return {"started": self.started, "not_stopping": not self.stopping} | checked
