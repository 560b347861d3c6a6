"""Starlette + psycopg + PostgreSQL: an insert and a commit for each request, with a connection pool."""

import contextlib
import os
from collections.abc import AsyncIterator

from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

pool = AsyncConnectionPool(os.environ["DATABASE_URL"], min_size=10, max_size=10, open=False)


@contextlib.asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    async with pool:
        async with pool.connection() as connection:
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
                " order_id text NOT NULL UNIQUE, callback text NOT NULL,"
                " received_at timestamptz NOT NULL DEFAULT now(), body bytea NOT NULL)"
            )
        yield


async def receive(request: Request) -> Response:
    body = await request.body()
    async with pool.connection() as connection:
        await connection.execute(
            "INSERT INTO orders (order_id, callback, body) VALUES (%s, %s, %s)",
            (request.path_params["order_id"], request.path_params["callback"], body),
        )
    return Response(status_code=200)


app = Starlette(
    routes=[Route("/api/v1/callbacks/orders/{order_id}/{callback}", receive, methods=["POST"])], lifespan=lifespan
)
