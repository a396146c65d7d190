"""Tables of what settings can name."""

import pytest

from common.registry import Registry
from config import ConfigError, UserError


class OwnError(UserError):
    pass


@pytest.fixture
def colours():
    registry = Registry("PAINT.COLOUR")
    for name in ("red", "green", "greenish"):
        registry.register(name, object())
    return registry


def test_a_name_is_found(colours):
    value = object()
    assert colours.register("blue", value) is value
    assert colours.find("blue") is value
    assert list(colours) == ["red", "green", "greenish", "blue"]


def test_the_same_value_may_register_again_and_no_other(colours):
    value = colours.find("red")
    assert colours.register("red", value) is value
    with pytest.raises(ConfigError, match=r"^PAINT\.COLOUR 'red' is registered already: choose another name$"):
        colours.register("red", object())
    assert colours.find("red") is value


def test_an_equal_value_is_another(colours):
    colours.register("list", [])
    with pytest.raises(ConfigError, match="registered already"):
        colours.register("list", [])


@pytest.mark.parametrize(
    ("name", "known"),
    [("gren", "near: green, greenish"), ("violet", "known: red, green, greenish"), ("", "known: red, green, greenish")],
)
def test_an_unknown_name_is_told_which_there_are(colours, name, known):
    message = f"no PAINT.COLOUR {name!r} ({known}; --plugins imports modules that register more)"
    with pytest.raises(ConfigError) as error:
        colours.find(name)
    assert str(error.value) == message
    assert error.value.exit_code == 2


def test_a_registry_has_its_own_error_and_says_what_else_there_is():
    registry = Registry("sort of paint", error=OwnError, otherwise="; or a file")
    with pytest.raises(OwnError, match=r"^no sort of paint 'oil' \(known: none; or a file; --plugins imports"):
        registry.find("oil")
    registry.register("oil", 1)
    with pytest.raises(OwnError, match="^sort of paint 'oil' is registered already"):
        registry.register("oil", 2)


def test_a_name_of_none_is_taken_too(colours):
    colours.register("nothing", None)
    assert colours.find("nothing") is None
    with pytest.raises(ConfigError, match="registered already"):
        colours.register("nothing", object())


def test_three_near_names_are_listed_and_no_more():
    registry = Registry("PAINT.COLOUR")
    for name in ("blue1", "blue2", "blue3", "blue4", "red"):
        registry.register(name, name)
    with pytest.raises(ConfigError) as error:
        registry.find("blue")
    listed = str(error.value).partition("(near: ")[2].partition(";")[0].split(", ")
    assert len(listed) == 3 and set(listed) < {"blue1", "blue2", "blue3", "blue4"}


def test_several_names_are_found_in_their_order(colours):
    values = colours.find_all(["red", "greenish"])
    assert values == [colours["red"], colours["greenish"]] and colours.find_all(()) == []
    with pytest.raises(ConfigError, match="no PAINT.COLOUR 'violet'"):
        colours.find_all(["red", "violet"])
