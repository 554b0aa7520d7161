"""The plainest dynamic mixture: a softmax of any signal, mixed with uniform. It remembers nothing."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field
from scipy.special import softmax

from ddkmix.policies.signal import Signal, columns_of, signal_of
from ddkmix.types import DomainLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class Softmax:
    """A softmax of the signal s with a temperature; nobody's paper, and every paper's baseline.

        w[i] = (1 - u) exp(s[i] / temperature) / sum_j exp(s[j] / temperature) + u / N

    At temperature 1, u = 0 and the perplexity ratio it is DDK "without factor smoothing", Eq. 1 computed anew
    at each evaluation (arXiv 2407.16154, Table 5).

    Gaps of ln 3 and 0 nats: the softmax is (3/4, 1/4), and half of it with half of uniform (0.625, 0.375).

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Softmax
    >>> losses = DomainLosses.from_means(
    ...     {"code": 2.0 + np.log(3.0), "prose": 2.0}, {"code": 2.0, "prose": 2.0}
    ... )
    >>> policy = Softmax()
    >>> state = policy.update(policy.init(losses, natural_weights=np.array([0.2, 0.8])), losses)
    >>> [round(share, 6) for share in state["mixture_weights"]]
    [0.625, 0.375]
    """

    signal: Signal = "loss_gap"
    """What the weights follow."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """In units of the signal: the larger, the closer to uniform."""
    uniform_mix: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the mixture that stays uniform, u."""
    first_interval: Literal["natural", "signal"] = "natural"
    """The first interval: the corpus as it is, or already the softmax."""

    @property
    def needs(self) -> frozenset[str]:
        """What an evaluator must measure beside the losses: `excess_loss`, `forward_kl`, or nothing."""
        return columns_of(self.signal)

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The mixture of the first interval.

        Args:
            losses: those of the untrained student, nats per token.
            natural_weights: shares of the corpus as it is; sum to 1.

        Raises:
            ConfigError: the signal is of something that nobody has measured.
        """
        state = {"first_gap": losses.loss_gap.tolist()} if self.signal == "gap_left" else {}
        weights = self._weights(state, losses)
        first = weights if self.first_interval == "signal" else natural_weights
        return {**state, "mixture_weights": first.tolist()}

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The softmax of the newest losses.

        Args:
            state: what `init` or the last `update` gave.
            losses: those at the end of the last interval, nats per token.

        Raises:
            ConfigError: the signal is of something that nobody has measured.
        """
        return {**state, "mixture_weights": self._weights(state, losses).tolist()}

    def _weights(self, state: dict[str, Any], losses: DomainLosses) -> Float[np.ndarray, " N"]:
        first = np.array(state["first_gap"]) if "first_gap" in state else None
        signal = signal_of(self.signal, losses, first)
        with np.errstate(over="ignore"):  # to -inf, which is a share of nothing
            shares = softmax((signal - signal.max()) / self.temperature)
        weights: Float[np.ndarray, " N"] = (1 - self.uniform_mix) * shares + self.uniform_mix / len(shares)
        return weights
