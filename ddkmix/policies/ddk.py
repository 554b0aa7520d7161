"""DDK: sample more from the domains where the student is furthest from the teacher (arXiv 2407.16154).

The equations stand in the docstring of `Ddk`. Here `uniform_mix` is their 1 - alpha, and everything is
computed in log space: r is a double exponential of the loss gap and overflows float64 from 6.6 nats.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from ddkmix.policies.signal import MeasuredSignal, columns_of, signal_of
from ddkmix.policies.update import exponentiated_update
from ddkmix.types import DomainLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class Ddk:
    """DDK's domain knowledge guided sampling (Liu et al. 2024, arXiv 2407.16154, Eq. 1 and 2).

        r_0[i]     = exp(s[i]) / sum_j exp(s[j])                                     (Eq. 1)
        psi[i]     = r_t[i] exp(s[i])
        r_{t+1}[i] = alpha psi[i] / sum_j psi[j] + (1 - alpha) / N                   (Eq. 2, alpha = 0.5)

    with the published signal s[i] = l_S[i] / l_T[i], the ratio of the perplexities l = exp(loss) of student
    and teacher. That makes r a double exponential of the loss gap: with gaps around 3 nats one domain takes
    all that the uniform share leaves. `signal="loss_gap"` is the logarithm of that ratio, for students still
    far from the teacher.

    Gaps of ln 3 and 0 nats: r_0 is (3/4, 1/4), psi is (9/4, 1/4), and half of (9/10, 1/10) with half of
    the uniform mixture is (0.7, 0.3).

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Ddk
    >>> losses = DomainLosses.from_means(
    ...     {"code": 2.0 + np.log(3.0), "prose": 2.0}, {"code": 2.0, "prose": 2.0}
    ... )
    >>> policy = Ddk(signal="loss_gap")
    >>> state = policy.init(losses, natural_weights=np.array([0.2, 0.8]))
    >>> state["mixture_weights"]
    [0.2, 0.8]
    >>> state = policy.update(state, losses)
    >>> [round(share, 6) for share in state["mixture_weights"]]
    [0.7, 0.3]
    """

    uniform_mix: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the mixture that stays uniform: 1 - alpha. At 0 one domain ends up with everything."""
    signal: MeasuredSignal = "perplexity_ratio"
    """`perplexity_ratio` as published, its logarithm `loss_gap`, or another of `Signal`."""
    signal_cap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Signals above this (a ratio, nats per token, or bits per byte) count as this; unset as published."""
    first_interval: Literal["random", "eq1"] = "random"
    """`random`: rows of the first interval are drawn from the corpus as it is (Algorithm 1, line 2).
    `eq1`: the first interval already follows Eq. 1."""

    @property
    def needs(self) -> frozenset[str]:
        """What an evaluator must measure beside the losses: `excess_loss`, `forward_kl`, or nothing."""
        return columns_of(self.signal)

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """r_0 by Eq. 1; the mixture of the first interval is natural or r_0.

        Args:
            losses: those of the untrained student, nats per token.
            natural_weights: shares of the corpus as it is; sum to 1.
        """
        log_factor = exponentiated_update(
            np.zeros(len(losses.domains)), self.score(losses), step_size=1.0, uniform_mix=0.0
        )
        first = np.exp(log_factor) if self.first_interval == "eq1" else natural_weights
        return {"log_factor": log_factor.tolist(), "mixture_weights": first.tolist()}

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """r_{t+1} by Eq. 2; after smoothing it is the mixture.

        Args:
            state: what `init` or the last `update` gave; `log_factor` is log r_t.
            losses: those at the end of the last interval, nats per token.
        """
        log_factor = exponentiated_update(
            np.array(state["log_factor"]),
            self.score(losses),
            step_size=1.0,
            uniform_mix=self.uniform_mix,
        )
        return {"log_factor": log_factor.tolist(), "mixture_weights": np.exp(log_factor).tolist()}

    def score(self, losses: DomainLosses) -> Float[np.ndarray, " N"]:
        """The signal s of the equations, capped.

        Args:
            losses: student and teacher on the same held-out rows, nats per token.
        """
        signal = signal_of(self.signal, losses)
        if self.signal_cap is not None:
            signal = np.minimum(signal, self.signal_cap)
        capped: Float[np.ndarray, " N"] = signal
        return capped
