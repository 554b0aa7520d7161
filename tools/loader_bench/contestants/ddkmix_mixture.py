"""ddkmix's `DomainMixture` (README, "The sampler in your own loop")."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader_bench.corpus import Corpus
from loader_bench.packed import open_domains, open_remote_domains, write_domain

NAME = "ddkmix"
PACKAGE = "ddkmix"
DOMAINS = "several"
HTTP = True


def prepare(corpus: Corpus, folder: Path) -> None:
    """Packed shards, as `ddkmix pack` writes them."""
    for domain in corpus.domains:
        write_domain(folder, domain, corpus.rows(domain), shard_rows=corpus.shard_rows)


def open_stream(corpus: Corpus, root: str, *, batch_rows: int, workers: int) -> Iterator[Any]:
    """The mixture itself: measuring its data wait after a weight change needs `set_weights`."""
    from ddkmix import DomainMixture

    if "://" in root:
        rows = open_remote_domains(root, corpus.domains, -(-corpus.rows_per_domain // corpus.shard_rows))
    else:
        rows = open_domains(Path(root), corpus.domains)
    return DomainMixture(
        rows,
        batch_rows=batch_rows,
        weights=corpus.weights,
        num_workers=workers,
    )
