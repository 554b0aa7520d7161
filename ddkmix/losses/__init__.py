"""Losses, each per token and in nats. One loss a file; the trainer alone normalises.

A loss is a frozen dataclass whose fields are its parameters in a config; called with the student's logits of
a chunk of tokens and the teacher's signal, it gives the loss of each token. Those files load no torch when
imported, so that `lint` can check a config at once. To add a loss: write the file, and add a line to
`LOSSES`. Outside the package: `name: package.module:Class`.

Axis letters: n tokens that are predicted, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.losses.cross_entropy import CrossEntropy
from ddkmix.losses.forward_kl import ForwardKL
from ddkmix.losses.jsd import JSD
from ddkmix.losses.mse import MSE
from ddkmix.losses.nll import NLL
from ddkmix.losses.ranking import Ranking
from ddkmix.losses.reverse_kl import ReverseKL
from ddkmix.losses.sinkhorn import Sinkhorn
from ddkmix.losses.skew_kl import SkewKL
from ddkmix.losses.skew_reverse_kl import SkewReverseKL
from ddkmix.losses.total_variation import TotalVariation
from ddkmix.plugins import build

__all__ = [
    "JSD",
    "LOSSES",
    "MSE",
    "NLL",
    "CrossEntropy",
    "ForwardKL",
    "Ranking",
    "ReverseKL",
    "Sinkhorn",
    "SkewKL",
    "SkewReverseKL",
    "TokenLoss",
    "TotalVariation",
]


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
    "jsd": JSD,
    "mse": MSE,
    "nll": NLL,
    "ranking": Ranking,
    "reverse_kl": ReverseKL,
    "sinkhorn": Sinkhorn,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "total_variation": TotalVariation,
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


def check_terms(terms: Sequence[LossTerm], kind: str) -> None:
    """Refuse losses that the teacher's signal cannot serve, before anything expensive starts.

    Args:
        terms: the objective.
        kind: of the signal: `dense`, or of a truncated one `bucket`, `renormalize`, `drop` or `drawn`.

    Raises:
        ConfigError: a term is not defined for such a signal.
    """
    for i, term in enumerate(terms):
        accepts = getattr(term.loss, "accepts", frozenset({"dense"}))
        kinds = getattr(term.loss, "kinds", accepts)
        if not term.loss.needs_teacher or kind in kinds:
            continue
        adapt = getattr(term.loss, "adapt", "fixed")
        by_adapt = kind in accepts and adapt != "fixed"
        what = f" with adapt: {adapt}" if by_adapt else ""
        raise ConfigError(
            f"loss.{i} ({term.name}){what} is not defined for a teacher signal of the kind {kind!r}, only "
            f"for {', '.join(sorted(kinds))}; {_way_out(kind, kinds, by_adapt=by_adapt)}"
        )


def _way_out(kind: str, kinds: frozenset[str], *, by_adapt: bool) -> str:
    if by_adapt:
        return "leave out adapt, or use the live teacher."
    others = [name for name, cls in LOSSES.items() if kind in getattr(cls, "accepts", ())]
    other = f"or use one of {', '.join(others)}."
    if kind in ("renormalize", "drop") and "bucket" in kinds:
        return f"set the signal's tail to bucket, {other}"
    if kind == "drawn" and "bucket" in kinds:
        return f"capture without random draws, {other}"
    return f"use the live teacher, {other}"


def token_multiple(terms: Sequence[LossTerm]) -> int:
    """What the number of tokens in a call of these terms has to be a multiple of, but for the last tokens.

    1 unless a loss compares tokens with each other, as `Sinkhorn` does within groups; it names its own
    multiple in `token_multiple`.
    """
    return math.lcm(*(getattr(term.loss, "token_multiple", 1) for term in terms))
