"""PLaD: calibration of the student on pseudo-preferences, where the teacher's response is taken for better.

Of the paper (arXiv 2406.02886) only the abstract could be read. The two forms are OUR RECONSTRUCTION, after
SLiC-HF (arXiv 2305.10425), which it follows: a hinge on the difference of log-likelihoods, with a constant
margin or one that follows the responses' quality. It adds language modelling (`ChosenNLL`) and looks at no
log-probability of the teacher, so in a loop of your own a teacher behind an interface serves; a run asks
its live teacher all the same, for what it records of pairs.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.errors import DataError
from ddkmix.preference.contrast import log_likelihood

__all__ = ["PladMargin", "PladRanking"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PladRanking:
    """Ranking calibration of PLaD (arXiv 2406.02886; reconstruction, see the module).

        L = max(0, beta - log q(y+|x) / |y+| + log q(y-|x) / |y-|)

    Nothing is learnt from a pair whose chosen response is ahead by beta nats per token.
    """

    beta: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Margin, nats per token (or nats where lengths are not taken out)."""
    length_normalize: bool = True
    """Divide by the tokens of each response."""
    needs_teacher: ClassVar[bool] = False
    """Whether it looks at the teacher's log-probabilities."""

    def __call__(self, chosen: Any, rejected: Any) -> Any:
        """max(0, beta - lead) of each pair; see `PairLoss`.

        Args:
            chosen: `ResponseScores` of the teacher's responses.
            rejected: `ResponseScores` of the student's responses.

        Returns:
            (B,) nats per token.
        """
        return (self.beta - _lead(chosen, rejected, self.length_normalize)).clamp(min=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PladMargin:
    """Margin calibration of PLaD (arXiv 2406.02886; reconstruction, see the module).

        L = max(0, beta (s(y+) - s(y-)) - log q(y+|x) / |y+| + log q(y-|x) / |y-|)

    s is how good a response is: `ResponseScores.quality`, for example its Rouge-L against a reference.
    Where the student's response is as good as the teacher's, no lead is asked for.
    """

    beta: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Nats per token of lead that a unit of quality asks for."""
    length_normalize: bool = True
    """Divide by the tokens of each response."""
    needs_teacher: ClassVar[bool] = False
    """Whether it looks at the teacher's log-probabilities."""
    needs_quality: ClassVar[bool] = True
    """Responses must be graded."""

    def __call__(self, chosen: Any, rejected: Any) -> Any:
        """max(0, beta (s(y+) - s(y-)) - lead) of each pair; see `PairLoss`.

        Args:
            chosen: `ResponseScores` of the teacher's responses, with `quality`.
            rejected: `ResponseScores` of the student's responses, with `quality`.

        Returns:
            (B,) nats per token.

        Raises:
            DataError: nobody has said how good the responses are.
        """
        if chosen.quality is None or rejected.quality is None:
            raise DataError(
                "plad_margin follows the quality of responses, and these pairs have none; give "
                "ResponseScores(quality=...) for both sides, or use plad_ranking, whose margin is constant."
            )
        wanted = self.beta * (chosen.quality - rejected.quality)
        return (wanted - _lead(chosen, rejected, self.length_normalize)).clamp(min=0)


def _lead(chosen: Any, rejected: Any, length_normalize: bool) -> Any:
    """By how much the chosen response is the likelier one."""
    ahead, behind = (log_likelihood(y, length_normalize=length_normalize) for y in (chosen, rejected))
    return ahead - behind
