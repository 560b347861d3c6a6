"""No body of 1 MiB holds the service's loop: the worst that `worst_bodies` has found."""

import msgspec
import pytest

from tests.attacks.worst_bodies import KEPT, PARTS, Found, Recipe, measure, plain_seconds

pytestmark = pytest.mark.speed

# In times of a plain decode of a MiB of small arrays (30 ms). The worst bodies take up to 8 of them; before their
# faults were mended, up to 200.
MOST_DECODES = 20


def worst() -> dict[str, Found]:
    """Return the worst body of each part."""
    found = msgspec.json.decode(KEPT.read_bytes(), type=list[Found])
    return {each.part: each for each in sorted(found, key=lambda each: each.held_ms)}


@pytest.fixture(scope="module")
def unit() -> float:
    return plain_seconds(Recipe(("[1]",)).order(), times=3)


def test_each_part_of_the_service_has_its_worst_bodies() -> None:
    assert worst().keys() == set(PARTS)


@pytest.mark.parametrize("found", worst().values(), ids=worst().keys())
def test_no_body_holds_the_loop(found: Found, unit: float) -> None:
    held = measure(found.part, found.recipe, times=1).held_ms / 1000

    assert held < MOST_DECODES * unit
