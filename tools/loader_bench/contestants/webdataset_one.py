"""webdataset on one domain, with the tars that ddkmix packs.

README and docs ("The fluid interface", "wds-notes", FAQ on WebLoader): shuffle shards and samples,
decode, batch *inside* the pipeline, give the loader `batch_size=None`, shards split over workers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader_bench.batches import collate
from loader_bench.corpus import Corpus
from loader_bench.packed import write_domain

NAME = "webdataset"
PACKAGE = "webdataset"
DOMAINS = "one"
HTTP = True
SHUFFLE_ROWS = 1000  # README: "usually, pick something bigger, like 1000"


def prepare(corpus: Corpus, folder: Path) -> None:
    """`.npy` members in plain tars: what webdataset's own decoder reads."""
    for domain in corpus.domains:
        write_domain(folder, domain, corpus.rows(domain), shard_rows=corpus.shard_rows)


def urls(corpus: Corpus, root: str, domain: str) -> list[str]:
    """The shards of a domain."""
    count = -(-corpus.rows_per_domain // corpus.shard_rows)
    return [f"{root}/{domain}/train-{i:06d}.tar" for i in range(count)]


def samples(corpus: Corpus, root: str, domain: str) -> Any:
    """Shuffled rows of a domain, without end."""
    import webdataset as wds

    return (
        wds.WebDataset(urls(corpus, root, domain), shardshuffle=100, seed=0, empty_check=False)
        .repeat()
        .shuffle(SHUFFLE_ROWS)
        .decode()
        .to_tuple("npy")
    )


def collate_tuples(rows: list[tuple[Any]]) -> dict[str, Any]:
    """`to_tuple` gives tuples of one."""
    return collate([row for (row,) in rows])


def open_stream(corpus: Corpus, root: str, *, batch_rows: int, workers: int) -> Iterator[Any]:
    """The largest domain of the mixture."""
    import webdataset as wds

    domain = max(corpus.weights, key=lambda name: corpus.weights[name])
    dataset = samples(corpus, root, domain).batched(batch_rows, collation_fn=collate_tuples)
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))
