"""Direct preference knowledge distillation, as the paper states it, and the term that anchors it."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.preference.contrast import log_likelihood, log_ratio

__all__ = ["ChosenNLL", "Dpkd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dpkd:
    """Direct preference knowledge distillation (arXiv 2406.19774, Eq. 9).

        L_kd = -log sigmoid(u),  u = beta/|y_t| log(q(y_t|x) / p(y_t|x)) - beta/|y_s| log(q(y_s|x) / p(y_s|x))
        y_t chosen: the teacher's response; y_s rejected: the student's; q student, p teacher

    It is DPO (arXiv 2305.18290) with the teacher as the reference and lengths taken out. The gradient is

        -sigmoid(-u) beta (grad log q(y_t|x) / |y_t| - grad log q(y_s|x) / |y_s|)

    whose weight grows where the student is wrong, as the paper says below its Eq. 11; that equation prints
    sigmoid(+u), which would shrink there. We follow Eq. 9 and so need no formula for the gradient.

    The paper's whole objective is L_kd + lambda L_pt (Algorithm 1), L_pt = -log q of text: another term,
    `cross_entropy` with weight lambda on rows of text, or `ChosenNLL` on the chosen responses. Leave it out
    and nothing keeps the likelihood of either response from falling as long as the rejected one falls
    faster (`rewards.pair_measures` watches it). The paper prints neither beta nor lambda; its code has
    beta = 0.1, for a difference of one token's log-probabilities.

    One nat per token below the teacher on the chosen response, and like it on the other: u = -1.

    >>> import torch
    >>> from ddkmix.preference import Dpkd
    >>> from ddkmix.preference.scores import ResponseScores
    >>> tokens = torch.tensor([4])
    >>> chosen = ResponseScores(student=torch.tensor([-8.0]), teacher=torch.tensor([-4.0]), tokens=tokens)
    >>> rejected = ResponseScores(student=torch.tensor([-6.0]), teacher=torch.tensor([-6.0]), tokens=tokens)
    >>> [round(value, 4) for value in Dpkd(beta=1.0)(chosen, rejected).tolist()]
    [1.3133]
    """

    beta: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """How far the student may leave the reference: factor on the implicit rewards."""
    length_normalize: bool = True
    """Divide by the tokens of each response, as Eq. 9 does (without: 22.8 against 24.6 Rouge-L)."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher's log-probabilities."""

    def __call__(self, chosen: Any, rejected: Any) -> Any:
        """-log sigmoid(u) of each pair; see `PairLoss`.

        Args:
            chosen: `ResponseScores` of the teacher's responses.
            rejected: `ResponseScores` of the student's responses.

        Returns:
            (B,) nats; ln 2 where the student is equally far from the reference on both.
        """
        from torch.nn.functional import logsigmoid

        ahead, behind = (log_ratio(y, length_normalize=self.length_normalize) for y in (chosen, rejected))
        return -logsigmoid(self.beta * (ahead - behind))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenNLL:
    """Language modelling on the chosen response: -log q(y_t|x) / |y_t|.

    The anchor that costs nothing, since the log-probabilities are there: the behaviour-cloning term of CPO
    (arXiv 2401.08417) and the regulariser of SLiC-HF (arXiv 2305.10425). Its weight is lambda.
    """

    length_normalize: bool = True
    """Divide by the tokens of the response."""
    needs_teacher: ClassVar[bool] = False
    """Whether it looks at the teacher's log-probabilities."""

    def __call__(self, chosen: Any, rejected: Any) -> Any:
        """-log q of each chosen response; see `PairLoss`.

        Args:
            chosen: `ResponseScores` of the preferred responses.
            rejected: not looked at.

        Returns:
            (B,) nats per token, or nats where lengths are not taken out.
        """
        return -log_likelihood(chosen, length_normalize=self.length_normalize)
