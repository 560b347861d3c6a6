"""The configuration service: one document per adapter, by merchant and channel.

A document has to fit Norce's basic schema and the schema that it names in `$schema`. The latter is fetched only from
this machine, and references in it are never fetched.
"""

from collections.abc import Callable
from typing import Any

import jsonschema_rs

from adapter.norce.api import schema
from adapter.sandbox.norce.callbacks import NOT_LOOPBACK
from adapter.sandbox.norce.checkout import Checkout
from adapter.sandbox.norce.orders import ApiRequest, Refused

Documents = dict[str, dict[str, Any]]  # by name


def handlers(checkout: Checkout) -> dict[str, Callable[[ApiRequest], Any]]:
    """Return the handlers of the service, by the names of the operations."""
    records = checkout.records

    def documents(request: ApiRequest) -> Documents:
        found = records.documents_of(request.path["merchant"], request.path["channel"])
        if not found or ("name" in request.path and request.path["name"] not in found):
            raise Refused("configuration-not-found", "There is no such configuration.")
        return found

    async def put(request: ApiRequest, named: Documents) -> Any:
        for name, document in named.items():
            await _check(checkout, document, name, request)
        for name, document in named.items():
            records.documents[request.path["merchant"], request.path["channel"], name] = document
        return request.body

    def remove(request: ApiRequest) -> None:
        for name in documents(request):
            if request.path.get("name", name) == name:
                del records.documents[request.path["merchant"], request.path["channel"], name]

    def channels(request: ApiRequest) -> list[str]:
        found = dict.fromkeys(
            channel for merchant, channel, _ in records.documents if merchant == request.path["merchant"]
        )
        if not found:
            raise Refused("configuration-not-found", "The merchant has no channels.")
        return list(found)

    return {
        "list_channels": channels,
        "list_configurations": lambda request: list(documents(request).values()),
        "put_configurations": lambda request: put(request, {each["id"]: each for each in request.body}),
        "remove_configurations": remove,
        "read_configuration": lambda request: documents(request)[request.path["name"]],
        "put_configuration": lambda request: put(request, {request.path["name"]: request.body}),
        "remove_configuration": remove,
    }


async def _check(checkout: Checkout, document: dict[str, Any], name: str, request: ApiRequest) -> None:
    if document["id"] != name:
        raise Refused("configuration-error", f"The id of the configuration {name} is another one.")
    url = document["$schema"]
    if url.endswith("/openapi/v1/schemas/configuration.json"):
        return
    channel = {name: request.path[name] for name in ("merchant", "channel")}
    answer = await checkout.callbacks.fetch(url, seconds=request.switches.hook_seconds, **channel)
    if answer.reason == NOT_LOOPBACK:
        return  # the schema of a real adapter cannot be fetched offline
    own = answer.json()
    if not answer.is_success or not isinstance(own, dict):
        reason = answer.reason or answer.status
        raise Refused("configuration-error", f"The schema at {url} cannot be read: {reason}.")
    try:
        problem = next(iter(jsonschema_rs.validator_for(own, retriever=_retrieve).iter_errors(document)), None)
    except (ValueError, jsonschema_rs.ValidationError) as error:
        raise Refused("configuration-error", f"The document at {url} is not a schema.") from error
    if problem is not None:
        place = "/".join(map(str, problem.instance_path))
        raise Refused("configuration-error", f"The configuration does not fit its schema at /{place}.")


def _retrieve(url: str) -> Any:
    # An adapter's schema may build on Norce's basic one, on any host.
    if url.endswith("configuration.json"):
        return schema("adapter-configuration")
    raise ValueError(f"{url} is not fetched")
