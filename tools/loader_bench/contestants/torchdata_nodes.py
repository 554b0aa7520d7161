"""torchdata.nodes: `MultiNodeWeightedSampler` over the domains, Batcher, ParallelMapper, Prefetcher, Loader.

Docs "Migrating to torchdata.nodes" (sampler -> Batcher -> ParallelMapper that fetches and collates a
whole batch -> Prefetcher) and "Getting started" (MultiNodeWeightedSampler over a mapping of nodes;
`method="thread"`). It has no storage of its own: rows are memory-mapped numpy files, the fastest thing
that it can be given.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loader_bench.batches import as_batch, endless
from loader_bench.corpus import Corpus

NAME = "torchdata-nodes"
PACKAGE = "torchdata"
DOMAINS = "several"
HTTP = False
METHOD = "thread"


def prepare(corpus: Corpus, folder: Path) -> None:
    """One array a domain."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in corpus.domains:
        np.save(folder / f"{domain}.npy", np.asarray(corpus.rows(domain)))


def open_stream(corpus: Corpus, root: str, *, batch_rows: int, workers: int) -> Iterator[Any]:
    """Places of rows are mixed and batched in the main process; workers fetch and collate."""
    from torch.utils.data import RandomSampler
    from torchdata.nodes import (
        Batcher,
        Loader,
        MultiNodeWeightedSampler,
        ParallelMapper,
        Prefetcher,
        SamplerWrapper,
    )
    from torchdata.nodes.map import Mapper

    rows = [np.load(f"{root}/{domain}.npy", mmap_mode="r") for domain in corpus.domains]
    nodes = {
        domain: Mapper(SamplerWrapper(RandomSampler(rows[i])), _Tagged(i))
        for i, domain in enumerate(corpus.domains)
    }
    mix = MultiNodeWeightedSampler(nodes, corpus.weights, stop_criteria="CYCLE_FOREVER")
    node: Any = Batcher(mix, batch_size=batch_rows, drop_last=True)
    if workers:
        node = ParallelMapper(node, _Fetch(rows), num_workers=workers, method=METHOD)
        node = Prefetcher(node, prefetch_factor=2 * workers)
    else:
        node = Mapper(node, _Fetch(rows))
    return endless(Loader(node))


class _Tagged:
    """The domain beside a row's number."""

    def __init__(self, domain: int) -> None:
        self._domain = domain

    def __call__(self, row: int) -> tuple[int, int]:
        return self._domain, row


class _Fetch:
    """A whole batch at a time."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self._rows = rows

    def __call__(self, places: list[tuple[int, int]]) -> dict[str, Any]:
        import torch

        tokens = np.stack([self._rows[domain][row] for domain, row in places])
        return as_batch(torch.from_numpy(tokens.astype(np.int64)))
