"""Runs an attack on a service in a process of its own, beside honest traffic, and measures both.

The service is the installed command, in a memory cgroup if this machine lets us make one. Norce is the offline one, in
this process. Honest traffic and every attacker have a process each; attackers have a lower priority, as if they were on
other machines.
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvloop

from tests.attacks import honest
from tests.attacks.honest import RATES
from tests.attacks.wire import MERCHANT, SECRET, URL_SECRET, Target
from tests.flows.service_process import COMMAND
from tests.flows.site import ExternalServices, Service, Site, free_port, install_sample_plugin, make_order

LEAD_SECONDS = 4.0  # of honest traffic alone
TAIL_SECONDS = 2.0
SAMPLE_EVERY_SECONDS = 0.25
MEMORY_MIB = 512
FILES = 20_000
MIB = 1024 * 1024

Result = dict[str, Any]
Strike = Callable[[Target, float], Awaitable[Result]]


def unchanged(_site: Site) -> None:
    """Leave the configuration as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """An attack: how the service is configured for it, and the coroutine that attacks for some seconds.

    Attributes:
        strike: Returns the attacker's figures. An entry `faults` lists what the service should not have done.
        configure: Changes the configuration of the site.
        files: The limit on open files of the service.
        rates: Of the honest traffic. A rate of 0 leaves a kind out.
        seconds: The shortest time that shows the fault.
        needs_plugin: Whether the sample plugin is installed.
    """

    summary: str
    strike: Strike
    configure: Callable[[Site], None] = unchanged
    files: int = FILES
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    seconds: float = 15.0
    needs_plugin: bool = False


class Orders(dict[str, Any]):
    """The orders of a Norce that has every order. A rule refuses those whose ids begin with `refused`."""

    def get(self, order_id: str, _default: Any = None) -> Any:
        return make_order(order_id, **({"currency": "EUR"} if order_id.startswith("refused") else {}))


def prepare(site: Site) -> None:
    """Configure the service of the attacks: all kinds of callbacks, and all kinds of senders."""
    site.norce.records = replace(site.norce.records, orders=Orders())
    site.environ["SECRET"], site.environ["URL_SECRET"] = SECRET, URL_SECRET
    site.environ.pop("PYTHONWARNINGS")
    site.config["norce"]["timeout"] = "5s"
    site.config["senders"] |= {
        "header_secrets": [{"header": "authorization", "values": ["${env:SECRET}"]}],
        "url_secrets": [{"parameter": "secret", "values": ["${env:URL_SECRET}"], "merchants": [MERCHANT]}],
    }
    site.config["callbacks"] = {
        "order-status": {"kind": "notification", "scope": "/state/currentStatus"},
        "order-rules": {"kind": "validation", "deadline": "2s"},
        "cart-changed": {"kind": "hook", "watch": "/cart", "target": "/cart", "deadline": "2s"},
    }
    rule: dict[str, Any] = {"handler": "rules", "no_answer": "approve"}
    site.config["routes"] = {
        "see-orders": {
            "callback": "order-status",
            "when": {"scope": "/state/currentStatus", "schema": {"const": "completed"}},
            "handler": "log",
        },
        "kronor": rule | {"callback": "order-rules", "settings": {"rules": [
            {"scope": "/currency", "schema": {"const": "SEK"}, "code": "not-sek", "message": "Kronor only."}]}},
        "ten-of-a-kind": rule | {"callback": "cart-changed", "settings": {"rules": [
            AT_MOST_TEN | {"code": "too-many"}]}},
    }  # fmt: skip


AT_MOST_TEN = {
    "scope": "/cart/items",
    "schema": {"items": {"properties": {"quantity": {"maximum": 10}}}},
    "message": "At most ten.",
}


def only_notifications(site: Site) -> None:
    """Leave validations and hooks out: with them, an older service refuses to start with 1,024 descriptors."""
    for name in ("order-rules", "cart-changed"):
        del site.config["callbacks"][name]
    for name in ("kronor", "ten-of-a-kind"):
        del site.config["routes"][name]


def with_slow_orders(site: Site) -> None:
    """Add a hook that never answers for orders whose ids begin with `slow`, and refuses all others."""
    site.config["callbacks"]["cart-slow"] = {"kind": "hook", "watch": "/cart", "target": "/cart", "deadline": "2s"}
    site.config["routes"]["slow"] = {
        "callback": "cart-slow",
        "handler": "sample-slow-for-some-orders",
        "no_answer": "approve",
        "settings": {"slow": "slow"},
    }


# --- the run ----------------------------------------------------------------------------------------------------------


def run(
    attacks: Mapping[str, Attack],
    seconds: float,
    *,
    files: int = FILES,
    rates: Mapping[str, float] = RATES,
    comes_again_seconds: float = 1.0,
    command: Path = COMMAND,
    memory_mib: int = MEMORY_MIB,
    report: Callable[[str], None] = lambda _line: None,
) -> Result:
    """Run attacks at the same time on one service. Return the figures of all.

    Args:
        attacks: By name.
        seconds: How long they attack.
        files: The limit on open files of the service.
        rates: Requests a second of each kind of honest traffic.
        comes_again_seconds: The time after which an attacker that was cut off opens another connection.
        command: The `norce-adapter` to run, which may be of another version.
        memory_mib: The limit of the service's memory cgroup; 0 for none.
        report: Called with lines of progress.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="norce-adapter-attacks-")))
        site = Site(folder, stack.enter_context(ExternalServices()))
        stack.callback(kill, site)
        norce_port = free_port()
        prepare(site)
        for attack in attacks.values():
            attack.configure(site)
        if any(attack.needs_plugin for attack in attacks.values()):
            site.environ["PYTHONPATH"] = str(install_sample_plugin(folder / "plugin"))
        if site.config["norce"]["base_url"] == HOSTILE:
            site.config["norce"]["base_url"] = f"http://127.0.0.1:{norce_port}/checkout"
        group = stack.enter_context(memory_group(memory_mib))
        words = limited(command, files=files, group=group)
        try:
            service = site.start(command=words)
        except AssertionError:
            return {"attacks": list(attacks), "faults": [], "refused_to_start": last_lines(site.services[0])}
        target = Target(
            address=service.address,
            operations_address=service.operations_address,
            norce_port=norce_port,
            comes_again_seconds=comes_again_seconds,
        )
        pool = stack.enter_context(
            ProcessPoolExecutor(len(attacks) + 1, mp_context=multiprocessing.get_context("spawn"))
        )
        list(pool.map(wake, range(len(attacks) + 1)))
        samples = stack.enter_context(Samples(service, group))
        whole = LEAD_SECONDS + seconds + TAIL_SECONDS
        traffic = pool.submit(honest.send, target, whole, rates)
        time.sleep(LEAD_SECONDS)
        stored_before, since = stored_bytes(site), time.monotonic()
        report(f"attacking for {seconds:g} s: {', '.join(attacks)}")
        strikes = {name: pool.submit(attack_once, name, target, seconds) for name in attacks}
        attackers = {name: each.result() for name, each in strikes.items()}
        until = time.monotonic()
        stored_after = stored_bytes(site)
        answers = traffic.result()
        # The first seconds warm the service up.
        alone = {kind: honest.figures(each, kind, since - LEAD_SECONDS / 2, since) for kind, each in answers.items()}
        beside = {kind: honest.figures(each, kind, since, until) for kind, each in answers.items()}
        result: Result = {
            "attacks": list(attacks),
            "seconds": round(until - since, 1),
            "honest_alone": alone,
            "honest": beside,
            "attackers": attackers,
            "service": samples.figures(since, until) | {
                "is_running": service.is_running,
                "stored_mib_per_second": round((stored_after - stored_before) / MIB / (until - since), 2),
            },
            "log": dict(Counter(each["event"] for each in service.read_log() if each["level"] != "info")),
            "load": os.getloadavg()[0],
        }  # fmt: skip
        result["faults"] = faults(result)
        return result


HOSTILE = "an attacker plays Norce"


def wake(_number: int) -> None:
    """Import everything, in each of the processes: one second is long enough for all of them to begin."""
    importlib.import_module("tests.attacks.catalogue")
    time.sleep(1)


def attack_once(name: str, target: Target, seconds: float) -> Result:
    """Run one attack, in a process of its own."""
    from tests.attacks.catalogue import ATTACKS

    os.nice(19)  # in reality, an attacker takes none of this processor
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    return uvloop.run(ATTACKS[name].strike(target, seconds))  # type: ignore[arg-type]


def faults(result: Result) -> list[str]:
    """Return what no attack may cause: an end of the service, or a wrong answer to an honest request."""
    found = [] if result["service"]["is_running"] else ["the service ended"]
    for kind, figures in result["honest"].items():
        if figures["wrong"]:
            statuses = ", ".join(f"{status}: {count}" for status, count in figures["statuses"].items())
            found.append(f"{figures['wrong']} of {figures['sent']} honest {kind} were answered wrongly ({statuses})")
    for name, figures in result["attackers"].items():
        found += [f"{name}: {fault}" for fault in figures.get("faults", [])]
    return found


def kill(site: Site) -> None:
    """End the services of a site without looking at their logs."""
    for service in site.services:
        service.kill()
    site.services.clear()
    site.__exit__(None)


def last_lines(service: Service) -> str:
    return service.log_path.read_text()[-600:]


def stored_bytes(site: Site) -> int:
    path = Path(site.config["store"]["url"].removeprefix("sqlite:///"))
    return sum(each.stat().st_size for each in (path, path.with_name(f"{path.name}-wal")) if each.exists())


# --- limits of the machine --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_group(mib: int) -> Iterator[Path | None]:
    """Make a memory cgroup (version 1 or 2), or yield None if this machine does not allow it."""
    roots = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))
    for root, limit in roots if mib else ():
        group = Path(root, f"norce-adapter-attacks-{os.getpid()}")
        if not (group.parent / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(mib * MIB))
        except OSError:  # the controller is not enabled here
            group.rmdir()
            continue
        try:
            yield group
        finally:
            remove(group)
        return
    yield None


def remove(group: Path) -> None:
    """Remove a cgroup. The kernel keeps it busy for a moment after its last process."""
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return


def limited(command: Path, *, files: int, group: Path | None) -> Sequence[str]:
    """Return the words that execute a command with these limits."""
    enter = f"echo $$ > {group}/cgroup.procs && " if group else ""
    return ["/bin/sh", "-c", f'{enter}ulimit -n {files} && exec "$0" "$@"', str(command)]


class Samples:
    """Memory and descriptors of the service, taken in a thread until the end of the context."""

    def __init__(self, service: Service, group: Path | None) -> None:
        self._service = service
        self._group = group
        self._is_ending = threading.Event()
        self._taken: list[tuple[float, float, int]] = []  # time, MiB, descriptors
        self._thread = threading.Thread(target=self._take_all)

    def __enter__(self) -> "Samples":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending.set()
        self._thread.join()

    def _take_all(self) -> None:
        process = Path("/proc", str(self._service.pid))
        while not self._is_ending.wait(SAMPLE_EVERY_SECONDS):
            with contextlib.suppress(OSError, IndexError):
                memory = int((process / "status").read_text().partition("VmRSS:")[2].split()[0]) / 1024
                self._taken.append((time.monotonic(), memory, len(os.listdir(process / "fd"))))

    def figures(self, since: float, until: float) -> Result:
        before = [each for each in self._taken if each[0] < since] or self._taken
        during = [each for each in self._taken if since <= each[0] < until] or self._taken
        most = {} if self._group is None else {"group": self._group_figures()}
        return {
            "rss_before_mib": round(before[-1][1], 1),
            "rss_most_mib": round(max(memory for _, memory, _ in during), 1),
            "rss_after_mib": round(self._taken[-1][1], 1),
            "rss_tenths_mib": [round(during[len(during) * tenth // 10][1], 1) for tenth in range(10)],
            "descriptors_before": before[-1][2],
            "descriptors_most": max(count for _, _, count in during),
            "descriptors_after": self._taken[-1][2],
        } | most

    def _group_figures(self) -> Result:
        """Return the limit, the peak and the kills of the memory cgroup."""
        found = {}
        for name in ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.max", "memory.peak"):
            with contextlib.suppress(OSError, ValueError):
                found[name.removesuffix("_in_bytes") + "_mib"] = round(int((self._group / name).read_text()) / MIB, 1)
        for name in ("memory.oom_control", "memory.events"):
            with contextlib.suppress(OSError, IndexError):
                _, _, rest = (self._group / name).read_text().partition("oom_kill ")
                found["oom_kills"] = int(rest.split()[0])
        return found
