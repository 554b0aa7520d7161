"""The mixture as an object that any loop can iterate: one batch per optimizer step.

    planner (main process) -> tasks -> stock DataLoader workers: (domain, j) -> row -> batch

Workers are pure functions and hold no state. `set_weights` takes the planner back to the last batch that
the loop received; batches of the old weights that workers have already read are dropped and their rows
planned again, so a change is whole at the next step at any worker count and prefetch depth.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ddkmix.apportion import ROW
from ddkmix.domains import load_domains
from ddkmix.errors import ConfigError, DataError, MixtureExhausted
from ddkmix.fingerprint import hash_json
from ddkmix.index import DomainRows
from ddkmix.order import DomainOrder, locate
from ddkmix.pack import pack_domains
from ddkmix.planner import (
    OnCap,
    PlannerState,
    PlanSettings,
    StepPlan,
    deal,
    effective_weights,
    initial_state,
    plan_step,
    quantise,
    with_weights,
)
from ddkmix.reading import ReadAhead, Task
from ddkmix.tokenizer import read_tokenizer
from ddkmix.types import simplex_vector

_KEPT_STATES = 64
"""Loops that read ahead ask for the state of a recent step; more is never read ahead."""
STATE_FORMAT = 1


class DomainMixture:
    """An endless stream of batches whose domains follow mixture weights that may change at any step.

    Iterating gives dicts of tensors: `input_ids` (b, T) int64, `labels` (b, T) int64 (equal to input_ids,
    -100 where there is only padding; not shifted, as transformers expects) and `domain_ids` (b,) int64
    into `domains`, with b = batch_rows / world_size. The stream ends when no domain may serve another row.
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
        block_rows: int = 8192,
    ) -> None:
        """Set up the stream; nothing is read before it is iterated.

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
            block_rows: see `order`.

        Raises:
            ConfigError: batch_rows does not divide by world_size, or another argument is wrong.
            DataError: the domains have no rows or rows of different length.
        """
        _check_arguments(rows, batch_rows, rank, world_size, num_workers, prefetch_steps)
        self.domains = tuple(sorted(rows))
        self._rows = [rows[name] for name in self.domains]
        self._rank, self._world_size = rank, world_size
        self._orders = [_order(domain, seed, block_rows) for domain in self._rows]
        self._settings = PlanSettings(
            domains=self.domains,
            batch_rows=batch_rows,
            num_rows=tuple(domain.num_rows for domain in self._rows),
            cap_rows=tuple(_cap(domain, max_epochs) for domain in self._rows),
            on_cap=on_cap,
        )
        vector = self.natural_weights
        if weights is not None:
            vector = simplex_vector(weights, self.domains, where="mixture weights")
        self._consumed = initial_state(self._settings, vector)
        self._ahead = self._consumed
        self._recent: OrderedDict[int, PlannerState] = OrderedDict({0: self._consumed})
        self._pending: deque[tuple[StepPlan, PlannerState]] = deque()
        """What was planned and not yet received, oldest first."""
        self._reader = ReadAhead(
            self._rows, self._orders, self._tasks, num_workers=num_workers, prefetch_steps=prefetch_steps
        )
        self.last_plan: StepPlan | None = None
        """The plan of the last batch, of all ranks."""

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
        processes: int = 1,
        **options: Any,
    ) -> "DomainMixture":
        """The mixture of some domain cards; packs what the cache lacks.

        Args:
            cards: card files, globs or folders.
            tokenizer: local folder or Hub id.
            seq_len: tokens in a row.
            batch_rows: rows in the global batch.
            cache_dir: where packed rows are kept.
            separator: token between documents; the tokenizer's end-of-sequence token when None.
            processes: packing processes.
            options: any other argument of the constructor.
        """
        packed = pack_domains(
            load_domains([cards] if isinstance(cards, str) else cards),
            read_tokenizer(tokenizer, separator=separator),
            seq_len=seq_len,
            cache_dir=Path(cache_dir),
            processes=processes,
        )
        rows = {name: domain.train for name, domain in packed.items()}
        return cls(rows, batch_rows=batch_rows, **options)

    @property
    def natural_weights(self) -> Float[np.ndarray, " N"]:
        """Proportional to the cards' priors where all have one, else to the rows available."""
        priors = [domain.prior for domain in self._rows]
        sizes = priors if all(priors) else self._settings.num_rows
        vector = np.array(sizes, dtype=np.float64)
        natural: Float[np.ndarray, " N"] = vector / vector.sum()
        return natural

    @property
    def settings(self) -> PlanSettings:
        """What the planner holds fixed."""
        return self._settings

    @property
    def state(self) -> PlannerState:
        """The planner's state after the last batch that the loop received."""
        return self._consumed

    @property
    def weights(self) -> dict[str, float]:
        """The mixture weights in force at the next step, by domain (without domains at their cap)."""
        try:
            weights = effective_weights(self._settings, self._consumed)
        except MixtureExhausted:
            weights = (0,) * len(self.domains)
        return {name: weight / ROW for name, weight in zip(self.domains, weights, strict=True)}

    @property
    def served(self) -> dict[str, int]:
        """Rows served so far over all ranks, by domain."""
        return dict(zip(self.domains, self._consumed.served, strict=True))

    @property
    def epochs(self) -> dict[str, float]:
        """Passes made over each domain so far."""
        return {
            name: served / rows
            for (name, served), rows in zip(self.served.items(), self._settings.num_rows, strict=True)
        }

    @property
    def fingerprint(self) -> str:
        """Changes with the data and with every setting that shapes the order of the stream."""
        return hash_json(
            {
                "domains": [domain.fingerprint for domain in self._rows],
                "batch_rows": self._settings.batch_rows,
                "cap_rows": self._settings.cap_rows,
                "on_cap": self._settings.on_cap,
                "orders": [[o.domain, o.seed, o.block_rows] for o in self._orders],
            }
        )

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
        self._rewind(with_weights(self._consumed, exact))

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """JSON-able state from which the stream goes on exactly.

        Args:
            step: the state after this many steps, for loops that read ahead; the last batch's when None.

        Raises:
            ConfigError: that step is not among the last 64.
        """
        state = self._consumed if step is None else self._recent.get(step)
        if state is None:
            raise ConfigError(f"state_dict(step={step}): known steps are {list(self._recent)}.")
        return {
            "format": STATE_FORMAT,
            "domains": list(self.domains),
            "fingerprint": self.fingerprint,
            "planner": state.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            DataError: the state belongs to other data, another batch size or another seed.
        """
        if state.get("format") != STATE_FORMAT or state.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"the saved mixture state is of domains {state.get('domains')} with fingerprint "
                f"{str(state.get('fingerprint'))[:12]}, this mixture is of {list(self.domains)} with "
                f"{self.fingerprint[:12]}: data, batch_rows, seed, max_epochs, on_cap or block_rows differ. "
                "Restore them to go on exactly."
            )
        planner = PlannerState.from_json(dict(state["planner"]))
        self._recent.clear()
        self._rewind(planner)

    def row_names(self, plan: StepPlan) -> list[str]:
        """The names of a plan's rows (`code/train-000003.tar#17`), all ranks, in slot order."""
        return [
            self._rows[domain].name_of(*locate(self._orders[domain], j))
            for domain, j in zip(plan.domain_ids.tolist(), plan.row_numbers.tolist(), strict=True)
        ]

    def close(self) -> None:
        """Stop the workers and close the files; iterating again starts them anew."""
        self._reader.close()
        self._ahead = self._consumed
        self._pending.clear()

    def __iter__(self) -> "DomainMixture":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self._receive()
        if batch is None:
            # either nothing is left, or the plan ran dry under weights that have since changed
            if self._is_exhausted():
                raise StopIteration
            batch = self._receive()
            assert batch is not None  # the step that was just planned
        self.last_plan, self._consumed = self._pending.popleft()
        self._recent[self._consumed.step] = self._consumed
        while len(self._recent) > _KEPT_STATES:
            self._recent.popitem(last=False)
        return batch

    def _receive(self) -> dict[str, Any] | None:
        batch = None
        try:
            batch = self._reader.receive()
        finally:
            if batch is None:  # reading has stopped, whatever the reason: go on from the last batch
                self.close()
        return batch

    def _is_exhausted(self) -> bool:
        """Whether no step can be planned; raises DataError where `on_cap` is "error"."""
        try:
            plan_step(self._settings, self._consumed)
        except MixtureExhausted:
            return True
        return False

    def _rewind(self, state: PlannerState) -> None:
        """Go on from `state`; what workers have read ahead of it becomes stale."""
        self._reader.invalidate()
        self._consumed = self._ahead = state
        self._recent[state.step] = state
        self._pending.clear()

    def _tasks(self) -> Iterator[Task]:
        """Plan one step whenever the DataLoader has room for another task."""
        while True:
            try:
                plan, self._ahead = plan_step(self._settings, self._ahead)
            except DataError:
                return  # when the loop gets there, `_is_exhausted` plans this step again and says so
            self._pending.append((plan, self._ahead))
            slots = deal(plan, self._rank, self._world_size)
            rows = zip(plan.domain_ids[slots].tolist(), plan.row_numbers[slots].tolist(), strict=True)
            yield Task(self._reader.version, tuple(rows))


def _check_arguments(
    rows: Mapping[str, DomainRows],
    batch_rows: int,
    rank: int,
    world_size: int,
    num_workers: int,
    prefetch_steps: int,
) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank = {rank} of {world_size} processes; ranks count from 0.")
    if num_workers < 0 or prefetch_steps < 1:
        raise ConfigError(
            f"num_workers = {num_workers}, prefetch_steps = {prefetch_steps}; workers must be >= 0 and "
            "each must read at least 1 step ahead."
        )
    if batch_rows < 1 or batch_rows % world_size:
        raise ConfigError(
            f"batch_rows = {batch_rows} rows cannot be dealt evenly to {world_size} processes; use a "
            f"positive multiple of {world_size}."
        )
    lengths = {name: domain.seq_len for name, domain in rows.items()}
    if not rows or len(set(lengths.values())) != 1:
        raise DataError(f"domains must have rows of one length; seq_len by domain: {lengths}.")


def _order(rows: DomainRows, seed: int, block_rows: int) -> DomainOrder:
    sizes = tuple(shard.num_rows for shard in rows.shards)
    return DomainOrder(domain=rows.domain, shard_rows=sizes, seed=seed, block_rows=block_rows)


def _cap(rows: DomainRows, max_epochs: float | None) -> int | None:
    limits = [limit for limit in (rows.max_epochs, max_epochs) if limit is not None]
    return int(min(limits) * rows.num_rows) if limits else None
