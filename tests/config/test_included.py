"""Merchants in files of their own: what is read, and the place of every problem."""

from collections.abc import Mapping
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from adapter.config import Config, ConfigurationInvalid, load
from adapter.config.json_schema import file_schema
from adapter.identifiers import Channel
from tests.config.test_config import ENVIRON, VALID

MAIN = VALID.replace("merchants:\n", "include: merchants/*.yaml\nmerchants:\n")
ALONE = """\
adapter: {id: an_adapter, public_url: https://adapter.example}
include: merchants/*.yaml
senders: {signed_urls: {keys: {k1: "${env:NORCE_ADAPTER_URL_KEY}"}}}
callbacks: {order-status: {kind: notification, scope: /state/currentStatus}}
routes: {export: {callback: order-status, handler: log}}
"""
MERCHANT = """\
merchants:
  {name}:
    tokens: ["${{env:NORCE_TOKEN}}"]
    channels: {{"1": {{}}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "merchants").mkdir()
    return tmp_path


def write(folder: Path, main: str = MAIN, /, **files: str) -> Path:
    """Write the main file and the files `merchants/NAME.yaml`."""
    for name, text in files.items():
        (folder / "merchants" / f"{name}.yaml").write_text(text)
    path = folder / "config.yaml"
    path.write_text(main)
    return path


def read(path: Path, environ: Mapping[str, str] = ENVIRON) -> Config:
    return load(path, environ)


def problems(path: Path) -> list[str]:
    """Return the problems without the folder."""
    with pytest.raises(ConfigurationInvalid) as raised:
        load(path, ENVIRON)
    return [str(problem).replace(f"{path.parent}/", "") for problem in raised.value.problems]


def test_merchants_come_from_the_main_file_and_from_all_included_ones(folder: Path) -> None:
    two = "merchants:\n" + "".join(MERCHANT.format(name=name).partition("\n")[2] for name in ("b1", "b2"))

    config = read(write(folder, a=MERCHANT.format(name="a"), b=two))

    assert list(config.merchants) == ["norce", "a", "b1", "b2"]
    assert config.merchants["a"].slug == "a"
    assert [token.reveal() for token in config.merchants["b2"].tokens] == [ENVIRON["NORCE_TOKEN"]]
    assert Channel("b1", "1") in config.channels_of("export")


def test_the_main_file_needs_no_merchant_if_an_included_one_has_it(folder: Path) -> None:
    config = read(write(folder, ALONE, a=MERCHANT.format(name="a")))

    assert config.channels == (Channel("a", "1"),)


def test_a_reference_means_the_same_in_an_included_file_as_in_the_main_file(folder: Path) -> None:
    (folder / "token").write_text("a token\n")
    text = MERCHANT.format(name="a").replace("${env:NORCE_TOKEN}", "${file:token}")

    assert read(write(folder, ALONE, a=text)).merchants["a"].tokens[0].reveal() == "a token"


def test_the_settings_of_an_included_merchant_are_merged(folder: Path) -> None:
    text = MERCHANT.format(name="a") + "    routes: {export: {settings: {colour: red}}}\n"

    config = read(write(folder, ALONE, a=text))

    assert config.settings("export", Channel("a", "1"))[0] == {"colour": "red"}


def test_a_problem_is_shown_in_the_file_and_the_line_where_it_is(folder: Path) -> None:
    wrong = MERCHANT.format(name="a").replace('"1": {}', '"1": {colour: red}') + "    routes: {exprot: {}}\n"
    main = MAIN.replace("handler: log", "handler: log, concurrency: 0").replace("NORCE_TOKEN", "NO_TOKEN")

    found = problems(write(folder, main, a=wrong, b=MERCHANT.format(name="b").replace('"${env:NORCE_TOKEN}"', "")))

    assert [each.partition(": ")[0] for each in found] == [
        "config.yaml:5",
        "config.yaml:15",
        "merchants/a.yaml:4",
        "merchants/a.yaml:5",
        "merchants/b.yaml:3",
    ]
    assert "merchants.a.channels.1.colour: is not a key here" in found[2]
    assert "merchants.a.routes.exprot: must be a route: export" in found[3]


def test_a_later_problem_of_an_included_merchant_is_shown_at_its_line(folder: Path) -> None:
    path = write(folder, a=MERCHANT.format(name="a"))

    problem = read(path).problem("merchants.a.channels.1.routes.export.settings.colour", "is wrong")

    assert (Path(problem.file).name, problem.line) == ("a.yaml", 4)


@pytest.mark.parametrize("name", ["a", "a b", "a.b", 'a"b', "a[0]"])
def test_a_merchant_that_is_given_twice_is_named_with_both_places(folder: Path, name: str) -> None:
    quoted = "'" + name + "'"

    found = problems(write(folder, a=MERCHANT.format(name=quoted), b=MERCHANT.format(name=quoted)))

    (twice,) = [each for each in found if "twice" in each]
    assert twice.startswith("merchants/b.yaml:2: ")
    assert twice.endswith("is given twice, first in merchants/a.yaml:2")


def test_a_merchant_of_the_main_file_and_of_an_included_one_is_named_with_both_places(folder: Path) -> None:
    found = problems(write(folder, a=MERCHANT.format(name="norce")))

    assert found == ["merchants/a.yaml:2: merchants.norce: is given twice, first in config.yaml:4"]


def test_of_two_merchants_whose_names_begin_alike_each_has_its_own_lines(folder: Path) -> None:
    long = "# a comment\n" * 20 + MERCHANT.format(name="a2")
    path = write(folder, ALONE, a=MERCHANT.format(name="a"), b=long)

    config = read(path)

    assert [config.problem(f"merchants.{name}.tokens", "").line for name in ("a", "a2")] == [3, 23]
    assert Path(config.problem("merchants.a2", "").file).name == "b.yaml"


REFUSED = {
    "another key": ("server: {port: 1}\n" + MERCHANT.format(name="a"), "a.yaml:1: server: is not a key here"),
    "include": ("include: x.yaml\n" + MERCHANT.format(name="a"), "a.yaml:1: include: is not a key here"),
    "a merchant itself": (MERCHANT.format(name="a").partition("\n")[2], "a.yaml:1: a: is not a key here"),
    "no key": ("{}", "a.yaml:1: merchants: must be a mapping of at least 1 entry"),
    "nothing": ("", "a.yaml: must be a mapping"),
    "a list": ("- a\n", "a.yaml: must be a mapping"),
    "no merchant": ("merchants: {}\n", "a.yaml:1: merchants: must be a mapping of at least 1 entry"),
    "null": ("merchants:\n", "a.yaml:1: merchants: must be a mapping of at least 1 entry"),
    "a list of merchants": ("merchants: [a]\n", "a.yaml:1: merchants: must be a mapping of at least 1 entry"),
    "no YAML": ("merchants: {a: [\n", "a.yaml:2: is not YAML"),
    "a merchant twice": (
        MERCHANT.format(name="a") + "  a: {}\n",
        "a.yaml:5: merchants.a: is given twice, first in line 2",
    ),
    "a bomb": ("merchants: {a: " + "[" * 100 + "]" * 100 + "}", "is too large"),
}


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_an_included_file_holds_merchants_and_nothing_else(folder: Path, text: str, says: str) -> None:
    found = problems(write(folder, a=text))

    assert len(found) <= 2
    assert any(says in each for each in found), found


@pytest.mark.parametrize("files", [{}, {".hidden": "merchants: {}"}], ids=["empty folder", "hidden file"])
def test_a_pattern_without_a_file_is_a_problem_at_its_line_and_the_only_one(
    folder: Path, files: dict[str, str]
) -> None:
    (found,) = problems(write(folder, ALONE, **files))

    assert found.startswith(f"config.yaml:2: include: matches no file in the folder {folder}; ")


def test_a_file_that_cannot_be_read_is_a_problem_and_the_only_one(folder: Path) -> None:
    """Each part that refers to merchants of that file would be reported as well, although it is correct."""
    (folder / "merchants" / "a.yaml").mkdir()
    (folder / "merchants" / "b.yaml").symlink_to(folder / "gone")
    main = ALONE.replace("handler: log", "handler: log, merchants: [a]")

    found = problems(write(folder, main))

    assert [each.partition(": ")[0] for each in found] == ["merchants/a.yaml", "merchants/b.yaml"]
    assert all("cannot be read" in each for each in found)


@pytest.mark.parametrize(
    "pattern", ["/etc/*.yaml", "../*.yaml", "merchants/../../x.yaml", "..", '""', "3", "[a.yaml, b.yaml]", '"a\\0b"']
)
def test_a_pattern_stays_below_the_folder_of_the_main_file(folder: Path, pattern: str) -> None:
    found = problems(write(folder, MAIN.replace("merchants/*.yaml", pattern)))

    assert [each.partition(" must")[0] for each in found] == ["config.yaml:2: include:"]
    assert "such as merchants/*.yaml" in found[0]


@pytest.mark.parametrize("pattern", ["merchants/a..b.yaml", "merchants/...yaml", "${env:PATTERN}"])
def test_two_dots_in_a_name_and_a_reference_are_a_pattern(folder: Path, pattern: str) -> None:
    for name in ("a..b", "..", "shop"):
        (folder / "merchants" / f"{name}.yaml").write_text(MERCHANT.format(name="a"))

    config = read(
        write(folder, ALONE.replace("merchants/*.yaml", pattern)), {**ENVIRON, "PATTERN": "merchants/shop.yaml"}
    )

    assert list(config.merchants) == ["a"]


def test_a_pattern_that_matches_the_main_file_is_a_problem(folder: Path) -> None:
    (folder / "a.yaml").write_text(MERCHANT.format(name="a"))

    (found,) = problems(write(folder, MAIN.replace("merchants/*.yaml", '"*.yaml"')))

    assert found.startswith("config.yaml:2: include: matches this file, too")


def test_files_that_are_links_are_read_as_kubernetes_mounts_them(folder: Path) -> None:
    data = folder / "merchants" / "..data"
    data.mkdir()
    (data / "a.yaml").write_text(MERCHANT.format(name="a"))
    (folder / "merchants" / "a.yaml").symlink_to("..data/a.yaml")

    assert list(read(write(folder, ALONE)).merchants) == ["a"]


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        (MERCHANT.format(name="a"), True),
        (ALONE, True),
        (VALID, True),
        (MAIN, True),
        (ALONE.replace("include: merchants/*.yaml\n", ""), False),
        ("server: {port: 1}\n" + MERCHANT.format(name="a"), False),
        ("merchants: {}", False),
        (MERCHANT.format(name="a").replace("channels", "chanels"), False),
    ],
    ids=["included", "merchants elsewhere", "alone", "both", "no merchants", "another key", "none", "a wrong key"],
)
def test_editors_check_an_included_file_by_the_same_schema(text: str, is_good: bool) -> None:
    document = YAML(typ="safe", pure=True).load(text)

    assert jsonschema.Draft202012Validator(file_schema({})).is_valid(document) is is_good
