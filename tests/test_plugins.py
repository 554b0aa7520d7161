"""Objects from `{name: ..., parameter: ...}`: out of a table, or from a module outside the package."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field

from ddkmix.errors import ConfigError
from ddkmix.plugins import build


@dataclass(frozen=True, kw_only=True)
class Plain:
    """An entry with parameters of several types."""

    kind: ClassVar[str] = "no parameter"
    size: Annotated[int, Field(ge=1)] = 3
    share: float = 0.5
    names: dict[str, float] = field(default_factory=dict)
    either: float | str = "x"
    derived: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.share > self.size:
            raise ValueError(f"share = {self.share} is more than size = {self.size}")


@dataclass(frozen=True)
class Demanding:
    """An entry with a parameter that has no default."""

    needed: int


@dataclass(frozen=True)
class Bare:
    """An entry without parameters."""


class NoDataclass:
    """A class that cannot be an entry."""


not_a_class = 3

TABLE = {"plain": Plain, "demanding": Demanding, "bare": Bare}
HERE = "tests.test_plugins"


def message_of(spec: dict[str, Any]) -> str:
    """The message of a spec that is wrong."""
    with pytest.raises(ConfigError) as error:
        build(spec, TABLE, where="part")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_name_alone_builds_the_defaults():
    """An entry of the table, with its own defaults."""
    assert Plain() == build({"name": "plain"}, TABLE, where="part")


def test_parameters_become_fields_of_their_types():
    """YAML's values are converted where that loses nothing: "4" and 4.0 are the size 4."""
    spec = {"name": "plain", "size": "4", "share": 1, "names": {"a": "0.5"}}
    assert Plain(size=4, share=1.0, names={"a": 0.5}) == build(spec, TABLE, where="part")


def test_a_class_outside_the_package_is_named_by_module_and_attribute():
    """It needs no registration, and its parameters are checked alike."""
    built = build({"name": f"{HERE}:Plain", "size": 9}, {}, where="part")
    assert ("Plain", 9) == (type(built).__name__, built.size)


def test_the_table_is_not_searched_for_imported_names_nor_the_modules_for_table_names():
    """A colon means import; without one only the table counts."""
    assert "part.name = 'json' is unknown" in message_of({"name": "json"})
    assert "cannot be imported" in message_of({"name": "plain:plain"})


def test_the_name_may_be_called_otherwise():
    """A weight names its `schedule`, and so do its messages; `name` is then a parameter like any other."""
    assert Plain(size=4) == build({"kind": "plain", "size": 4}, TABLE, where="part", key="kind")
    for spec, message in (
        ({"name": "plain"}, "part.kind is missing; known: "),
        ({"kind": "plan"}, "part.kind = 'plan' is unknown; did you mean 'plain'?"),
        ({"kind": "no_such_module:Thing"}, "part.kind = 'no_such_module:Thing' cannot be imported"),
        ({"kind": f"{HERE}:not_a_class"}, f"part.kind = '{HERE}:not_a_class' is not a dataclass"),
        ({"kind": "plain", "name": "plain"}, "part (plain) has no parameter 'name'"),
    ):
        with pytest.raises(ConfigError) as error:
            build(spec, TABLE, where="part", key="kind")
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "part.name is missing; known: bare, demanding, plain."),
        ({"name": 3}, "part.name is missing; known: bare, demanding, plain."),
        ({"name": "plan"}, "part.name = 'plan' is unknown; did you mean 'plain'?"),
        ({"name": "zzz"}, "part.name = 'zzz' is unknown; known: bare, demanding, plain."),
        ({"name": "plain", "sise": 1}, "part (plain) has no parameter 'sise'; did you mean 'size'?"),
        ({"name": "plain", "kind": "x"}, "part (plain) has no parameter 'kind'; known: either, names, "),
        ({"name": "plain", "derived": 1}, "part (plain) has no parameter 'derived'; known: either, "),
        ({"name": "bare", "x": 1}, "part (bare) has no parameter 'x'; it has none."),
        ({"name": "plain", "size": 0}, "part.size = 0: Input should be greater than or equal to 1."),
        ({"name": "plain", "size": "many"}, "part.size = 'many': Input should be a valid integer"),
        ({"name": "plain", "size": None}, "part.size = None: Input should be a valid integer."),
        ({"name": "plain", "names": {"a": "x"}}, "part.names = {'a': 'x'}: Input should be a valid number"),
        (
            {"name": "plain", "either": []},
            "part.either = []: Input should be a valid number; Input should be a valid string.",
        ),
        ({"name": "plain", "share": 9}, "part: share = 9.0 is more than size = 3."),
        ({"name": "demanding"}, "part.needed: Field required."),
    ],
)
def test_a_wrong_spec_is_one_line(spec, message):
    """The place, the value that was found, the rule, and every type that would have done."""
    assert message_of(spec).startswith(message)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:Thing", "No module named 'no_such_module'"),
        (f"{HERE}:Missing", "has no attribute 'Missing'"),
        (f"{HERE}:", "has no attribute ''"),
        (":Plain", "Empty module name"),
        (".relative:Plain", "relative import"),
        ("two words:Plain", "No module named 'two words'"),
    ],
)
def test_what_cannot_be_imported_is_one_line(name, reason):
    """The reason and the form that is expected."""
    message = message_of({"name": name})
    assert message.startswith(f"part.name = {name!r} cannot be imported (")
    assert reason in message
    assert message.endswith("it must be package.module:Name of an installed or PYTHONPATH module.")


@pytest.mark.parametrize("attribute", ["NoDataclass", "not_a_class", "test_a_name_alone_builds_the_defaults"])
def test_what_is_no_dataclass_is_refused(attribute):
    """A class without declared parameters, a number, a function: nothing of it is called."""
    name = f"{HERE}:{attribute}"
    assert f"part.name = {name!r} is not a dataclass; make it a frozen one." == message_of({"name": name})
