"""How sure a policy's next mixture is: the standard errors of the gaps, carried through its update.

Held-out rows of two domains are different rows, so their gaps err independently, and to first order

    se(w[i])^2 = sum_j (dw[i] / dgap[j])^2 gap_error[j]^2                               (the delta method)

The derivative times the error is a difference over two standard errors, which also sees what a steep update
does between them:

    d_j = (w(gap + gap_error[j] e_j) - w(gap - gap_error[j] e_j)) / 2,    se(w)^2 = sum_j d_j^2    (N <= 32)

For more domains that would be many updates. There all gaps move at once, 16 times, up or down by signs that
come from a hash of the domain's name: se(w)^2 = mean_k (sum_j sign_jk d_j)^2. Over the signs its expectation
is the sum above, and its root is off by about a sixth (1 / sqrt(2 x 16)). Nothing is random: the same losses
give the same errors on every rank, in every run, and in any order of the domains.

A gap moves with the student's loss. Excess loss and KL, where they are measured, move by as much but not
below 0: the excess moves at most so far; the KL, a mean over all classes, errs less than the gap on one token
of each.
"""

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

import numpy as np
from jaxtyping import Float

from ddkmix.errors import ConfigError
from ddkmix.types import DomainLosses

ALONE, TOGETHER = 32, 16
"""Domains up to which each moves alone; pairs of updates for more of them."""


def require_errors(losses: DomainLosses) -> None:
    """Refuse losses that do not say how far off they may be.

    Raises:
        ConfigError: the standard error of a gap is not known.
    """
    unknown = [d for d, error in zip(losses.domains, losses.gap_error, strict=True) if not np.isfinite(error)]
    if unknown:
        raise ConfigError(
            f"guards.evidence needs the standard error of every gap, and {', '.join(unknown)} has none (a "
            "single held-out row, or losses without errors); give more held-out rows, or set guards.evidence "
            "to 0."
        )


def weight_errors(
    weights_at: Callable[[DomainLosses], Float[np.ndarray, " N"]], losses: DomainLosses
) -> Float[np.ndarray, " N"]:
    """The standard error of each mixture weight that a policy makes of these losses.

    Args:
        weights_at: the policy's weights at other losses of the same domains; called 2N times, or 32.
        losses: with a finite `gap_error` everywhere, nats per token.
    """
    pairs = [
        (weights_at(_moved(losses, shift)) - weights_at(_moved(losses, -shift))) / 2
        for shift in _shifts(losses)
    ]
    squares = np.square(pairs)
    few = len(losses.domains) <= ALONE
    errors: Float[np.ndarray, " N"] = np.sqrt(squares.sum(axis=0) if few else squares.mean(axis=0))
    return errors


def _shifts(losses: DomainLosses) -> Float[np.ndarray, "K N"]:
    """How far every gap moves, pair by pair."""
    if len(losses.domains) <= ALONE:
        return np.diag(losses.gap_error)
    hashes = b"".join(sha256(name.encode()).digest()[: TOGETHER // 8] for name in losses.domains)
    bits = np.unpackbits(np.frombuffer(hashes, dtype=np.uint8)).reshape(-1, TOGETHER)
    shifts: Float[np.ndarray, "K N"] = np.where(bits.T == 1, 1.0, -1.0) * losses.gap_error
    return shifts


def _moved(losses: DomainLosses, shift: Float[np.ndarray, " N"]) -> DomainLosses:
    excess, kl = losses.excess_loss, losses.forward_kl
    return replace(
        losses,
        student_loss=losses.student_loss + shift,
        excess_loss=None if excess is None else np.maximum(excess + shift, 0.0),
        forward_kl=None if kl is None else np.maximum(kl + shift, 0.0),
    )
