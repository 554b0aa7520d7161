"""Packed folders: what rows.json says, opening, publishing, and refusing what does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddkmix.errors import ConfigError, DataError
from ddkmix.fingerprint import hash_file
from ddkmix.pack import open_packed, pack_domains, packed_folders, read_manifest
from ddkmix.pack.manifest import parse_manifest
from ddkmix.prepare import publish_rows
from ddkmix.tokenizer import TokenizerCard, read_tokenizer
from tests.pack.rows import SEQ_LEN, domain_of, files_of, one_domain

SOURCE = {"package": "p", "registry": "pypi", "version": "1", "license": "MIT"}


@pytest.fixture
def packed_folder(tmp_path: Path, tokenizer: TokenizerCard) -> Path:
    """The packed rows of two train shards and a held-out one."""
    domain_of(tmp_path, "code", [["one", "two"], ["three"]], ["held out"])
    domain = one_domain(
        tmp_path / "code.yaml",
        train="code/train-*.tar",
        held_out="code/held_out.tar",
        license="MIT",
        sources=[SOURCE],
    )
    pack_domains([domain], tokenizer, seq_len=SEQ_LEN, cache_dir=tmp_path / "cache", processes=1)
    return packed_folders([domain], tokenizer, SEQ_LEN, tmp_path / "cache")["code"][0]


def test_rows_json_describes_the_folder(packed_folder: Path, tokenizer: TokenizerCard) -> None:
    """Everything that a reader needs, and where the text came from."""
    tree = json.loads((packed_folder / "rows.json").read_text())
    assert (1, "code", tokenizer.fingerprint, "<|endoftext|>", 0, SEQ_LEN, "concatenate", "MIT") == tuple(
        tree[name]
        for name in (
            "format",
            "domain",
            "tokenizer",
            "separator",
            "separator_id",
            "seq_len",
            "strategy",
            "license",
        )
    )
    assert "MIT" == tree["sources"][0]["license"]
    first, _ = tree["splits"]["train"]
    path = packed_folder / first["path"]
    assert ("train-000000.tar", "train/train-000000.tar") == (first["name"], first["path"])
    assert (path.stat().st_size, hash_file(path)) == (first["size"], first["sha256"])
    assert hash_file(path.with_name(f"{path.name}.index.npz")) == first["index_sha256"]
    assert (1, len("onetwo")) == (first["rows"], first["bytes"])
    assert 3 == tree["report"]["train"]["documents"]
    assert str(packed_folder.parents[2]) not in (packed_folder / "rows.json").read_text()


def test_rows_json_follows_the_card(packed_folder: Path, tokenizer: TokenizerCard, tmp_path: Path) -> None:
    """A corrected licence packs nothing anew, but rows.json says it; a damaged one is written again."""
    before = (packed_folder / "rows.json").read_text()
    stamp = (packed_folder / "train" / "train-000000.tar").stat().st_mtime_ns
    card: dict[str, Any] = {"train": "code/train-*.tar", "held_out": "code/held_out.tar", "sources": [SOURCE]}
    for license, damage in (("Apache-2.0", False), ("MIT", True)):
        if damage:
            (packed_folder / "rows.json").write_text(before[:100])
        domain = one_domain(tmp_path / "code.yaml", license=license, **card)
        pack_domains([domain], tokenizer, seq_len=SEQ_LEN, cache_dir=tmp_path / "cache", processes=1)
        tree = json.loads((packed_folder / "rows.json").read_text())
        assert license == tree["license"]
    assert before == (packed_folder / "rows.json").read_text()
    assert stamp == (packed_folder / "train" / "train-000000.tar").stat().st_mtime_ns


def rows_domain(folder: Path, rows: Path | str, tokenizer: TokenizerCard, seq_len: int = SEQ_LEN) -> Any:
    """Open a card that names packed rows."""
    domain = one_domain(folder / "packed.yaml", name="mine", rows=str(rows))
    return pack_domains([domain], tokenizer, seq_len=seq_len, cache_dir=folder / "other")["mine"]


def test_a_card_may_name_packed_rows(packed_folder: Path, tokenizer: TokenizerCard, tmp_path: Path) -> None:
    """Nothing is packed; the rows are called after the card's domain."""
    packed = rows_domain(tmp_path, packed_folder, tokenizer)
    assert "mine/train-000001.tar#0" == packed.train.name_of(1, 0)
    assert open_packed(str(packed_folder), cache_dir=tmp_path).train.fingerprint == packed.train.fingerprint
    assert not (tmp_path / "other" / "rows").exists()


def test_rows_that_do_not_fit_the_run_are_refused(
    packed_folder: Path, tokenizer: TokenizerCard, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Another row length, separator or tokenizer: one line each."""
    tree = json.loads(tokenizer.path.read_text())
    tree["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "tokenizer.json").write_text(json.dumps(tree))
    lower = read_tokenizer(str(tmp_path / "lower"), separator="<|endoftext|>")
    for run, seq_len, message in (
        (tokenizer, 32, "has rows of 16 tokens and pack.seq_len = 32; set it to 16"),
        (read_tokenizer(str(tokenizer_folder), separator="a"), SEQ_LEN, "has the separator '<|endoftext|>'"),
        (lower, SEQ_LEN, "a token id means different text"),
    ):
        with pytest.raises(DataError) as info:
            rows_domain(tmp_path, packed_folder, run, seq_len)
        assert message in str(info.value)
        assert str(info.value).startswith(f"{tmp_path}/packed.yaml: rows {packed_folder}")
        assert "\n" not in str(info.value)


def test_rows_of_two_domains_must_differ(
    packed_folder: Path, tokenizer: TokenizerCard, tmp_path: Path
) -> None:
    """A copy of the folder under another name is still the same rows."""
    shutil.copytree(packed_folder, tmp_path / "copy")
    domains = [
        one_domain(tmp_path / f"{name}.yaml", name=name, rows=str(rows))
        for name, rows in (("a", packed_folder), ("b", tmp_path / "copy"))
    ]
    with pytest.raises(DataError, match=r"b/train/train-000000\.tar has the same rows as a/train/train-00"):
        pack_domains(domains, tokenizer, seq_len=SEQ_LEN, cache_dir=tmp_path / "other")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format": 1}',
        "REPLACE sha256 WITH 3",
        "REPLACE rows WITH null",
        "REPLACE path WITH ../../etc/passwd",
        "REPLACE path WITH /etc/passwd",
        "REPLACE path WITH a\\b",
        "REPLACE name WITH a/b",
        "REPLACE more WITH key",
    ],
)
def test_a_damaged_rows_json_is_one_line(packed_folder: Path, tmp_path: Path, content: str) -> None:
    """Also one that somebody made to lead out of its folder."""
    path = packed_folder / "rows.json"
    if content.startswith("REPLACE"):
        _, key, _, value = content.split(" ", 3)
        tree = json.loads(path.read_text())
        tree["splits"]["train"][0][key] = {"3": 3, "null": None}.get(value, value)
        content = json.dumps(tree)
    path.write_text(content)
    with pytest.raises(DataError, match=r"is not a rows\.json that ddkmix wrote") as info:
        open_packed(str(packed_folder), cache_dir=tmp_path)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)


def test_a_rows_json_of_another_version_says_so(packed_folder: Path) -> None:
    """Its number and ours."""
    data = (packed_folder / "rows.json").read_bytes().replace(b'"format": 1', b'"format": 9')
    with pytest.raises(DataError, match="has the format 9; this version of ddkmix reads 1"):
        parse_manifest(data, "rows.json")


def test_a_folder_that_is_not_packed_is_refused(tmp_path: Path) -> None:
    """It has no rows.json, or is not there."""
    with pytest.raises(DataError, match="name a folder that `ddkmix pack`"):
        open_packed(str(tmp_path), cache_dir=tmp_path)


def test_a_shard_of_another_folder_is_noticed(packed_folder: Path, tmp_path: Path) -> None:
    """Two shards and their indices swapped: each is sound, but not the one that is listed."""
    train = packed_folder / "train"
    for suffix in ("", ".index.npz"):
        shutil.copy(train / f"train-000001.tar{suffix}", train / f"train-000000.tar{suffix}")
    with pytest.raises(DataError, match=r"train-000000\.tar is not the shard that"):
        open_packed(str(packed_folder), cache_dir=tmp_path)


# --- publishing -------------------------------------------------------------------------------------


def test_published_rows_are_complete_and_nothing_else(packed_folder: Path, tmp_path: Path) -> None:
    """Tars, indices and rows.json below OUT/DOMAIN; a second time copies only what is damaged."""
    packed = {"code": open_packed(str(packed_folder), cache_dir=tmp_path)}
    (target,) = publish_rows(packed, str(tmp_path / "out"))
    expected = {name: data for name, data in files_of(packed_folder).items() if not name.startswith(".")}
    assert tmp_path / "out" / "code" == target
    assert expected == files_of(target)
    stamp = (target / "train" / "train-000001.tar").stat().st_mtime_ns
    (target / "train" / "train-000000.tar").write_bytes(b"cut")
    damaged = target / "held_out" / "held_out.tar"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    publish_rows(packed, str(tmp_path / "out"))
    assert expected == files_of(target)
    assert stamp == (target / "train" / "train-000001.tar").stat().st_mtime_ns
    copy = open_packed(str(target), cache_dir=tmp_path)
    assert packed["code"].train.fingerprint == copy.train.fingerprint


def test_publishing_over_other_rows_is_refused(packed_folder: Path, tmp_path: Path) -> None:
    """And to a store: one line with the way out."""
    packed = {"code": open_packed(str(packed_folder), cache_dir=tmp_path)}
    (target,) = publish_rows(packed, str(tmp_path / "out"))
    tree = json.loads((target / "rows.json").read_text())
    (target / "rows.json").write_text(json.dumps({**tree, "fingerprint": "other"}))
    with pytest.raises(DataError, match=r"out/code holds other rows \(other instead of"):
        publish_rows(packed, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"--out s3://b/x: give a local folder and upload it"):
        publish_rows(packed, "s3://b/x")


def test_damaged_rows_are_not_published(packed_folder: Path, tmp_path: Path) -> None:
    """A flipped bit that the size does not show."""
    packed = {"code": open_packed(str(packed_folder), cache_dir=tmp_path)}
    shard = packed_folder / "train" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000000\.tar is damaged; delete its folder to pack again"):
        publish_rows(packed, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "code" / "rows.json").exists()


def test_the_manifest_is_read_without_opening_rows(packed_folder: Path, tmp_path: Path) -> None:
    """Nothing but rows.json is looked at."""
    shutil.rmtree(packed_folder / "train")
    from ddkmix.config import Storage

    manifest = read_manifest(str(packed_folder), cache_dir=tmp_path, storage=Storage())
    assert ["train-000000.tar", "train-000001.tar"] == [shard.name for shard in manifest.splits["train"]]
