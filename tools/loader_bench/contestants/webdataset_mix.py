"""webdataset's RandomMix over the domains (webdataset/mix.py), batched inside the pipeline (README)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader_bench.contestants import webdataset_one
from loader_bench.corpus import Corpus

NAME = "webdataset-randommix"
PACKAGE = "webdataset"
DOMAINS = "several"
HTTP = True


def prepare(corpus: Corpus, folder: Path) -> None:
    """The same tars as the plain one's."""
    webdataset_one.prepare(corpus, folder)


def open_stream(corpus: Corpus, root: str, *, batch_rows: int, workers: int) -> Iterator[Any]:
    """A mix of shuffled domains."""
    import webdataset as wds

    domains = [webdataset_one.samples(corpus, root, domain) for domain in corpus.domains]
    mix = wds.RandomMix(domains, probs=list(corpus.weights.values()))
    dataset = wds.DataPipeline(mix, wds.batched(batch_rows, collation_fn=webdataset_one.collate_tuples))
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))
