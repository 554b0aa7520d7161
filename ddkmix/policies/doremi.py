"""DoReMi: group DRO over domains, with the teacher as the reference model (arXiv 2305.10429)."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Float
from pydantic import Field

from ddkmix.policies.signal import measured
from ddkmix.policies.update import LARGEST_STEP_SIZE, Start, exponentiated_update, finite_logs, start_weights
from ddkmix.types import DomainLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class Doremi:
    """DoReMi's domain weights (Xie et al. 2023, arXiv 2305.10429, Algorithm 1).

        lambda_t[i] = mean over the tokens of i of max(0, l_student - l_reference)
        psi[i]      = w_{t-1}[i] exp(eta lambda_t[i])
        w_t[i]      = (1 - c) psi[i] / sum_j psi[j] + c / N,       eta = 1, c = 1e-3, w_0 = 1 / N
        result      = mean over t = 1..T of w_t

    The excess is clipped **per token**, so a domain counts by the tokens where the student is behind, even if
    it is ahead on others; copies that clip the mean of the domain (Aioli, DoGE) are another rule. The result
    is `average_weights` of the state: of all updates, without w_0 and before guards. `ddkmix show` prints it,
    and `static` takes it (`weights: average, run: THIS RUN`). Paper and code agree on the rule; the code's
    default c is 1e-4, its script passes the paper's 1e-3.

    Here the teacher is the reference, losses are of held-out rows at the end of an interval (there: of every
    training batch), and w says how often a domain is drawn (there: how much its tokens count, drawn
    uniformly; the same gradient in the mean).

    Excesses of ln 3 and 0 nats, c = 0: psi is (3/2, 1/2), w_1 is (3/4, 1/4); once more, (9/10, 1/10).

    >>> import numpy as np
    >>> from dataclasses import replace
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Doremi
    >>> losses = DomainLosses.from_means({"code": 3.0, "prose": 2.5}, {"code": 2.0, "prose": 2.5})
    >>> losses = replace(losses, excess_loss=np.array([np.log(3.0), 0.0]))
    >>> policy = Doremi(uniform_mix=0.0)
    >>> state = policy.init(losses, natural_weights=np.array([0.2, 0.8]))
    >>> for _ in range(2):
    ...     state = policy.update(state, losses)
    >>> [round(share, 6) for share in state["mixture_weights"]]
    [0.9, 0.1]
    >>> [round(share, 6) for share in state["average_weights"]]
    [0.825, 0.175]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"excess_loss"})
    """What an evaluator must measure beside the losses."""
    step_size: Annotated[float, Field(gt=0, le=LARGEST_STEP_SIZE)] = 1.0
    """The factor eta of the excess in the exponent."""
    uniform_mix: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """Share of the mixture that stays uniform, the paper's c."""
    start: Start = "uniform"
    """Weights of the first interval: `uniform` as published, or `natural`."""

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The weights w_0, which no average counts.

        Args:
            losses: those of the untrained student, nats per token, with `excess_loss`.
            natural_weights: shares of the corpus as it is; sum to 1.

        Raises:
            ConfigError: nobody has measured `excess_loss`.
        """
        measured("excess_loss", losses)  # better now than after the first interval
        weights = start_weights(self.start, natural_weights)
        return {
            "log_weights": finite_logs(weights).tolist(),
            "mixture_weights": weights.tolist(),
            "average_weights": weights.tolist(),
            "updates": 0,
        }

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The weights w_t and the mean of all since w_1.

        Args:
            state: what `init` or the last `update` gave.
            losses: those at the end of the last interval, nats per token, with `excess_loss`.

        Raises:
            ConfigError: nobody has measured `excess_loss`.
        """
        log_weights = exponentiated_update(
            np.array(state["log_weights"]),
            measured("excess_loss", losses),
            step_size=self.step_size,
            uniform_mix=self.uniform_mix,
        )
        weights, updates = np.exp(log_weights), state["updates"] + 1
        before = np.array(state["average_weights"])
        return {
            "log_weights": log_weights.tolist(),
            "mixture_weights": weights.tolist(),
            "average_weights": (before + (weights - before) / updates).tolist(),
            "updates": updates,
        }
