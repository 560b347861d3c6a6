"""The health of the service, which the probes report."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field

import structlog

log = structlog.get_logger(__name__)


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


@contextlib.asynccontextmanager
async def background_task(name: str, work: Coroutine[None, None, None], health: Health) -> AsyncIterator[None]:
    """Run work that should not end. If it ends, the service is no longer ready."""
    task = asyncio.create_task(work)
    health.checks[name] = lambda: not task.done()
    task.add_done_callback(_log_failure)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("task_failed", exc_info=error)
