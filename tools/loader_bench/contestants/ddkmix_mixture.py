"""ddkmix's `DomainMixture` (README, "The sampler in your own loop")."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader_bench.corpus import Corpus
from loader_bench.packed import open_domains, write_domain

NAME = "ddkmix"
PACKAGE = "ddkmix"
DOMAINS = "several"
HTTP = False


def prepare(corpus: Corpus, folder: Path) -> None:
    """Packed shards, as `ddkmix pack` writes them."""
    for domain in corpus.domains:
        write_domain(folder, domain, corpus.rows(domain), shard_rows=corpus.shard_rows)


def open_stream(corpus: Corpus, root: str, *, batch_rows: int, workers: int) -> Iterator[Any]:
    """The mixture itself: measuring its data wait after a weight change needs `set_weights`."""
    from ddkmix import DomainMixture

    return DomainMixture(
        open_domains(Path(root), corpus.domains),
        batch_rows=batch_rows,
        weights=corpus.weights,
        num_workers=workers,
    )
