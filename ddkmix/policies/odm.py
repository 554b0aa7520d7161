"""Online Data Mixing: a bandit whose arms are domains (arXiv 2312.02406), with excess loss as the reward."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field
from scipy.special import log_softmax

from ddkmix.policies.signal import columns_of, measured
from ddkmix.types import DomainLosses

_DEFAULT_STEPS = 1000
_SMALLEST_PROBABILITY = 1e-12  # an arm that something else has switched off


@dataclass(frozen=True, kw_only=True, slots=True)
class Odm:
    """Online Data Mixing (Albalak et al. 2023, arXiv 2312.02406); three rules go by this name.

        e_t  = min(1/N, sqrt(ln N / (N t)))                                     exploration
        paper:          R[i] <- 0.9 R[i] + 0.1 x[i] / w[i]
                        w[i]  = (1 - N e_t) exp(e_{t-1} R[i]) / sum_j exp(e_{t-1} R[j]) + e_t
        exp3:           R[i] <- R[i] + (x[i] / 10) / w[i], then w as above
        smoothed_mean:  R[i] <- 0.9 R[i] + 0.1 exp(x[i])
                        w[i]  = (1 - N e_t) R[i] / sum_j R[j] + e_t

    with w = 1/N, R = 0 and e_0 = 1/N before the first. `paper` is what the paper prints (we had it through
    the documentation of DataFlex). `exp3` is what the training scripts of the authors' code select.
    `smoothed_mean` is what their README calls the method of the paper (its `group_update`: all domains at
    once, no division by w, no exponential of R). We default to the paper.

    The reward x is the **excess over the teacher**. Published is the loss itself (`reward: student_loss`),
    which favours domains that are merely unpredictable. The published t counts training steps, so e_t has
    left its cap of 1/N long before anything is done; that is why t grows by `interval_steps` per update here.
    Dividing by w makes an unbiased estimate where only the arm that was drawn pays; here all are measured, so
    it favours rare domains. It is kept because it is published.

    Two domains with rewards (1, 0), t = 1: e_0 = 1/2, e_1 = min(1/2, sqrt(ln 2 / 2)) = 1/2, so w stays
    uniform; R is (0.2, 0). At t = 2 R is (0.38, 0), e_2 = 0.4163, and w = 0.1674 softmax(0.19, 0) + 0.4163.

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Odm
    >>> losses = DomainLosses.from_means({"code": 3.0, "prose": 2.0}, {"code": 2.0, "prose": 2.0})
    >>> policy = Odm(interval_steps=1)
    >>> state = policy.init(losses, natural_weights=np.array([0.2, 0.8]))
    >>> for _ in range(2):
    ...     state = policy.update(state, losses)
    ...     print([round(share, 4) for share in state["mixture_weights"]])
    [0.5, 0.5]
    [0.5079, 0.4921]
    """

    form: Literal["paper", "exp3", "smoothed_mean"] = "paper"
    """Which of the three rules."""
    reward: Literal["loss_gap", "excess_loss", "student_loss"] = "loss_gap"
    """What a domain pays, nats per token: the student's loss over the teacher's, the same clipped per token,
    or, as published, the student's loss."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the old estimate in the new one; `exp3` has none."""
    interval_steps: Annotated[int, Field(ge=1)] | None = None
    """Training steps that t grows by per update. Unset: those of the run, `mixture.interval_steps` (or of the
    `Reweighter`); 1000, a run's default, for those who call the policy themselves."""

    @property
    def needs(self) -> frozenset[str]:
        """What an evaluator must measure beside the losses: `excess_loss` or nothing."""
        return columns_of(self.reward)

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The uniform mixture.

        Args:
            losses: those of the untrained student, nats per token.
            natural_weights: not looked at; every arm starts alike.

        Raises:
            ConfigError: the reward is of something that nobody has measured.
        """
        count = len(self._rewards(losses))
        return {
            "mixture_weights": [1.0 / count] * count,
            "estimate": None,
            "exploration": 1.0 / count,
            "updates": 0,
        }

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The weights after every arm has paid once.

        Args:
            state: what `init` or the last `update` gave; `estimate` is R, or log R for `smoothed_mean`.
            losses: those at the end of the last interval, nats per token.

        Raises:
            ConfigError: the reward is of something that nobody has measured.
        """
        reward, updates = self._rewards(losses), state["updates"] + 1
        estimate = self._estimate(state, reward)
        count, before = len(reward), state["exploration"]
        steps = updates * (_DEFAULT_STEPS if self.interval_steps is None else self.interval_steps)
        exploration = min(1.0 / count, math.sqrt(math.log(count) / (count * steps)))
        log_shares = estimate if self.form == "smoothed_mean" else before * estimate
        shares = np.exp(log_softmax(log_shares))
        weights = max(0.0, 1.0 - count * exploration) * shares + exploration
        return {
            "mixture_weights": weights.tolist(),
            "estimate": estimate.tolist(),
            "exploration": exploration,
            "updates": updates,
        }

    def _rewards(self, losses: DomainLosses) -> Float[np.ndarray, " N"]:
        if self.reward == "excess_loss":
            return measured("excess_loss", losses)
        return losses.loss_gap if self.reward == "loss_gap" else losses.student_loss

    def _estimate(self, state: dict[str, Any], reward: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """R after this reward; its logarithm for `smoothed_mean`, where it is a mean of exponentials."""
        keep, fresh = self.smoothing, 1.0 - self.smoothing
        old = None if state["estimate"] is None else np.array(state["estimate"])
        if self.form == "smoothed_mean":
            paid = math.log(fresh) + reward
            if old is None or keep == 0:
                return paid
            mixed: Float[np.ndarray, " N"] = np.logaddexp(math.log(keep) + old, paid)
            return mixed
        old = np.zeros_like(reward) if old is None else old
        paid = reward / np.maximum(np.array(state["mixture_weights"]), _SMALLEST_PROBABILITY)
        estimate: Float[np.ndarray, " N"] = (
            old + paid / 10.0 if self.form == "exp3" else keep * old + fresh * paid
        )
        return estimate
