"""FastAPI + SQLAlchemy ORM + SQLite as documented: a session and a commit for each request."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import JSON, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

engine = create_engine(os.environ["DATABASE_URL"], connect_args={"check_same_thread": False, "timeout": 30})


@event.listens_for(engine, "connect")
def durable(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


class Base(DeclarativeBase):
    pass


class ReceivedOrder(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str] = mapped_column(unique=True)
    callback: Mapped[str]
    received_at: Mapped[datetime]
    body: Mapped[dict[str, Any]] = mapped_column(JSON)


Base.metadata.create_all(engine)
app = FastAPI()


def session() -> Iterator[Session]:
    with Session(engine) as opened:
        yield opened


@app.post("/api/v1/callbacks/orders/{order_id}/{callback}")
def receive(
    order_id: str, callback: str, order: dict[str, Any], session: Annotated[Session, Depends(session)]
) -> dict[str, str]:
    session.add(ReceivedOrder(order_id=order_id, callback=callback, received_at=datetime.now(UTC), body=order))
    session.commit()
    return {"status": "accepted"}
