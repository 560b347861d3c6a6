"""A hook's answer: what is merged applies, stays in its target, contradicts nothing, and ends."""

import copy
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import jsonpath
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st
from jsonpath.exceptions import JSONPatchError, JSONPointerError

from adapter.plugin import Patch
from adapter.verdicts.patches import MAX_DEPTH, PatchInvalid, encode, merge

add, replace, remove = Patch.add, Patch.replace, Patch.remove
ORDER: dict[str, Any] = {
    "cart": {
        "items": [{"sku": "jacket", "quantity": 1}, {"sku": "socks", "quantity": 2}],
        "discounts": [],
        "total": {"includingVat": 987.2},
        "attributes": {"gift": True, "": "empty", "a/b": 1, "m~n": None, "blåbär": 0},
    },
    "customer": {"billing": {"phone": "0700000000"}},
}
CYCLIC: list[Any] = []
CYCLIC.append(CYCLIC)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


def merged(*asked: list[Patch], order: Any = ORDER, target: str | None = "/cart") -> list[Patch]:
    """The answer, where nothing may be left out."""
    answer, refused, _ = merge(order, asked, target)
    assert refused == [None] * len(asked)
    return answer


def refusal(*asked: list[Patch], target: str | None = "/cart") -> tuple[str, str]:
    """Why the last list was left out, which leaves the answer as it is without it."""
    answer, (*others, last), _ = merge(ORDER, asked, target)
    assert others == [None] * len(others)
    assert answer == merged(*asked[:-1], target=target)
    assert isinstance(last, PatchInvalid)
    return last.reason, last.path


# --- what is answered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch",
    [
        add("/cart/attributes/note", "x"),
        add("/cart/attributes/gift", False),
        replace("/cart/attributes/gift", 1),
        replace("/cart/total/includingVat", Decimal("987.21")),
        replace("/cart/items/1/quantity", 3),
        replace("/cart/attributes/m~0n", "x"),
        replace("/cart/attributes/a~1b", "x"),
        replace("/cart/attributes/", "x"),
        replace("/cart/attributes/blåbär", "lingon"),
        remove("/cart/attributes/m~0n"),
        replace("/cart", {}),
        remove("/cart"),
        remove("/cart/items/1/quantity"),
    ],
    ids=lambda patch: f"{patch.op} {patch.path}",
)
def test_a_patch_that_changes_something_is_sent_unchanged(patch):
    assert merged([patch]) == [patch]


@pytest.mark.parametrize(
    "patch",
    [
        add("/cart/attributes/gift", True),
        replace("/cart/items/0/quantity", 1.0),
        replace("/cart/total/includingVat", Decimal("987.20")),
        replace("/cart/attributes/m~0n", None),
        replace("/cart/attributes", dict(reversed(ORDER["cart"]["attributes"].items()))),
        replace("/cart/discounts", ()),
        remove("/cart/attributes/note"),
        remove("/cart/no/such/member"),
        remove("/cart/items/7"),
        remove("/cart/items/-"),
        remove("/cart/items/0/sku/0"),
    ],
    ids=lambda patch: f"{patch.op} {patch.path}",
)
def test_a_patch_that_changes_nothing_is_not_sent(patch):
    assert merged([patch]) == []


@pytest.mark.parametrize(
    "patches",
    [
        [add("/cart/items/-", {"sku": "book"})],
        [add("/cart/items/2", {"sku": "book"})],
        [
            add("/cart/items/1", {"sku": "book"}),
            remove("/cart/items/2"),
            add("/cart/items/1", ORDER["cart"]["items"][1]),
        ],
    ],
    ids=["end", "position", "several"],
)
def test_a_patch_that_moves_elements_is_sent_as_the_whole_array(patches):
    assert merged(patches) == [replace("/cart/items", [*ORDER["cart"]["items"], {"sku": "book"}])]


def test_several_patches_of_one_place_become_one():
    patches = [add("/cart/attributes", {}), add("/cart/attributes/a", 1), add("/cart/attributes/b", Decimal("1.50"))]

    assert merged(patches) == [replace("/cart/attributes", {"a": 1, "b": Decimal("1.50")})]
    assert merged([add("/cart/new", {}), add("/cart/new/a", [])]) == [add("/cart/new", {"a": []})]
    assert merged([replace("/cart/total/includingVat", 1), remove("/cart/total")]) == [remove("/cart/total")]
    assert merged([remove("/cart/total"), add("/cart/total", {"includingVat": 987.2})]) == []


def test_lists_are_sent_one_after_the_other():
    one, other = [replace("/cart/items/0/quantity", 3)], [add("/cart/a", 1), replace("/cart/items/1/quantity", 5)]

    assert merged(one, [], other) == [*one, *other]


def test_without_patches_nothing_is_sent():
    class Untouchable:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(name)

    assert merge(Untouchable(), [[], []], "/cart") == ([], [None, None], [False, False])
    assert merge(Untouchable(), [], None) == ([], [], [])


# --- what is left out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "patch"),
    [
        (None, add("/cart/a", 1)),
        ("/cart", add("/customer/a", 1)),
        ("/cart", add("/cartoon", 1)),
        ("/cart/items", replace("/cart", {})),
        ("/cart/items/0", remove("/cart/items/0")),
        ("/cart", remove("/nothing-there")),
    ],
    ids=["no-target", "elsewhere", "longer-name", "above", "moves-its-neighbours", "nothing-to-remove"],
)
def test_a_patch_outside_the_target_is_refused(target, patch):
    assert refusal([patch], target=target) == ("outside-target", patch.path)


def test_the_target_itself_and_its_elements_may_be_patched():
    assert merged([replace("/cart", {})], target="/cart")
    assert merged([remove("/cart/items/0")], target="/cart/items")
    assert merged([replace("/cart/items/0", {})], target="/cart/items/0")
    assert merged([add("/cart/attributes/a~1b", 2)], target="/cart/attributes/a~1b")


@pytest.mark.parametrize(
    "patch",
    [
        replace("/cart/note", 1),
        add("/cart/no/such/member", 1),
        add("/cart/items/3", 1),
        replace("/cart/items/-", 1),
        replace("/cart/items/2", 1),
        add("/cart/items/01", 1),
        add("/cart/items/-1", 1),
        add("/cart/items/x", 1),
        add("/cart/items/-/sku", 1),
        add("/cart/items/0/sku/0", "J"),
        replace("/cart/total/includingVat/x", 1),
        add("/cart/attributes/m~0n/x", 1),
    ],
    ids=lambda patch: f"{patch.op} {patch.path}",
)
def test_a_patch_that_does_not_apply_drops_its_whole_list(patch):
    assert refusal([add("/cart/a", 1), patch, add("/cart/b", 1)]) == ("does-not-apply", patch.path)


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("-inf"),
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("Infinity"),
        Decimal("1e400"),
        10**400,
        "\ud800",
        {"\ud800": 1},
        {1: 2},
        {1, 2},
        b"bytes",
        object(),
        CYCLIC,
        nested(MAX_DEPTH + 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_is_not_json_is_refused(value):
    patch = add("/cart/a", {"deep": [value]} if value is not CYCLIC and type(value) is not list else value)

    assert refusal([patch]) == ("not-json", "/cart/a")
    with pytest.raises(PatchInvalid, match="not-json"):
        encode([patch])


def test_a_path_that_is_not_text_is_refused():
    assert refusal([add("/cart/\ud800", 1)])[0] == "not-json"


def test_a_value_may_be_as_deep_as_conditions_evaluate():
    assert merged([add("/cart/a", nested(MAX_DEPTH))]) == [add("/cart/a", nested(MAX_DEPTH))]


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        ([replace("/cart/total", {})], [replace("/cart/total", [])], "/cart/total"),
        ([replace("/cart/total", {})], [replace("/cart/total/includingVat", 1)], "/cart/total/includingVat"),
        ([replace("/cart/total/includingVat", 1)], [replace("/cart/total", {})], "/cart/total"),
        ([remove("/cart/total")], [replace("/cart/total/includingVat", 1)], "/cart/total/includingVat"),
        ([replace("/cart/items/0/sku", "a")], [remove("/cart/items/1")], "/cart/items"),
        ([add("/cart/items/0", {"sku": "x"})], [replace("/cart/items/0/sku", "x")], "/cart/items/0/sku"),
        ([add("/cart/items/-", 1)], [add("/cart/items/-", 2)], "/cart/items"),
        ([add("/cart/attributes/gift", True)], [replace("/cart/attributes/gift", False)], "/cart/attributes/gift"),
        ([replace("/cart/attributes/gift", 1)], [add("/cart/attributes/gift", True)], "/cart/attributes/gift"),
        ([remove("/cart/note")], [add("/cart/note", None)], "/cart/note"),
    ],
    ids=[
        "same", "below", "above", "removed", "array", "element", "append", "holds-already", "held-before", "absent",
    ],
)  # fmt: skip
def test_the_earlier_of_two_contradicting_lists_is_sent(one, other, path):
    assert refusal(one, [add("/cart/free", 1), *other]) == ("contradicts", path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([replace("/cart/total", {"a": 1})], [replace("/cart/total", {"a": Decimal("1.0")})]),
        ([remove("/cart/items/0")], [remove("/cart/items/0")]),
        ([add("/cart/items/-", 1)], [add("/cart/items/2", 1.0)]),
        ([replace("/cart/total", {"includingVat": 5})], [replace("/cart/total/includingVat", 5)]),
        ([remove("/cart/total")], [remove("/cart/total/includingVat")]),
        ([remove("/cart/total")], [replace("/cart/total/includingVat", 5), remove("/cart/total")]),
    ],
    ids=["value", "element", "append", "inside", "gone-with-it", "by-another-way"],
)
def test_a_patch_of_two_lists_is_sent_once(one, other):
    free = [replace("/cart/attributes/gift", False)]

    assert merged(one, other) == merged(one)
    assert merged(one, [*free, *other]) == merged(one) + free


def test_a_list_that_was_left_out_contradicts_no_other():
    answer, (first, second, third), _ = merge(
        ORDER, [[add("/cart/a", 1), add("/customer/a", 1)], [add("/cart/a", 2)], [add("/cart/a", 3)]], "/cart"
    )

    assert answer == [add("/cart/a", 2)]
    assert (first and first.reason, second, third and third.reason) == ("outside-target", None, "contradicts")


def test_the_message_names_the_place_and_the_remedy_and_no_value():
    answer, (error,), _ = merge(ORDER, [[replace("/cart/note", "canary-19811218")]], "/cart")

    assert answer == []
    assert str(error) == (
        "the patch of /cart/note cannot be used: does-not-apply: its place does not exist; replace needs the "
        "member itself, add the object or array around it"
    )


# --- what leaves ----------------------------------------------------------------------------------------------------


def test_the_answer_is_the_array_that_norce_expects():
    patches = [
        replace("/cart/total", {"includingVat": Decimal("1879.10"), "a": (1, None)}),
        remove("/cart/å"),
        add("/x", None),
    ]

    assert encode(patches).decode() == (
        '[{"op":"replace","path":"/cart/total","value":{"includingVat":1879.10,"a":[1,null]}},'
        '{"op":"remove","path":"/cart/å"},{"op":"add","path":"/x","value":null}]'
    )
    assert encode([]) == b"[]"


# --- random requests --------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "", "~", "/", "~1", "-", "0", "1", "å", "\U0001f6d2", "01"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([0.0, 1.0, 0.5, 1e22, -0.0])
    | st.text("ab\0é", max_size=2)
)
TREES = st.recursive(
    SCALARS, lambda parts: st.lists(parts, max_size=3) | st.dictionaries(NAMES, parts, max_size=4), max_leaves=20
)
ORDERS = st.dictionaries(NAMES, TREES, min_size=1, max_size=4)


def places_in(tree: Any, here: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every place in a tree, and beside them places where something could be."""
    if isinstance(tree, dict):
        parts = [*tree.items(), ("b", None), ("new", None)]
    elif isinstance(tree, list):
        parts = [*((str(index), part) for index, part in enumerate(tree)), (str(len(tree)), None), ("-", None)]
    else:
        return [here]
    return [*([here] if here else []), *(place for name, part in parts for place in places_in(part, (*here, name)))]


def pointer(place: tuple[str, ...]) -> str:
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in place)


@st.composite
def patch_lists(draw: Callable[..., Any], order: Any, ops: str = "add replace remove", most: int = 4) -> list[Patch]:
    """A list that a handler could ask for: it mostly applies, each patch to what those before it have made."""
    patches: list[Patch] = []
    for _ in range(draw(st.integers(1, most))):
        path = pointer(draw(st.sampled_from(places_in(order))))
        op = draw(st.sampled_from(ops.split()))
        patch = Patch(op, path, None if op == "remove" else draw(TREES))
        patches.append(patch)
        with_it = by_the_oracle(order, [patch])
        order = order if with_it is None else with_it
    return patches


def by_the_oracle(order: Any, patches: list[Patch]) -> Any:
    """Apply the patches with the other library, without removals of missing members. None if it fails."""
    order = copy.deepcopy(order)
    for patch in patches:
        if (
            patch.op == "remove"
            and jsonpath.pointer.resolve(patch.path, order, default=order, unicode_escape=False) is order
        ):
            continue
        try:
            operation = {"op": patch.op, "path": patch.path, "value": copy.deepcopy(patch.value)}
            order = jsonpath.JSONPatch([operation], unicode_escape=False).apply(order)
        except (JSONPatchError, JSONPointerError, TypeError, AttributeError):
            return None
    return order


def as_json(tree: Any) -> str:
    """Equal for equal JSON: 1 is 1.0, -0.0 is 0, true is not 1."""
    return json.dumps(json.loads(json.dumps(tree), parse_int=_number, parse_float=_number), sort_keys=True)


def _number(text: str) -> float:
    return float(text) + 0.0


def targets_of(order: Any) -> st.SearchStrategy[str | None]:
    return st.none() | st.just("") | st.sampled_from(places_in(order)).map(pointer)


@given(st.data(), ORDERS)
def test_one_list_is_applied_as_the_other_implementation_applies_it(data, order):
    patches = data.draw(patch_lists(order))
    expected = by_the_oracle(order, patches)

    answer, (refused,), _ = merge(order, [patches], "")

    event(f"{len(answer)} answered of {len(patches)}, {refused and refused.reason}")
    if expected is None:
        assert (answer, refused and refused.reason) == ([], "does-not-apply")
    else:
        assert refused is None
        assert as_json(by_the_oracle(order, answer)) == as_json(expected)


@given(st.data(), ORDERS)
def test_the_answer_applies_inside_its_target_and_the_order_is_not_touched(data, order):
    target = data.draw(targets_of(order))
    asked = data.draw(st.lists(patch_lists(order), max_size=3))
    before = copy.deepcopy((order, asked))

    answer, refused, _ = merge(order, asked, target)

    assert repr((order, asked)) == repr(before)
    assert len(refused) == len(asked)
    after = order
    for patch in answer:
        assert target is not None
        assert patch.path == target or patch.path.startswith(target + "/")
        changed = by_the_oracle(after, [patch])
        assert changed is not None
        assert as_json(changed) != as_json(after)
        after = changed
    assert json.loads(encode(answer)) == [
        {"op": patch.op, "path": patch.path} | ({} if patch.op == "remove" else {"value": patch.value})
        for patch in answer
    ]


@given(st.data(), ORDERS)
def test_the_result_agrees_with_every_list_that_is_not_left_out(data, order):
    """Applying a list twice gives the same result if no item of an array moves."""
    asked = data.draw(st.lists(patch_lists(order, "add replace", most=2), max_size=3))
    answer, refused, _ = merge(order, asked, "")
    after = by_the_oracle(order, answer)

    for patches, reason in zip(asked, refused, strict=True):
        if reason is None and sets_values(order, patches):
            assert as_json(by_the_oracle(after, patches)) == as_json(after)


@given(st.data(), ORDERS)
def test_answers_to_the_own_patches_end(data, order):
    """Routes that ask for the same values reach a fixed point: no two overwrite each other for ever."""
    asked = data.draw(st.lists(patch_lists(order, most=2), min_size=1, max_size=4))
    assume(all(sets_values(order, patches) for patches in asked))

    for rounds in range(len(asked) + 2):
        answer, *_ = merge(order, asked, "")
        if not answer:
            event(f"{rounds} rounds")
            return
        order = by_the_oracle(order, answer)
        assume(all(sets_values(order, patches) for patches in asked))
    raise AssertionError(answer)


def sets_values(order: Any, patches: list[Patch]) -> bool:
    """Return whether a list names each place once, and moves no item of an array."""
    paths = [f"{patch.path}/" for patch in patches]
    if any(one.startswith(other) for index, other in enumerate(paths) for one in paths[:index] + paths[index + 1 :]):
        return False
    for patch in patches:
        parent = jsonpath.pointer.resolve(patch.path.rpartition("/")[0], order, default=None, unicode_escape=False)
        if isinstance(parent, list) and patch.op != "replace":
            return False
    return True


class Counted(dict[str, Any]):
    """A dict that counts its copies and comparisons."""

    copies = comparisons = 0

    def __copy__(self) -> "Counted":
        Counted.copies += 1
        return Counted(self)

    def keys(self) -> Any:
        Counted.comparisons += 1
        return super().keys()


def counted_lines() -> dict[str, Any]:
    Counted.copies = Counted.comparisons = 0
    return {"cart": Counted({str(number): Counted(quantity=1) for number in range(500)})}


def test_many_patches_copy_each_changed_part_once() -> None:
    """Each patch copied the whole cart: a thousand patches of a MiB took seconds."""
    order = counted_lines()
    asked = [replace(f"/cart/{number}/quantity", 2) for number in range(500)]

    answer, refused, _ = merge(order, [asked], "/cart")

    assert (len(answer), refused) == (500, [None])
    assert Counted.copies == 2 * 501  # for the list of patches, and for the answer
    assert order["cart"]["0"] == {"quantity": 1}


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_value_is_compared_once_for_all_places_inside_it(*, whole_first: bool) -> None:
    order = counted_lines()
    single = [replace(f"/cart/{number}/quantity", 2) for number in range(500)]
    whole = [replace("/cart", {str(number): {"quantity": 2} for number in range(500)})]
    asked = [whole, single] if whole_first else [single, whole]

    assert merge(order, asked, "/cart")[1] == [None, None]
    assert Counted.comparisons < 10 * 500
