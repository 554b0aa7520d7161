"""Velocitune: more of the domains that have closed the smallest share of their gap (arXiv 2411.14318)."""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float
from pydantic import Field

from ddkmix.policies.signal import signal_of
from ddkmix.policies.update import LARGEST_STEP_SIZE, Start, exponentiated_update, finite_logs, start_weights
from ddkmix.types import DomainLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class Velocitune:
    """Velocitune's weights (Luo et al. 2024, arXiv 2411.14318), with the teacher's loss as the target.

        V_t[i]  = clamp((l_t[i] - l_target[i]) / (l_0[i] - l_target[i]), 0, 1)
        psi[i]  = w_{t-1}[i] exp(V_t[i])
        w_t[i]  = psi[i] / sum_j psi[j]

    V is the signal `gap_left`; what it is where the first gap was not positive is said at `signal_of`, the
    paper does not. It is free of scale, so an easy and a hard domain are alike to it. The paper extrapolates
    its targets from a scaling law; here they are what the teacher has. No code is published. The paper has no
    floor: differences in V add up over the run, so set `uniform_mix` (0 as published) or guards in long ones.

    Gaps that were 2 and 2 nats and are 1 and 2: V is (1/2, 1), and w_1 is (1, e^(1/2)) normalised.

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Velocitune
    >>> teacher = {"code": 1.0, "prose": 2.0}
    >>> before = DomainLosses.from_means({"code": 3.0, "prose": 4.0}, teacher)
    >>> after = DomainLosses.from_means({"code": 2.0, "prose": 4.0}, teacher)
    >>> policy = Velocitune()
    >>> state = policy.update(policy.init(before, natural_weights=np.array([0.5, 0.5])), after)
    >>> [round(share, 4) for share in state["mixture_weights"]]
    [0.3775, 0.6225]
    """

    step_size: Annotated[float, Field(gt=0, le=LARGEST_STEP_SIZE)] = 1.0
    """A factor of V in the exponent; 1 as published."""
    uniform_mix: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the mixture that stays uniform; 0 as published."""
    start: Start = "natural"
    """Weights of the first interval: the corpus as it is, or `uniform`."""

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The weights before the first update; remembers the first gaps.

        Args:
            losses: those of the untrained student, nats per token: l_0.
            natural_weights: shares of the corpus as it is; sum to 1.
        """
        weights = start_weights(self.start, natural_weights)
        return {
            "log_weights": finite_logs(weights).tolist(),
            "mixture_weights": weights.tolist(),
            "first_gap": losses.loss_gap.tolist(),
        }

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The weights w_t.

        Args:
            state: what `init` or the last `update` gave.
            losses: those at the end of the last interval, nats per token: l_t.
        """
        log_weights = exponentiated_update(
            np.array(state["log_weights"]),
            signal_of("gap_left", losses, np.array(state["first_gap"])),
            step_size=self.step_size,
            uniform_mix=self.uniform_mix,
        )
        return {
            "log_weights": log_weights.tolist(),
            "mixture_weights": np.exp(log_weights).tolist(),
            "first_gap": state["first_gap"],
        }
