"""Shards of documents: what `train` and `held_out` of a card name, one by one, before anything is read.

    en/part-{0..1}.jsonl.zst, s3://bucket/x-*.tar, shards.json, {dataset: allenai/c4, config: en}
        -> DocumentShard, DocumentShard, ...

Finding shards touches the local disk and nothing else: what is remote is looked at when it is packed.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob  # Path.glob takes no absolute pattern
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from ddkmix.config import Storage
from ddkmix.documents import HubSplit, read_wids
from ddkmix.errors import DataError
from ddkmix.storage.location import check_location, file_name, is_remote, scheme_of, shown

_EXTENSION = re.compile(r"(\.(tar|tgz|jsonl|ndjson|json|parquet))?(\.(gz|bz2|xz|zst|zstd))?$", re.IGNORECASE)
_WIDS_MARK = re.compile(rb'"wids_version"\s*:')


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentShard:
    """One file of documents, or one part of a data set: all that a process needs to know to read it."""

    location: str
    """A path or a URL; for a data set, its name or folder."""
    name: str = ""
    """The file name that its rows have, unique in its split: `train-000003.tar`, `en__part-0.tar`."""
    sha256: str | None = None
    """Digest of its bytes that the card promises, hex."""
    md5: str | None = None
    """Digest of its bytes that a wids list promises, hex."""
    size: int | None = None
    """Bytes that a wids list promises."""
    num_documents: int | None = None
    """Documents that a wids list promises."""
    dataset: HubSplit | None = None
    """The split of a data set that it is a part of."""
    index: int = 0
    """Which part of the data set, from 0."""
    of: int = 1
    """Parts that the data set is read in; 0 until somebody has counted its files."""

    @property
    def remote(self) -> bool:
        """Its bytes lie behind a URL."""
        return self.dataset is None and is_remote(self.location)

    def __str__(self) -> str:
        """How messages call it: without the credentials that a URL may hold."""
        return shown(self.location) if self.dataset is None else f"{self.location} ({self.name})"


def shards_of_pattern(pattern: str, folder: Path, storage: Storage, *, where: str) -> Iterator[DocumentShard]:
    """The files that one entry of a card names, in order.

    Args:
        pattern: a path relative to `folder`, an absolute path or a URL; braces expand, and so does `*` in a
            path; the path of a wids list stands for the shards in it.
        folder: the card's.
        storage: what remote locations may be.
        where: "CARD: train" or the like, for messages.

    Raises:
        DataError: nothing is there, a file is empty, or braces are unbalanced.
    """
    try:
        locations = list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"{where} = {pattern!r} has unbalanced braces.") from None
    for location in locations:
        if is_remote(location):
            yield _remote_shard(location, storage, where)
            continue
        for path in _local_paths(location, folder, where):
            if _is_wids_list(path):
                yield from _listed_shards(path, storage, where)
            else:
                yield DocumentShard(location=str(path))


def shard_of_dataset(split: HubSplit, parts: int | None) -> DocumentShard:
    """A data set as one shard, until `parts_of_dataset` is told how many there are.

    Args:
        split: of the data set.
        parts: how many; None means as many as it has files.
    """
    return DocumentShard(location=split.dataset, name=_stem_of(split), dataset=split, of=parts or 0)


def parts_of_dataset(split: HubSplit, parts: int) -> Iterator[DocumentShard]:
    """The parts of one split of a Hugging Face data set, each of which becomes a shard of rows."""
    for index in range(parts):
        yield DocumentShard(
            location=split.dataset,
            name=f"{_stem_of(split)}-{index:05d}-of-{parts:05d}.tar",
            dataset=split,
            index=index,
            of=parts,
        )


def with_names(shards: Sequence[DocumentShard], *, where: str) -> tuple[DocumentShard, ...]:
    """Give every shard the name of its rows: its file name, with as many folders before it as it takes to
    tell it from the others of its split.

    Raises:
        DataError: two shards cannot be told apart.
    """
    locations = [shard.location for shard in shards if not shard.name]
    names = _distinct_names(locations)
    named = tuple(shard if shard.name else replace(shard, name=names[shard.location]) for shard in shards)
    first: dict[str, DocumentShard] = {}
    for shard in named:
        other = first.setdefault(shard.name, shard)
        if _path_of(other.location) != _path_of(
            shard.location
        ):  # else one shard twice, which is told better later
            raise DataError(
                f"{where}: {other} and {shard} would both have rows called {shard.name}; rename one."
            )
    return named


def with_checksums(
    shards: Sequence[DocumentShard], sha256: Mapping[str, str], used: set[str]
) -> tuple[DocumentShard, ...]:
    """Give shards the digests that a card promises for them, by file name or by the end of their path.

    Args:
        shards: of one split.
        sha256: file name -> SHA-256 in hex.
        used: the keys that found a shard are added here.

    Raises:
        DataError: a key fits several shards.
    """
    result = list(shards)
    for key, digest in sha256.items():
        fits = [i for i, shard in enumerate(shards) if f"/{_path_of(shard.location)}".endswith(f"/{key}")]
        if len(fits) > 1:
            raise DataError(
                f"sha256: {key!r} fits {shards[fits[0]]} and {shards[fits[1]]}; write more of the path "
                "before it."
            )
        for i in fits:
            result[i] = replace(result[i], sha256=digest.lower())
            used.add(key)
    return tuple(result)


def _remote_shard(location: str, storage: Storage, where: str) -> DocumentShard:
    if "*" in location and scheme_of(location) != "pipe":
        raise DataError(
            f"{where} = {shown(location)!r}: `*` stands for files of this machine only; name remote shards "
            "with braces, a list or a wids list."
        )
    check_location(location, storage, where)
    return DocumentShard(location=location)


def _local_paths(location: str, folder: Path, where: str) -> list[Path]:
    path = folder / location
    if "*" in location and not path.exists():
        pattern = re.sub(r"([\[?])", r"[\1]", str(path))  # only * is a wildcard here
        paths = sorted(Path(match) for match in glob(pattern, recursive=True))  # noqa: PTH207
        paths = [match for match in paths if match.is_file()]
        if not paths:
            raise DataError(f"{where} = {location!r} matches no file; correct the card or add it.")
    else:
        paths = [path]
    for path in paths:
        _check_file(path, where)
    return paths


def _check_file(path: Path, where: str) -> None:
    if not path.is_file():
        raise DataError(f"{where} shard {path} does not exist; correct the card or add it.")
    if path.stat().st_size == 0:
        raise DataError(f"{where} shard {path} is empty (0 bytes); write it again.")


def _is_wids_list(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return _WIDS_MARK.search(file.read(1 << 16)) is not None


def _listed_shards(path: Path, storage: Storage, where: str) -> Iterator[DocumentShard]:
    for entry in read_wids(path):
        if is_remote(entry.location):
            shard = _remote_shard(entry.location, storage, f"{where}: {path.name}:")
        else:
            _check_file(Path(entry.location), f"{where}: {path.name}:")
            shard = DocumentShard(location=entry.location)
        yield replace(shard, md5=entry.md5, size=entry.size, num_documents=entry.num_documents)


def _distinct_names(locations: Sequence[str]) -> dict[str, str]:
    """The shortest distinct ends of paths, as file names of tars."""
    parts = {location: _path_of(location).split("/") for location in locations}
    names = {location: _row_name(path[-1:]) for location, path in parts.items()}
    deepest = max((len(path) for path in parts.values()), default=0)
    for depth in range(2, deepest + 1):
        for clash in _clashes(names):
            names.update({location: _row_name(parts[location][-depth:]) for location in clash})
    for clash in _clashes(names):  # the same path in two formats: a.jsonl and a.parquet
        names.update({location: _safe("__".join(parts[location][-1:])) + ".tar" for location in clash})
    return names


def _stem_of(split: HubSplit) -> str:
    name = PurePosixPath(split.dataset).name
    return _safe("-".join(part for part in (name, split.config, split.split) if part))


def _clashes(names: Mapping[str, str]) -> list[list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for location, name in names.items():
        groups[name].append(location)
    return [group for group in groups.values() if len(group) > 1]


def _row_name(path: Sequence[str]) -> str:
    *folders, file = path
    stem = _EXTENSION.sub("", file) or file
    return _safe("__".join([*folders, stem])) + ".tar"


def _path_of(location: str) -> str:
    """The path of a location, with `.` and `..` resolved and without a URL's host and query."""
    scheme = scheme_of(location)
    path = file_name(location) if scheme == "pipe" else location.partition("://")[2] or location
    if scheme not in ("", "pipe", "file"):
        path = re.split(r"[?#]", path, maxsplit=1)[0]
    kept: list[str] = []
    for part in path.split("/"):
        if part == ".." and kept and kept[-1] != "..":
            kept.pop()
        elif part not in ("", "."):
            kept.append(part)
    return "/".join(kept)


def _safe(name: str) -> str:
    """Without the characters that separate the parts of a row's name, a path or a URL."""
    return re.sub(r"[\s/\\#?%:*]+", "_", name)
