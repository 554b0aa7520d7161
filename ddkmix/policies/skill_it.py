"""Skill-It: losses summed over the last evaluations, carried along a graph of skills (arXiv 2307.14430)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field
from scipy.special import softmax

from ddkmix.errors import ConfigError
from ddkmix.policies.update import LARGEST_STEP_SIZE
from ddkmix.types import DomainLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class SkillIt:
    """Skill-It's online sampling (Chen et al. 2023, arXiv 2307.14430, Algorithm 1).

        w_1[i]     = exp(eta sum_j A[i, j])                                     normalised
        w_{t+1}[i] = exp(eta sum_j A[i, j] sum_{s > t-3} l_s[j])                normalised

    A[i, j] says how much training on domain i helps domain j; the identity where nobody knows. Published are
    the student's losses themselves, `signal: student_loss`, so a domain that is merely unpredictable draws
    rows for ever; `loss_gap` is the excess over the teacher. eta was 0.2 to 0.8; the sum, not the mean, over
    the window is published. Where a run has fewer evaluations than the window, the sum is over those that
    there are, the one of the untrained student included, as in the authors' code. The code also turns entries
    of 1 off the diagonal into 0.5; we take the numbers as they are given.

    Losses (2, 1) before and (1, 1) after an interval, eta = ln 2, identity: sums (3, 2), so 2^3 : 2^2.

    >>> import numpy as np
    >>> from ddkmix import DomainLosses
    >>> from ddkmix.policies import SkillIt
    >>> policy = SkillIt(step_size=np.log(2.0))
    >>> before = DomainLosses.from_means({"code": 2.0, "prose": 1.0})
    >>> after = DomainLosses.from_means({"code": 1.0, "prose": 1.0})
    >>> state = policy.update(policy.init(before, natural_weights=np.array([0.2, 0.8])), after)
    >>> [round(share, 4) for share in state["mixture_weights"]]
    [0.6667, 0.3333]
    """

    step_size: Annotated[float, Field(gt=0, le=LARGEST_STEP_SIZE)] = 0.2
    """The factor eta of the summed losses in the exponent."""
    window: Annotated[int, Field(ge=1)] = 3
    """How many evaluations are summed over, of losses in nats per token."""
    skills: dict[str, dict[str, float]] | None = None
    """A by names, `{code: {math: 0.5}}`: a number is the weight of math's losses in the exponent of code.
    Entries that are not given are 1 on the diagonal and 0 off it; unset is the identity."""
    signal: Literal["student_loss", "loss_gap"] = "student_loss"
    """The losses themselves, as published, or their excess over the teacher."""

    def init(self, losses: DomainLosses, natural_weights: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The weights w_1.

        Args:
            losses: those of the untrained student, nats per token.
            natural_weights: not looked at.

        Raises:
            ConfigError: `skills` names domains that there are not.
        """
        weights = softmax(self.step_size * self._graph(losses.domains).sum(axis=1))
        return {"history": [self._signal(losses).tolist()], "mixture_weights": weights.tolist()}

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """The weights w_{t+1}.

        Args:
            state: what `init` or the last `update` gave.
            losses: those at the end of the last interval, nats per token.

        Raises:
            ConfigError: `skills` names domains that there are not.
        """
        history = [*state["history"], self._signal(losses).tolist()][-self.window :]
        exponent = self._graph(losses.domains) @ np.array(history).sum(axis=0)
        weights = softmax(self.step_size * exponent)
        return {"history": history, "mixture_weights": weights.tolist()}

    def _signal(self, losses: DomainLosses) -> Float[np.ndarray, " N"]:
        return losses.student_loss if self.signal == "student_loss" else losses.loss_gap

    def _graph(self, domains: tuple[str, ...]) -> Float[np.ndarray, "N N"]:
        graph = np.eye(len(domains))
        place = {name: i for i, name in enumerate(domains)}
        rows: Mapping[str, Mapping[str, float]] = self.skills or {}
        unknown = sorted({name for name, row in rows.items() for name in (name, *row)} - set(place))
        if unknown:
            raise ConfigError(
                f"policy.skills: unknown domains {unknown}; its rows and columns are among {sorted(domains)}."
            )
        for name, row in rows.items():
            for other, value in row.items():
                if not abs(value) <= LARGEST_STEP_SIZE:
                    raise ConfigError(
                        f"policy.skills.{name}.{other} = {value}; it must be a finite number of at most 1e6."
                    )
                graph[place[name], place[other]] = value
        return graph
