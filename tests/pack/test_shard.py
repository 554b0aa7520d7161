"""What a packing process does with one shard: formats, promises, the held-out share, what is counted."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.documents import digest
from ddkmix.errors import DataError
from ddkmix.pack import PackedDomain, pack_domains, pack_report
from ddkmix.pack import shard as shard_module
from ddkmix.pack.digests import count_repeated, digest_set, read_digests, write_digests
from ddkmix.pack.shard import is_held_out
from ddkmix.tokenizer import TokenizerCard
from tests.conftest import documents, write_shard
from tests.pack.rows import files_of, one_domain, texts_of

TEXTS = ["first", "second one", "дритте 三"]


def pack(path: Path, tokenizer: TokenizerCard, *, seq_len: int = 16, **card: Any) -> PackedDomain:
    """The domain of a card, packed in this process."""
    domain = one_domain(path / "code.yaml", **card)
    return pack_domains([domain], tokenizer, seq_len=seq_len, cache_dir=path / "cache", processes=1)["code"]


# --- formats ----------------------------------------------------------------------------------------


def jsonl(texts: Sequence[str]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts: Sequence[str]) -> bytes:
    """A Parquet file with the column `text`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), data)
    return data.getvalue()


def tar(texts: Sequence[str]) -> bytes:
    """A WebDataset with members .json."""
    import webdataset

    data = io.BytesIO()
    with webdataset.TarWriter(data, mtime=0) as writer:
        for i, text in enumerate(texts):
            writer.write({"__key__": f"{i:05d}", "json": json.dumps({"text": text}).encode()})
    return data.getvalue()


FORMATS: dict[str, Callable[[Sequence[str]], bytes]] = {
    "a.jsonl": jsonl,
    "a.json": jsonl,
    "a.ndjson.xz": lambda texts: lzma.compress(jsonl(texts)),
    "a.jsonl.gz": lambda texts: gzip.compress(jsonl(texts)),
    "a.jsonl.bz2": lambda texts: bz2.compress(jsonl(texts)),
    "a.parquet": parquet,
    "a.tar": tar,
    "a.tar.gz": lambda texts: gzip.compress(tar(texts)),
    "a.tgz": lambda texts: gzip.compress(tar(texts)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, tokenizer: TokenizerCard, name: str) -> None:
    """Whatever documents come in, rows and their names are those of a plain tar."""
    (tmp_path / name).write_bytes(FORMATS[name](TEXTS))
    (tmp_path / "held_out.jsonl").write_bytes(jsonl(["held out"]))
    packed = pack(tmp_path, tokenizer, train=name, held_out="held_out.jsonl", text_field="json.text")
    assert TEXTS == texts_of(packed.train, tokenizer)
    assert "code/a.tar#0" == packed.train.name_of(0, 0)


def test_a_local_data_set_is_packed(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """One row shard per file, or as many as the card says; more than there are files is one line."""
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / "data" / f"train-{i}.jsonl").write_bytes(jsonl([f"document {i}"]))
    (tmp_path / "held_out.jsonl").write_bytes(jsonl(["held out"]))
    card: dict[str, Any] = {"held_out": "held_out.jsonl", "text_field": "text"}
    packed = pack(tmp_path, tokenizer, train={"dataset": "./data"}, **card)
    assert [f"data-train-{i:05d}-of-00003.tar" for i in range(3)] == [s.name for s in packed.train.shards]
    assert [f"document {i}" for i in range(3)] == texts_of(packed.train, tokenizer)
    packed = pack(tmp_path, tokenizer, train={"dataset": "./data", "shards": 2}, **card)
    assert 2 == len(packed.train.shards)
    with pytest.raises(DataError, match="cannot be read in 4 parts") as info:
        pack(tmp_path, tokenizer, train={"dataset": "./data", "shards": 4}, **card)
    assert "\n" not in str(info.value)


# --- promises ---------------------------------------------------------------------------------------


def wids(path: Path, content: bytes, **changes: Any) -> None:
    """A shard and a wids list that describes it, with some claims changed."""
    (path / "0.tar").write_bytes(content)
    entry = {
        "url": "0.tar",
        "md5sum": hashlib.md5(content).hexdigest(),
        "nsamples": 3,
        "filesize": len(content),
        **changes,
    }
    tree = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [entry]}
    (path / "list.json").write_text(json.dumps(tree))
    (path / "held_out.jsonl").write_bytes(jsonl(["held out"]))


def test_a_wids_list_is_packed(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """Its shards, checked against it."""
    wids(tmp_path, tar(TEXTS))
    packed = pack(tmp_path, tokenizer, train="list.json", held_out="held_out.jsonl", text_field="json.text")
    assert TEXTS == texts_of(packed.train, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"md5sum": "0" * 32}, "and 000000000000... was promised; it is damaged or another file."),
        ({"nsamples": 4}, "has 3 documents and its list promises 4"),
        ({"filesize": 7}, "bytes and its list promises 7"),
    ],
)
def test_a_shard_that_breaks_a_promise_is_refused(
    tmp_path: Path, tokenizer: TokenizerCard, changes: dict[str, Any], message: str
) -> None:
    """One line with the shard, what was found and what was promised."""
    wids(tmp_path, tar(TEXTS), **changes)
    with pytest.raises(DataError) as info:
        pack(tmp_path, tokenizer, train="list.json", held_out="held_out.jsonl", text_field="json.text")
    assert message in str(info.value)
    assert str(info.value).startswith(f"{tmp_path}/0.tar has ")
    assert "\n" not in str(info.value)


def test_a_wrong_checksum_of_a_card_is_refused(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """And a right one is not."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl").write_bytes(jsonl(["held out"]))
    right = hashlib.sha256(jsonl(TEXTS)).hexdigest()
    card: dict[str, Any] = {"train": "a.jsonl", "held_out": "b.jsonl", "text_field": "text"}
    assert TEXTS == texts_of(pack(tmp_path, tokenizer, sha256={"a.jsonl": right}, **card).train, tokenizer)
    with pytest.raises(
        DataError, match=f"a.jsonl has the sha256 {right[:12]}... and {'0' * 12}... was promised"
    ):
        pack(tmp_path, tokenizer, sha256={"a.jsonl": "0" * 64}, **card)


# --- the held-out share -----------------------------------------------------------------------------

Shards = list[list[str]]
TEXT = st.text("abcdefgh ", min_size=1, max_size=4).filter(str.strip)


def check_share(folder: Path, tokenizer: TokenizerCard, shards: Shards, share: float) -> None:
    """Both sides together are all documents, each as often as it came; no document is on both sides."""
    for i, texts in enumerate(shards):
        write_shard(folder / f"{i}.tar", texts)
    domain = one_domain(folder / "code.yaml", train="*.tar", held_out={"share_of_train": share})
    try:
        packed = pack_domains([domain], tokenizer, seq_len=64, cache_dir=folder / "cache", processes=1)[
            "code"
        ]
    except DataError as error:
        assert "hold no text" in str(error)  # one side is empty
        return
    train, held_out = texts_of(packed.train, tokenizer), texts_of(packed.held_out, tokenizer)
    assert sorted(text for texts in shards for text in texts) == sorted([*train, *held_out])
    assert not set(train) & set(held_out)
    assert all(is_held_out(digest(text), share) for text in held_out)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    shards=st.lists(st.lists(TEXT, min_size=1, max_size=6), min_size=1, max_size=3, unique_by=tuple),
    share=st.sampled_from([0.1, 0.3, 0.5]),
)
def test_the_share_is_a_partition(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: TokenizerCard, shards: Shards, share: float
) -> None:
    """Any documents, with repeats in and across shards."""
    check_share(tmp_path_factory.mktemp("share"), tokenizer, shards, share)


def test_a_share_by_position_fails_the_check(
    tmp_path: Path, tokenizer: TokenizerCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second document, as many loaders do it: copies of one document fall on both sides."""
    count = iter(range(1000))
    monkeypatch.setattr(shard_module, "is_held_out", lambda document, share: next(count) % 2 == 0)
    with pytest.raises(AssertionError):
        check_share(tmp_path, tokenizer, [["a", "b", "a", "c"], ["d", "b"], ["a"]], 0.5)


def test_the_share_is_about_as_large_as_asked_for() -> None:
    """20,000 documents, 1 %: 200 within four standard deviations (14 each)."""
    held_out = sum(is_held_out(digest(f"document {i}"), 0.01) for i in range(20_000))
    assert abs(held_out - 200) < 57


def test_a_document_stays_on_its_side_when_shards_change(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """More shards, another order: what was held out before is never trained on later."""
    texts = documents("code", 40)
    write_shard(tmp_path / "0.tar", texts[:20])
    write_shard(tmp_path / "1.tar", texts[20:])
    held_out = {"share_of_train": 0.2}
    one = pack(tmp_path, tokenizer, train="0.tar", held_out=held_out)
    two = pack(tmp_path, tokenizer, train=["1.tar", "0.tar"], held_out=held_out)
    assert set(texts_of(one.held_out, tokenizer)) < set(texts_of(two.held_out, tokenizer))
    assert set(texts_of(one.train, tokenizer)) < set(texts_of(two.train, tokenizer))


def test_rows_of_both_sides_have_the_name_of_their_shard(tmp_path: Path, tokenizer: TokenizerCard) -> None:
    """They lie in folders of their own."""
    write_shard(tmp_path / "0.tar", documents("code", 40))
    pack(tmp_path, tokenizer, train="0.tar", held_out={"share_of_train": 0.2})
    (folder,) = (tmp_path / "cache" / "rows").iterdir()
    assert {"train/0.tar", "held_out/0.tar"} < set(files_of(folder))


# --- what is counted --------------------------------------------------------------------------------


def test_repeated_documents_are_counted_over_shards_and_kept(
    tmp_path: Path, tokenizer: TokenizerCard
) -> None:
    """Information only: b comes three times, so two of them are repeats."""
    write_shard(tmp_path / "0.tar", ["a", "b", "b", " "])
    write_shard(tmp_path / "1.tar", ["b", "c"])
    write_shard(tmp_path / "held_out.tar", ["d"])
    packed = pack(tmp_path, tokenizer, train="{0,1}.tar", held_out="held_out.tar")
    report = pack_report({"code": packed})
    assert (5, 2, {"empty": 1}) == tuple(
        report["code"]["train"][k] for k in ("documents", "repeated", "dropped")
    )
    assert (5, 2) == tuple(report["total"]["train"][k] for k in ("documents", "repeated"))
    assert 0 == report["code"]["held_out"]["repeated"]


def test_digests_are_kept_in_order(tmp_path: Path) -> None:
    """16 bytes each; what is missing or damaged is None, and nothing is nothing."""
    rows = tmp_path / "train" / "0.tar"
    write_digests(rows, [digest("b"), digest("a"), digest("b")])
    found = read_digests(rows)
    assert found is not None
    assert [digest("b"), digest("a"), digest("b")] == [row.tobytes() for row in found]
    assert {digest("a"), digest("b")} == digest_set([rows])
    other = tmp_path / "train" / "1.tar"
    assert (None, None) == (read_digests(other), count_repeated([rows, other]))
    write_digests(other, [])
    assert 1 == count_repeated([rows, other])


def test_repeats_are_counted_in_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little is sorted at once."""
    shards = [tmp_path / "train" / f"{i}.tar" for i in range(3)]
    for i, rows in enumerate(shards):
        write_digests(rows, [digest(f"{(i * 7 + k) % 11}") for k in range(10)])
    for most in (1, 4, 7, 30, 100):
        monkeypatch.setattr("ddkmix.pack.digests._MOST_AT_ONCE", most)
        assert 30 - 11 == count_repeated(shards)
