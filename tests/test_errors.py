"""The exception tree and the end of an unknown-name message."""

import inspect
import re

import pytest

from ddkmix import errors
from ddkmix.errors import DdkmixError, did_you_mean

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, Exception)
}


def drawn_tree():
    """name -> name of its base, from the picture in the module's docstring."""
    parents, path = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^ {4}([│├└─ ]*)([A-Z]\w+) ", line)
        if match and match[2] in CLASSES:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            parents[match[2]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_picture_of_the_tree_is_the_tree():
    """Every class is drawn under its base, and nothing else is drawn."""
    assert {name: cls.__base__.__name__ for name, cls in CLASSES.items()} == drawn_tree()


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_of_ours_is_caught_by_its_base(name):
    """A program that catches DdkmixError catches all that a user can cause."""
    with pytest.raises(DdkmixError, match=r"^what, where, got, rule, way out$"):
        raise CLASSES[name]("what, where, got, rule, way out")


def test_no_error_of_ours_hides_a_builtin_one():
    """Nothing else is caught by accident: the base is Exception itself."""
    assert (Exception,) == DdkmixError.__bases__


def test_a_near_name_is_offered():
    """A slip of the finger gets the name that was meant."""
    assert "did you mean 'temperature'?" == did_you_mean("temperatur", ["weight", "temperature"])


def test_without_a_near_name_all_are_listed_in_order():
    """Nothing close: the message lists what there is, sorted."""
    assert "known: alpha, beta, gamma." == did_you_mean("zzz", ["gamma", "alpha", "beta"])
