"""The documents of a shard in a packing process, wherever they lie, checked against what was promised.

A remote shard is copied to a temporary folder of this process, read and deleted, so a process needs disk for
one shard.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddkmix.document_shards import DocumentShard
from ddkmix.documents import TextField, read_documents, read_hub_documents
from ddkmix.errors import DataError
from ddkmix.pack.marks import Fetching, check_unchanged
from ddkmix.pack.scratch import scratch_folder
from ddkmix.storage.remote import download


def documents_of(shard: DocumentShard, text_field: TextField, mark: str, fetching: Fetching) -> Iterator[str]:
    """The documents of a shard, in order.

    Args:
        shard: what to read.
        text_field: what documents are made of.
        mark: what the shard was known by when the work was planned.
        fetching: how remote shards are copied.

    Raises:
        DataError: it cannot be read, or is not what was promised.
    """
    if shard.dataset is not None:
        yield from read_hub_documents(shard.dataset, shard.index, shard.of, text_field)
        return
    number = 0
    with _local_copy(shard, mark, fetching) as path:
        for document in read_documents(path, text_field, name=str(shard)):
            yield document
            number += 1
    if shard.num_documents is not None and number != shard.num_documents:
        raise DataError(
            f"{shard} has {number} documents and its list promises {shard.num_documents}; correct the list "
            "or copy the shard again."
        )


@contextmanager
def _local_copy(shard: DocumentShard, mark: str, fetching: Fetching) -> Iterator[Path]:
    if not shard.remote:
        _check_promises(Path(shard.location), shard)
        yield Path(shard.location)
        return
    with scratch_folder(fetching.folder) as folder:
        path = folder / "documents"
        arrived = download(shard.location, path, fetching.storage, size=shard.size, sha256=shard.sha256)
        _check_promises(path, shard)
        check_unchanged(shard, mark, arrived.sha256, fetching.storage)
        yield path


def _check_promises(path: Path, shard: DocumentShard) -> None:
    try:
        size = path.stat().st_size
        if shard.size is not None and size != shard.size:
            raise DataError(
                f"{shard} has {size} bytes and its list promises {shard.size}; copy it again or correct "
                "the list."
            )
        for name, digest in (("sha256", shard.sha256), ("md5", shard.md5)):
            if digest is not None:
                _check_digest(path, shard, name, digest)
    except OSError as error:
        raise DataError(f"{shard} cannot be read ({error.strerror}).") from None


def _check_digest(path: Path, shard: DocumentShard, name: str, digest: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()
    if found != digest:
        raise DataError(
            f"{shard} has the {name} {found[:12]}... and {digest[:12]}... was promised; it is damaged or "
            "another file. Copy it again, or correct the checksum."
        )
