"""Registration on every new order of a channel, through Norce's configuration."""

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from adapter.config import Config
from adapter.norce.client import NorceUnavailable
from adapter.registrations.on_channels import STATIC, channel_documents, static_notifications, static_secret
from adapter.routing.norce_settings import published_schema
from adapter.routing.routes import build
from tests.registrations.stage import CHANNEL, TREE, configured, opened
from tests.simulators import Shop, shop

URL_SECRETS = TREE["senders"] | {"url_secrets": [{"parameter": "secret", "values": ["${env:STATIC}"]}]}
FOR_ALL = {"parameter": "all", "values": ["${env:OLD}"]}
FOR_ONE = {"parameter": "its", "values": ["${env:STATIC}"], "merchants": ["norce"]}
BOTH = TREE["merchants"] | {"other": TREE["merchants"]["norce"]}


def documents(norce: Shop, config: Config) -> dict[str, Any]:
    with opened(norce) as client:
        return norce.loop.run(channel_documents(config, client, CHANNEL))


def keep(norce: Shop, name: str, document: Any) -> None:
    """Write a document past the simulator's checks."""
    norce.simulator.records.documents[*CHANNEL, name] = document


def test_the_documents_add_a_notification_to_every_new_order(tmp_path: Path) -> None:
    config = configured(tmp_path, senders=URL_SECRETS)
    with shop() as norce:
        made = documents(norce, config)

    assert made["our_adapter"] == {
        "active": True,
        "$schema": "http://127.0.0.1:8080/openapi/v1/schemas/our_adapter.json",
        "id": "our_adapter",
        "adapter": {"publicUrl": "http://127.0.0.1:8080", "internalUrl": "http://127.0.0.1:8080"},
        "callbacks": {"secret": "a%20secret%20%26%20more"},
    }
    Draft202012Validator(published_schema(config, build(config, []))).validate(made["our_adapter"])
    [notification] = made[STATIC]["order"]["notifications"]
    assert (notification["adapterId"], notification["reference"]) == ("our_adapter", "order-status")
    assert notification["invoke"].endswith("/order-status?secret={configuration.callbacks.secret}")


def test_other_members_of_the_documents_stay_and_a_repetition_changes_nothing(tmp_path: Path) -> None:
    config = configured(tmp_path, senders=URL_SECRETS)
    other = {"adapterId": "another", "scope": "/cart", "invoke": "http://127.0.0.1:9/x"}
    stale = {"adapterId": "our_adapter", "scope": "/cart", "invoke": "http://127.0.0.1:9/old"}
    with shop() as norce:
        keep(norce, "our_adapter", {"id": "our_adapter", "active": False, "more": 1})
        keep(norce, STATIC, {"id": STATIC, "own": 1, "order": {"notifications": [stale, other], "b": 2}})

        first = documents(norce, config)
        for name, document in first.items():
            keep(norce, name, document)

        assert documents(norce, config) == first
    ours, static = first["our_adapter"], first[STATIC]
    assert (ours["active"], ours["more"], static["own"], static["order"]["b"]) == (False, 1, 1, 2)
    assert [each["adapterId"] for each in static["order"]["notifications"]] == ["another", "our_adapter"]


@pytest.mark.parametrize("static", [[], {"order": {"notifications": {"a": {}}}}], ids=["not an object", "not a list"])
def test_a_document_that_is_not_understood_is_not_replaced(tmp_path: Path, static: Any) -> None:
    with shop() as norce:
        keep(norce, STATIC, static)

        with pytest.raises(NorceUnavailable):
            documents(norce, configured(tmp_path, senders=URL_SECRETS))


def test_a_static_registration_has_the_secret_that_is_good_for_this_merchant_alone(tmp_path: Path) -> None:
    config = configured(tmp_path, merchants=BOTH, senders=TREE["senders"] | {"url_secrets": [FOR_ALL, FOR_ONE]})

    assert static_secret(config, "norce") == "a%20secret%20%26%20more"
    assert "?its=" in static_notifications(config, "norce")[0]["invoke"]


@pytest.mark.parametrize("merchants", [None, ["norce", "other"]])
def test_without_such_a_secret_there_is_no_static_registration(tmp_path: Path, merchants: list[str] | None) -> None:
    secret = FOR_ALL | ({} if merchants is None else {"merchants": merchants})
    shared = configured(tmp_path, merchants=BOTH, senders=TREE["senders"] | {"url_secrets": [secret]})

    for config in (configured(tmp_path), shared):
        with shop() as norce, pytest.raises(LookupError, match="url_secrets"):
            documents(norce, config)
