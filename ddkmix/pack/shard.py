"""One shard of documents -> its row shards: what a packing process does.

Rows first, then the index that vouches for them. Each file takes its name when it is whole, and its bytes
depend on the documents and the settings alone, so a shard may be packed twice, or by two processes at once.
"""

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from ddkmix.document_shards import DocumentShard
from ddkmix.documents import TextField, digest
from ddkmix.domains import Split
from ddkmix.errors import DataError
from ddkmix.fingerprint import hash_file, replacing
from ddkmix.index import ShardIndex, index_path, row_checksums, write_index
from ddkmix.pack.digests import digest_set, digests_path, write_digests
from ddkmix.pack.fetch import documents_of
from ddkmix.pack.marks import Fetching
from ddkmix.prompts import PromptFormat, PromptStream
from ddkmix.row_layout import Strategy
from ddkmix.token_stream import PackedRows, TokenStream

_BATCH_DOCUMENTS = 64

DUPLICATE = "duplicate of held-out"
EMPTY = "empty"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSettings:
    """Everything but the documents that the rows depend on."""

    text_field: str
    tokenizer: Path
    separator_id: int
    seq_len: int
    strategy: Strategy
    dtype: str
    share_of_train: float | None
    """Share of the train documents that are held out."""
    prompts: PromptFormat | None = None
    """Where documents are prompts and responses: how they are written, instead of text_field and strategy."""

    @property
    def content(self) -> TextField:
        """What is read of each document."""
        return self.text_field if self.prompts is None else self.prompts.fields

    def stream(self) -> TokenStream | PromptStream:
        """An empty one, for the documents of one row shard."""
        if self.prompts is None:
            return TokenStream(self.tokenizer, separator_id=self.separator_id, seq_len=self.seq_len)
        return PromptStream(
            self.tokenizer, self.prompts, separator_id=self.separator_id, seq_len=self.seq_len
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """One shard of documents to pack, as a worker process needs it."""

    documents: DocumentShard
    mark: str
    """What the shard was known by when the work was planned; see `marks`."""
    split: Split
    folder: Path
    """The domain's packed folder."""
    settings: RowSettings
    fetching: Fetching
    held_out: tuple[Path, ...] = ()
    """Row shards whose documents must not be in this one."""

    @property
    def outputs(self) -> dict[Split, Path]:
        """The row shards that it makes: its split's, and the held-out share's."""
        splits: tuple[Split, ...] = (self.split,)
        if self.settings.share_of_train is not None:
            splits = ("train", "held_out")
        return {split: self.folder / split / self.documents.name for split in splits}

    @property
    def done(self) -> bool:
        """All its row shards are there."""
        return all(index_path(rows).exists() for rows in self.outputs.values())


def is_held_out(document: bytes, share: float) -> bool:
    """Whether a document with this digest belongs to the held-out share.

    The digest decides, so that copies of a document fall on one side wherever they stand, and adding or
    moving shards moves no document across.
    """
    return int.from_bytes(document[:8], "little") < share * 2.0**64


@dataclass(slots=True)
class _Kept:
    """The documents of one row shard so far."""

    stream: TokenStream | PromptStream
    batch: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, text: str, key: bytes) -> None:
        self.digests.append(key)
        self.batch.append(text)
        if len(self.batch) == _BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        self.stream.add(self.batch)
        self.batch = []


def pack_shard(job: ShardJob) -> None:
    """Pack one shard of documents, unless somebody else has done it since the work was planned.

    Raises:
        DataError: the documents cannot be read, or the rows not written.
    """
    if job.done:
        return
    settings = job.settings
    kept = {split: _Kept(settings.stream()) for split in job.outputs}
    side = _sides(job)
    forbidden = digest_set(job.held_out)
    for text in documents_of(job.documents, settings.content, job.mark, job.fetching):
        key = digest(text)
        split = side(key)
        if not text.strip():
            kept[split].dropped[EMPTY] += 1
        elif key in forbidden:
            kept[split].dropped[DUPLICATE] += 1
        else:
            kept[split].add(text, key)
    for split, rows in job.outputs.items():
        _write(rows, kept[split], settings)


def read_held_out(job: ShardJob) -> None:
    """Write the digests of a held-out shard's documents, which train shards are checked against.

    Raises:
        DataError: the documents cannot be read, or the digests not written.
    """
    texts = documents_of(job.documents, job.settings.content, job.mark, job.fetching)
    digests = [digest(text) for text in texts if text.strip()]
    rows = job.outputs["held_out"]
    with named_when_full(digests_path(rows)):
        write_digests(rows, digests)


def _sides(job: ShardJob) -> Callable[[bytes], Split]:
    share = job.settings.share_of_train
    if share is None:
        return lambda key: job.split
    return lambda key: "held_out" if is_held_out(key, share) else "train"


def _write(path: Path, kept: _Kept, settings: RowSettings) -> None:
    kept.flush()
    packed = kept.stream.rows(settings.strategy)
    rows = packed.tokens.astype(settings.dtype)
    with named_when_full(path):
        write_digests(path, kept.digests)
        offsets = write_tar(path, rows)
        write_index(
            ShardIndex(
                location=str(path),
                size=path.stat().st_size,
                sha256=hash_file(path),
                offsets=offsets,
                num_tokens=packed.num_tokens,
                num_bytes=packed.num_bytes,
                crc32=row_checksums(rows, packed.num_tokens),
                seq_len=settings.seq_len,
                dtype=settings.dtype,
                report=_facts(packed, kept),
                num_prompt_tokens=packed.num_prompt_tokens,
            )
        )


def _facts(packed: PackedRows, kept: _Kept) -> dict[str, Any]:
    dropped, prompts = Counter(kept.dropped), packed.num_prompt_tokens
    if isinstance(kept.stream, PromptStream):
        dropped += kept.stream.dropped
    return {
        "documents": packed.num_documents,
        "truncated": packed.num_truncated,
        "separators": packed.num_separators,
        "tokens": int(packed.num_tokens.sum()),
        "padding": packed.num_padding,
        "bytes": kept.stream.num_bytes,
        "dropped": dict(sorted(dropped.items())),
        **({} if prompts is None else {"prompt_tokens": int(prompts.sum())}),
    }


@contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into the line that says which file could not be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); free space or move cache_dir."
        ) from None


def write_tar(path: Path, rows: UInt[np.ndarray, "R T"]) -> Int[np.ndarray, " R"]:
    """Write rows as `000017.npy` members; returns the byte offset of each row's first token.

    The standard library writes the tar because importing webdataset imports torch, which would cost
    every worker process seconds; tests read the result with webdataset.
    """
    offsets = np.zeros(len(rows), dtype=np.int64)
    with (
        replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for i, row in enumerate(rows):
            data = io.BytesIO()
            np.save(data, row, allow_pickle=False)
            member = tarfile.TarInfo(f"{i:06d}.npy")
            member.size = len(data.getvalue())
            header = tarfile.BLOCKSIZE + member.size - row.nbytes
            offsets[i] = tar.offset + header
            data.seek(0)
            tar.addfile(member, data)
    return offsets
