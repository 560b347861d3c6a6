"""FastAPI + Celery + Redis as documented: the order is a task, and is enqueued before the answer."""

import os
from typing import Any

from celery import Celery
from fastapi import FastAPI

app = FastAPI()
celery = Celery("orders", broker=os.environ["BROKER_URL"])


@celery.task
def deliver(order_id: str, order: dict[str, Any]) -> None:
    """Do nothing: no worker runs here, so none takes time from the receiver."""


@app.post("/api/v1/callbacks/orders/{order_id}/{callback}")
def receive(order_id: str, callback: str, order: dict[str, Any]) -> dict[str, str]:
    deliver.delay(order_id, order)
    return {"status": "accepted"}
