"""`python -m tests.crash`: progress on stderr, and the result as JSON on the last line of stdout."""

import random
import sys
from contextlib import ExitStack

import click

from tests.crash import points
from tests.crash.child import MISTAKES
from tests.crash.harness import FROZEN, RANDOM, RANDOM_START, run
from tests.databases import KINDS, postgres_server


@click.command()
@click.option("--kills", default=200, show_default=True, type=click.IntRange(1, 100_000))
@click.option("--store", default="both", show_default=True, type=click.Choice([*KINDS, "both"]))
@click.option("--seed", default="", help="Decides what is done in which order, but not the moments.")
@click.option(
    "--a-round", default=25, show_default=True, type=click.IntRange(1, 1000), help="Kills between two drains."
)
@click.option("--point", "only", multiple=True, type=click.Choice([*points.POINTS, RANDOM, RANDOM_START, FROZEN]))
@click.option("--outages/--no-outages", default=True, show_default=True, help="The store fails in every other round.")
@click.option("--mistake", type=click.Choice(list(MISTAKES)), help="Build in a mistake, which the test must find.")
def main(
    kills: int, store: str, seed: str, a_round: int, only: tuple[str, ...], outages: bool, mistake: str | None
) -> None:
    """Kill the service many times. Fail if anything acknowledged was lost or anything was done twice."""
    seed = seed or str(random.SystemRandom().randrange(1_000_000))
    report(f"seed {seed}")
    stores = KINDS if store == "both" else (store,)
    with ExitStack() as stack:
        server = stack.enter_context(postgres_server()) if "postgresql" in stores else None
        counts = run(
            kills,
            stores=stores,
            seed=seed,
            server=server,
            kills_a_round=a_round,
            only=only,
            outages=outages,
            mistake=mistake,
            report=report,
        )
    click.echo(counts.as_json())
    sys.exit(0 if counts.passed else 1)


def report(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()
