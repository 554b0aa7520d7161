"""What can be measured on held-out rows beside the losses, and who asks for it.

A policy says what it looks at in `needs`, a class variable or an attribute; a config may ask for more.
"""

from collections.abc import Iterable
from typing import Any, get_args

from ddkmix.config import RunConfig
from ddkmix.errors import ConfigError
from ddkmix.sections import Measure

MEASURES: tuple[str, ...] = get_args(Measure)
"""Optional columns of `DomainLosses`."""


def needs_of(policy: Any) -> frozenset[str]:
    """What a policy wants measured; nothing where it does not say.

    Raises:
        ConfigError: it needs what nobody can measure.
    """
    return checked_measures(getattr(policy, "needs", ()), where=f"policy {type(policy).__name__} needs")


def checked_measures(names: Iterable[str], *, where: str) -> frozenset[str]:
    """Names of measures as a set.

    Raises:
        ConfigError: one of them is unknown, or a string is given instead of several.
    """
    found = frozenset([names] if isinstance(names, str) else names)
    if isinstance(names, str) or not found <= set(MEASURES):
        raise ConfigError(f"{where} {names!r}; give a set of {', '.join(MEASURES)}, or of none of them.")
    return found


def check_measures(measures: frozenset[str], config: RunConfig, *, live: bool, one_tokenizer: bool) -> None:
    """Refuse what could not be measured, before anything expensive starts.

    Args:
        measures: what the policy or the config asks for.
        config: the run.
        live: whether there is a teacher that can read held-out rows at every evaluation.
        one_tokenizer: whether teacher and student read text alike.

    Raises:
        ConfigError: the teacher's losses of single tokens, or its distributions, cannot be had.
    """
    if not measures:
        return
    what = " and ".join(sorted(measures))
    way_out = "use a policy that does not need it, or take it out of evaluation.measures"
    if config.evaluation.reference == "cards":
        raise ConfigError(
            f"{what} looks at the teacher token by token, and evaluation.reference = 'cards' gives one "
            f"number for a domain; set it to 'teacher', {way_out}."
        )
    if not one_tokenizer:
        raise ConfigError(
            f"{what} compares student and teacher token by token, and the teacher {config.teacher.model} has "
            f"other tokens than the student; {way_out}."
        )
    if "forward_kl" in measures and not live:
        raise ConfigError(
            "forward_kl needs the teacher at every evaluation, and signal.source = 'store' holds only train "
            f"rows; set it to 'live', {way_out} (excess_loss needs the teacher once)."
        )
