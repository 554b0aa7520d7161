"""What shapes a stream of rows, and what it must agree with to go on: data, order, batch, caps.

Nothing here depends on who reads the rows: ranks, workers and prefetching are the loader's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, Literal, Protocol, TypeVar, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from ddkmix.errors import ConfigError, DataError
from ddkmix.mixture_state import StreamIdentity
from ddkmix.order import DomainOrder, locate
from ddkmix.planner import OnCap, PlanSettings, StepPlan, TokensOf

Count = Literal["rows", "tokens"]
"""What a mixture weight is a share of."""


@runtime_checkable
class Rows(Protocol):
    """The train rows of a domain, wherever they are: `index.DomainRows` or `own_rows.OwnRows`."""

    @property
    def domain(self) -> str:
        """Its name."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with the rows."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        ...

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard."""
        ...

    @property
    def kept_rows(self) -> Int[np.ndarray, " n"] | None:
        """Number in its shard of each of them, shard after shard; None where shards are served whole."""
        ...

    @property
    def max_epochs(self) -> float | None:
        """The domain's own limit."""
        ...

    @property
    def prior(self) -> float | None:
        """Its share in the natural mixture."""
        ...

    @property
    def seq_len(self) -> int | None:
        """Tokens of every row; None where rows differ."""
        ...

    def counted_tokens_at(self, shard: int, row: int) -> int:
        """What a row counts where weights are shares of tokens."""
        ...

    def name_of(self, shard: int, row: int) -> str:
        """The name of a row, the same under every mixture."""
        ...


R = TypeVar("R", bound=Rows)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stream(Generic[R]):
    """The rows of some domains, their order, and what the planner holds fixed."""

    rows: tuple[R, ...]
    """Sorted by domain, as everything else here."""
    orders: tuple[DomainOrder, ...]
    settings: PlanSettings
    identity: StreamIdentity
    count: Count

    @property
    def tokens_of(self) -> TokensOf | None:
        """The size of a row, where weights count tokens."""
        return self._row_tokens if self.count == "tokens" else None

    @property
    def natural_weights(self) -> Float[np.ndarray, " N"]:
        """Proportional to the cards' priors where all have one, else to the rows available."""
        priors = [domain.prior for domain in self.rows]
        sizes = priors if all(priors) else self.settings.num_rows
        vector = np.array(sizes, dtype=np.float64)
        natural: Float[np.ndarray, " N"] = vector / vector.sum()
        return natural

    def _row_tokens(self, domain: int, j: int) -> int:
        shard, row = locate(self.orders[domain], j)
        return self.rows[domain].counted_tokens_at(shard, row)

    def row_names(self, plan: StepPlan) -> list[str]:
        """The names of a plan's rows (`code/train-000003.tar#17`), all ranks, in slot order."""
        pairs = zip(plan.domain_ids.tolist(), plan.row_numbers.tolist(), strict=True)
        return [self.rows[domain].name_of(*locate(self.orders[domain], j)) for domain, j in pairs]


def describe_stream(
    rows: Sequence[R],
    *,
    batch_rows: int,
    seed: int = 0,
    block_rows: int = 8192,
    count: Count = "rows",
    max_epochs: float | None = None,
    on_cap: OnCap = "renormalize",
) -> Stream[R]:
    """The stream of some rows; the arguments are those of `loader.DomainMixture`.

    Raises:
        ConfigError: an argument is wrong.
        DataError: the domains have no rows or rows of different length.
    """
    _check_settings(batch_rows, block_rows, count, max_epochs, on_cap)
    _check_rows(rows)
    rows = sorted(rows, key=lambda domain: domain.domain)
    caps = tuple(_cap(domain, max_epochs) for domain in rows)
    return Stream(
        rows=tuple(rows),
        orders=tuple(
            DomainOrder(
                domain=domain.domain,
                shard_rows=domain.shard_rows,
                seed=seed,
                block_rows=block_rows,
                kept_rows=domain.kept_rows,
            )
            for domain in rows
        ),
        settings=PlanSettings(
            domains=tuple(domain.domain for domain in rows),
            batch_rows=batch_rows,
            num_rows=tuple(domain.num_rows for domain in rows),
            cap_rows=caps,
            on_cap=on_cap,
        ),
        identity=StreamIdentity(
            data={domain.domain: domain.fingerprint for domain in rows},
            settings={
                "batch_rows": batch_rows,
                "seed": seed,
                "block_rows": block_rows,
                "count": count,
                "on_cap": on_cap,
                "cap_rows": {
                    domain.domain: cap for domain, cap in zip(rows, caps, strict=True) if cap is not None
                },
            },
        ),
        count=count,
    )


def _check_settings(
    batch_rows: int, block_rows: int, count: str, max_epochs: float | None, on_cap: str
) -> None:
    if batch_rows < 1 or block_rows < 1 or count not in get_args(Count):
        raise ConfigError(
            f"batch_rows = {batch_rows}, block_rows = {block_rows}, count = {count!r}; the first two must be "
            "at least 1, the last 'rows' or 'tokens'."
        )
    if on_cap not in get_args(OnCap) or (max_epochs is not None and not 0 < max_epochs < inf):
        raise ConfigError(
            f"on_cap = {on_cap!r}, max_epochs = {max_epochs}; the first must be one of "
            f"{', '.join(map(repr, get_args(OnCap)))}, the other > 0 or None."
        )


def _check_rows(rows: Sequence[Rows]) -> None:
    names = [domain.domain for domain in rows]
    if len(set(names)) < len(names):
        raise DataError(f"domains {sorted(names)} are not distinct; a row belongs to one domain.")
    empty = [domain.domain for domain in rows if not domain.num_rows]
    if empty:
        raise DataError(f"domains {empty} have no rows; add documents or leave them out.")
    lengths = {domain.domain: domain.seq_len for domain in rows}
    if len(set(lengths.values())) != 1:
        raise DataError(f"domains must have rows of one length; seq_len by domain: {lengths}.")


def _cap(rows: Rows, max_epochs: float | None) -> int | None:
    limits = [limit for limit in (rows.max_epochs, max_epochs) if limit is not None]
    return int(min(limits) * rows.num_rows) if limits else None


def check_ranks(batch_rows: int, rank: int, world_size: int) -> None:
    """Raises ConfigError if a batch cannot be dealt to so many ranks."""
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank = {rank} of {world_size} processes; ranks count from 0.")
    if batch_rows < 1 or batch_rows % world_size:
        raise ConfigError(
            f"batch_rows = {batch_rows} rows cannot be dealt evenly to {world_size} processes; use a "
            f"positive multiple of {world_size}."
        )


def check_steps(steps: int | None, microbatches: int) -> None:
    """Raises ConfigError if a run cannot have so many steps of so many micro-batches."""
    if microbatches < 1 or (steps is not None and steps < 1):
        raise ConfigError(f"steps = {steps}, microbatches = {microbatches}; both must be at least 1.")
