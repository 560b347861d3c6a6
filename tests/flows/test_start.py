"""A service that cannot start says why, in one go, and with an exit code of its own."""

import socket

from tests.flows.stage import Stage, order


def test_a_second_process_on_the_same_database_says_so_and_leaves_the_first_alone(stage: Stage) -> None:
    first = stage.start()

    second = stage.command("serve")

    assert second.returncode == 5
    assert second.stderr == f"another process serves {stage.folder / 'ledger.db'}; stop it first\n"
    assert stage.notify(first, order("undisturbed")) == 200
    assert stage.ended("undisturbed")["reason"] == "delivered"


def test_a_broken_file_ends_the_start_with_every_problem_and_its_line(stage: Stage) -> None:
    del stage.environ["SHOP_PASSWORD"]
    stage.config["server"]["prot"] = 8080
    stage.config["norce"]["timeout"] = "soon"
    stage.config["routes"]["export-payment"]["callback"] = "order-state"
    lines = (stage.write()).read_text().splitlines()

    ended = stage.command("serve")

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
        assert problem.startswith(f"{stage.folder / 'config.yaml'}:{line}: {path}: ")
    assert not (stage.folder / "ledger.db").exists()


def test_problems_with_handlers_conditions_and_settings_are_told_together(stage: Stage) -> None:
    export = stage.config["routes"]["export-payment"]
    export["when"]["schema"] = {"type": "strnig"}
    export["settings"]["shop_id"] = 1
    stage.config["routes"]["other"] = {"callback": "order-status", "handler": "jet-shop"}

    ended = stage.command("serve")

    assert ended.returncode == 4
    paths = [problem.split(": ")[1] for problem in ended.stderr.splitlines()[:-1]]
    assert paths == [
        "routes.export-payment.when.schema",
        "routes.export-payment.settings.shop_id",
        "routes.other.handler",
    ]


def test_a_port_that_is_taken_ends_the_start_and_gives_the_database_back(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = stage.config["server"]["port"] = taken.getsockname()[1]
        ended = stage.command("serve")

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"cannot listen on 127.0.0.1:{port}: Address already in use"
    stage.config["server"]["port"] = 0
    assert stage.notify(stage.start(), order("after-all")) == 200
