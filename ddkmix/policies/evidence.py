"""How sure a policy's next mixture is: the standard errors of the gaps, carried through its update.

Held-out rows of two domains are different rows, so their gaps err independently, and to first order

    se(w[i])^2 = sum_j (dw[i] / dgap[j])^2 gap_error[j]^2                               (the delta method)

The derivative times the error is a difference over two standard errors, which also sees what a steep update
does between them:

    d_j = (w(gap + gap_error[j] e_j) - w(gap - gap_error[j] e_j)) / 2,    se(w)^2 = sum_j d_j^2

Each pair is two updates, so many domains have fewer pairs than that: 16 up to 75 domains, then as many as
keep an update cheap, 4 at 300, and 2 there of a policy that fits laws. All gaps move at once, up or down by
signs that come from a hash of the domain's name: se(w)^2 = mean_k (sum_j sign_jk d_j)^2. Over the signs its
expectation is the sum above. For a weight that hangs on its own gap alone every pair says the same; for one
that hangs on many alike the root is off by about 1 / sqrt(2 K), a sixth with 16 pairs and a third with 4.
Nothing is random: the same losses give the same errors on every rank, in every run, and in any order of the
domains.

A gap moves with the student's loss. Excess loss and KL, where they are measured, move by as much but not
below 0: the excess moves at most so far; the KL, a mean over all classes, errs less than the gap on one token
of each.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256

import numpy as np
from jaxtyping import Float

from ddkmix.errors import ConfigError
from ddkmix.types import DomainLosses

ALONE, FEWEST, MOST = 32, 2, 16
"""Domains up to which each moves alone; the fewest and the most pairs of updates for more of them."""
_WORK, _WORK_OF_FITS = 1200, 400
"""Domains times pairs: 300 domains within 5 ms, and within a second where an update fits laws."""


def pairs_of(num_domains: int, *, fits_laws: bool = False) -> int:
    """Pairs of updates that the standard errors of the weights take.

    Args:
        num_domains: domains of the mixture; each has a pair of its own where the answer is their number.
        fits_laws: whether an update of the policy fits a law per domain, and so takes long.
    """
    affordable = (_WORK_OF_FITS if fits_laws else _WORK) // num_domains
    if num_domains <= min(ALONE, affordable):
        return num_domains
    return min(max(affordable, FEWEST), MOST)


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
    weights_at: Callable[[DomainLosses], Float[np.ndarray, " N"]],
    losses: DomainLosses,
    *,
    fits_laws: bool = False,
) -> Float[np.ndarray, " N"]:
    """The standard error of each mixture weight that a policy makes of these losses.

    Args:
        weights_at: the policy's weights at other losses of the same domains; called twice for each pair.
        losses: with a finite `gap_error` everywhere, nats per token.
        fits_laws: whether a call takes long, so that there are fewer pairs.
    """
    count = pairs_of(len(losses.domains), fits_laws=fits_laws)
    alone = count == len(losses.domains)
    shifts = np.diag(losses.gap_error) if alone else signs(losses.domains)[:count] * losses.gap_error
    squares = np.square(
        [(weights_at(_moved(losses, shift)) - weights_at(_moved(losses, -shift))) / 2 for shift in shifts]
    )
    errors: Float[np.ndarray, " N"] = np.sqrt(squares.sum(axis=0) if alone else squares.mean(axis=0))
    return errors


@lru_cache(maxsize=8)
def signs(domains: tuple[str, ...]) -> Float[np.ndarray, "K N"]:
    """1 or -1 for every domain in every one of `MOST` pairs, from its name; not to be written to."""
    hashes = b"".join(sha256(name.encode()).digest()[: MOST // 8] for name in domains)
    bits = np.unpackbits(np.frombuffer(hashes, dtype=np.uint8)).reshape(-1, MOST)
    found: Float[np.ndarray, "K N"] = np.where(bits.T == 1, 1.0, -1.0)
    return found


def _moved(losses: DomainLosses, shift: Float[np.ndarray, " N"]) -> DomainLosses:
    excess, kl = losses.excess_loss, losses.forward_kl
    return replace(
        losses,
        student_loss=losses.student_loss + shift,
        excess_loss=None if excess is None else np.maximum(excess + shift, 0.0),
        forward_kl=None if kl is None else np.maximum(kl + shift, 0.0),
    )
