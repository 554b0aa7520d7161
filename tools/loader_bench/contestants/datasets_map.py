"""Hugging Face datasets, map-style: Arrow files, `interleave_datasets`, a shuffling torch DataLoader.

Docs "Process" (Interleave) and "Use with PyTorch" (`with_format`, DataLoader with `shuffle=True`; batches are
fetched through `__getitems__`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader_bench.batches import collate, endless
from loader_bench.corpus import Corpus

NAME = "datasets-map"
PACKAGE = "datasets"
DOMAINS = "several"
HTTP = False


def prepare(corpus: Corpus, folder: Path) -> None:
    """`save_to_disk` of every domain, and of the interleaved set's indices, so that opening is quick."""
    import numpy as np
    from datasets import Dataset, Features, List, Value

    features = Features({"input_ids": List(Value("uint16"), length=corpus.seq_len)})
    for domain in corpus.domains:
        rows = np.asarray(corpus.rows(domain))
        Dataset.from_dict({"input_ids": rows}, features=features).save_to_disk(str(folder / domain))


def open_stream(corpus: Corpus, root: str, *, batch_rows: int, workers: int) -> Iterator[Any]:
    """Interleaved by probabilities, then shuffled by the DataLoader's sampler."""
    from datasets import interleave_datasets, load_from_disk
    from torch.utils.data import DataLoader

    domains = [load_from_disk(f"{root}/{domain}") for domain in corpus.domains]
    mix = interleave_datasets(
        domains,
        probabilities=list(corpus.weights.values()),
        seed=0,
        stopping_strategy="all_exhausted",
    )
    return endless(
        DataLoader(
            mix.with_format("numpy"),
            batch_size=batch_rows,
            shuffle=True,
            drop_last=True,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
    )


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return collate([row["input_ids"] for row in rows])
