"""Documents of a Hugging Face dataset: on the Hub, in a local folder, or saved with `save_to_disk`.

It is streamed: nothing is copied to a cache of rows. The shards of a split are the files that it is made
of, so they can be read in parallel, and always the same rows come from the same shard.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddkmix.documents.arrow import check_columns, documents_of_table
from ddkmix.documents.records import TextField
from ddkmix.errors import DataError, DdkmixError, StorageError
from ddkmix.fingerprint import FileDigests, hash_file, hash_json

_BATCH_ROWS = 256
_COMMIT_DIGITS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSplit:
    """One split of a dataset."""

    dataset: str
    """A Hub id (`owner/name`) or a local folder."""
    config: str | None = None
    """Name of the configuration (subset); None is the default one."""
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""

    def __str__(self) -> str:
        """As messages call it: `owner/name[config] train`."""
        config = f"[{self.config}]" if self.config else ""
        return f"{self.dataset}{config} {self.split}"


def count_shards(split: HubSplit) -> int:
    """How many parts the split is made of; at most one can be read by each process.

    Raises:
        DataError: it cannot be had or read.
        StorageError: the Hub cannot be reached.
    """
    with _explaining(split):
        return int(_open(split).num_shards)


def read_hub_documents(split: HubSplit, index: int, of: int, text_field: TextField) -> Iterator[str]:
    """The documents of part `index` of `of` in order; null is "".

    Args:
        split: what to read; pin its revision (`pin_revision`) when it is read more than once.
        index: which part, from 0.
        of: parts in all, at most `count_shards(split)`.
        text_field: the column: `FIELD` or `json.FIELD`; dots go into structs. Or the fields of an example.

    Raises:
        DataError: the split cannot be read, the column is missing or holds no strings, or `of` is too large.
        StorageError: the Hub cannot be reached.
    """
    assert 0 <= index < of
    name, rows = f"{split} (shard {index} of {of})", 0
    with _explaining(split):
        dataset = _open(split)
        if of > dataset.num_shards:
            raise DataError(f"{split} has {dataset.num_shards} shards and cannot be read in {of} parts.")
        part = dataset.shard(num_shards=of, index=index).with_format("arrow")
        for table in part.iter(batch_size=_BATCH_ROWS):
            check_columns(table.schema, text_field, name)
            yield from documents_of_table(table, text_field, name, rows)
            rows += table.num_rows


def pin_revision(split: HubSplit) -> HubSplit:
    """The split at the commit that its revision names now; a local folder as it is.

    Raises:
        StorageError: the Hub cannot be reached.
        DataError: it has no such dataset or revision.
    """
    if _is_local(split):
        return split
    if (
        split.revision
        and len(split.revision) == _COMMIT_DIGITS
        and set(split.revision) <= set("0123456789abcdef")
    ):
        return split
    from huggingface_hub import HfApi

    with _explaining(split):
        return replace(split, revision=HfApi().dataset_info(split.dataset, revision=split.revision).sha)


def hub_fingerprint(split: HubSplit, digests: FileDigests | None = None) -> str:
    """SHA-256 (hex) that changes with the content: the commit of a Hub dataset, the files of a folder.

    Args:
        split: the split.
        digests: remembers the digests of a local folder's files from call to call.

    Raises:
        StorageError: the Hub cannot be reached.
        DataError: there is no such dataset.
    """
    if _is_local(split):
        content: Any = _folder_content(split, digests)
    else:
        content = [split.dataset, pin_revision(split).revision]
    return hash_json({"content": content, "config": split.config, "split": split.split})


def _folder_content(split: HubSplit, digests: FileDigests | None) -> list[list[str]]:
    """Relative path and digest of every file; hidden ones, which `datasets` does not read, left out."""
    folder = Path(split.dataset)
    content = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            digest = digests.of(path) if digests and path.stat().st_size else hash_file(path)
            content.append([relative.as_posix(), digest])
    if not content:
        raise DataError(f"{split}: the folder {folder} has no files.")
    return content


def _is_local(split: HubSplit) -> bool:
    """Whether the dataset is a folder.

    Raises:
        DataError: it looks like one and is none, or a folder has a revision.
    """
    name = split.dataset
    if Path(name).is_dir():
        if split.revision:
            raise DataError(f"{split}: a local folder has no revision; remove {split.revision!r}.")
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise DataError(f"{split}: no such folder; give a local folder or a Hub id (owner/name).")
    return False


def _open(split: HubSplit) -> Any:
    """The split as an `IterableDataset`."""
    import datasets

    if not _is_local(split):
        return datasets.load_dataset(
            split.dataset, split.config, split=split.split, revision=split.revision, streaming=True
        )
    folder = Path(split.dataset).resolve()  # `datasets` takes a bare name for a Hub id
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _open_saved(split, folder)
    _refuse_zstd(split, folder)
    return datasets.load_dataset(str(folder), split.config, split=split.split, streaming=True)


def _refuse_zstd(split: HubSplit, folder: Path) -> None:
    """`datasets` ends silently where a zstd file is cut (measured: 7,259 of 30,000 rows, no error)."""
    for path in sorted(folder.rglob("*.zst")):
        raise DataError(
            f"{split}: {path.relative_to(folder)} is zstd, of which datasets does not notice when it is cut. "
            "Name the files as shards of the card instead, where they are checked."
        )


def _open_saved(split: HubSplit, folder: Path) -> Any:
    """What `save_to_disk` wrote: a dataset, or a dict of splits."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split.split not in saved:
            raise DataError(f"{split}: no such split; {folder} has {', '.join(map(str, saved))}.")
        saved = saved[split.split]
    elif saved.split is not None and str(saved.split) != split.split:
        raise DataError(f"{split}: no such split; {folder} is {saved.split}.")
    parts = max(min(len(saved.cache_files), len(saved)), 1)
    return saved.with_format(None).to_iterable_dataset(num_shards=parts)


@contextmanager
def _explaining(split: HubSplit) -> Iterator[None]:
    """Turn what `datasets` and the Hub raise into one line.

    It wraps code of theirs only: `datasets` raises whatever its parsers, its file systems and its
    builders raise, and has no base class for it.
    """
    try:
        yield
    except (DdkmixError, AssertionError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if _is_network(error):
            raise StorageError(
                f"{split} cannot be had from the Hub ({reason}); check the network and HF_HUB_OFFLINE, or "
                "download it (hf download --repo-type dataset) and name the folder."
            ) from None
        raise DataError(
            f"{split} cannot be read ({reason}); check dataset, config, split and revision."
        ) from None


def _is_network(error: Exception) -> bool:
    # the Hub's client has changed its HTTP library twice, and lets its errors through
    clients = {"aiohttp", "httpx", "httpx2", "requests", "urllib3"}
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(clients & modules)
