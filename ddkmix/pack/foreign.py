"""Rows that others packed: tars of `.npy` token arrays, indexed so that a card can name them.

    FOLDER/train/*.tar  FOLDER/held_out/*.tar   ->   an index beside each tar, and FOLDER/rows.json

The tars stay as they are. An array is one row, of at most `seq_len` tokens. Every array is read once, because
each row needs a checksum; Energon's `.tar.idx`, where it lies beside a tar, must agree with it.
"""

import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt

from ddkmix.documents.energon import index_beside
from ddkmix.documents.tar import whole_tar
from ddkmix.domains import SPLITS, Split
from ddkmix.errors import DataError
from ddkmix.fingerprint import hash_file, hash_json
from ddkmix.index import ShardIndex, write_index
from ddkmix.pack.facts import split_report
from ddkmix.pack.manifest import Manifest, PackedShard, describe_shard, write_manifest
from ddkmix.pack.shard import named_when_full
from ddkmix.tokenizer import TokenizerCard

_BATCH_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    offset: int
    """Of the first token in the tar."""
    tokens: UInt[np.ndarray, " n"]


def index_rows(folder: Path, tokenizer: TokenizerCard, *, seq_len: int, name: str, license: str) -> Manifest:
    """Index the tars of a folder and write its rows.json.

    Args:
        folder: has `train/*.tar` and `held_out/*.tar`.
        tokenizer: that made the tokens.
        seq_len: the longest row, to which shorter ones are padded when they are read.
        name: of the domain.
        license: of its text.

    Raises:
        DataError: a split has no tars, a tar is damaged, or an array is no row of this tokenizer.
    """
    splits: dict[Split, tuple[PackedShard, ...]] = {}
    report: dict[Split, dict[str, Any]] = {}
    dtypes: dict[str, Path] = {}
    for split in SPLITS:
        paths = sorted((folder / split).glob("*.tar"))
        if not paths:
            raise DataError(f"{folder / split} has no *.tar; put the {split} shards of rows there.")
        indices = [_index_tar(path, tokenizer, seq_len) for path in paths]
        for index, path in zip(indices, paths, strict=True):
            dtypes.setdefault(index.dtype, path)
            if len(dtypes) > 1:
                (one, first), (other, second) = dtypes.items()
                raise DataError(
                    f"{first} has tokens of type {one} and {second} of {other}; write them alike."
                )
            with named_when_full(path):
                write_index(index)
        splits[split] = tuple(describe_shard(index, f"{split}/{index.name}") for index in indices)
        report[split] = split_report(indices, None)
    content = {split: [[shard.name, shard.sha256] for shard in splits[split]] for split in SPLITS}
    manifest = Manifest(
        domain=name,
        fingerprint=hash_json([tokenizer.fingerprint, tokenizer.separator_id, seq_len, name, content]),
        tokenizer=tokenizer.fingerprint,
        separator=tokenizer.separator,
        separator_id=tokenizer.separator_id,
        seq_len=seq_len,
        strategy="unknown",
        license=license,
        sources=(),
        splits=splits,
        report=report,
    )
    write_manifest(folder, manifest)
    return manifest


def _index_tar(path: Path, tokenizer: TokenizerCard, seq_len: int) -> ShardIndex:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tokenizer.path))
    rows = list(_rows(path, tokenizer, seq_len))
    if not rows:
        raise DataError(f"{path} has no .npy member; a row is an array of tokens.")
    types = {row.tokens.dtype.str for row in rows}
    if len(types) > 1:
        raise DataError(f"{path} has tokens of the types {', '.join(sorted(types))}; write them alike.")
    arrays = [row.tokens for row in rows]
    num_tokens = np.array([len(tokens) for tokens in arrays], dtype=np.int64)
    whole = _text_bytes(library, arrays, tokenizer.separator_id)
    first = _text_bytes(library, [tokens[:1] for tokens in arrays], tokenizer.separator_id)
    separators = int(sum((tokens == tokenizer.separator_id).sum() for tokens in arrays))
    return ShardIndex(
        location=str(path),
        size=path.stat().st_size,
        sha256=hash_file(path),
        offsets=np.array([row.offset for row in rows], dtype=np.int64),
        num_tokens=num_tokens,
        num_bytes=np.maximum(np.array(whole) - np.array(first), 0),
        crc32=np.array([zlib.crc32(tokens.tobytes()) for tokens in arrays], dtype=np.uint32),
        seq_len=seq_len,
        dtype=types.pop(),
        report={
            # what a document was, nobody knows; its separator is all that is left of it
            "documents": separators,
            "truncated": 0,
            "separators": separators,
            "tokens": int(num_tokens.sum()),
            "padding": int((seq_len - num_tokens).sum()),
            "bytes": sum(whole),
            "dropped": {},
        },
    )


def _rows(path: Path, tokenizer: TokenizerCard, seq_len: int) -> Iterator[_Row]:
    check, key = index_beside(path, str(path)), None
    try:
        with whole_tar(path, str(path)) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if check is not None and key != (key := member.name.partition(".")[0]):
                    check.sample(member.offset)
                if member.name.endswith(".npy"):
                    file = tar.extractfile(member)
                    assert file is not None
                    where = f"{path}: {member.name}"
                    yield _row(file.read(), member, where, tokenizer, seq_len)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); copy or write it again.") from None
    if check is not None:
        check.end(tar.offset)


def _row(data: bytes, member: tarfile.TarInfo, where: str, tokenizer: TokenizerCard, seq_len: int) -> _Row:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{where} is not a .npy array ({error}); write the shard again.") from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.dtype.byteorder == ">":
        raise DataError(
            f"{where} is {array.dtype.str} of shape {array.shape}; a row is one axis of little-endian "
            "integers."
        )
    if not 1 <= len(array) <= seq_len:
        raise DataError(f"{where} has {len(array)} tokens; a row has 1 to --seq-len = {seq_len}.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise DataError(
            f"{where} has token {low if low < 0 else high}; {tokenizer.name} has 0 to "
            f"{tokenizer.vocab_size - 1}. Name the tokenizer that made the rows."
        )
    # a signed number that is not negative has the bits of the unsigned one
    unsigned = array.view(array.dtype.str.replace("i", "u"))
    return _Row(offset=member.offset_data + len(data) - array.nbytes, tokens=unsigned)


def _text_bytes(library: Any, arrays: Sequence[UInt[np.ndarray, " _"]], separator_id: int) -> list[int]:
    """UTF-8 bytes of the text of some tokens; special tokens and separators have none."""
    sizes: list[int] = []
    for at in range(0, len(arrays), _BATCH_ROWS):
        batch = [[t for t in a.tolist() if t != separator_id] for a in arrays[at : at + _BATCH_ROWS]]
        sizes += [len(text.encode()) for text in library.decode_batch(batch, skip_special_tokens=True)]
    return sizes
