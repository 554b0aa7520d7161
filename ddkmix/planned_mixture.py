"""A mixture without its readers: weights that change, what has been served, and a state to go on from.

`loader.DomainMixture` reads the rows that it plans; `batch_sampler.MixtureBatchSampler` names them to others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Generic

import numpy as np
from jaxtyping import Float, Int

from ddkmix.apportion import ROW
from ddkmix.errors import ConfigError
from ddkmix.fingerprint import hash_json
from ddkmix.mixture_state import from_json, to_json
from ddkmix.plan_queue import PlanQueue
from ddkmix.planner import PlannerState, PlanSettings, StepPlan, deal, initial_state, quantise, with_weights
from ddkmix.ranks import current_rank
from ddkmix.stream import R, Stream, check_ranks
from ddkmix.types import simplex_vector


class PlannedMixture(Generic[R]):
    """What is common to everything that serves rows by mixture weights.

    Args:
        stream: rows, order and settings.
        weights: mixture weights by domain, normalised here; natural ones when None.
        rank: this process, from 0; when None, that of torch.distributed or of the environment.
        world_size: processes that batches are dealt to. None with `rank`.

    Raises:
        ConfigError: weights or ranks are wrong.
    """

    def __init__(
        self,
        stream: Stream[R],
        weights: Mapping[str, float] | None,
        rank: int | None,
        world_size: int | None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ConfigError(f"rank = {rank}, world_size = {world_size}; give both or neither.")
        self._ranks = None if rank is None or world_size is None else (rank, world_size)
        self.stream: Stream[R] = stream
        """Rows, order and settings."""
        self.domains: tuple[str, ...] = stream.settings.domains
        """Names of the domains, sorted; `domain_ids` are places in it."""
        check_ranks(self.settings.batch_rows, *(self._ranks or current_rank()))
        vector = self.natural_weights
        if weights is not None:
            vector = simplex_vector(weights, self.domains, where="mixture weights")
        self._plans = PlanQueue(self.settings, initial_state(self.settings, vector), stream.tokens_of)
        self.last_plan: StepPlan | None = None
        """The plan of the last batch, of all ranks; None before the first and after a state was loaded."""
        self.loads: int = 0
        """States loaded so far: whoever holds a part of a step from before must let go of it."""

    @property
    def natural_weights(self) -> Float[np.ndarray, " N"]:
        """Proportional to the cards' priors where all have one, else to the rows available."""
        return self.stream.natural_weights

    @property
    def settings(self) -> PlanSettings:
        """What the planner holds fixed."""
        return self.stream.settings

    @property
    def state(self) -> PlannerState:
        """The planner's state after the last batch that the loop received."""
        return self._plans.consumed

    @property
    def weights(self) -> dict[str, float]:
        """The mixture weights in force at the next step, by domain (without domains at their cap)."""
        weights = self._plans.weights_after(self.state)
        return {name: weight / ROW for name, weight in zip(self.domains, weights, strict=True)}

    @property
    def served(self) -> dict[str, int]:
        """Rows served so far over all ranks, by domain."""
        return dict(zip(self.domains, self.state.served, strict=True))

    @property
    def epochs(self) -> dict[str, float]:
        """Passes made over each domain so far."""
        return {
            name: served / rows
            for (name, served), rows in zip(self.served.items(), self.settings.num_rows, strict=True)
        }

    @property
    def fingerprint(self) -> str:
        """Changes with the data and with every setting that shapes the order of the stream."""
        return hash_json([self.stream.identity.data, self.stream.identity.settings])

    def set_weights(self, weights: Mapping[str, float] | Sequence[int]) -> None:
        """Change the mixture weights; the next batch follows them.

        Args:
            weights: one number per domain, normalised here; or the integers of `ddkmix.planner.quantise`,
                which ranks exchange because they are exact.

        Raises:
            ConfigError: they are not a distribution over the domains.
        """
        if isinstance(weights, Mapping):
            exact = quantise(simplex_vector(weights, self.domains, where="mixture weights"))
        else:
            exact = tuple(weights)
            if len(exact) != len(self.domains) or sum(exact) != ROW or min(exact) < 0:
                raise ConfigError(
                    f"mixture weights {exact} must be a dict {{domain: weight}}, or {len(self.domains)} "
                    f"integers >= 0 summing to {ROW}."
                )
        self._rewind(with_weights(self.state, exact))

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """JSON-able state from which the stream goes on exactly.

        Args:
            step: the state after this many steps, for loops that read ahead; the last batch's when None.

        Raises:
            ConfigError: that step is not among the last 64.
        """
        return to_json(self.stream.identity, self.state if step is None else self._plans.state_at(step))

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Go on from a saved state.

        Args:
            state: what `state_dict` gave.
            allow_changes: go on although domains, their data or settings have changed: a domain that is
                the same keeps its place, a new one starts at its first row with its natural weight.

        Returns:
            What has changed, one phrase each; empty when the stream goes on exactly.

        Raises:
            DataError: something has changed and `allow_changes` is not set.
        """
        natural = quantise(self.natural_weights)
        planner, changes = from_json(state, self.stream.identity, natural, allow_changes=allow_changes)
        self._plans.forget()
        self._rewind(planner)
        self.last_plan, self.loads = None, self.loads + 1
        return changes

    def row_names(self, plan: StepPlan) -> list[str]:
        """The names of a plan's rows (`code/train-000003.tar#17`), all ranks, in slot order.

        Args:
            plan: of any step of this mixture, for example `last_plan`.
        """
        return self.stream.row_names(plan)

    @property
    def ranks(self) -> tuple[int, int]:
        """(rank, world size) that batches are dealt to.

        Raises:
            ConfigError: a batch cannot be dealt to so many ranks.
        """
        if self._ranks is None:
            self._ranks = current_rank()
            check_ranks(self.settings.batch_rows, *self._ranks)
        return self._ranks

    def check_parts(self, parts: int) -> None:
        """Refuse micro-batches of different size, which would have different weight in most loops.

        Args:
            parts: micro-batches that this rank's rows of a step are dealt into.

        Raises:
            ConfigError: they would not be equal.
        """
        batch_rows, world_size = self.settings.batch_rows, (self._ranks or current_rank())[1]
        if batch_rows // world_size % parts:
            raise ConfigError(
                f"{batch_rows} rows a step are {batch_rows // world_size} for each of {world_size} processes "
                f"and cannot be dealt into {parts} equal micro-batches; make batch_rows a multiple of "
                f"{world_size * parts}."
            )

    def _rewind(self, state: PlannerState) -> None:
        """Go on from `state`; what workers have read ahead of it becomes stale."""
        self._invalidate()
        self._plans.rewind(state)

    def _invalidate(self) -> None:
        """What was planned ahead no longer counts."""

    def _slots(self, plan: StepPlan) -> Int[np.ndarray, " b"]:
        """The places of this rank's rows in the global batch."""
        return deal(plan, *self.ranks)
