"""The relatives of DPO in DPKD's ablation (arXiv 2406.19774, Rouge-L 18.8, 24.3 and 24.5; DPKD 24.6)."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.preference.contrast import log_likelihood, log_ratio

__all__ = ["CPO", "IPO", "SimPO"]


@dataclass(frozen=True, kw_only=True, slots=True)
class IPO:
    """Identity preference optimisation (arXiv 2310.12036, Eq. 17), the reference being the teacher.

        L = (h - 1 / (2 beta))**2,  h = log(q(y_t|x) / p(y_t|x)) - log(q(y_s|x) / p(y_s|x))

    Its pull has no sigmoid to end it, but a goal: h = 1 / (2 beta), beyond which it pulls back.
    """

    beta: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """Half the reciprocal of the lead that is wanted, in nats: a larger factor keeps closer."""
    length_normalize: bool = False
    """Divide by the tokens of each response. The published form does not."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher's log-probabilities."""

    def __call__(self, chosen: Any, rejected: Any) -> Any:
        """(h - 1 / (2 beta))**2 of each pair; see `PairLoss`.

        Args:
            chosen: `ResponseScores` of the teacher's responses.
            rejected: `ResponseScores` of the student's responses.

        Returns:
            (B,) squared nats.
        """
        ahead, behind = (log_ratio(y, length_normalize=self.length_normalize) for y in (chosen, rejected))
        return (ahead - behind - 1 / (2 * self.beta)).square()


@dataclass(frozen=True, kw_only=True, slots=True)
class CPO:
    """Contrastive preference optimisation (arXiv 2401.08417), which has no reference.

        L = -log sigmoid(beta (log q(y_t|x) - log q(y_s|x)))

    The paper adds language modelling on the chosen response: `ChosenNLL` with weight 1 beside it.
    """

    beta: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """Factor on the lead, nats."""
    length_normalize: bool = False
    """Divide by the tokens of each response. The published form does not."""
    needs_teacher: ClassVar[bool] = False
    """Whether it looks at the teacher's log-probabilities."""

    def __call__(self, chosen: Any, rejected: Any) -> Any:
        """-log sigmoid(beta lead) of each pair; see `PairLoss`.

        Args:
            chosen: `ResponseScores` of the teacher's responses.
            rejected: `ResponseScores` of the student's responses.

        Returns:
            (B,) nats.
        """
        return _preferred(chosen, rejected, self.beta, 0.0, length_normalize=self.length_normalize)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimPO:
    """Simple preference optimisation (arXiv 2405.14734): no reference, lengths out, and a margin.

    L = -log sigmoid(beta/|y_t| log q(y_t|x) - beta/|y_s| log q(y_s|x) - gamma)
    """

    beta: Annotated[float, Field(gt=0, le=1000)] = 2.0
    """Factor on the lead per token; the paper's runs have 2 to 2.5."""
    gamma: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Lead that is wanted, after the factor, nats; the paper's runs have 0.3 to 1.6."""
    needs_teacher: ClassVar[bool] = False
    """Whether it looks at the teacher's log-probabilities."""

    def __call__(self, chosen: Any, rejected: Any) -> Any:
        """-log sigmoid(beta lead - gamma) of each pair; see `PairLoss`.

        Args:
            chosen: `ResponseScores` of the teacher's responses.
            rejected: `ResponseScores` of the student's responses.

        Returns:
            (B,) nats.
        """
        return _preferred(chosen, rejected, self.beta, self.gamma, length_normalize=True)


def _preferred(chosen: Any, rejected: Any, beta: float, gamma: float, *, length_normalize: bool) -> Any:
    from torch.nn.functional import logsigmoid

    ahead, behind = (log_likelihood(y, length_normalize=length_normalize) for y in (chosen, rejected))
    return -logsigmoid(beta * (ahead - behind) - gamma)
