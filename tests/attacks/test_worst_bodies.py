"""No body of 1 MiB holds the service's loop: the worst that `worst_bodies` has found."""

import msgspec
import pytest

from tests.attacks.worst_bodies import KEPT, PARTS, Found, Recipe, measure, plain_seconds

pytestmark = pytest.mark.speed

# In times of a plain decode of a MiB of small arrays (20 to 30 ms). Before their faults were mended, the worst bodies
# held the loop for 10 to 200 of them.
MOST_DECODES = 10


def kept() -> list[Found]:
    return msgspec.json.decode(KEPT.read_bytes(), type=list[Found])


def test_each_part_of_the_service_has_its_worst_bodies() -> None:
    assert {each.part for each in kept()} == set(PARTS)


@pytest.mark.parametrize("found", kept(), ids=lambda found: found.part)
def test_no_body_holds_the_loop(found: Found) -> None:
    unit = plain_seconds(Recipe(("[1]",)).order(), times=3)

    held = measure(found.part, found.recipe, times=3).held_ms / 1000

    assert held < MOST_DECODES * unit
