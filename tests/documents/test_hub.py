"""Hugging Face datasets: local folders of every kind, and what happens when there is no network."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ddkmix.documents import (
    HubSplit,
    count_shards,
    hub_fingerprint,
    pin_revision,
    read_documents,
    read_hub_documents,
)
from ddkmix.errors import DataError, StorageError
from ddkmix.fingerprint import FileDigests

TEXTS = ["first document", "the second, héllo 😀 中文", "", "line\r\nends", "fifth"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, no cache of the user, no progress bars."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    """A Parquet file in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_jsonl(path: Path, texts: list[str | None]) -> None:
    """JSON lines in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))


def read_all(split: HubSplit, of: int = 1, text_field: str = "text") -> list[str]:
    """The documents of all parts, one after another."""
    return [text for index in range(of) for text in read_hub_documents(split, index, of, text_field)]


def refusal(split: HubSplit, text_field: str = "text") -> str:
    """The one line that reading a split raises; it has the dataset."""
    with pytest.raises(DataError) as info:
        read_all(split, text_field=text_field)
    message = str(info.value)
    assert "\n" not in message
    assert split.dataset in message
    return message


# --- what is read -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five Parquet files of train, one document each, and one of test."""
    for i, text in enumerate(TEXTS):
        write_parquet(tmp_path / "data" / f"train-{i:05d}-of-00005.parquet", {"id": [i], "text": [text]})
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", {"id": [9], "text": ["held out"]})
    return tmp_path


def test_a_folder_of_parquet_is_read(folder: Path) -> None:
    """Each file is a shard; any number of parts up to theirs gives all documents in order."""
    split = HubSplit(dataset=str(folder))
    assert 5 == count_shards(split)
    for of in range(1, 6):
        assert TEXTS == read_all(split, of)
    assert [TEXTS[3]] == list(read_hub_documents(split, 3, 5, "text"))
    assert ["held out"] == read_all(HubSplit(dataset=str(folder), split="test"))


def test_more_parts_than_shards_are_refused(folder: Path) -> None:
    """They would be empty, or repeat documents."""
    with pytest.raises(DataError, match="test has 1 shards and cannot be read in 2 parts"):
        list(read_hub_documents(HubSplit(dataset=str(folder), split="test"), 0, 2, "text"))


def test_a_folder_of_json_lines_is_read(tmp_path: Path) -> None:
    """Compressed or not; null is an empty document; the texts of more than one batch."""
    write_jsonl(tmp_path / "data" / "train.jsonl", [None, *TEXTS] * 200)
    split = HubSplit(dataset=str(tmp_path / "data"))
    assert ["", *TEXTS] * 200 == read_all(split) == read_all(split, text_field="json.text")
    (tmp_path / "zipped").mkdir()
    lines = (tmp_path / "data" / "train.jsonl").read_bytes()
    (tmp_path / "zipped" / "train.jsonl.gz").write_bytes(gzip.compress(lines))
    assert ["", *TEXTS] * 200 == read_all(HubSplit(dataset=str(tmp_path / "zipped")))


def test_a_configuration_is_chosen(tmp_path: Path) -> None:
    """As the dataset's README declares them."""
    write_jsonl(tmp_path / "en" / "train.jsonl", ["hello"])
    write_jsonl(tmp_path / "de" / "train.jsonl", ["hallo"])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n"
        "- config_name: de\n  data_files: de/*.jsonl\n---\n"
    )
    assert ["hallo"] == read_all(HubSplit(dataset=str(tmp_path), config="de"))
    assert "[fr] train cannot be read (BuilderConfig 'fr' not found" in refusal(
        HubSplit(dataset=str(tmp_path), config="fr")
    )
    assert "Config name is missing" in refusal(HubSplit(dataset=str(tmp_path)))


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    """One that `save_to_disk` wrote, in as many parts as it has files, whatever format it was set to."""
    import datasets

    dataset = datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3, 4, 5]}, split="train")
    dataset.with_format("numpy", columns=["id"]).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    split = HubSplit(dataset=str(tmp_path / "saved"))
    assert 3 == count_shards(split)
    for of in (1, 2, 3):
        assert TEXTS == read_all(split, of)
    assert "no such split" in refusal(HubSplit(dataset=str(tmp_path / "saved"), split="test"))


def test_a_saved_dict_of_splits_is_read(tmp_path: Path) -> None:
    """By the name of the split; one that was filtered keeps what it kept."""
    import datasets

    train = datasets.Dataset.from_dict({"text": TEXTS}).select([4, 0])
    both = datasets.DatasetDict({"train": train, "test": datasets.Dataset.from_dict({"text": ["x"]})})
    both.save_to_disk(str(tmp_path / "saved"))
    assert [TEXTS[4], TEXTS[0]] == read_all(HubSplit(dataset=str(tmp_path / "saved")))
    assert ["x"] == read_all(HubSplit(dataset=str(tmp_path / "saved"), split="test"))
    message = refusal(HubSplit(dataset=str(tmp_path / "saved"), split="valid"))
    assert f"valid: no such split; {tmp_path / 'saved'} has train, test." in message


def test_an_empty_saved_dataset_is_refused(tmp_path: Path) -> None:
    """`datasets` cannot stream it."""
    import datasets

    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "saved"))
    assert "train cannot be read (" in refusal(HubSplit(dataset=str(tmp_path / "saved")))


def test_dots_go_into_structs(tmp_path: Path) -> None:
    """As in Parquet."""
    write_parquet(tmp_path / "train.parquet", {"a": [{"b": "x"}, None]})
    assert ["x", ""] == read_all(HubSplit(dataset=str(tmp_path)), text_field="json.a.b")


# --- what is refused --------------------------------------------------------------------------------


def test_a_wrong_column_is_named(folder: Path) -> None:
    """With the columns that there are, or its type."""
    split = HubSplit(dataset=str(folder))
    assert f"{folder} train (shard 0 of 1) has no field 'txt', only id, text;" in refusal(split, "txt")
    assert "(shard 0 of 1): 'id' is a column of int64; documents are strings." in refusal(split, "id")


def test_a_damaged_file_is_refused(folder: Path) -> None:
    """Whichever it is; the documents before it have been given."""
    path = folder / "data" / "train-00002-of-00005.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert "train cannot be read (" in refusal(HubSplit(dataset=str(folder)))


def test_a_malformed_line_is_refused(tmp_path: Path) -> None:
    """The JSON reader of `datasets` says so."""
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert "train cannot be read (" in refusal(HubSplit(dataset=str(tmp_path)))


def test_a_compressed_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    """gzip, whose reader notices."""
    write_jsonl(tmp_path / "a.jsonl", [f"{i} text" for i in range(3000)])
    data = gzip.compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl.gz").write_bytes(data[: len(data) // 2])
    assert "train cannot be read (" in refusal(HubSplit(dataset=str(tmp_path / "data")))


def test_a_folder_of_zstd_is_refused(tmp_path: Path) -> None:
    """`datasets` reads what there is of a file that is cut, and ends without an error.

    When the second half of this test fails, `datasets` has learnt it, and the refusal may go.
    """
    import datasets

    (tmp_path / "data").mkdir()
    frame = zstandard.ZstdCompressor().compressobj()
    line = b'{"text": "a"}\n'
    cut = frame.compress(line * 5) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "data" / "train.jsonl.zst").write_bytes(cut)
    assert (
        f"{tmp_path} train: data/train.jsonl.zst is zstd, of which datasets does not notice when it is cut. "
        "Name the files as shards of the card instead, where they are checked."
    ) == refusal(HubSplit(dataset=str(tmp_path)))
    assert 5 == len(list(datasets.load_dataset(str(tmp_path), split="train", streaming=True)))
    with pytest.raises(DataError, match="truncated"):
        list(read_documents(tmp_path / "data" / "train.jsonl.zst", "text"))


def test_a_dataset_script_is_never_run(tmp_path: Path) -> None:
    """A folder with code of its own name is refused, with data beside it too."""
    folder = tmp_path / "corpus"
    write_jsonl(folder / "train.jsonl", TEXTS[:1])
    (folder / "corpus.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "Dataset scripts are no longer supported" in refusal(HubSplit(dataset=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name: str) -> None:
    """No Hub id looks like a path."""
    split = HubSplit(dataset=name)
    assert f"{name} train: no such folder; give a local folder or a Hub id (owner/name)." == refusal(split)
    with pytest.raises(DataError, match="no such folder"):
        hub_fingerprint(split)


def test_a_file_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named as a shard instead."""
    write_jsonl(tmp_path / "owner" / "a.jsonl", ["x"])
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in refusal(HubSplit(dataset="owner/a.jsonl"))


def test_a_relative_folder_is_no_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would take one without a slash for a dataset of the Hub."""
    monkeypatch.chdir(folder.parent)
    assert TEXTS == read_all(HubSplit(dataset=folder.name))


def test_a_wrong_split_is_named(folder: Path) -> None:
    """With those that there are."""
    message = refusal(HubSplit(dataset=str(folder), split="valid"))
    assert "valid cannot be read (Bad split: valid. Available splits: ['train', 'test']); check" in message


def test_a_folder_has_no_revision(folder: Path) -> None:
    """To pass over it would read something else than was asked for."""
    split = HubSplit(dataset=str(folder), revision="main")
    assert f"{folder} train: a local folder has no revision; remove 'main'." == refusal(split)


def test_a_hub_id_without_a_network_is_a_storage_error() -> None:
    """One line that names the dataset and the way out, from every function."""
    split = HubSplit(dataset="nobody/nothing")
    for ask in (count_shards, read_all, hub_fingerprint, pin_revision):
        with pytest.raises(StorageError) as info:
            ask(split)
        message = str(info.value)
        assert "\n" not in message
        assert message.startswith("nobody/nothing train cannot be had from the Hub (")
        assert message.endswith(
            "check the network and HF_HUB_OFFLINE, or download it (hf download --repo-type dataset) and name "
            "the folder."
        )


def test_a_part_that_is_not_there_is_our_own_mistake(folder: Path) -> None:
    """Part 1 of 1: an assertion."""
    with pytest.raises(AssertionError):
        list(read_hub_documents(HubSplit(dataset=str(folder)), 1, 1, "text"))


# --- fingerprints -----------------------------------------------------------------------------------


def test_the_fingerprint_of_a_folder_is_of_its_content(folder: Path) -> None:
    """A byte, a name, another file, another split change it; the place, times and hidden files do not."""
    split = HubSplit(dataset=str(folder))
    first = hub_fingerprint(split)
    assert 64 == len(first)
    moved = folder.rename(folder.with_name("moved"))
    split = HubSplit(dataset=str(moved))
    (moved / ".cache").mkdir()
    (moved / ".cache" / "lock").write_text("x")
    (moved / "data" / ".train.swp").write_text("x")
    assert first == hub_fingerprint(split)
    seen = {first, hub_fingerprint(HubSplit(dataset=str(moved), split="test"))}
    seen.add(hub_fingerprint(HubSplit(dataset=str(moved), config="c")))
    path = moved / "data" / "train-00002-of-00005.parquet"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    seen.add(hub_fingerprint(split))
    path.rename(path.with_name("train-00009-of-00005.parquet"))
    seen.add(hub_fingerprint(split))
    (moved / "README.md").write_text("")
    seen.add(hub_fingerprint(split))
    assert 6 == len(seen)


def test_digests_of_a_folder_are_remembered(folder: Path, tmp_path: Path) -> None:
    """The same fingerprint with a memory, which then holds every file."""
    cache = tmp_path / "memory"
    (folder / "README.md").write_text("")  # of which a memory keeps nothing, it is empty
    split, digests = HubSplit(dataset=str(folder)), FileDigests(cache)
    assert hub_fingerprint(split) == hub_fingerprint(split, digests)
    digests.save()
    assert 6 == len(json.loads((cache / "digests.json").read_text()))


def test_an_empty_folder_has_no_fingerprint(tmp_path: Path) -> None:
    """Nor documents."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no files"):
        hub_fingerprint(HubSplit(dataset=str(tmp_path / "empty")))
    refusal(HubSplit(dataset=str(tmp_path / "empty")))


def test_a_commit_needs_no_network(folder: Path) -> None:
    """It is the content; branches and tags are asked for, folders are as they are."""
    split = HubSplit(dataset="owner/name", revision=COMMIT)
    assert split == pin_revision(split)
    others = [
        HubSplit(dataset="owner/name", revision=COMMIT[::-1]),
        HubSplit(dataset="owner/name", revision=COMMIT, split="test"),
        HubSplit(dataset="owner/name", revision=COMMIT, config="en"),
    ]
    assert 4 == len({hub_fingerprint(each) for each in [split, *others]})
    for revision in ("main", COMMIT[:39], COMMIT.upper()):
        with pytest.raises(StorageError):
            pin_revision(HubSplit(dataset="owner/name", revision=revision))
    assert HubSplit(dataset=str(folder)) == pin_revision(HubSplit(dataset=str(folder)))
