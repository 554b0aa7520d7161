"""Lists of shards: what wids writes is read, and a list that is wrong is one line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ddkmix.documents import ListedShard, read_wids
from ddkmix.errors import DataError
from tests.conftest import write_shard


def write_list(path: Path, shards: Any, **changes: Any) -> Path:
    """A list as `widsindex create` (wids 0.1.11) writes it."""
    tree = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards, "name": "a", **changes}
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}, indent=2))
    return path


def refusal(path: Path) -> str:
    """The one line that reading a list raises; it has the list's path."""
    with pytest.raises(DataError) as info:
        read_wids(path)
    message = str(info.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


def test_a_list_is_read(tmp_path: Path) -> None:
    """Everything that it says of its shards, in its order."""
    shards = [write_shard(tmp_path / f"a-{i}.tar", ["x"] * (i + 1)) for i in (1, 0)]
    entries = [
        {
            "url": path.name,
            "md5sum": hashlib.md5(path.read_bytes()).hexdigest(),
            "nsamples": 2 - i,
            "filesize": path.stat().st_size,
        }
        for i, path in enumerate(shards)
    ]
    found = read_wids(write_list(tmp_path / "a.json", entries))
    assert [str(path) for path in shards] == [shard.location for shard in found]
    assert [2, 1] == [shard.num_documents for shard in found]
    assert [entry["md5sum"] for entry in entries] == [shard.md5 for shard in found]
    assert [path.stat().st_size for path in shards] == [shard.size for shard in found]


def test_what_a_list_does_not_say_is_none(tmp_path: Path) -> None:
    """wids itself asks for no more than url and nsamples; lists by hand have less."""
    path = write_list(tmp_path / "a.json", [{"url": "a.tar"}], __kind__=None)
    location = str(tmp_path / "a.tar")
    assert (ListedShard(location=location, num_documents=None, md5=None, size=None),) == read_wids(path)


@pytest.mark.parametrize(
    ("expected", "url", "base"),
    [
        ("{list}/x/a.tar", "x/a.tar", None),
        ("/data/a.tar", "/data/a.tar", None),
        ("s3://bucket/x/a.tar", "s3://bucket/x/a.tar", None),
        ("{list}/x/a.tar", "a.tar", "x"),
        ("/data/a.tar", "a.tar", "/data"),
        ("/other/a.tar", "/other/a.tar", "/data"),
        ("s3://bucket/x/a.tar", "a.tar", "s3://bucket/x"),
        ("s3://bucket/x/a.tar", "a.tar", "s3://bucket/x/"),
        ("s3://bucket/a.tar", "../a.tar", "s3://bucket/x/"),
        ("s3://bucket/y/a.tar", "/y/a.tar", "s3://bucket/x/"),
        ("https://host/b.tar", "https://host/b.tar", "s3://bucket/x"),
        ("hf://datasets/o/n/data/a 1.tar", "data/a 1.tar", "hf://datasets/o/n"),
    ],
)
def test_names_are_relative_to_the_base_or_the_list(
    tmp_path: Path, expected: str, url: str, base: str | None
) -> None:
    """Absolute ones stay."""
    (shard,) = read_wids(write_list(tmp_path / "a.json", [{"url": url}], base=base))
    assert expected.format(list=tmp_path) == shard.location


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (" is no list of shards", {"__kind__": "other"}),
        (" is no list of shards", {"wids_version": 2}),
        (" is no list of shards", {"wids_version": None}),
        (" is no list of shards", {"shardlist": None}),
        (" is no list of shards", {"shardlist": {"url": "a.tar"}}),
        (" lists no shard", {"shardlist": []}),
        (" refers to other lists under datasets", {"datasets": [{"source_url": "b.json"}]}),
        (": base = 3;", {"base": 3}),
        (": shard 0 has no url", {"shardlist": ["a.tar"]}),
        (": shard 1 has no url", {"shardlist": [{"url": "a"}, {"nsamples": 1}]}),
        (": shard 0 has no url", {"shardlist": [{"url": ""}]}),
        (
            ": shard 0: md5sum = 'xyz'; an MD5 has 32 hex digits.",
            {"shardlist": [{"url": "a", "md5sum": "xyz"}]},
        ),
        (": shard 0: nsamples = -1; it is a whole number.", {"shardlist": [{"url": "a", "nsamples": -1}]}),
        (": shard 0: nsamples = True; it", {"shardlist": [{"url": "a", "nsamples": True}]}),
        (": shard 0: filesize = 1.5; it", {"shardlist": [{"url": "a", "filesize": 1.5}]}),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, expected: str, changes: dict[str, Any]) -> None:
    """With the entry and the value."""
    path = write_list(tmp_path / "a.json", [{"url": "a.tar"}], **changes)
    assert refusal(path).startswith(f"{path}{expected}")


def test_a_shard_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    """It would be sampled twice as often."""
    path = write_list(tmp_path / "a.json", [{"url": "a.tar"}, {"url": str(tmp_path / "a.tar")}])
    assert f"{path} lists {tmp_path / 'a.tar'} twice" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"null"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    """One line with the path."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    refusal(path)
