"""The yardstick: uvicorn with one Starlette route that reads the body. It imports nothing of the adapter.

python benchmarks/echo.py PORT
"""

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def answer(request: Request) -> Response:
    await request.body()
    return Response(status_code=200)


if __name__ == "__main__":
    uvicorn.run(
        Starlette(routes=[Route("/{rest:path}", answer, methods=["POST"])]),
        host="127.0.0.1", port=int(sys.argv[1]), log_config=None, access_log=False, lifespan="off", ws="none",
        server_header=False, loop="uvloop", http="httptools",
    )  # fmt: skip
