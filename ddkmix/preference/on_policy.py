"""Where the responses of a step come from: the data, the student now, or what it said before.

Pure functions of a JSON-able state, the step and one number in [0, 1) that the caller draws from its seed and
the step, so that a resumed run decides as the uninterrupted one. No torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ddkmix.errors import NumericsError

__all__ = ["AdaptiveOffPolicy", "OnPolicyShare", "Source"]

Source = Literal["generate", "replay", "dataset"]
"""`generate`: the student answers the step's prompts, and its answers enter the replay buffer. `replay`: rows
out of the buffer. `dataset`: the responses of the data."""

_Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class OnPolicyShare:
    """A fixed share of steps on the student's own samples: lambda of GKD (arXiv 2306.13649, Algorithm 1).

    No gradient flows through the sampling; the loss is `jsd` (or any other) on the tokens of the responses.
    lambda = 0 is distillation on fixed data, 1 is on-policy distillation.

    >>> from ddkmix.preference.on_policy import OnPolicyShare
    >>> [OnPolicyShare(share=0.5).decide(uniform) for uniform in (0.3, 0.7)]
    ['generate', 'dataset']
    """

    share: _Share = 0.5
    """lambda: share of the steps; TRL's default."""

    def decide(self, uniform: float) -> Source:
        """Where the responses of a step come from.

        Args:
            uniform: a number in [0, 1), drawn for this step: a share of 1 always generates.
        """
        return "generate" if uniform < self.share else "dataset"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveOffPolicy:
    """More student samples when the validation loss rises: DistiLLM's scheduler (arXiv 2402.03898).

        at each validation:  if L >= L_prev + eps:  phi = min(phi + 0.1, 1),  L_prev = L
        step s of S, u in [0, 1):  u < phi (1 - s/S), or u < phi while the buffer is not full -> generate
                                   u < phi -> replay;  otherwise -> dataset

    It starts on the data alone and lets the student's samples in when training on the data no longer fits
    held-out responses; late in the run most of them come from the replay buffer, which costs no generation.
    Constants are those of the code (its OpenLLaMA script: start 0.2, tolerance 0.2). L_prev moves only when
    phi does, so the loss is compared with that of the last rise; the first is measured before training.
    """

    start: _Share = 0.0
    """phi before the first rise, a share."""
    increment: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What phi, a share, grows by."""
    tolerance: Annotated[float, Field(ge=0)] = 0.1
    """eps: the rise of the validation loss that counts, nats per token."""
    capacity: Annotated[int, Field(ge=1)] = 1000
    """Rows in the replay buffer when it is full; the oldest leave first."""
    fresh: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """How the share phi is split as the run goes on: of it 1 - s/S is generated, or 1/2, or s/S."""

    def init(self, validation_loss: float) -> dict[str, Any]:
        """The state before the first step, JSON-able.

        Args:
            validation_loss: on held-out responses, nats per token.

        Raises:
            NumericsError: it is not finite.
        """
        return {"threshold": self.start, "last_loss": _finite(validation_loss)}

    def update(self, state: Mapping[str, Any], validation_loss: float) -> dict[str, Any]:
        """The state after a validation.

        Args:
            state: what `init` or `update` gave.
            validation_loss: on held-out responses, nats per token.

        Raises:
            NumericsError: it is not finite.
        """
        if _finite(validation_loss) < state["last_loss"] + self.tolerance:
            return dict(state)
        return {"threshold": min(state["threshold"] + self.increment, 1.0), "last_loss": validation_loss}

    def decide(
        self, state: Mapping[str, Any], *, step: int, steps: int, uniform: float, stored: int
    ) -> Source:
        """Where the responses of a step come from.

        Args:
            state: what `init` or `update` gave.
            step: optimizer steps done, from 0.
            steps: optimizer steps of the run.
            uniform: a number in [0, 1), drawn for this step: it is compared with shares.
            stored: rows in the replay buffer.
        """
        threshold, done = state["threshold"], step / steps
        part = {"decreasing": 1 - done, "constant": 0.5, "increasing": done}[self.fresh]
        if uniform >= threshold:
            return "dataset"
        return "generate" if uniform < threshold * part or stored < self.capacity else "replay"


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NumericsError(
            f"the validation loss is {loss}; the share of student samples cannot follow it. Lower "
            "optimizer.lr, or look at the held-out rows."
        )
    return loss
