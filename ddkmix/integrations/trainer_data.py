"""What a Trainer is given in place of a dataset, and what its loop iterates.

Trainers want one train dataset: they look at its length and columns, and those of TRL tokenise it. Domains
are joined for that, every row marked with its domain, and taken apart again by the mark, so rows that the
trainer shuffles or drops stay with their domain.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import repeat
from logging import getLogger
from typing import Any

import numpy as np

from ddkmix.errors import ConfigError
from ddkmix.loader import DomainMixture
from ddkmix.own_rows import count_items

_LOG = getLogger("ddkmix")
DOMAIN_COLUMN = "ddkmix_domain"
"""Column of the joined dataset that says where a row came from; gone before rows are collated."""


class JoinedRows:
    """A length, for a Trainer that only asks how many rows there are."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, i: int) -> Any:
        raise ConfigError(
            f"train_dataset[{i}] was asked for, but a mixture serves its rows itself; read them from the "
            "datasets that you gave, or from trainer.mixture."
        )


def packed_stand_in() -> Any:
    """One row that a trainer of TRL takes for tokenised data; never trained on."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})


def check_datasets(datasets: Mapping[str, Any]) -> None:
    """Every domain must have rows that can be asked for by number.

    Raises:
        ConfigError: one has not, or there is none.
    """
    if not datasets:
        raise ConfigError("train_dataset = {}; give one map-style dataset per domain.")
    for name, dataset in datasets.items():
        count_items(f"train_dataset[{name!r}]", dataset)


def joined(datasets: Mapping[str, Any], trainer: str) -> Any:
    """One `datasets.Dataset` of all domains, each row marked with its domain.

    Args:
        datasets: one per domain.
        trainer: the class that will prepare it.

    Raises:
        ConfigError: a dataset is of another kind, or they differ in their columns.
    """
    from datasets import Dataset, concatenate_datasets

    columns: dict[str, Any] = {}
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"train_dataset[{name!r}] is a {type(dataset).__name__}; {trainer} prepares its rows and "
                "needs a datasets.Dataset: datasets.Dataset.from_list([...]) makes one."
            )
        columns[name] = dataset.features
    first = next(iter(columns))
    for name, features in columns.items():
        if features != columns[first]:
            raise ConfigError(
                f"train_dataset[{name!r}] has columns {dict(features)} and [{first!r}] has "
                f"{dict(columns[first])}; {trainer} prepares all domains alike. Bring them to the same "
                "columns (select_columns, cast)."
            )
    parts = [
        dataset.add_column(DOMAIN_COLUMN, np.full(len(dataset), i))
        for i, dataset in enumerate(datasets.values())
    ]
    return concatenate_datasets(parts)


def taken_apart(prepared: Any, datasets: Mapping[str, Any], trainer: str) -> dict[str, Any]:
    """The prepared rows of each domain, in the order in which the trainer left them.

    Raises:
        ConfigError: the trainer has made new rows of old ones, so nobody knows their domains.
    """
    if DOMAIN_COLUMN not in (getattr(prepared, "column_names", None) or ()):
        raise ConfigError(
            f"{trainer} has made other rows of train_dataset (packing mixes domains in a row); turn packing "
            "off, or pack each domain (ddkmix pack) and give DomainMixture.from_cards(...)."
        )
    ids = prepared.select_columns([DOMAIN_COLUMN]).with_format("numpy")[:][DOMAIN_COLUMN]
    bare = prepared.remove_columns(DOMAIN_COLUMN)
    found = {name: bare.select(np.flatnonzero(ids == i)) for i, name in enumerate(datasets)}
    for name, rows in found.items():
        if len(rows) != len(datasets[name]):
            _LOG.warning(
                "%s kept %d of the %d rows of domain %r.", trainer, len(rows), len(datasets[name]), name
            )
    return found


class EpochLoader:
    """A mixture as the train dataloader of a Trainer: as long as all domains together, again and again.

    A Trainer counts in passes over its dataloader, so this one has the length of one pass; rows go on where
    the last pass ended, whatever the weights have made of the shares. An iteration that starts in the middle
    of a pass (a resume) ends with it. Nothing is read ahead of the loop.

    Args:
        mixture: what serves the rows.
        microbatches: batches that the loop takes for each optimizer step.
        windows: each batch holds the rows of all of them, and comes `microbatches` times, as trainers that
            generate for a whole window want it.
        attention_mask: add one (all ones, as packed rows need) to batches that lack it.
        names: of `domain_ids` and `row_places`, what every batch says about its rows beside them.
    """

    def __init__(
        self,
        mixture: DomainMixture,
        *,
        microbatches: int,
        windows: bool = False,
        attention_mask: bool = False,
        names: Collection[str] = (),
    ) -> None:
        self.mixture, self._names = mixture, dict.fromkeys(names, True)
        num_rows = sum(mixture.settings.num_rows)
        self.dataset = JoinedRows(num_rows)
        self.steps = -(-num_rows // mixture.settings.batch_rows)
        """Optimizer steps of one pass."""
        self.ended = False
        """Whether the mixture had no row left before the loop wanted none."""
        self._microbatches, self._windows, self._attention_mask = microbatches, windows, attention_mask

    def __len__(self) -> int:
        return self.steps * self._microbatches

    def __iter__(self) -> Iterator[Any]:
        end = (self.mixture.state.step // self.steps + 1) * self.steps
        parts, copies = (1, self._microbatches) if self._windows else (self._microbatches, 1)
        for batch in self.mixture.loader(steps=end, microbatches=parts, **self._names):
            if (
                self._attention_mask
                and "input_ids" in batch
                and not {"attention_mask", "position_ids"} & set(batch)
            ):
                batch["attention_mask"] = batch["input_ids"].new_ones(batch["input_ids"].shape)
            yield from repeat(batch, copies)
        self.ended = self.mixture.state.step < end
