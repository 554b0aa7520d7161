"""`rows.json`: what a packed folder holds, so that it can be published and read from anywhere.

    <folder>/rows.json
    <folder>/train/part-0.tar            rows, a WebDataset
    <folder>/train/part-0.tar.index.npz  where each row lies
    <folder>/held_out/...

It is written when every shard is there, and its bytes depend on them alone: of several jobs that finish at
the same time, each may write it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddkmix.domains import SPLITS, Split
from ddkmix.errors import DataError
from ddkmix.fingerprint import hash_file, write_atomically
from ddkmix.index import ShardIndex, index_path

MANIFEST = "rows.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedShard:
    """One shard of rows in a packed folder."""

    name: str
    """What its rows are called after."""
    path: str
    """Where it lies, relative to the folder."""
    size: int
    sha256: str
    index_sha256: str
    rows: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of rows.json."""

    domain: str
    fingerprint: str
    """Changes with the documents, the tokenizer and the packing."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    separator: str
    separator_id: int
    seq_len: int
    strategy: str
    license: str
    sources: tuple[Mapping[str, Any], ...]
    splits: Mapping[Split, tuple[PackedShard, ...]]
    report: Mapping[Split, Mapping[str, Any]]
    """Per split: documents, tokens, bytes, rows, padding, what was dropped."""
    end_of_turn: str | None = None
    """Token behind a response; None where rows are text."""
    end_of_turn_id: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back unchanged."""
        tree = asdict(self)
        if self.end_of_turn is None:  # as it always was
            del tree["end_of_turn"], tree["end_of_turn_id"]
        return {"format": MANIFEST_FORMAT, **tree}


def describe_shard(index: ShardIndex, path: str) -> PackedShard:
    """The entry of a local shard.

    Args:
        index: of the shard.
        path: of the shard, relative to the packed folder.
    """
    return PackedShard(
        name=index.name,
        path=path,
        size=index.size,
        sha256=index.sha256,
        index_sha256=hash_file(index_path(Path(index.location))),
        rows=index.num_rows,
        tokens=int(index.num_tokens.sum()),
        bytes=int(index.report["bytes"]),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write rows.json, unless it says this already.

    Raises:
        DataError: the folder cannot be written.
    """
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
    path = folder / MANIFEST
    try:
        if path.exists() and path.read_bytes() == text.encode():
            return
        write_atomically(path, text)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); free space or move cache_dir."
        ) from None


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from the bytes of rows.json.

    Args:
        data: the file.
        where: what messages call it.

    Raises:
        DataError: it is not one, or one of another version.
    """
    try:
        tree = json.loads(data)
        if tree["format"] != MANIFEST_FORMAT:
            raise DataError(
                f"{where} has the format {tree['format']!r}; this version of ddkmix reads {MANIFEST_FORMAT}. "
                "Pack again, or use the version that wrote it."
            )
        tree.pop("format")
        splits = {split: tuple(_shard(entry) for entry in tree["splits"][split]) for split in SPLITS}
        manifest = Manifest(**{**tree, "splits": splits, "sources": tuple(tree["sources"])})
        _check_types(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{where} is not a rows.json that ddkmix wrote ({type(error).__name__}: {reason}); pack again or "
            "copy it again."
        ) from None
    return manifest


def _shard(entry: Mapping[str, Any]) -> PackedShard:
    shard = PackedShard(**entry)
    for name in ("name", "path", "sha256", "index_sha256"):
        if not isinstance(getattr(shard, name), str):
            raise TypeError(f"{name} of a shard")
    for name in ("size", "rows", "tokens", "bytes"):
        if not isinstance(getattr(shard, name), int):
            raise TypeError(f"{name} of a shard")
    # a path from a file somebody else wrote must not lead out of its folder
    parts = shard.path.split("/")
    if "" in parts or ".." in parts or "\\" in shard.path or "/" in shard.name:
        raise ValueError(f"path {shard.path!r}")
    return shard


def _check_types(manifest: Manifest) -> None:
    for name in ("domain", "fingerprint", "tokenizer", "separator", "strategy", "license"):
        if not isinstance(getattr(manifest, name), str):
            raise TypeError(name)
    for name in ("separator_id", "seq_len"):
        if not isinstance(getattr(manifest, name), int):
            raise TypeError(name)
    if not isinstance(manifest.end_of_turn, str | None) or not isinstance(
        manifest.end_of_turn_id, int | None
    ):
        raise TypeError("end_of_turn")
    for split in SPLITS:
        if not isinstance(manifest.report[split], dict):
            raise TypeError("report")
