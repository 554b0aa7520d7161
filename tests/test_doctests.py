"""The examples in the docstrings of public names are true."""

import doctest
import sys

import pytest

from tests.conftest import REPO

sys.path.insert(0, str(REPO / "tools"))

import public_names as tool

TAUGHT = {
    "ddkmix.DomainLosses",
    "ddkmix.DomainLosses.from_means",
    "ddkmix.DomainMixture.from_datasets",
    "ddkmix.MixtureBatchSampler",
    "ddkmix.RunConfig",
    "ddkmix.StepLoader",
    "ddkmix.domain_indices",
    "ddkmix.reweight",
    "ddkmix.losses.CrossEntropy",
    "ddkmix.losses.ForwardKL",
    "ddkmix.planner.quantise",
    "ddkmix.policies.Ado",
    "ddkmix.policies.Chi2Dro",
    "ddkmix.policies.Ddk",
    "ddkmix.policies.Doremi",
    "ddkmix.policies.Odm",
    "ddkmix.policies.Sheared",
    "ddkmix.policies.SkillIt",
    "ddkmix.policies.Softmax",
    "ddkmix.policies.Static",
    "ddkmix.policies.Velocitune",
    "ddkmix.policies.exponentiated_update",
    "ddkmix.policies.signal_of",
}
"""Names that an example teaches best."""


def home_of(path: str) -> str | None:
    """The public module that a name is in."""
    return max((m for m in tool.public_modules() if path.startswith(f"{m}.")), key=len, default=None)


def failures(doc: str, name: str) -> tuple[int, int]:
    """(failed, tried) of a docstring's examples, which start with no names at all."""
    test = doctest.DocTestParser().get_doctest(doc, {}, name, name, 0)
    result = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(test)
    return result.failed, result.attempted


@pytest.mark.parametrize("module", tool.public_modules())
def test_the_examples_of_a_module_are_true(module: str) -> None:
    """They run as they stand, imports included, and print what they say; what needs one has one."""
    modules, missing = tool.load_modules([module])
    if missing:
        pytest.skip(f"{missing[module]} is not installed")
    documented = {name.path: name.doc for name in tool.public_names(modules) if ">>>" in name.doc}
    assert [] == [path for path, doc in documented.items() if failures(doc, path)[0]]
    assert set() == {path for path in TAUGHT if home_of(path) == module} - set(documented)


def test_every_name_that_needs_an_example_is_of_a_public_module() -> None:
    """The list above has no slip of the pen."""
    assert None not in map(home_of, TAUGHT)


def test_a_wrong_example_would_be_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    """The check can fail."""
    assert (1, 2) == failures("Text.\n\n>>> a = 1\n>>> a + 1\n3\n", "wrong")
    assert "+ 2" in capsys.readouterr().out
