"""A service that cannot start reports every reason at once and ends with a specific exit code."""

import json
import socket

from tests.flows.service_process import COMMAND
from tests.flows.site import Site, make_order


def test_a_second_process_on_the_same_database_ends_and_does_not_disturb_the_first(site: Site) -> None:
    first = site.start()

    second = site.run_command("serve")

    assert second.returncode == 5
    assert second.stderr == f"another process serves {site.folder / 'ledger.db'}; stop it first\n"
    assert site.notify(first, make_order("undisturbed")) == 200
    assert site.wait_for_end("undisturbed")["reason"] == "delivered"


def test_a_broken_file_ends_the_start_with_every_problem_and_its_line(site: Site) -> None:
    del site.environ["SHOP_PASSWORD"]
    site.config["server"]["prot"] = 8080
    site.config["norce"]["timeout"] = "soon"
    site.config["routes"]["export-payment"]["callback"] = "order-state"
    lines = (site.write_config()).read_text().splitlines()

    ended = site.run_command("serve")

    assert ended.returncode == 4
    assert ended.stdout == ""
    *problems, last = ended.stderr.splitlines()
    assert last == "4 problems in the configuration; nothing was started"
    for problem, key, path in zip(
        problems,
        ('"prot"', '"timeout": "soon"', '"callback": "order-state"', '"password"'),
        (
            "server.prot",
            "norce.timeout",
            "routes.export-payment.callback",
            "routes.export-payment.settings.auth.password",
        ),
        strict=True,
    ):
        (line,) = (number for number, text in enumerate(lines, 1) if key in text)
        assert problem.startswith(f"{site.folder / 'config.yaml'}:{line}: {path}: ")
    assert not (site.folder / "ledger.db").exists()


def test_problems_with_handlers_conditions_and_settings_are_reported_together(site: Site) -> None:
    export = site.config["routes"]["export-payment"]
    export["when"]["schema"] = {"type": "strnig"}
    export["settings"]["shop_id"] = 1
    site.config["routes"]["other"] = {"callback": "order-status", "handler": "jet-shop"}

    ended = site.run_command("serve")

    assert ended.returncode == 4
    paths = [problem.split(": ")[1] for problem in ended.stderr.splitlines()[:-1]]
    assert paths == [
        "routes.export-payment.when.schema",
        "routes.export-payment.settings.shop_id",
        "routes.other.handler",
    ]


def test_a_port_in_use_ends_the_start_and_releases_the_database(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = site.config["server"]["port"] = taken.getsockname()[1]
        ended = site.run_command("serve")

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"cannot listen on 127.0.0.1:{port}: Address already in use"
    site.config["server"]["port"] = 0
    assert site.notify(site.start(command=[COMMAND]), make_order("after-all")) == 200


def test_a_held_service_accepts_and_delivers_nothing_until_the_next_start(site: Site) -> None:
    site.config["operations"]["socket"] = "operations.sock"
    held = site.start("--hold")

    assert site.notify(held, make_order("held")) == 200
    assert site.validate(held, make_order("answered")).status_code == 200
    assert site.http.get(f"{held.operations_address}/readyz").json()["held"] is True
    paused = site.run_command("queues", "pause", "export-payment", "--why", "a test")
    listed = site.run_command("queues", "list", "--output", "json")
    assert (paused.returncode, paused.stdout) == (0, "2 paused\n"), paused.stderr
    assert {row["state"] for row in json.loads(listed.stdout)} == {"paused"}
    assert site.run_command("queues", "resume", "export-payment", "--why", "a test").returncode == 0
    assert site.delivery("held")["state"] == "waiting"
    assert site.delivery("held")["attempts"] == []
    assert held.stop() == 0
    assert not (site.folder / "operations.sock").exists()

    site.start()
    assert site.wait_for_end("held")["reason"] == "delivered"


def test_the_socket_of_a_killed_service_is_replaced(site: Site) -> None:
    site.config["operations"]["socket"] = "operations.sock"
    site.start().kill()
    left = site.run_command("queues", "pause", "export-payment", "--why", "a test")
    site.start()
    done = site.run_command("queues", "pause", "export-payment", "--why", "a test")

    assert left.returncode == 1
    assert f"no service answers at {site.folder / 'operations.sock'}" in left.stderr
    assert (done.returncode, done.stdout) == (0, "2 paused\n")


def test_a_ledger_serves_one_norce_until_a_person_lets_it_change_over(site: Site) -> None:
    loopback, why = site.config["norce"], ("--why", "the shop goes live")
    assert site.start().stop() == 0
    site.config["norce"] = {**loopback, "base_url": "http://localhost:1/another/port"}
    assert site.start().stop() == 0
    site.config["norce"] = {"environment": "stage", "refresh": "0s"}
    site.config["reconciliation"] = {"every": "0s"}

    refused = site.run_command("serve")
    preview = site.run_command("store", "adopt", "--dry-run", *why)
    still = site.run_command("check")
    adopted = site.run_command("store", "adopt", "--output", "json", *why)
    again = site.run_command("store", "adopt", *why)

    words = (
        f"{site.folder / 'ledger.db'} belongs to adapter jetshop_adapter at localhost, and the configuration names "
        "adapter jetshop_adapter at stage: use another database (store.url), or run `norce-adapter store adopt` if "
        "this one is to change over\n"
    )
    assert (refused.returncode, refused.stderr) == (5, words)
    assert (still.returncode, still.stderr.splitlines(keepends=True)[-1]) == (5, words)
    change = "from adapter jetshop_adapter at localhost to adapter jetshop_adapter at stage; 0 deliveries wait"
    assert (preview.returncode, preview.stdout) == (0, f"would change {change}\n")
    assert (adopted.returncode, json.loads(adopted.stdout)["changed"]) == (0, True)
    assert again.returncode == 3
    service = site.start()
    assert (beside := site.run_command("store", "adopt", *why)).returncode == 3, beside.stderr
    site.config["norce"] = loopback
    assert (beside := site.run_command("store", "adopt", *why)).returncode == 5, beside.stderr
    assert service.stop() == 0
