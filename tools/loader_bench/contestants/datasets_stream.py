"""Hugging Face datasets, streaming: Parquet shards, `shuffle`, `interleave_datasets`, a torch DataLoader.

Docs "Stream" (Interleave; Shuffle with a buffer), "Use with PyTorch" (Stream data; several workers split the
shards) and `IterableDataset.batch`, which hands whole Arrow batches on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader_bench.batches import as_batch, endless
from loader_bench.corpus import Corpus

NAME = "datasets-stream"
PACKAGE = "datasets"
DOMAINS = "several"
HTTP = True
SHUFFLE_ROWS = 1000  # the documented default of `shuffle`; the same as webdataset's here


def prepare(corpus: Corpus, folder: Path) -> None:
    """Parquet shards with a fixed-size list column, which datasets reads without copying."""
    import numpy as np
    from datasets import Dataset, Features, List, Value

    features = Features({"input_ids": List(Value("uint16"), length=corpus.seq_len)})
    for domain in corpus.domains:
        rows = np.asarray(corpus.rows(domain))
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for i, start in enumerate(range(0, len(rows), corpus.shard_rows)):
            part = rows[start : start + corpus.shard_rows]
            Dataset.from_dict({"input_ids": part}, features=features).to_parquet(
                str(folder / domain / f"{i:06d}.parquet")
            )


def open_stream(corpus: Corpus, root: str, *, batch_rows: int, workers: int) -> Iterator[Any]:
    """Interleaved by probabilities until every domain was seen."""
    from datasets import interleave_datasets, load_dataset
    from torch.utils.data import DataLoader

    count = -(-corpus.rows_per_domain // corpus.shard_rows)
    domains = [
        load_dataset(
            "parquet",
            data_files=[f"{root}/{domain}/{i:06d}.parquet" for i in range(count)],
            split="train",
            streaming=True,
        ).shuffle(seed=0, buffer_size=SHUFFLE_ROWS)
        for domain in corpus.domains
    ]
    mix = interleave_datasets(
        domains,
        probabilities=list(corpus.weights.values()),
        seed=0,
        stopping_strategy="all_exhausted",
    )
    batches = mix.with_format("torch").batch(batch_rows, drop_last_batch=True)
    return endless(
        DataLoader(
            batches,
            batch_size=None,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
    )


def _collate(batch: dict[str, Any]) -> dict[str, Any]:
    return as_batch(batch["input_ids"].long())
