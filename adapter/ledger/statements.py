"""
Statements for any number of rows or numbers, on either database: none of them is written or planned anew because there
are more. SQLite is in the same process, where a statement costs little and a long one saves hand-overs; to PostgreSQL
it is a way there and back, so everything goes along as arrays.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Column, ColumnElement, Dialect, Table, Text, TypeDecorator, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

ROWS_A_STATEMENT = 64


class Insert(ABC):
    """Puts many rows into a table with one statement. `ending` is what follows: ON CONFLICT …, RETURNING …"""

    def __init__(self, table: Table, columns: Sequence[str], ending: str = "") -> None:
        self._into = f"INSERT INTO {table.name} ({', '.join(columns)})"
        self._columns = [table.c[name] for name in columns]
        self._ending = ending

    @abstractmethod
    def rows(self, cursor: Any, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Inserts them in this order, and answers what the ending returns; an empty list where it returns nothing."""


class Update(ABC):
    """
    Changes many rows of a table, each by values of its own. `sets` is what follows SET, with `{name}` for a value; `of`
    says by its name which column a value is of, first the key by which a row is found.
    """

    def __init__(self, table: Table, of: Mapping[str, Column[Any]], sets: str) -> None:
        self._table = table
        self._of = of
        self._sets = sets

    @abstractmethod
    def rows(self, cursor: Any, rows: Sequence[Mapping[str, Any]]) -> None: ...


class _Numbers(TypeDecorator[Any]):
    """Any number of numbers as one parameter."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(ARRAY(BigInteger()) if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return list(value) if dialect.name == "postgresql" else json.dumps(list(value))


class _Among(FunctionElement[Any]):  # of no type: SQLite knows no booleans, and behind "… = 1" finds no index
    inherit_cache = True


@compiles(_Among)
def _among(element: _Among, compiler: SQLCompiler, **named: Any) -> str:
    column, numbers = (compiler.process(each, **named) for each in element.clauses)
    if compiler.dialect.name == "postgresql":
        return f"{column} = ANY({numbers})"
    return f"{column} IN (SELECT value FROM json_each({numbers}))"  # noqa: S608 - our own names


def among(column: ColumnElement[int], name: str = "ids") -> ColumnElement[bool]:
    """
    Whether a column is one of the numbers that the parameter `name` holds. Unlike `IN (…)` it is one statement for any
    number of them, which is neither written nor planned anew.
    """
    return _Among(column, bindparam(name, type_=_Numbers()))


class ValuesInsert(Insert):
    """`VALUES (…), (…)`: one step of the engine, and one hand-over of the interpreter, for so many rows."""

    def rows(self, cursor: Any, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        returned: list[tuple[Any, ...]] = []
        one = f"({', '.join('?' for _ in self._columns)})"
        for start in range(0, len(rows), ROWS_A_STATEMENT):
            some = rows[start : start + ROWS_A_STATEMENT]
            sql = f"{self._into} VALUES {', '.join([one] * len(some))} {self._ending}"
            cursor.execute(sql, [value for row in some for value in row])
            if cursor.description:
                returned += cursor.fetchall()
        return returned


class EachUpdate(Update):
    """One after the other, which in the same process costs next to nothing."""

    def __init__(self, table: Table, of: Mapping[str, Column[Any]], sets: str) -> None:
        super().__init__(table, of, sets)
        values = {name: f":{name}" for name in of}
        self._sql = f"UPDATE {table.name} SET {sets.format(**values)} WHERE id = :{next(iter(of))}"  # noqa: S608 - ours

    def rows(self, cursor: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        cursor.executemany(self._sql, rows)


class ArraysInsert(Insert):
    """One array a column: the statement is the same for any number of rows, and prepared once."""

    def __init__(self, table: Table, columns: Sequence[str], ending: str = "") -> None:
        super().__init__(table, columns, ending)
        self._sql = f"{self._into} SELECT * FROM {_unnested(self._columns)} {ending}"  # noqa: S608 - our own names

    def rows(self, cursor: Any, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        if not rows:
            return []
        cursor.execute(self._sql, [list(column) for column in zip(*rows, strict=True)])
        return cursor.fetchall() if cursor.description else []


class ArraysUpdate(Update):
    """As `ArraysInsert`: one statement, and one way to the server and back, for all rows."""

    def __init__(self, table: Table, of: Mapping[str, Column[Any]], sets: str) -> None:
        super().__init__(table, of, sets)
        values = {name: f"changes.{name}" for name in of}
        self._sql = (
            f"UPDATE {table.name} SET {sets.format(**values)}"  # noqa: S608 - our own names
            f" FROM {_unnested(of.values())} AS changes ({', '.join(of)})"
            f" WHERE {table.name}.id = changes.{next(iter(of))}"
        )

    def rows(self, cursor: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        cursor.execute(self._sql, [[row[name] for row in rows] for name in self._of])


def _unnested(columns: Iterable[Column[Any]]) -> str:
    from sqlalchemy.dialects import postgresql  # only where it is used, like the driver

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    arrays = (f"%b::{column.type.compile(dialect).partition(' ')[0]}[]" for column in columns)
    return f"unnest({', '.join(arrays)})"
