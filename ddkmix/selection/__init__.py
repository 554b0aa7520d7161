"""Which rows of a domain are worth learning from, by what teacher and student think of them.

Mixture weights say how much of each domain; a selection says which of its rows. Pure functions of losses per
row, with a JSON-able state where they follow the student: the same losses give the same rows on every rank
and after a resume. Nothing is dropped silently: states count the rows that were offered and kept.

- `difference`: once, before training, by teacher and a small reference model (MiniPLM).
- `confidence`: step by step, by the teacher's confidence and the student's uncertainty (LLKD's idea).

No torch, no IO, no logging; `checks` alone looks at a model's small files, before a run. Axis letters: B rows
of a batch, R rows of a domain, N domains.
"""

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.plugins import build
from ddkmix.selection.confidence import ConfidenceSelection
from ddkmix.selection.difference import DifferenceSelection

__all__ = ["SELECTIONS", "ConfidenceSelection", "DifferenceSelection", "build_selection"]

Selection = ConfidenceSelection | DifferenceSelection

SELECTIONS: dict[str, type] = {
    "confidence": ConfidenceSelection,
    "difference": DifferenceSelection,
}
"""The selections that a config can name; each class states its rule and its source."""


def build_selection(spec: Named | None) -> Selection | None:
    """The selection that a config names; None where it names none, and every row teaches alike.

    Args:
        spec: its name and its parameters.

    Raises:
        ConfigError: the name or a parameter is wrong.
    """
    if spec is None:
        return None
    built = build(spec.model_dump(), SELECTIONS, where="selection")
    if not isinstance(built, Selection):
        raise ConfigError(
            f"selection.name = {spec.name!r} is a {type(built).__name__}; a run knows how to use "
            f"{' and '.join(SELECTIONS)}, and classes derived from these."
        )
    return built
