"""Lists of shards as wids (WebDataset's indexed reader) writes them: names, sizes, digests, counts.

    {"__kind__": "wids-shard-index-v1", "wids_version": 1, "base": URL, "shardlist": [
        {"url": "a-000000.tar", "md5sum": "...", "nsamples": 1000, "filesize": 12345678}, ...]}

A name is relative to `base`, or to the list itself where that is missing. What the list says about a
shard is only handed on; whoever has the shard verifies it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from ddkmix.errors import DataError

KIND = "wids-shard-index-v1"
_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedShard:
    """One shard, and what its list says about it; None where it says nothing."""

    location: str
    """A path or a URL."""
    num_documents: int | None
    """Samples in it."""
    md5: str | None
    """Hex, lower case."""
    size: int | None
    """Bytes."""


def read_wids(path: Path) -> tuple[ListedShard, ...]:
    """The shards of a wids list in its order.

    Raises:
        DataError: the file is no such list, an entry is wrong, a shard is listed twice, or the list refers to
            other lists.
        OSError: it cannot be read.
    """
    tree = _read_tree(path)
    entries = tree["shardlist"]
    base = tree.get("base")
    if base is not None and not isinstance(base, str):
        raise DataError(f"{path}: base = {base!r}; it is the folder or URL that the shards lie in.")
    shards = tuple(_shard(entry, base, f"{path}: shard {i}", path) for i, entry in enumerate(entries))
    locations: set[str] = set()
    for shard in shards:
        if shard.location in locations:
            raise DataError(f"{path} lists {shard.location} twice; remove one.")
        locations.add(shard.location)
    return shards


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); write the list again (widsindex create).") from None
    kind = tree.get("__kind__", KIND) if isinstance(tree, dict) else None
    if kind != KIND or tree.get("wids_version") != 1 or not isinstance(tree.get("shardlist"), list):
        raise DataError(
            f"{path} is no list of shards: it has no wids_version 1 with a shardlist. Write it with "
            "widsindex create."
        )
    if tree.get("datasets"):
        raise DataError(f"{path} refers to other lists under datasets; name those lists themselves.")
    if not tree["shardlist"]:
        raise DataError(f"{path} lists no shard; write it again (widsindex create).")
    return tree


def _shard(entry: Any, base: str | None, where: str, path: Path) -> ListedShard:
    if not isinstance(entry, dict) or not isinstance(entry.get("url"), str) or not entry["url"]:
        raise DataError(f"{where} has no url; write the list again (widsindex create).")
    md5 = entry.get("md5sum")
    if md5 is not None and not (isinstance(md5, str) and _MD5.fullmatch(md5.lower())):
        raise DataError(f"{where}: md5sum = {md5!r}; an MD5 has 32 hex digits.")
    return ListedShard(
        location=_resolve(entry["url"], base, path),
        num_documents=_count(entry, "nsamples", where),
        md5=md5.lower() if md5 else None,
        size=_count(entry, "filesize", where),
    )


def _count(entry: dict[str, Any], key: str, where: str) -> int | None:
    value = entry.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise DataError(f"{where}: {key} = {value!r}; it is a whole number.")
    return value


def _resolve(url: str, base: str | None, path: Path) -> str:
    """A shard's name relative to the base, and that relative to the list; absolute ones stay."""
    if "://" in url:
        return url
    if base is not None and "://" in base:
        # urljoin knows few schemes, so the path is joined alone
        parts = urlsplit(base)
        joined = urljoin(parts.path.rstrip("/") + "/", url)
        return parts._replace(path=joined).geturl()
    return str(path.parent / (base or "") / url)
