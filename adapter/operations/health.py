"""The health of the service, as the probes report it."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Health:
    """The state of the service. `checks` has a function by name for each part; it returns True if the part works.

    A destination that is down does not make the service unready, because the intake must go on.
    """

    started: bool = False
    stopping: bool = False
    is_held: bool = False  # the service delivers nothing: `serve --hold`
    checks: dict[str, Callable[[], bool]] = field(default_factory=dict)

    def results(self) -> dict[str, bool]:
        """Return the result of every check. The service can take callbacks if all are True."""
        checked = {name: check() for name, check in self.checks.items()}
        return {"started": self.started, "not_stopping": not self.stopping} | checked
