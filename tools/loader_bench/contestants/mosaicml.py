"""mosaicml-streaming: MDS shards, one `Stream` with a proportion per domain, `StreamingDataLoader`.

Docs "Mixing Datasets" (streams with `proportion`, `batching_method="random"`, the default), "Quick Start"
(give `batch_size` to both) and "Encodings" (`ndarray:uint16:T`, of fixed shape).

Its package needs torchvision at import, whose PyPI build needs CUDA's torch; nothing here uses
`streaming.vision`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from loader_bench.batches import collate, endless
from loader_bench.corpus import Corpus

NAME = "mosaicml-streaming"
PACKAGE = "mosaicml-streaming"
DOMAINS = "several"
HTTP = False  # its documentation names s3, gs, oci, azure, hf, sftp, dbfs, alipan and local folders


def _streaming() -> Any:
    sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
    import streaming

    return streaming


def prepare(corpus: Corpus, folder: Path) -> None:
    """Uncompressed MDS shards of about the size of the others'."""
    streaming = _streaming()
    import numpy as np

    columns = {"input_ids": f"ndarray:uint16:{corpus.seq_len}"}
    limit = corpus.shard_rows * (corpus.seq_len * 2 + 16)
    for domain in corpus.domains:
        with streaming.MDSWriter(out=str(folder / domain), columns=columns, size_limit=limit) as writer:
            for row in np.asarray(corpus.rows(domain)):
                writer.write({"input_ids": row})


def open_stream(corpus: Corpus, root: str, *, batch_rows: int, workers: int) -> Iterator[Any]:
    """Local streams, mixed by proportion, shuffled by its default algorithm (py1e)."""
    streaming = _streaming()
    streaming.base.util.clean_stale_shared_memory()  # documented: after a run that was killed
    streams = [
        streaming.Stream(local=f"{root}/{domain}", proportion=weight)
        for domain, weight in corpus.weights.items()
    ]
    dataset = streaming.StreamingDataset(streams=streams, shuffle=True, shuffle_seed=0, batch_size=batch_rows)
    return endless(
        streaming.StreamingDataLoader(
            dataset,
            batch_size=batch_rows,
            num_workers=workers,
            collate_fn=_collate,
            drop_last=True,
            persistent_workers=workers > 0,
        )
    )


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return collate([row["input_ids"] for row in rows])
