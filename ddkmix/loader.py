"""The mixture as an object that any loop can iterate: one batch per optimizer step.

    planner (main process) -> tasks -> stock DataLoader workers: (domain, j) -> row -> batch

Workers are pure functions and hold no state. `set_weights` takes the planner back to the last batch that
the loop received; batches of the old weights that workers have already read are dropped and their rows
planned again, so a change is whole at the next step at any worker count and prefetch depth.
"""

from collections.abc import Iterator, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ddkmix.apportion import ROW
from ddkmix.config import Storage
from ddkmix.domains import load_domains
from ddkmix.errors import ConfigError, RowError
from ddkmix.fingerprint import hash_json
from ddkmix.index import DomainRows
from ddkmix.mixture_state import from_json, to_json
from ddkmix.pack import pack_domains
from ddkmix.plan_queue import PlanQueue
from ddkmix.planner import (
    OnCap,
    PlannerState,
    PlanSettings,
    StepPlan,
    deal,
    initial_state,
    quantise,
    with_weights,
)
from ddkmix.prefetching import ShardPrefetch
from ddkmix.reading import ReadAhead, position_ids, tensors_of
from ddkmix.row_layout import Strategy
from ddkmix.row_tasks import RowBatch, Substitution, Task
from ddkmix.rows import byte_reader
from ddkmix.stream import Count, check_ranks, describe_stream
from ddkmix.tokenizer import read_tokenizer
from ddkmix.types import simplex_vector

_LOG = getLogger("ddkmix")


class DomainMixture:
    """An endless stream of batches whose domains follow mixture weights that may change at any step.

    Iterating gives dicts of tensors: `input_ids` (b, T) int64, `labels` (b, T) int64 (equal to input_ids,
    -100 where there is only padding; not shifted, as transformers expects) and `domain_ids` (b,) int64
    into `domains`, with b = batch_rows / world_size. The stream ends when no domain may serve another row.
    Nothing is read before the first batch is asked for.

    Args:
        rows: packed train rows of each domain, all of one `seq_len`.
        batch_rows: rows in the global batch of one optimizer step.
        weights: mixture weights by domain, normalised here; proportional to rows when None.
        seed: of the order of the rows.
        rank: this process, from 0.
        world_size: processes; must divide batch_rows.
        num_workers: reader processes of this rank.
        prefetch_steps: batches that each of them reads ahead.
        max_epochs: passes allowed over any domain; a card's own limit wins where it is smaller.
        on_cap: "renormalize", "stop" or "error" at that limit.
        count: what a weight is a share of: rows, or tokens without padding.
        block_rows: see `order`.
        max_substitutes: damaged rows that other rows of their domain may stand in for.
        storage: how remote shards are read; the defaults of a config when None.
        document_boundaries: batches hold `position_ids` (b, T) that restart at every document, from which
            models of transformers keep documents apart (`segments`).

    Raises:
        ConfigError: batch_rows does not divide by world_size, or another argument is wrong.
        DataError: the domains have no rows or rows of different length.
    """

    def __init__(
        self,
        rows: Mapping[str, DomainRows],
        *,
        batch_rows: int,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch_steps: int = 2,
        max_epochs: float | None = None,
        on_cap: OnCap = "renormalize",
        count: Count = "rows",
        block_rows: int = 8192,
        max_substitutes: int = 100,
        storage: Storage | None = None,
        document_boundaries: bool = False,
    ) -> None:
        check_ranks(batch_rows, rank, world_size)
        self._rank, self._world_size = rank, world_size
        self.stream = describe_stream(
            list(rows.values()),
            batch_rows=batch_rows,
            seed=seed,
            block_rows=block_rows,
            count=count,
            max_epochs=max_epochs,
            on_cap=on_cap,
        )
        """Rows, order and settings."""
        self.domains = self.stream.settings.domains
        vector = self.natural_weights
        if weights is not None:
            vector = simplex_vector(weights, self.domains, where="mixture weights")
        self._plans = PlanQueue(self.settings, initial_state(self.settings, vector), self.stream.tokens_of)
        remote = byte_reader(storage)
        self._prefetch = ShardPrefetch(self.stream, remote)
        self._reader = ReadAhead(
            self.stream,
            self._tasks,
            remote,
            batch_rows=batch_rows // world_size,
            num_workers=num_workers,
            prefetch_steps=prefetch_steps,
        )
        self.last_plan: StepPlan | None = None
        """The plan of the last batch, of all ranks."""
        self.substitutions: list[Substitution] = []
        """Damaged rows of this rank for which others stood in, in the order of the stream."""
        self._max_substitutes, self._document_boundaries = max_substitutes, document_boundaries

    @classmethod
    def from_cards(
        cls,
        cards: Sequence[str] | str,
        *,
        tokenizer: str,
        seq_len: int,
        batch_rows: int,
        cache_dir: Path | str = ".cache/ddkmix",
        separator: str | None = None,
        strategy: Strategy = "concatenate",
        processes: int = 1,
        **options: Any,
    ) -> "DomainMixture":
        """The mixture of some domain cards; packs what the cache lacks.

        Args:
            cards: card files, globs or folders.
            tokenizer: local folder or Hub id.
            seq_len, separator, strategy, processes: as in the section `pack` of a config.
            batch_rows: rows in the global batch.
            cache_dir: where packed rows are kept.
            options: other arguments of the constructor.
        """
        packed = pack_domains(
            load_domains([cards] if isinstance(cards, str) else cards, options.get("storage")),
            read_tokenizer(tokenizer, separator=separator),
            seq_len=seq_len,
            cache_dir=Path(cache_dir),
            strategy=strategy,
            processes=processes,
            storage=options.get("storage") or Storage(),
        )
        rows = {name: domain.train for name, domain in packed.items()}
        return cls(rows, batch_rows=batch_rows, **options)

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
        return {name: weight / ROW for name, weight in zip(self.domains, self._plans.weights, strict=True)}

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
            weights: one number per domain, normalised here; or the integers of `planner.quantise`, which
                ranks exchange because they are exact.

        Raises:
            ConfigError: they are not a distribution over the domains.
        """
        if isinstance(weights, Mapping):
            exact = quantise(simplex_vector(weights, self.domains, where="mixture weights"))
        else:
            exact = tuple(weights)
            if len(exact) != len(self.domains) or sum(exact) != ROW or min(exact) < 0:
                raise ConfigError(
                    f"mixture weights {exact} must be {len(self.domains)} integers >= 0 summing to {ROW}."
                )
        self._rewind(with_weights(self.state, exact))

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """JSON-able state from which the stream goes on exactly.

        Args:
            step: the state after this many steps, for loops that read ahead; the last batch's when None.

        Raises:
            ConfigError: that step is not among the last 64.
        """
        return to_json(self.stream.identity, self._plans.state_at(step))

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
        return changes

    def row_names(self, plan: StepPlan) -> list[str]:
        """The names of a plan's rows (`code/train-000003.tar#17`), all ranks, in slot order."""
        return self.stream.row_names(plan)

    def close(self) -> None:
        """Stop the workers and close the files; iterating again starts them anew."""
        self._reader.close()
        self._prefetch.close()
        self._plans.rewind(self.state)

    def __iter__(self) -> "DomainMixture":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self._receive()
        if batch is None:  # nothing is left, or the plan ran dry under weights that have since changed
            if self._plans.is_exhausted():
                raise StopIteration
            batch = self._receive()
            assert batch is not None  # the step that was just planned
        self._accept(batch.substitutions)
        self.last_plan = self._plans.consume()
        tensors = tensors_of(batch, self.last_plan.domain_ids[self._slots(self.last_plan)])
        if self._document_boundaries:
            tensors["position_ids"] = position_ids(batch, self.stream.rows[0].padding_id)
        return tensors

    def _accept(self, substitutions: Sequence[Substitution]) -> None:
        """Let other rows stand in for damaged ones, up to the limit."""
        count = len(self.substitutions) + len(substitutions)
        if substitutions and count > self._max_substitutes:
            self.close()
            last, most = substitutions[-1], self._max_substitutes
            raise RowError(f"{last.reason} It is damaged row {count}; max_substitutes allows {most}.")
        for record in substitutions:
            _LOG.warning("%s %s stands in for it.", record.reason, record.substitute)
        self.substitutions += substitutions

    def _receive(self) -> RowBatch | None:
        batch = None
        try:
            batch = self._reader.receive()
        finally:
            if batch is None:  # reading has stopped, whatever the reason: go on from the last batch
                self.close()
        return batch

    def _rewind(self, state: PlannerState) -> None:
        """Go on from `state`; what workers have read ahead of it becomes stale."""
        self._reader.invalidate()
        self._plans.rewind(state)

    def _tasks(self) -> Iterator[Task]:
        """Plan one step whenever the DataLoader has room for another task."""
        while plan := self._plans.plan():
            self._prefetch.follow(self._plans.ahead.served, self._plans.ahead.weights)
            slots = self._slots(plan)
            yield Task(self._reader.version, plan.domain_ids[slots], plan.row_numbers[slots])

    def _slots(self, plan: StepPlan) -> Int[np.ndarray, " b"]:
        """The places of this rank's rows in the global batch."""
        return deal(plan, self._rank, self._world_size)
