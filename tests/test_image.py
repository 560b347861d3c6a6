"""The Dockerfile and the compose file agree with the code, as far as that shows without a build."""

import http.server
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML
from sqlalchemy import make_url

from adapter import cli
from adapter.config.model import DispatcherConfig, OperationsConfig, ServerConfig, StoreConfig
from tests import ROOT

DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SECRETS = {"NORCE_TOKEN": "a-token", "NORCE_ADAPTER_URL_KEY": "0123456789abcdef", "POSTGRES_PASSWORD": "0a1b"}


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def arguments_of(word: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == word]


def arguments() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(arguments_of("ARG"))))


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", arguments_of("ENV")[-1]))


def interpolated(value: Any, given: dict[str, str]) -> Any:
    """Replace ${NAME:-default} and ${NAME:?message}, as Compose does."""
    if isinstance(value, dict):
        return {key: interpolated(member, given) for key, member in value.items()}
    if isinstance(value, list):
        return [interpolated(member, given) for member in value]
    if not isinstance(value, str):
        return value
    return re.sub(
        r"\$\{(\w+):([-?])([^}]*)\}", lambda m: given[m[1]] if m[2] == "?" else given.get(m[1]) or m[3], value
    )


def services() -> dict[str, dict[str, Any]]:
    tree = YAML(typ="safe").load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return interpolated(tree["services"], SECRETS)


OURS = ["adapter", "node-a", "node-b"]


# --- the image --------------------------------------------------------------------------------------------------------


def test_the_image_exposes_the_default_ports() -> None:
    assert arguments_of("EXPOSE") == [f"{ServerConfig().port} {OperationsConfig().port}"]


def test_the_base_image_has_a_supported_python() -> None:
    found = re.match(r"python:(\d+)\.(\d+)-", arguments()["BASE"])

    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert tuple(map(int, found.groups())) >= tuple(map(int, least.groups()))


def test_the_image_has_the_version_of_the_package() -> None:
    assert arguments()["VERSION"] == PROJECT["version"]
    assert {services()[name]["image"] for name in OURS} == {f"norce-adapter:{PROJECT['version']}"}
    documented = re.findall(r"norce-adapter:(\d[\w.]*)", (ROOT / "docs" / "deployment.md").read_text("utf-8"))
    assert set(documented) == {PROJECT["version"]}


def test_the_image_starts_an_existing_command() -> None:
    [script] = json.loads(arguments_of("ENTRYPOINT")[0])
    [command] = json.loads(arguments_of("CMD")[0])

    assert script in PROJECT["scripts"]
    assert isinstance(cli.main.get_command(click.Context(cli.main), command), click.Command)


def test_the_store_is_in_the_volume() -> None:
    [volume], [folder] = arguments_of("VOLUME"), arguments_of("WORKDIR")[1:]

    for url in (environment()["NORCE_ADAPTER_STORE_URL"], StoreConfig().url):
        assert (Path(folder) / make_url(url).database).parent == Path(volume)


def test_the_user_is_a_number_and_owns_the_volume() -> None:
    [user] = arguments_of("USER")
    uid, gid = user.split(":")

    assert int(uid) >= 10000
    assert f"useradd --uid {uid} --gid {gid} " in arguments_of("RUN")[-1]
    assert f"install -d -o {uid} -g {gid} -m 0700 {arguments_of('VOLUME')[0]}" in arguments_of("RUN")[-1]


def test_copied_files_exist_and_nothing_else_reaches_the_builder() -> None:
    copied = {name for rest in arguments_of("COPY") if "--from" not in rest for name in rest.split()[:-1]}

    ignored = (ROOT / ".dockerignore").read_text("utf-8").split("\n")
    assert "*" in ignored
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


def test_every_package_is_installed_by_hash() -> None:
    installs = re.findall(r"install (?:(?! && ).)*", " ".join(run for run in arguments_of("RUN") if "pip" in run))

    assert len(installs) == 3
    assert all("--require-hashes" in line or "--no-deps --no-index" in line for line in installs)


@pytest.fixture
def operations_port() -> Iterator[tuple[int, list[int]]]:
    """A server in place of the operations port. The list holds the status of its next answer."""
    status = [200]

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/readyz" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server.server_port, status
        server.shutdown()
        thread.join()


def healthcheck(port: int) -> int:
    python, options, code = json.loads(re.search(r" CMD (\[.*\])", arguments_of("HEALTHCHECK")[0])[1])
    assert (python, code.count(str(OperationsConfig().port))) == ("python", 1)
    command = [sys.executable, options, code.replace(str(OperationsConfig().port), str(port))]
    proxied = {"http_proxy": "http://127.0.0.1:1"}
    return subprocess.run(command, check=False, capture_output=True, timeout=30, env=proxied).returncode


def test_the_health_check_follows_readyz(operations_port: tuple[int, list[int]]) -> None:
    port, status = operations_port

    assert healthcheck(port) == 0
    status[0] = 503
    assert healthcheck(port) == 1


def test_the_health_check_fails_without_a_listener() -> None:
    assert healthcheck(1) == 1


# --- compose ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_the_mounted_configuration_passes_the_check(name: str) -> None:
    given = environment() | services()[name]["environment"]
    given["NORCE_ADAPTER_CONFIG"] = str(DEPLOY / "config.yaml")

    result = CliRunner().invoke(cli.main, ["check"], env=given)
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.output.splitlines() if line.startswith("warning")]
    assert [line for line in warnings if "cannot read postgresql" not in line] == []  # no database runs here


def test_every_service_gets_every_referenced_variable() -> None:
    wanted = set(re.findall(r"\$\{env:(\w+)\}", (DEPLOY / "config.yaml").read_text("utf-8")))

    for name in OURS:
        assert wanted <= environment().keys() | services()[name]["environment"].keys()


def test_the_example_names_every_secret_without_a_value() -> None:
    text = (DEPLOY / "compose.yaml").read_text("utf-8")
    lines = (DEPLOY / "example.env").read_text("utf-8").splitlines()

    names = set(re.findall(r"\$\{(\w+)", text)) - {"NORCE_ADAPTER_VERSION"}
    assert {line for line in lines if not line.startswith("#")} == {f"{name}=" for name in names}
    assert names == SECRETS.keys()


@pytest.mark.parametrize("name", OURS)
def test_a_container_can_write_only_its_volume(name: str) -> None:
    service = services()[name]

    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    writable = [volume.split(":")[1] for volume in service["volumes"] if not volume.endswith(":ro")]
    assert {*writable, *(path.split(":")[0] for path in service["tmpfs"])} == {"/tmp", *arguments_of("VOLUME")}


@pytest.mark.parametrize("name", OURS)
def test_the_configuration_is_mounted_at_the_path_of_the_image(name: str) -> None:
    mounted = f"./config.yaml:{environment()['NORCE_ADAPTER_CONFIG']}:ro"

    assert mounted in services()[name]["volumes"]


@pytest.mark.parametrize("name", OURS)
def test_only_the_public_port_is_published_and_only_on_loopback(name: str) -> None:
    [published] = services()[name]["ports"]

    assert re.fullmatch(rf"127\.0\.0\.1:\d+:{ServerConfig().port}", published)


def test_services_have_different_ports() -> None:
    published = [port for service in services().values() for port in service.get("ports", [])]

    assert len(published) == len(set(published)) == len(OURS)


@pytest.mark.parametrize("name", OURS)
def test_the_stop_period_covers_a_shutdown(name: str) -> None:
    seconds = int(services()[name]["stop_grace_period"].removesuffix("s"))

    assert timedelta(seconds=seconds) >= DispatcherConfig().grace + timedelta(seconds=5)


def test_the_nodes_share_the_database_of_the_compose_file() -> None:
    postgres = services()["postgres"]
    [url] = {services()[name]["environment"]["NORCE_ADAPTER_STORE_URL"] for name in ("node-a", "node-b")}

    address = make_url(url)
    assert (address.drivername, address.host, address.port) == ("postgresql+psycopg", "postgres", 5432)
    assert (address.username, address.password, address.database) == tuple(
        postgres["environment"][f"POSTGRES_{part}"] for part in ("USER", "PASSWORD", "DB")
    )


def test_postgresql_starts_only_with_its_profile() -> None:
    assert {name for name, service in services().items() if "profiles" not in service} == {"adapter"}
