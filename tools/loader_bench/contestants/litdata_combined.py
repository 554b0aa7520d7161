"""litdata: `optimize` with TokensLoader, `CombinedStreamingDataset` with weights, its `StreamingDataLoader`.

README "LLM training" and "Combine datasets": `TokensLoader(block_size=...)`, `shuffle=True`,
`drop_last=True`, `iterate_over_all=False` because weights are given.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loader_bench.batches import as_batch, collate, endless
from loader_bench.corpus import Corpus

NAME = "litdata"
PACKAGE = "litdata"
DOMAINS = "several"
HTTP = False  # its downloaders are s3, gs, azure, r2, hf and local paths


def prepare(corpus: Corpus, folder: Path) -> None:
    """Chunks of contiguous tokens, about the size of the others' shards."""
    from litdata import TokensLoader, optimize

    folder.mkdir(parents=True, exist_ok=True)
    for domain in corpus.domains:
        starts = list(range(0, corpus.rows_per_domain, corpus.shard_rows))
        optimize(
            fn=partial(_tokens, str(corpus.folder / "rows" / f"{domain}.npy"), corpus.shard_rows),
            inputs=starts,
            output_dir=str(folder / domain),
            chunk_size=corpus.shard_rows * corpus.seq_len,
            item_loader=TokensLoader(),
            num_workers=1,
            mode="overwrite",
            verbose=False,
        )


def _tokens(path: str, shard_rows: int, start: int) -> Any:
    rows = np.load(path, mmap_mode="r")
    yield np.array(rows[start : start + shard_rows]).reshape(-1)


def open_stream(corpus: Corpus, root: str, *, batch_rows: int, workers: int) -> Iterator[Any]:
    """As its README mixes SlimPajama with Starcoder."""
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader

    domains = [
        StreamingDataset(
            input_dir=f"{root}/{domain}",
            item_loader=TokensLoader(block_size=corpus.seq_len),
            shuffle=True,
            drop_last=True,
        )
        for domain in corpus.domains
    ]
    combined = CombinedStreamingDataset(
        datasets=domains, seed=42, weights=list(corpus.weights.values()), iterate_over_all=False
    )
    return endless(
        StreamingDataLoader(combined, batch_size=batch_rows, num_workers=workers, collate_fn=_collate)
    )


def _collate(rows: list[Any]) -> dict[str, Any]:
    if isinstance(rows[0], np.ndarray):
        return collate(rows)
    import torch

    return as_batch(torch.stack(rows).long())
