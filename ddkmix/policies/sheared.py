"""Dynamic batch loading: more of the domains that are furthest from their target (arXiv 2310.06694)."""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float
from pydantic import Field

from ddkmix.policies.signal import MeasuredSignal, columns_of, signal_of
from ddkmix.policies.update import LARGEST_STEP_SIZE, Start, exponentiated_update, finite_logs, start_weights
from ddkmix.types import DomainLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheared:
    """Sheared LLaMA's dynamic batch loading (Xia et al. 2023, arXiv 2310.06694, Algorithm 1).

        d[i]     = l_student[i] - l_target[i]
        psi[i]   = w_t[i] exp(eta d[i])
        w_{t+1}  = (1 - c) psi[i] / sum_j psi[j] + c / N,       eta = 1, c = 1e-4

    The target is the teacher's loss, which the authors' code offers too ("source reference"); their main
    runs extrapolate it from a scaling law. The **paper** clips, d = max(d, 0), and has no c. The **code**, by
    which the models were made, does not clip and mixes in c. We do what the code does: a domain that is past
    its target gives rows away in proportion.
    `clip_at_zero: true` and `uniform_mix: 0` are the paper.

    Differences of ln 3 and 0 nats from natural weights (1/2, 1/2), c = 0: (3/4, 1/4), then (9/10, 1/10).

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Sheared
    >>> losses = DomainLosses.from_means(
    ...     {"code": 2.0 + np.log(3.0), "prose": 2.0}, {"code": 2.0, "prose": 2.0}
    ... )
    >>> policy = Sheared(uniform_mix=0.0)
    >>> state = policy.init(losses, natural_weights=np.array([0.5, 0.5]))
    >>> for _ in range(2):
    ...     state = policy.update(state, losses)
    >>> [round(share, 6) for share in state["mixture_weights"]]
    [0.9, 0.1]
    """

    step_size: Annotated[float, Field(gt=0, le=LARGEST_STEP_SIZE)] = 1.0
    """The factor eta of the difference in the exponent."""
    uniform_mix: Annotated[float, Field(ge=0, le=1)] = 1e-4
    """Share of the mixture that stays uniform, the code's c; 0 in the paper."""
    clip_at_zero: bool = False
    """Whether a student ahead of its target counts as one that is level with it, as in the paper."""
    signal: MeasuredSignal = "loss_gap"
    """The difference d: `loss_gap` as published, or another of `Signal` that one evaluation is enough for."""
    start: Start = "natural"
    """Weights of the first interval: `natural` as published, or `uniform`."""

    @property
    def needs(self) -> frozenset[str]:
        """What an evaluator must measure beside the losses: `excess_loss`, `forward_kl`, or nothing."""
        return columns_of(self.signal)

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The weights before the first update.

        Args:
            losses: those of the untrained student; only looked at for the signal to be there.
            natural_weights: shares of the corpus as it is; sum to 1.

        Raises:
            ConfigError: the signal is of something that nobody has measured.
        """
        signal_of(self.signal, losses)  # better now than after the first interval
        weights = start_weights(self.start, natural_weights)
        return {"log_weights": finite_logs(weights).tolist(), "mixture_weights": weights.tolist()}

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The weights w_{t+1}.

        Args:
            state: what `init` or the last `update` gave.
            losses: those at the end of the last interval, nats per token.
        """
        gap = signal_of(self.signal, losses)
        log_weights = exponentiated_update(
            np.array(state["log_weights"]),
            np.maximum(gap, 0.0) if self.clip_at_zero else gap,
            step_size=self.step_size,
            uniform_mix=self.uniform_mix,
        )
        return {"log_weights": log_weights.tolist(), "mixture_weights": np.exp(log_weights).tolist()}
