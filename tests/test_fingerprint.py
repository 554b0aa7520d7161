"""Fingerprints: caches are keyed by content, and a remembered digest is only trusted while it can be true."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddkmix import fingerprint
from ddkmix.errors import DataError
from ddkmix.fingerprint import (
    FileDigests,
    hash_file,
    hash_json,
    remove_abandoned,
    replacing,
    write_atomically,
)


def sha256(data: bytes) -> str:
    """What hash_file must give."""
    return hashlib.sha256(data).hexdigest()


def write_at(path: Path, data: bytes, *, mtime_ns: int) -> Path:
    """A file with a chosen modification time, so that no test has to wait for the clock."""
    path.write_bytes(data)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def leftovers(folder: Path) -> list[str]:
    """Names of the temporary files in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# --- values -----------------------------------------------------------------------------------------


def test_hash_json_is_the_sha256_of_compact_sorted_json() -> None:
    """The format is fixed: packed rows and captured logits are found by it in later versions."""
    assert sha256(b'{"a":[1,2.5,null,true],"b":"\xc3\xa9"}') == hash_json(
        {"b": "é", "a": [1, 2.5, None, True]}
    )


def test_hash_json_does_not_depend_on_the_order_of_keys() -> None:
    """The same mapping, written in another order and as tuple or list, is the same value."""
    assert hash_json({"x": 1, "y": {"p": (1, 2), "q": 3}}) == hash_json({"y": {"q": 3, "p": [1, 2]}, "x": 1})


@pytest.mark.parametrize(
    ("one", "other"), [([1, 2], [2, 1]), (1, "1"), ([], {}), (None, 0), ([[1], 2], [1, [2]]), ("", [""])]
)
def test_hash_json_tells_values_apart(one: Any, other: Any) -> None:
    """Different JSON gives different fingerprints."""
    assert hash_json(one) != hash_json(other)


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_is_hashed_whole(tmp_path: Path, size: int) -> None:
    """Also when it is longer than the pieces that are read."""
    data = bytes(range(256)) * (size // 256 + 1)
    path = tmp_path / "file"
    path.write_bytes(data[:size])
    assert sha256(data[:size]) == hash_file(path) == FileDigests(tmp_path).of(path)


def test_a_digest_is_remembered(tmp_path: Path) -> None:
    """A file that has not changed is not read again: the remembered digest is given, here a marked one."""
    path = write_at(tmp_path / "file", b"text", mtime_ns=10**18)
    marked = {str(path.resolve()): [4, 10**18, "from memory"]}
    (tmp_path / "digests.json").write_text(json.dumps(marked))
    assert "from memory" == FileDigests(tmp_path).of(path)


def test_digests_are_remembered_between_processes(tmp_path: Path) -> None:
    """What `save` writes is what the next run starts from."""
    path = write_at(tmp_path / "file", b"text", mtime_ns=10**18)
    digests = FileDigests(tmp_path / "cache")
    digests.of(path)
    digests.save()
    saved = json.loads((tmp_path / "cache" / "digests.json").read_text())
    assert {str(path.resolve()): [4, 10**18, sha256(b"text")]} == saved
    assert sha256(b"text") == FileDigests(tmp_path / "cache").of(path)


def check_notices_edits(tmp_path: Path, digest_of: Callable[[FileDigests, Path], str]) -> None:
    """An edit is noticed when it changes the size or the modification time, whichever."""
    digests = FileDigests(tmp_path)
    path = write_at(tmp_path / "file", b"old.", mtime_ns=10**18)
    assert sha256(b"old.") == digest_of(digests, path)
    write_at(path, b"new.", mtime_ns=10**18 + 1)
    assert sha256(b"new.") == digest_of(digests, path)
    write_at(path, b"longer", mtime_ns=10**18 + 1)
    assert sha256(b"longer") == digest_of(digests, path)


def test_an_edit_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    """One nanosecond later is enough; so is another size at the same time."""
    check_notices_edits(tmp_path, FileDigests.of)


def test_remembering_by_path_alone_fails_the_check(tmp_path: Path) -> None:
    """The check notices a memory that does not look at the file."""
    memory: dict[Path, str] = {}
    with pytest.raises(AssertionError):
        check_notices_edits(tmp_path, lambda digests, path: memory.setdefault(path, digests.of(path)))


def test_a_touched_file_keeps_its_digest(tmp_path: Path) -> None:
    """A digest is of the content: another modification time alone changes nothing."""
    path = write_at(tmp_path / "file", b"text", mtime_ns=10**18)
    digests = FileDigests(tmp_path)
    before = digests.of(path)
    os.utime(path, ns=(5, 5))
    assert before == digests.of(path)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"PATH": null}',
        b'{"PATH": []}',
        b'{"PATH": [4, 1000000000000000000]}',
        b'{"PATH": "4"}',
        b'{"PATH": [4, 1000000000000000000, 7]}',
    ],
)
def test_a_damaged_memory_is_ignored(tmp_path: Path, damaged: bytes) -> None:
    """It is only a cache: whatever is wrong with it costs one more reading of the file."""
    path = write_at(tmp_path / "file", b"text", mtime_ns=10**18)
    (tmp_path / "digests.json").write_bytes(damaged.replace(b"PATH", str(path.resolve()).encode()))
    digests = FileDigests(tmp_path)
    assert sha256(b"text") == digests.of(path)
    digests.save()
    assert sha256(b"text") == FileDigests(tmp_path).of(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The message has the path and the rule."""
    with pytest.raises(DataError, match=r"gone\.tar: file not found; a fingerprint needs it to exist\."):
        FileDigests(tmp_path).of(tmp_path / "gone.tar")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """All empty files have one digest, so they would pass for one another."""
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match=r"empty\.tar: the file is empty \(0 bytes\)"):
        FileDigests(tmp_path).of(tmp_path / "empty.tar")


# --- writing ----------------------------------------------------------------------------------------

Write = Callable[[Path, str], None]


def check_writes_atomically(folder: Path, write: Write) -> None:
    """A write that fails half-way leaves the old text and nothing else."""
    path = folder / "state.json"
    write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write(path, "new \ud800")
    assert "old" == path.read_text()
    assert ["state.json"] == [path.name for path in folder.iterdir()]
    write(path, "é")
    assert "é".encode() == path.read_bytes()


def test_a_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    """And no temporary file."""
    check_writes_atomically(tmp_path, write_atomically)


def test_writing_in_place_fails_the_check(tmp_path: Path) -> None:
    """The check notices a file that is opened for writing before its text is complete."""

    def in_place(path: Path, text: str) -> None:
        with path.open("wb") as file:
            file.write(text.encode())

    with pytest.raises(AssertionError):
        check_writes_atomically(tmp_path, in_place)


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Here the target is a folder."""
    (tmp_path / "state.json").mkdir()
    with pytest.raises(OSError, match=r"state\.json"):
        write_atomically(tmp_path / "state.json", "text")
    assert [] == leftovers(tmp_path)


def test_folders_are_made_on_the_way(tmp_path: Path) -> None:
    """A cache folder need not exist."""
    write_atomically(tmp_path / "a" / "b" / "file", "text")
    assert ["file"] == [path.name for path in (tmp_path / "a" / "b").iterdir()]


def test_files_of_killed_writers_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    """A lock ends with its process; other files are nobody's business."""
    left, other = tmp_path / ".a.tar.0123abcd.tmp", tmp_path / "b.tmp"
    left.write_bytes(b"half")
    other.write_bytes(b"not ours")
    with replacing(tmp_path / "c.tar") as file:
        file.write(b"half")
        remove_abandoned(tmp_path)
        assert not left.exists()
        file.write(b" and half")
    assert b"half and half" == (tmp_path / "c.tar").read_bytes()
    assert {"b.tmp", "c.tar"} == {path.name for path in tmp_path.iterdir()}


def test_many_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Each has a temporary file of its own, also where process ids are equal (containers, other machines)."""
    with replacing(tmp_path / "a") as one:
        one.write(b"one ")
        with replacing(tmp_path / "a") as two:
            two.write(b"two")
        assert b"two" == (tmp_path / "a").read_bytes()
        one.write(b"more")
    assert b"one more" == (tmp_path / "a").read_bytes()
    assert ["a"] == [path.name for path in tmp_path.iterdir()]


def test_a_writer_whose_file_was_taken_for_abandoned_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between creating a file and locking it: the cleaner comes by."""
    lock, calls = fingerprint.fcntl.flock, []

    def late(descriptor: Any, operation: int) -> None:
        if not calls:
            calls.append(1)
            remove_abandoned(tmp_path)
        lock(descriptor, operation)

    monkeypatch.setattr(fingerprint.fcntl, "flock", late)
    write_atomically(tmp_path / "a", "text")
    assert "text" == (tmp_path / "a").read_text()
    assert calls


def test_files_are_as_readable_as_any(tmp_path: Path) -> None:
    """Others may read what is published: the mode is the process's umask, not a temporary file's 0600."""
    write_atomically(tmp_path / "a", "text")
    (tmp_path / "b").write_text("text")
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "a").stat().st_mode
