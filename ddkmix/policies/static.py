"""A mixture that never moves: the baseline that every dynamic one must beat."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from ddkmix.types import DomainLosses, simplex_vector


@dataclass(frozen=True, kw_only=True, slots=True)
class Static:
    """Uniform, natural or given weights, w_{t+1} = w_t.

    Uniform is the "equal sampling" that DDK is held against (arXiv 2407.16154, Table 5). Given weights may be
    the time average of a run's, which is DoReMi's second stage (arXiv 2305.10429) and the control that shows
    whether it matters *when* a domain comes (Velocitune, arXiv 2411.14318). In a config that is

        policy: {name: static, weights: average, run: runs/ddk}

    and reading the config puts the numbers there: DoReMi's own average where `doremi` made the run, else the
    mixture as it was served. In Python `Static(weights=average_weights("runs/ddk"))`, with
    `ddkmix.average_weights`, where both are explained.

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import Static
    >>> losses = DomainLosses.from_means({"code": 3.0, "prose": 2.5})
    >>> Static(weights={"code": 3.0, "prose": 1.0}).init(losses, natural_weights=np.array([0.2, 0.8]))
    {'mixture_weights': [0.75, 0.25]}
    """

    fixed: ClassVar[bool] = True
    """Guards that nobody has set do not bound it: it is the mixture that somebody asked for."""
    weights: Literal["uniform", "natural"] | dict[str, float] = "uniform"
    """`uniform`: 1/N each. `natural`: by rows available (or the cards' priors). Or one number per domain."""
    averaged_from: str | None = None
    """The run that the weights are the average of, and which average; written when the config is read."""

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The weights of the whole run.

        Args:
            losses: only its domains count.
            natural_weights: shares of the corpus as it is; sum to 1.

        Raises:
            ConfigError: `weights` does not give one number >= 0 for each domain.
        """
        if self.weights == "natural":
            vector = natural_weights
        elif self.weights == "uniform":
            vector = np.full(len(losses.domains), 1.0 / len(losses.domains))
        else:
            assert isinstance(self.weights, dict)
            vector = simplex_vector(self.weights, losses.domains, where="policy.weights")
        return {"mixture_weights": vector.tolist()}

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The same weights.

        Args:
            state: what `init` gave.
            losses: not looked at.
        """
        return state
