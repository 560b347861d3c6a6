"""docs/norce.md, run from top to bottom: its commands against the sandbox, with its YAML put into `config.yaml`.

The test plays the programs that the page leaves to the reader: the shop, which creates orders and buys, and whoever
writes the file of orders. It replaces the ports, and the page's Norce by the sandbox.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from adapter.norce.api import BY_NAME, CHANNEL, MERCHANT
from tests import PATIENCE, ROOT
from tests.cli.test_cli import run
from tests.flows.site import Service, free_port, wait_until
from tests.simulators import Served

pytestmark = pytest.mark.usefixtures("logging_as_before")

PAGE = (ROOT / "docs" / "norce.md").read_text("utf-8")
ORDER = "o_yClTSySjyAuuBjmiBlHCjuEcTf"  # the id on the page
STEP = re.compile(r"^```(console|yaml)\n(.*?)^```|^#+ ([^\n]*)$|^\|([^\n]*)\|$", re.M | re.S)
IN_A_TABLE = re.compile(r"`(norce-adapter [^`]+)`")
YAML_FILES = YAML(typ="safe", pure=True)


def steps() -> Iterator[tuple[str, str, str]]:
    """Yield the heading, the kind and the text of each block, and of the commands in each row of a table."""
    heading = ""
    for found in STEP.finditer(PAGE):
        kind, text, title, row = found.groups()
        heading = title or heading
        if kind:
            yield heading, kind, text
        elif row and (commands := IN_A_TABLE.findall(row)):
            yield heading, "console", "\n".join(commands)


class Reader:
    """A reader who does what the page says, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "config.yaml"
        self.environ: dict[str, str] = {"PATH": os.environ["PATH"]}
        self.ports = free_port(), free_port()
        self.service: Service | None = None
        self.starts = 0
        self.norce: Served | None = None
        self.orders: list[str] = []
        self._open = ExitStack()

    def close(self) -> None:
        if self.service is not None and self.service.is_running:
            self.service.kill()
        self._open.close()

    def do(self, kind: str, text: str) -> None:
        if kind == "yaml":
            self.configure(YAML_FILES.load(text))
            return
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["export"]:
                self.environ |= dict(each.split("=", 1) for each in words[1:])
            elif words[:2] == ["norce-adapter", "serve"]:
                self.serve()
            elif words:
                self.run(line, words[1:])

    def run(self, line: str, words: list[str]) -> None:
        if "gone" in words:  # its orders are those of another shop
            self.environ["NORCE_ADAPTER_NORCE_TOKEN"] = self.environ["NORCE_TOKEN"]
        if words[0] == "simulate":
            words += ["--port", str(self.ports[1])]
        if ORDER in words and not self.orders:
            listed = run("deliveries", "list", "--output", "json", config=self.path, env=self.environ)
            self.orders.append(json.loads(listed.stdout)[0]["order_id"])
        words = [self.orders[-1] if word == ORDER else word for word in words]
        result = run(*words, config=self.path, env=self.environ)
        assert result.exit_code in (0, 3), f"{line}\n{result.output}"  # 3: nothing matched, such as an empty list
        if words[0] == "init":
            text = self.path.read_text().replace(":8080", f":{self.ports[0]}").replace(":8090", f":{self.ports[1]}")
            ports = f"server: {{host: 127.0.0.1, port: {self.ports[0]}}}\noperations: {{port: 0}}\n"
            self.path.write_text(text + ports + "reconciliation: {every: 0s}\n")

    def configure(self, sections: dict[str, Any]) -> None:
        """Put sections of the page into the file, with this machine as the Norce and as the public address."""
        config = YAML_FILES.load(self.path.read_text())
        if "merchants" in sections:
            config["store"] = {"url": "sqlite:///data/another.db"}  # as the page says, for another Norce
            sections["adapter"]["public_url"] = config["adapter"]["public_url"]
            sections["norce"] = config["norce"]
        with self.path.open("w") as file:
            json.dump(config | sections, file)  # JSON is YAML
        if self.norce is None:  # until here, scenarios had a Norce of their own
            self.norce = Served(self.environ["NORCE_TOKEN"], self.ports[1])
            self._open.enter_context(closing(self.norce))

    def serve(self) -> None:
        """Start the service, in place of one that runs."""
        if self.service is not None:
            assert self.service.stop() == 0
        self.starts += 1
        self.service = Service(self.path, self.environ, self.folder / f"serve{self.starts}.log").wait_until_serving()

    # --- the shop ---

    def create(self) -> str:
        order = {"currency": "SEK", "reference": "100245", "cart": {"reference": "7", "items": []}}
        self.orders.append(self.ask("create_order", order)["id"])
        return self.orders[-1]

    def buy(self) -> None:
        """Complete the last order, and wait for its export."""
        for status in ("processing", "accepted", "completed"):
            self.ask("put_state", {"currentStatus": status}, order_id=self.orders[-1])
        wait_until(lambda: self.is_exported(self.orders[-1]), what="an export")

    def read(self, order_id: str) -> dict[str, Any]:
        order: dict[str, Any] = self.ask("read_order", None, order_id=order_id)
        return order

    def ask(self, name: str, body: Any, **path: str) -> Any:
        assert self.norce is not None
        operation = BY_NAME[name]
        answer = httpx.request(
            operation.method,
            operation.url(self.norce.url, "v0", **path),
            headers={
                "authorization": f"Bearer {self.environ['NORCE_TOKEN']}",
                MERCHANT: "fjallboden",
                CHANNEL: "se-b2c",
            },
            json=body,
            trust_env=False,
            timeout=PATIENCE,
        )
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def delivered(self) -> list[dict[str, Any]]:
        """Return the deliveries of the last order that are done."""
        options = ["--order", self.orders[-1], "--reason", "delivered", "--output", "json"]
        listed: list[dict[str, Any]] = json.loads(
            run("deliveries", "list", *options, config=self.path, env=self.environ).stdout
        )
        return listed

    def is_exported(self, order_id: str) -> bool:
        return run("why", order_id, config=self.path, env=self.environ).exit_code == 0


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    with closing(Reader(tmp_path)) as reader:
        yield reader


def test_the_page_leads_from_an_empty_folder_to_a_shop(reader: Reader) -> None:
    for heading, kind, text in steps():
        if heading == "Registration":
            (reader.folder / "ids").write_text(reader.create() + "\n")
        reader.do(kind, text)
        if kind != "console":
            continue
        if heading == "The first export, offline":
            assert reader.is_exported(reader.orders[0])
        elif heading == "Registration":
            reader.buy()
        elif heading == "Registering on every new order":
            reader.create()
            reader.buy()
        elif heading == "A merchant that leaves":
            shown = reader.read(reader.orders[-1])
            assert [shown.get(kind) or [] for kind in ("validations", "hooks", "notifications")] == [[], [], []]
    wait_until(lambda: len(reader.delivered()) == 2, what="the order that was resent")
