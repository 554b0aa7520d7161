"""What policies look at: one number per domain that says how far the student is behind the teacher.

A policy is a signal, an update and guards. The signals are here; which one a published rule looks at is a
constant of that rule, and a choice where the rule leaves it open.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float

from ddkmix.errors import ConfigError, NumericsError
from ddkmix.types import DomainLosses

MeasuredSignal = Literal["perplexity_ratio", "loss_gap", "excess_loss", "forward_kl", "bits_per_byte_gap"]
"""The signals that one evaluation is enough for."""

Signal = Literal["perplexity_ratio", "loss_gap", "excess_loss", "forward_kl", "bits_per_byte_gap", "gap_left"]
"""`perplexity_ratio`: exp(loss_gap), DDK's. `loss_gap`: student_loss - teacher_loss, nats per token.
`excess_loss`: the mean over tokens of max(0, student - teacher), DoReMi's. `forward_kl`: mean
KL(teacher || student). `bits_per_byte_gap`: the gap in bits per UTF-8 byte, comparable between tokenizers.
`gap_left`: the share of the first gap that is still to be closed, Velocitune's."""

_LARGEST_EXPONENT = 700.0  # exp(709.8) is the largest float64
_MEASURED_ON_REQUEST = frozenset({"excess_loss", "forward_kl"})


def signal_of(
    name: Signal, losses: DomainLosses, first: Float[np.ndarray, " N"] | None = None
) -> Float[np.ndarray, " N"]:
    """One number per domain; the larger, the further the student is behind.

    `gap_left` is clamp(gap / first gap, 0, 1). Where the first gap was not positive there was nothing to
    close; there it is the limit of small first gaps: 1 if the student is behind now, 0 if it is not. (The
    formula as printed would give 1 to a student that has got ahead of a teacher it was ahead of before.)

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import signal_of
    >>> losses = DomainLosses.from_means({"code": 3.0, "prose": 2.5}, {"code": 1.0, "prose": 2.0})
    >>> signal_of("loss_gap", losses).tolist()
    [2.0, 0.5]
    >>> signal_of("gap_left", losses, first=np.array([4.0, 0.25])).tolist()
    [0.5, 1.0]

    Args:
        name: which of the signals.
        losses: student and teacher on the same held-out rows, nats per token.
        first: gaps before the first step, nats per token, for `gap_left` alone.

    Raises:
        ConfigError: the signal is of something that nobody has measured.
        NumericsError: what it is of is not finite.
    """
    if name == "loss_gap":
        return losses.loss_gap
    if name == "perplexity_ratio":  # a ratio of e^700 is as good as a larger one, and finite
        ratio: Float[np.ndarray, " N"] = np.exp(np.minimum(losses.loss_gap, _LARGEST_EXPONENT))
        return ratio
    if name == "bits_per_byte_gap":
        return _bits_per_byte_gap(losses)
    if name == "gap_left":
        assert first is not None, "gap_left is a share of first gaps"
        return _gap_left(losses.loss_gap, first)
    return measured(name, losses)


def columns_of(name: str) -> frozenset[str]:
    """What an evaluator must measure beside the two losses, for a policy that looks at this signal."""
    return _MEASURED_ON_REQUEST & {name}


def measured(name: str, losses: DomainLosses) -> Float[np.ndarray, " N"]:
    """An optional column of the losses, which must be there and finite.

    Raises:
        ConfigError: nobody has measured it.
        NumericsError: it is not finite.
    """
    column = {
        "excess_loss": losses.excess_loss,
        "forward_kl": losses.forward_kl,
        "rows_served": losses.rows_served,
    }[name]
    if column is None:
        run = f" (in a run that is replayed later, evaluation.measures: [{name}])"
        raise ConfigError(
            f"the policy looks at {name}, and these losses have none: give DomainLosses({name}=...), let an "
            f"evaluator and a Reweighter measure it{run if name in _MEASURED_ON_REQUEST else ''}, or take a "
            "policy or a signal that does without (loss_gap)."
        )
    values: Float[np.ndarray, " N"] = np.asarray(column, dtype=np.float64)
    if not np.isfinite(values).all():
        bad = {d: float(v) for d, v in zip(losses.domains, values, strict=True) if not np.isfinite(v)}
        raise NumericsError(
            f"held-out {name} is not finite: {bad}; weights are not updated from it. Lower optimizer.lr or "
            "look at the rows of these domains."
        )
    return values


def _bits_per_byte_gap(losses: DomainLosses) -> Float[np.ndarray, " N"]:
    uncounted = [d for d, size in zip(losses.domains, losses.num_bytes, strict=True) if size <= 0]
    if uncounted:
        raise ConfigError(
            f"the policy looks at bits_per_byte_gap, and num_bytes of {uncounted} is 0: nobody counted them. "
            "Give DomainLosses(num_tokens=..., num_bytes=...), or take the signal loss_gap."
        )
    gap: Float[np.ndarray, " N"] = losses.student_bits_per_byte - losses.teacher_bits_per_byte
    return gap


def _gap_left(gap: Float[np.ndarray, " N"], first: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    was_behind = first > 0
    with np.errstate(over="ignore"):  # a tiny first gap; clipped to 1
        share = np.clip(gap / np.where(was_behind, first, 1.0), 0.0, 1.0)
    left: Float[np.ndarray, " N"] = np.where(was_behind, share, (gap > 0).astype(np.float64))
    return left
