"""
The configuration service: one document per adapter, by merchant and channel.

A document has to fit the basic schema, which has been checked by the table of operations, and the schema that it names.
What one would get wrong: that one is an adapter's, so it is fetched from this machine only, and fetches nothing itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jsonschema_rs
import msgspec

from adapter.norce.api import schema
from adapter.sandbox.norce.callbacks import NOT_LOOPBACK
from adapter.sandbox.norce.checkout import Checkout
from adapter.sandbox.norce.orders import Call, Refused
from adapter.sandbox.norce.records import document_key


def handlers(checkout: Checkout) -> dict[str, Callable[[Call], Any]]:
    """By the names of the operations."""
    records = checkout.records

    def documents(call: Call) -> dict[str, Any]:
        found = records.documents_of(call.path["merchant"], call.path["channel"])
        if not found or ("name" in call.path and call.path["name"] not in found):
            raise Refused("configuration-not-found", "There is no such configuration.")
        return found

    async def checked(document: dict[str, Any], name: str, call: Call) -> None:
        if document["id"] != name:
            raise Refused("configuration-error", f"The id of the configuration {name} is another one.")
        url = document["$schema"]
        if url.endswith("/openapi/v1/schemas/configuration.json"):
            return
        merchant, channel = call.path["merchant"], call.path["channel"]
        answer = await checkout.callbacks.fetch(
            url, seconds=call.switches.hook_seconds, merchant=merchant, channel=channel
        )
        if answer.reason == NOT_LOOPBACK:
            return  # a real adapter's schema cannot be had offline; the basic one holds
        own = answer.json()
        if not answer.is_good or not isinstance(own, dict):
            raise Refused(
                "configuration-error", f"The schema at {url} cannot be read: {answer.reason or answer.status}."
            )
        try:
            validator = jsonschema_rs.validator_for(own, retriever=_retrieve)
            problem = next(iter(validator.iter_errors(document)), None)
        except (ValueError, jsonschema_rs.ValidationError) as error:
            raise Refused("configuration-error", f"The schema at {url} is none.") from error
        if problem is not None:
            place = "/".join(map(str, problem.instance_path))
            raise Refused("configuration-error", f"The configuration does not fit its schema at /{place}.")

    def key(call: Call, name: str) -> str:
        return document_key(call.path["merchant"], call.path["channel"], name)

    async def put(call: Call, named: Mapping[str, dict[str, Any]]) -> Any:
        for name, document in named.items():
            await checked(document, name, call)
        for name, document in named.items():
            records.keep("documents", key(call, name), document)
        return call.body

    def remove(call: Call) -> None:
        for name in documents(call):
            if call.path.get("name", name) == name:
                records.drop("documents", key(call, name))

    def channels(call: Call) -> Any:
        keys = (msgspec.json.decode(each) for each in records.documents)
        found = list(dict.fromkeys(channel for merchant, channel, _ in keys if merchant == call.path["merchant"]))
        if not found:
            raise Refused("configuration-not-found", "The merchant has no channels.")
        return found

    return {
        "list_channels": channels,
        "list_configurations": lambda call: list(documents(call).values()),
        "put_configurations": lambda call: put(call, {each["id"]: each for each in call.body}),
        "remove_configurations": remove,
        "read_configuration": lambda call: documents(call)[call.path["name"]],
        "put_configuration": lambda call: put(call, {call.path["name"]: call.body}),
        "remove_configuration": remove,
    }


def _retrieve(url: str) -> Any:
    """What another schema may build on: Norce's basic one, wherever it says that is. Nothing is fetched."""
    if url.endswith("configuration.json"):
        return schema("adapter-configuration")
    raise ValueError(f"{url} is not fetched")
