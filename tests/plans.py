"""Query plans of statements."""

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Engine, event

from tests.ledgers import Ledger

BIG = ("notifications", "deliveries", "lanes", "attempts")


def seen(engine: Engine, do: Callable[[], Any]) -> list[tuple[str, Any]]:
    """Call a function and return the statements that it executes, with their parameters."""
    statements: list[tuple[str, Any]] = []

    def hear(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        statements.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", hear)
    try:
        do()
    finally:
        event.remove(engine, "before_cursor_execute", hear)
    return statements


def plan(ledger: Ledger, statement: str, parameters: Any) -> list[str]:
    explain = "EXPLAIN QUERY PLAN " if ledger.url.startswith("sqlite") else "EXPLAIN "
    with ledger.store.engine.connect() as connection:
        lines = [str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters)]
        connection.rollback()
    return lines


def assert_no_scan(ledger: Ledger, statement: str, parameters: Any, tables: Iterable[str] = BIG) -> None:
    """Check that a statement reads every big table through an index."""
    if not statement.startswith(("SELECT", "UPDATE", "DELETE")):
        return
    lines = plan(ledger, statement, parameters)
    for line in lines:
        for table in tables:
            # A full scan of an index is fine: it is a partial index of the rows in question, or the scan ends early.
            by_no_index = f"Seq Scan on {table}" in line or line == f"SCAN {table}"
            assert not by_no_index, "\n".join([statement, *lines])
