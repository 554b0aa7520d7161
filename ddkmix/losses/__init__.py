"""Losses, each per token and in nats. One loss a file; the trainer alone normalises.

A loss is a frozen dataclass whose fields are its parameters in a config; called with the student's logits of
a chunk of tokens and the teacher's signal, it gives the loss of each token. Those files load no torch when
imported, so that `lint` can check a config at once. To add a loss: write the file, and add a line to
`LOSSES`. Outside the package: `name: package.module:Class`.

Axis letters: n tokens that are predicted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.losses.cross_entropy import CrossEntropy
from ddkmix.losses.forward_kl import ForwardKL
from ddkmix.losses.gold import GOLD
from ddkmix.losses.reverse_kl import ReverseKL
from ddkmix.losses.uld import ULD
from ddkmix.plugins import build

__all__ = ["GOLD", "LOSSES", "ULD", "CrossEntropy", "ForwardKL", "ReverseKL", "TokenLoss"]


@runtime_checkable
class TokenLoss(Protocol):
    """What a loss must offer. Its tensors are torch's; their types are left open to stay free of torch."""

    needs_teacher: ClassVar[bool]
    """Whether it looks at the teacher."""

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """The loss of each token. A loss that names no `accepts` is only given dense logits.

        Args:
            student_logits: (n, V) float32; the result is differentiable in them.
            teacher: (n, V) float32 logits, or a `ddkmix.batch.TruncatedSignal` of the n tokens, of a kind
                in the loss's `accepts`; None if no term of the objective needs it.
            labels: (n,) int64, the next tokens.

        Returns:
            (n,) float32, nats per token. Normalising them is not its business.

        A loss may also have a method `value_and_slope(student, teacher, labels)`, which gives the same values
        and their derivative in closed form, as a `ddkmix.losses.closed_form.Slope`. It is given detached
        `LogProbs`, of the student and, where the signal is dense, of the teacher, which losses share. It is
        used where it was written in the same class as `__call__` or in one derived from that; any other loss
        is differentiated by autograd, a few tokens at a time.
        """
        ...


LOSSES: dict[str, type] = {
    "cross_entropy": CrossEntropy,
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "uld": ULD,
    "gold": GOLD,
}
"""The losses that a config can name."""


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One summand of the objective."""

    name: str
    weight: float
    loss: TokenLoss


def build_terms(specs: Sequence[Named]) -> tuple[LossTerm, ...]:
    """The weighted sum that a config names; each entry is `{name, weight, parameters}`.

    Raises:
        ConfigError: a name, a weight or a parameter is wrong, or there is no term.
    """
    terms = []
    for i, spec in enumerate(specs):
        parameters = spec.model_dump()
        weight = parameters.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
            raise ConfigError(f"loss.{i}.weight = {weight!r}; a loss weight is a finite number >= 0.")
        terms.append(LossTerm(spec.name, float(weight), build(parameters, LOSSES, where=f"loss.{i}")))
    if not any(term.weight > 0 for term in terms):
        raise ConfigError("loss: every weight is 0 or there is no term; nothing would be learnt.")
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ConfigError(f"loss: {names} names a loss twice; metrics need each name once.")
    return tuple(terms)
