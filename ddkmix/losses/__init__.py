"""Losses, each per token and in nats. One loss a file; the trainer alone normalises.

A loss is a frozen dataclass whose fields are its parameters in a config; called with the student's logits of
a chunk of tokens and the teacher's signal, it gives the loss of each token. Those files load no torch when
imported, so that `lint` can check a config at once. To add a loss: write the file, and add a line to
`LOSSES`. Outside the package: `name: package.module:Class`. Their weights are numbers, or move: `weights`.

Axis letters: n tokens that are predicted, V vocabulary.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.losses.cross_entropy import CrossEntropy
from ddkmix.losses.dpkd_token import DpkdToken
from ddkmix.losses.forward_kl import ForwardKL
from ddkmix.losses.gold import GOLD
from ddkmix.losses.hidden_consistency import HiddenConsistency
from ddkmix.losses.hidden_match import HiddenMatch
from ddkmix.losses.jsd import JSD
from ddkmix.losses.mse import MSE
from ddkmix.losses.nll import NLL
from ddkmix.losses.ranking import Ranking
from ddkmix.losses.reverse_kl import ReverseKL
from ddkmix.losses.sinkhorn import Sinkhorn
from ddkmix.losses.skew_kl import SkewKL
from ddkmix.losses.skew_reverse_kl import SkewReverseKL
from ddkmix.losses.total_variation import TotalVariation
from ddkmix.losses.uld import ULD
from ddkmix.losses.weights import Rest, WeightSchedule, build_weight, weights_at
from ddkmix.plugins import build
from ddkmix.sections import Schedule

__all__ = [
    "GOLD",
    "JSD",
    "LOSSES",
    "MSE",
    "NLL",
    "ULD",
    "CrossEntropy",
    "DpkdToken",
    "ForwardKL",
    "HiddenConsistency",
    "HiddenMatch",
    "LossTerm",
    "Ranking",
    "ReverseKL",
    "Sinkhorn",
    "SkewKL",
    "SkewReverseKL",
    "TokenLoss",
    "TotalVariation",
    "build_terms",
    "check_terms",
    "terms_at",
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
        and their derivative in closed form, as a `Slope`. It is given detached
        `LogProbs`, of the student and, where the signal is dense, of the teacher, which losses share. It is
        used where it was written in the same class as `__call__` or in one derived from that; any other loss
        is differentiated by autograd, a few tokens at a time.

        Also optional: `kinds`, which of `accepts` are left with these parameters; `temperatures`, at which
        the teacher's probabilities are wanted; `token_multiple`, where tokens are compared with each other:
        calls then start at a multiple of it, and only the last may hold another number of tokens.
        """
        ...


LOSSES: dict[str, type] = {
    "cross_entropy": CrossEntropy,
    "dpkd_token": DpkdToken,
    "forward_kl": ForwardKL,
    "hidden_consistency": HiddenConsistency,
    "hidden_match": HiddenMatch,
    "jsd": JSD,
    "mse": MSE,
    "nll": NLL,
    "ranking": Ranking,
    "reverse_kl": ReverseKL,
    "sinkhorn": Sinkhorn,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "total_variation": TotalVariation,
    "uld": ULD,
    "gold": GOLD,
}
"""The losses that a config can name."""

_STEPS_TRIED = 10_000


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One summand of the objective; `build_terms` makes them."""

    name: str
    """The loss's name in `LOSSES`, or `package.module:Class`."""
    weight: float
    """Weight in force. Not a number where there is a `schedule`, until `terms_at` says which step it is."""
    loss: TokenLoss
    """The loss with its parameters."""
    schedule: WeightSchedule | Rest | None = None
    """How the weight moves; None where it is constant."""


def build_terms(specs: Sequence[Any], *, may_be_empty: bool = False) -> tuple[LossTerm, ...]:
    """The weighted sum that a config names.

    >>> from ddkmix import build_terms
    >>> for term in build_terms(["cross_entropy", {"name": "jsd", "weight": 0.2, "beta": 0.5}]):
    ...     print(term.name, term.weight)
    cross_entropy 1.0
    jsd 0.2

    Args:
        specs: for each term a mapping (or an entry of a config) of `name`, `weight` (1 if it is left out) and
            the parameters of the loss; or a name alone, for the loss as it is.
        may_be_empty: something else is learnt from, so that there may be no term.

    Raises:
        ConfigError: a name, a weight or a parameter is wrong, or there is no term.
    """
    terms = []
    for i, spec in enumerate(specs):
        parameters = _parameters(spec, where=f"loss.{i}")
        weight = build_weight(parameters.pop("weight", 1.0), where=f"loss.{i}.weight")
        loss = build(parameters, LOSSES, where=f"loss.{i}")
        name = str(parameters["name"])
        if isinstance(weight, float):
            terms.append(LossTerm(name, weight, loss))
        else:
            terms.append(LossTerm(name, math.nan, loss, weight))
    if all(term.weight == 0 for term in terms) and not (may_be_empty and not terms):
        raise ConfigError("loss: every weight is 0 or there is no term; nothing would be learnt.")
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ConfigError(f"loss: {names} names a loss twice; metrics need each name once.")
    if terms and all(isinstance(term.loss, HiddenMatch | HiddenConsistency) for term in terms):
        raise ConfigError(
            f"loss: {terms[0].name} teaches nothing about the next token; name another loss beside it, if "
            "only to watch it: {name: cross_entropy, weight: 0}."
        )
    resting = [term.name for term in terms if isinstance(term.schedule, Rest)]
    if len(resting) > 1:
        raise ConfigError(f"loss: {resting} both have the weight `rest`; only one term can have it.")
    return tuple(terms)


def _parameters(spec: Any, *, where: str) -> dict[str, Any]:
    if isinstance(spec, str):
        return {"name": spec}
    if isinstance(spec, Named):
        return spec.model_dump()
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{where} = {spec!r}; give a name, or a mapping with `name` and parameters.")
    return dict(spec)


def check_terms(terms: Sequence[LossTerm], kind: str, temperatures: Collection[float] | None = None) -> None:
    """Refuse losses that the teacher's signal cannot serve, before anything expensive starts.

    Args:
        terms: the objective.
        kind: of the signal: `dense`, or of a truncated one `bucket`, `renormalize`, `drop` or `drawn`.
        temperatures: other than 1, at which a truncated signal knows log Z; None where that is not known yet.

    Raises:
        ConfigError: a term is not defined for such a signal, or wants the teacher at another temperature.
    """
    for i, term in enumerate(terms):
        if not term.loss.needs_teacher:
            continue
        _check_kind(f"loss.{i} ({term.name})", term.loss, kind)
        if kind == "dense" or temperatures is None or not _needs_log_z(term.loss, kind):
            continue
        for wanted in getattr(term.loss, "temperatures", ()):
            if wanted != 1.0 and wanted not in temperatures:
                known = ", ".join(str(value) for value in sorted({1.0, *temperatures}))
                raise ConfigError(
                    f"loss.{i} ({term.name}) wants the teacher at temperature {wanted}, but its truncated "
                    f"signal is exact only at {known}; capture it again with this temperature."
                )


def _check_kind(where: str, loss: TokenLoss, kind: str) -> None:
    accepts = getattr(loss, "accepts", frozenset({"dense"}))
    kinds = getattr(loss, "kinds", accepts)
    if kind in kinds:
        return
    adapt = getattr(loss, "adapt", "fixed")
    by_adapt = kind in accepts and adapt != "fixed"
    what = f" with adapt: {adapt}" if by_adapt else ""
    raise ConfigError(
        f"{where}{what} is not defined for a teacher signal of the kind {kind!r}, only "
        f"for {', '.join(sorted(kinds))}; {_way_out(kind, kinds, by_adapt=by_adapt)}"
    )


def _needs_log_z(loss: TokenLoss, kind: str) -> bool:
    """Renormalised probabilities are a softmax at any temperature; WTTM weighs with log Z itself."""
    return kind != "renormalize" or getattr(loss, "adapt", "fixed") == "wttm"


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


def terms_at(terms: Sequence[LossTerm], step: int, steps: int, schedule: Schedule) -> tuple[LossTerm, ...]:
    """The terms with the weights in force at a step.

    Args:
        terms: what `build_terms` gave.
        step: optimizer step, counted from 0.
        steps: optimizer steps of the run.
        schedule: that of the run's learning rate.

    Raises:
        ConfigError: a schedule gives no weight at this step.
    """
    weights = weights_at(_rules(terms), step, steps, schedule)
    return tuple(replace(term, weight=weight) for term, weight in zip(terms, weights, strict=True))


def check_weights(terms: Sequence[LossTerm], steps: int, schedule: Schedule) -> None:
    """Try the steps of a run (of a long one 10,000, evenly spread), so that none of them ends it.

    Args:
        terms: what `build_terms` gave.
        steps: optimizer steps of the run.
        schedule: that of the run's learning rate.

    Raises:
        ConfigError: a step at which a schedule gives no weight, or no step at which any weight is above 0.
    """
    if all(term.schedule is None for term in terms):
        return
    tried = [*range(0, steps, 1 + steps // _STEPS_TRIED), steps - 1]
    weights = [weights_at(_rules(terms), step, steps, schedule) for step in tried]
    if not any(any(of_step) for of_step in weights):
        raise ConfigError(f"loss: every weight is 0 at all {steps} steps; nothing would be learnt.")


def _rules(terms: Sequence[LossTerm]) -> list[float | WeightSchedule | Rest]:
    return [term.weight if term.schedule is None else term.schedule for term in terms]
