"""The places of a batch's rows: what a logits store is read by. Checked against the rows' own tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ddkmix.errors import ConfigError
from ddkmix.index import DomainRows
from ddkmix.loader import DomainMixture
from ddkmix.rows import RowReader
from tests.hand_made import write_rows

LENGTH = 4
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, DomainRows]:
    """Two domains of two shards; all tokens of a row are its own number."""
    numbers = iter(range(1000))
    counts = {"code": (3, 5), "math": (4, 2)}
    return {
        name: write_rows(
            tmp_path,
            name,
            [[[next(numbers)] * LENGTH for _ in range(count)] for count in shards],
            seq_len=LENGTH,
        )
        for name, shards in counts.items()
    }


@pytest.fixture
def tokens_at(rows: dict[str, DomainRows]) -> Callable[[torch.Tensor, torch.Tensor], list[list[int]]]:
    """A function that reads rows by (domain_ids, row_places)."""
    readers = [RowReader(domain) for domain in rows.values()]

    def read(domain_ids: torch.Tensor, places: torch.Tensor) -> list[list[int]]:
        pairs = zip(domain_ids.tolist(), places.tolist(), strict=True)
        return [readers[domain].read(*place).tolist() for domain, place in pairs]

    return read


@pytest.mark.parametrize("workers", [0, 2])
def test_places_are_those_of_the_rows_that_the_loop_received(
    rows: dict[str, DomainRows], tokens_at: Callable[..., list[list[int]]], workers: int
) -> None:
    """Over several epochs, with weights that change while workers read ahead, on both of two ranks."""
    mixtures = [
        DomainMixture(rows, batch_rows=6, rank=rank, world_size=2, num_workers=workers, seed=3)
        for rank in range(2)
    ]
    for step in range(8):
        for mixture in mixtures:
            if step % 3 == 2:
                mixture.set_weights({"code": step % 2 + 1.0, "math": 1.0})
            batch = next(mixture)
            places = torch.from_numpy(mixture.row_places)
            assert tokens_at(batch["domain_ids"], places) == batch["input_ids"].tolist()
    for mixture in mixtures:
        mixture.close()


def test_a_loader_deals_places_like_rows(
    rows: dict[str, DomainRows], tokens_at: Callable[..., list[list[int]]]
) -> None:
    """Micro-batches of other people's loops carry the places of their own rows."""
    loader = DomainMixture(rows, batch_rows=6).loader(
        steps=3, microbatches=3, domain_ids=True, row_places=True
    )
    for batch in loader:
        assert tokens_at(batch["domain_ids"], batch["row_places"]) == batch["input_ids"].tolist()
    batch = next(iter(DomainMixture(rows, batch_rows=6).loader(row_places=True)))
    assert {"input_ids", "labels", "row_places"} == set(batch)


def test_a_row_that_stands_in_for_a_damaged_one_has_its_own_place(
    rows: dict[str, DomainRows], tokens_at: Callable[..., list[list[int]]]
) -> None:
    """The teacher must comment on the row that is there, not on the one that was planned."""
    shard = rows["code"].shards[1]
    damaged = 2
    with Path(shard.location).open("r+b") as file:
        file.seek(int(shard.offsets[damaged]))
        file.write(np.array([999], dtype="<u2").tobytes())
    mixture = DomainMixture(rows, batch_rows=7, weights={"code": 1.0, "math": 0.0})
    for _ in range(8):
        batch = next(mixture)
        assert [1, damaged] not in mixture.row_places.tolist()
        assert (
            tokens_at(batch["domain_ids"], torch.from_numpy(mixture.row_places))
            == batch["input_ids"].tolist()
        )
    assert 7 == len(mixture.substitutions)  # once an epoch


def test_batches_that_are_no_dicts_have_no_room_for_places() -> None:
    """One line that says what to change."""
    mixture = DomainMixture.from_datasets({"code": [1, 2, 3]}, batch_rows=2, collate_fn=list)
    with pytest.raises(ConfigError, match="row_places = True and batches are lists"):
        next(iter(mixture.loader(row_places=True)))
