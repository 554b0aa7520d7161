"""The mixture as an object that any loop can iterate: one batch per optimizer step.

    planner (main process) -> tasks -> stock DataLoader workers: (domain, j) -> row -> batch

Workers are pure functions and hold no state. `set_weights` takes the planner back to the last batch that
the loop received; batches of the old weights that workers have already read are dropped and their rows
planned again, so a change is whole at the next step at any worker count and prefetch depth.
"""

from collections.abc import Iterator, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jaxtyping import Int

from ddkmix.config import Storage
from ddkmix.errors import ConfigError, RowError
from ddkmix.fingerprint import hash_json
from ddkmix.index import DomainRows
from ddkmix.item_tasks import Collate
from ddkmix.own_rows import MapDataset, Numbers, OwnRows, own_rows
from ddkmix.pack.cards import pack_cards
from ddkmix.planned_mixture import PlannedMixture
from ddkmix.planner import OnCap
from ddkmix.reading import Batch, ReadAhead
from ddkmix.row_layout import Strategy
from ddkmix.row_tasks import Substitution, Task, places_of
from ddkmix.sources import MixtureOptions, RowSource, open_source, with_arrays
from ddkmix.step_loader import StepLoader
from ddkmix.stream import Count, Stream, describe_stream

_LOG = getLogger("ddkmix")


class DomainMixture(PlannedMixture[Any]):
    """An endless stream of batches whose domains follow mixture weights that may change at any step.

    Iterating gives dicts of tensors: `input_ids` (b, T) int64, `labels` (b, T) int64 (equal to input_ids,
    -100 on prompts and padding; not shifted, as transformers expects) and `domain_ids` (b,) int64 into
    `domains`, with b = batch_rows / world_size. The stream ends when no domain may serve another row. Nothing
    is read before the first batch is asked for (but a few items of own datasets, to know them again).

    Axis letters: b rows of this rank, T tokens in a row, N domains.

    Args:
        rows: packed train rows of each domain, all of one `seq_len`.
        batch_rows: rows in the global batch of one optimizer step.
        weights: mixture weights by domain, normalised here; proportional to rows when None.
        seed: of the order of the rows.
        rank: this process, from 0; when None, that of torch.distributed when the first batch is asked for,
            else RANK. Under tensor or pipeline parallelism give the data-parallel rank.
        world_size: processes that batches are dealt to; must divide batch_rows. None with `rank`.
        num_workers: reader processes of this rank.
        prefetch_steps: batches that each of them reads ahead.
        max_epochs: passes allowed over any domain; a card's own limit wins where it is smaller.
        on_cap: "renormalize", "stop" or "error" at that limit.
        count: what a weight is a share of: rows, or tokens without padding (and without prompts).
        block_rows: rows are permuted inside blocks of this many.
        max_substitutes: damaged rows that other rows of their domain may stand in for.
        storage: how remote shards are read; the defaults of a config when None.
        document_boundaries: batches hold `position_ids` (b, T) that restart at every document, from which
            models of transformers keep documents apart.
        collate_fn: makes a batch of a list of items, of your own datasets only.

    Raises:
        ConfigError: batch_rows does not divide by world_size, or another argument is wrong.
        DataError: the domains have no rows or rows of different length.
    """

    def __init__(
        self,
        rows: Mapping[str, DomainRows] | Mapping[str, OwnRows],
        *,
        batch_rows: int,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        num_workers: int = 0,
        prefetch_steps: int = 2,
        max_epochs: float | None = None,
        on_cap: OnCap = "renormalize",
        count: Count = "rows",
        block_rows: int = 8192,
        max_substitutes: int = 100,
        storage: Storage | None = None,
        document_boundaries: bool = False,
        collate_fn: Collate | None = None,
    ) -> None:
        stream: Stream[Any] = describe_stream(
            list(rows.values()),
            batch_rows=batch_rows,
            seed=seed,
            block_rows=block_rows,
            count=count,
            max_epochs=max_epochs,
            on_cap=on_cap,
        )
        super().__init__(stream, weights, rank, world_size)
        self._source: RowSource = open_source(
            stream, storage, collate_fn=collate_fn, document_boundaries=document_boundaries
        )
        self._reader = ReadAhead(
            self._source,
            self._tasks,
            num_rows=lambda: batch_rows // self.ranks[1],
            num_workers=num_workers,
            prefetch_steps=prefetch_steps,
            seed=lambda: int(hash_json([seed, self.ranks[0], self.state.step])[:12], 16),
        )
        self.substitutions: list[Substitution] = []
        """Damaged rows of this rank for which others stood in, in the order of the stream."""
        self._max_substitutes, self._parts = max_substitutes, 1
        self._stood_in: tuple[Substitution, ...] = ()

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
        **options: Unpack[MixtureOptions],
    ) -> "DomainMixture":
        """The mixture of some domain cards; packs what the cache lacks.

        Args:
            cards: card files, globs or folders.
            tokenizer: local folder or Hub id.
            seq_len, separator, strategy, processes: as in `ddkmix.config.Pack`: tokens in a row, and so on.
            batch_rows: rows in the global batch of one optimizer step.
            cache_dir: where packed rows are kept.
            options: other arguments of the constructor.

        Raises:
            ConfigError: an argument is wrong.
            DataError: a card or its shards are wrong.
        """
        packed = pack_cards(
            cards,
            tokenizer=tokenizer,
            seq_len=seq_len,
            cache_dir=cache_dir,
            separator=separator,
            strategy=strategy,
            processes=processes,
            storage=options.get("storage"),
        )
        rows = {name: domain.train for name, domain in packed.items()}
        return cls(rows, batch_rows=batch_rows, **options)

    @classmethod
    def from_datasets(
        cls,
        datasets: Mapping[str, MapDataset],
        *,
        batch_rows: int,
        num_tokens: Mapping[str, Numbers] | None = None,
        **options: Unpack[MixtureOptions],
    ) -> "DomainMixture":
        """The mixture of datasets that you already have; nothing is packed.

        Batches are what `collate_fn` makes of the items of a micro-batch; None is torch's `default_collate`,
        which wants tensors of one shape: `.with_format("torch")` of a `datasets.Dataset`, or a function that
        pads.
        A saved state is of the same data when lengths, `num_tokens` and a few items are the same; of a
        dataset that draws its items at random, when lengths are. What items draw in workers is seeded anew
        with every start of the workers, from seed, rank and step.

        >>> from ddkmix import DomainMixture
        >>> mixture = DomainMixture.from_datasets(
        ...     {"code": ["a", "b", "c"], "prose": ["x", "y", "z"]},
        ...     batch_rows=4,
        ...     weights={"code": 0.75, "prose": 0.25},
        ...     collate_fn=list,
        ... )
        >>> batch = next(mixture)
        >>> [len({"a", "b", "c"} & set(batch)), len({"x", "y", "z"} & set(batch))]
        [3, 1]
        >>> mixture.set_weights({"code": 0.0, "prose": 1.0})
        >>> batch = next(mixture)
        >>> mixture.served
        {'code': 3, 'prose': 5}
        >>> mixture.state.step
        2

        Args:
            datasets: one map-style dataset per domain: lists, `datasets.Dataset`, torch datasets.
            batch_rows: items in the global batch of one optimizer step.
            num_tokens: tokens of each item of each domain; needed for `count="tokens"`.
            options: other arguments of the constructor.

        Raises:
            ConfigError: an argument is wrong, or a dataset is not map-style.
            DataError: a dataset is empty or an item cannot be read.
        """
        if options.get("count") == "tokens" and num_tokens is None:
            raise ConfigError("count = 'tokens' of your own datasets; give num_tokens for every item.")
        return cls(own_rows(datasets, num_tokens), batch_rows=batch_rows, **options)

    @property
    def row_places(self) -> Int[np.ndarray, "b 2"]:
        """Shard and row of each row of this rank's last batch, in its domain's `DomainRows.shards`.

        What a logits store is read by. Of a damaged row, the place of the row that stood in for it.
        """
        assert self.last_plan is not None
        slots = self._slots(self.last_plan)
        numbers = self.last_plan.row_numbers[slots]
        return places_of(self.stream, self.last_plan.domain_ids[slots], numbers, self._stood_in)

    def loader(
        self,
        *,
        steps: int | None = None,
        microbatches: int = 1,
        domain_ids: bool = False,
        row_places: bool = False,
        device: Any = None,
    ) -> StepLoader:
        """Batches for a loop that is not ours: see `ddkmix.StepLoader`.

        Args:
            steps: optimizer steps of the whole run; None goes on until the domains are used up.
            microbatches: batches for each step (gradient accumulation).
            domain_ids: add `domain_ids` (b,) int64 to every batch that is a dict.
            row_places: add `row_places` (b, 2) int64 likewise: see the property of this name.
            device: where tensors are moved; None leaves them on the CPU.

        Raises:
            ConfigError: `steps` or `microbatches` is wrong.
        """
        return StepLoader(
            self,
            steps=steps,
            microbatches=microbatches,
            domain_ids=domain_ids,
            row_places=row_places,
            device=device,
        )

    def close(self) -> None:
        """Stop the workers and close the files; iterating again starts them anew."""
        self._reader.close()
        self._source.close()
        self._plans.rewind(self.state)

    def __iter__(self) -> "DomainMixture":
        return self

    def __next__(self) -> Any:
        batch = self.next_parts(1)[0]
        assert self.last_plan is not None
        return with_arrays(batch, domain_ids=self.last_plan.domain_ids[self._slots(self.last_plan)])

    def next_parts(self, parts: int) -> list[Any]:
        """The next step's rows of this rank, dealt into micro-batches; without `domain_ids`.

        Args:
            parts: micro-batches; each takes every `parts`-th row.

        Raises:
            StopIteration: no domain may serve another row.
            DataError: a row cannot be read; the step can be asked for again.
        """
        if parts != self._parts:  # readers may have collated the next steps in another way
            self._parts = parts
            self._rewind(self.state)
        batch = self._receive()
        if batch is None:  # nothing is left, or the plan ran dry under weights that have since changed
            if self._plans.is_exhausted():
                raise StopIteration
            batch = self._receive()
            assert batch is not None  # the step that was just planned
        self._accept(batch.substitutions)
        self._stood_in = tuple(batch.substitutions)
        self.last_plan = self._plans.consume()
        return self._source.batches(batch, parts)

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

    def _receive(self) -> Batch | None:
        batch = None
        try:
            batch = self._reader.receive()
        finally:
            if batch is None:  # reading has stopped, whatever the reason: go on from the last batch
                self.close()
        return batch

    def _invalidate(self) -> None:
        """What workers have read ahead becomes stale."""
        self._reader.invalidate()

    def _tasks(self) -> Iterator[Task]:
        """Plan one step whenever the DataLoader has room for another task."""
        while plan := self._plans.plan():
            self._source.follow(self._plans.ahead.served, self._plans.ahead.weights)
            slots = self._slots(plan)
            yield Task(
                self._reader.version, plan.domain_ids[slots], plan.row_numbers[slots], parts=self._parts
            )
