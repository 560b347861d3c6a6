"""`python -m tests.attacks`: figures as text or JSON. Exit code 1 if the service did what no attack may cause."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from tests.attacks.catalogue import ATTACKS, COMBINED_FILES, COMBINED_RATES, combined
from tests.attacks.harness import MEMORY_MIB, run
from tests.flows.service_process import COMMAND

COMBINED_SECONDS = 150.0


@click.command()
@click.argument("name", type=click.Choice([*ATTACKS, "combined", "all"]))
@click.option("--seconds", type=float, help="How long to attack. Default: the shortest time that shows the fault.")
@click.option("--command", default=COMMAND, type=click.Path(path_type=Path), help="The norce-adapter to attack.")
@click.option("--memory", default=MEMORY_MIB, show_default=True, help="MiB of its memory cgroup; 0: none.")
@click.option("--output", default="text", type=click.Choice(["text", "json"]))
def main(name: str, seconds: float | None, command: Path, memory: int, output: str) -> None:
    """Attack a service that this command starts, beside honest traffic."""
    names = list(ATTACKS) if name == "all" else [name]
    is_held = True
    for each in names:
        is_one = each != "combined"
        result = run(
            {each: ATTACKS[each]} if is_one else combined(),
            seconds or (ATTACKS[each].seconds if is_one else COMBINED_SECONDS),
            files=ATTACKS[each].files if is_one else COMBINED_FILES,
            rates=ATTACKS[each].rates if is_one else COMBINED_RATES,
            comes_again_seconds=1.0 if is_one else 5.0,
            command=command,
            memory_mib=memory,
            report=lambda line: click.echo(line, err=True),
        )
        is_held = is_held and not result["faults"]
        click.echo(json.dumps({"name": each, **result}) if output == "json" else as_text(each, result))
    sys.exit(0 if is_held else 1)


def as_text(name: str, result: dict[str, Any]) -> str:
    """Return the figures of one run for a person."""
    if "refused_to_start" in result:
        return f"{name}: the service refused to start\n{result['refused_to_start']}"
    lines = [f"{name}: {'FAULT' if result['faults'] else 'held'} after {result['seconds']} s"]
    lines += [f"  {fault}" for fault in result["faults"]]
    for span in ("honest_alone", "honest"):
        for kind, figures in result[span].items():
            lines.append(f"  {span:<13}{kind:<14}" + "  ".join(f"{key} {value}" for key, value in figures.items()))
    for attack, figures in result["attackers"].items():
        lines.append(f"  attacker     {attack:<14}{json.dumps({k: v for k, v in figures.items() if k != 'faults'})}")
    lines.append(f"  service      {json.dumps(result['service'])}")
    lines.append(f"  log          {json.dumps(result['log'])}; load {result['load']:.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
