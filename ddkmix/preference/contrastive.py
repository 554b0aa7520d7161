"""DistiLLM-2: one skew divergence on the teacher's responses, the other on the student's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ddkmix.losses import LossTerm, SkewKL, SkewReverseKL

__all__ = ["ContrastiveSkew"]

_NOT_ZERO = 1e-5
"""Added to a denominator, as in the authors' code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveSkew:
    """Contrastive skew divergences (DistiLLM-2, arXiv 2503.07067).

        L = (1 - b) mean SKL_a(x, y_t) + b mean SRKL_a(x, y_s)
        y_t the teacher's response, y_s the student's; skews a, each side its own, and b in [0, 1]

    On what the teacher says the student is pulled up, on what it says itself pushed down; both divergences
    exist and are bounded. Two curricula move the constants, and the authors' release turns both off
    (`update_alpha`, `gradual_beta` are false), as is the default here:

        b = clip(share of the run that is over, b_0, 1)                                    moving_beta
        a = clip(1 - (1 - a_0) m / (p(y) - q(y)), 0.01, a_0), m the mean of p(y) - q(y)    moving_skew

    p(y) and q(y) are geometric means of the tokens' probabilities; on the student's side they change places.
    The paper writes e/E + tau/T for epoch and step within it: the same where there is one epoch. An easier
    response than the mean gets less skew, a divergence nearer to the KL.

    Weights are scaled so that both are 1 at b = 1/2, as in the release. Two things differ from it: a side is
    the mean over its tokens, not over responses of their means, and the gradient goes through the student's
    part of the reverse divergence's mixture, as the formula says; the release detaches it (read in a copy).

    >>> from ddkmix.preference.contrastive import ContrastiveSkew
    >>> [(term.name, term.weight) for term in ContrastiveSkew().terms(step=0, steps=100)]
    [('skew_kl', 1.0), ('skew_reverse_kl', 1.0)]
    """

    skew: Annotated[float, Field(gt=0.01, lt=1)] = 0.1
    """a_0, a share: skew of both sides, the largest where it moves."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """b, a share: weight of the student's responses; where it moves b_0, the least."""
    moving_beta: bool = False
    """Whether b grows to 1 with the run."""
    moving_skew: bool = False
    """Whether each response has a skew of its own; m is the mean over the rows of a micro-batch."""

    def terms(
        self, *, step: int, steps: int, skews: tuple[float, float] | None = None
    ) -> tuple[LossTerm, LossTerm]:
        """The term of the teacher's responses and that of the student's, each for the tokens of its side.

        Args:
            step: optimizer steps done, from 0.
            steps: optimizer steps of the run.
            skews: share in the mixture for either side, as `skews` gives them for single rows; None: `skew`.
        """
        of_chosen, of_rejected = skews or (self.skew, self.skew)
        beta = min(max(step / steps, self.beta), 1.0) if self.moving_beta else self.beta
        return (
            LossTerm("skew_kl", 2 * (1 - beta), SkewKL(skew=of_chosen)),
            LossTerm("skew_reverse_kl", 2 * beta, SkewReverseKL(skew=of_rejected)),
        )

    def skews(self, own: Sequence[float], other: Sequence[float]) -> list[float]:
        """The skew of each response of one side; rows of one skew can share a call of the loss.

        Args:
            own: mean probability (geometric, a share) of each response under the model that wrote it.
            other: the same share under the other model.

        Returns:
            Of each response, rounded to hundredths: ten values at most at a_0 = 0.1.
        """
        if not self.moving_skew:
            return [self.skew] * len(own)
        gaps = [a - b for a, b in zip(own, other, strict=True)]
        mean = sum(gaps) / max(len(gaps), 1)
        wanted = [1 - (1 - self.skew) * mean / (gap + _NOT_ZERO) for gap in gaps]
        return [round(min(max(value, 0.01), self.skew), 2) for value in wanted]
