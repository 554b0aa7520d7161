"""One try of a download: commands, and parts that must belong to one version of a file."""

import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from ddkmix.config import Storage
from ddkmix.errors import StorageError
from ddkmix.storage import streams
from ddkmix.storage.faults import Fault, Stopped
from ddkmix.storage.remote import Downloaded, download
from ddkmix.storage.streams import Partial, receive
from tests.storage.conftest import FAST, put_s3

CONTENT = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def allowed() -> Storage:
    """The opt-in, and two attempts."""
    return Storage(attempts=2, timeout_s=20.0, allow_pipe=True)


def failure(command: str, folder: Path, settings: Storage) -> str:
    """How a command that fails is reported, in one line; nothing is left."""
    with pytest.raises(StorageError) as info:
        download(f"pipe:{command}", folder / "copy", settings, backoff_s=FAST)
    assert "\n" not in str(info.value)
    assert not (folder / "copy").exists()
    return str(info.value)


# --- commands ---------------------------------------------------------------------------------------


def test_the_output_of_a_command(tmp_path: Path, allowed: Storage) -> None:
    """A pipeline in a shell, as webdataset's users write it."""
    (tmp_path / "a.tar").write_bytes(CONTENT)
    command = f"pipe:cat {tmp_path}/a.tar | cat"
    expected = Downloaded(size=300_000, sha256=DIGEST)
    assert expected == download(command, tmp_path / "copy", allowed, sha256=DIGEST)
    assert CONTENT == (tmp_path / "copy").read_bytes()


def test_a_command_that_fails_is_run_again(tmp_path: Path, allowed: Storage) -> None:
    """From its beginning: the first run wrote something and failed, the second is whole."""
    mark = tmp_path / "mark"
    command = f"pipe:printf half; test -e {mark} || {{ touch {mark}; exit 3; }}; printf whole"
    download(command, tmp_path / "copy", allowed, backoff_s=FAST)
    assert b"halfwhole" == (tmp_path / "copy").read_bytes()


def test_the_exit_status_and_the_complaint_are_told(tmp_path: Path, allowed: Storage) -> None:
    """The last line that it wrote to its error output, without secrets."""
    message = failure(
        "echo a; echo first 1>&2; echo no such key https://me:hush@h/a?hush 1>&2; exit 22", tmp_path, allowed
    )
    assert "2 attempts failed, the last with: the command ended with exit status 22" in message
    assert "and said: no such key https://h/a;" in message
    assert "hush" not in message


def test_a_command_that_is_not_there_is_not_run_again(tmp_path: Path, allowed: Storage) -> None:
    """Exit status 127 is the shell's word for it."""
    message = failure("no-such-program a.tar", tmp_path, allowed)
    assert message.startswith(
        "pipe:no-such-program ... a.tar cannot be read: the command ended with exit status 127"
    )
    assert "attempts" not in message


def test_silence_is_no_shard(tmp_path: Path, allowed: Storage) -> None:
    """The first command of a pipeline fails, and the last one ends well with nothing."""
    assert "ended well but wrote nothing; correct the command." in failure("false | cat", tmp_path, allowed)


def test_a_command_that_is_killed(tmp_path: Path, allowed: Storage) -> None:
    """As the kernel does when memory runs out."""
    assert "was killed by signal 9" in failure("printf half; kill -9 $$", tmp_path, allowed)


@pytest.mark.parametrize(
    "command", ["sleep 60", "printf half; sleep 60", "exec 1>&-; sleep 60", "sleep 60 & wait"]
)
def test_a_command_that_hangs_is_ended(tmp_path: Path, command: str) -> None:
    """After the timeout, with all that it started."""
    settings = Storage(attempts=1, timeout_s=0.3, allow_pipe=True)
    start = time.monotonic()
    message = failure(f"echo $$ > {tmp_path}/pid; {command}", tmp_path, settings)
    assert "0.3 s" in message
    assert time.monotonic() - start < 10
    group = int((tmp_path / "pid").read_text())
    give_up = time.monotonic() + 5
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < give_up:
            os.killpg(group, 0)
            time.sleep(0.01)


def test_a_command_can_be_stopped(tmp_path: Path, allowed: Storage) -> None:
    """At once."""
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Stopped):
        download("pipe:sleep 60", tmp_path / "copy", Storage(timeout_s=60, allow_pipe=True), stop=stop)
    assert time.monotonic() - start < 10
    assert [] == list(tmp_path.iterdir())


def test_a_command_does_not_read_our_input(tmp_path: Path, allowed: Storage) -> None:
    """A program that asks for a password gets an end of file, not the terminal."""
    download("pipe:cat; echo done", tmp_path / "copy", allowed)
    assert b"done\n" == (tmp_path / "copy").read_bytes()


# --- parts ------------------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Iterator[BinaryIO]:
    """Where a file goes."""
    with (tmp_path / "copy").open("w+b", buffering=0) as file:
        yield file  # type: ignore[misc]


def partial_of(file: BinaryIO, *, digest_known: bool = False) -> Partial:
    """Nothing yet."""
    return Partial(file=file, name=Path("copy"), digest_known=digest_known)


def written(file: BinaryIO) -> bytes:
    """All that is in the file."""
    file.seek(0)
    return file.read()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 10,000 bytes."""
    monkeypatch.setattr(streams, "_PART", 10_000)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("digest_known", [True, False])
def test_parts_go_on_where_they_broke_off(
    s3: str, settings: Storage, target: BinaryIO, digest_known: bool
) -> None:
    """What is there is not asked for again."""
    location = put_s3(f"{s3}/a.tar", CONTENT)
    partial = partial_of(target, digest_known=digest_known)
    partial.total, partial.mark = streams.describe(location, settings)
    partial.write(CONTENT[:25_000])
    receive(location, partial, settings, None)
    assert CONTENT == written(target)
    assert DIGEST == partial.digest.hexdigest()


@pytest.mark.usefixtures("small_parts")
def test_parts_of_two_versions_are_not_mixed(s3: str, settings: Storage, target: BinaryIO) -> None:
    """The file was replaced after the first parts: all of the new one comes."""
    location = put_s3(f"{s3}/a.tar", CONTENT)
    partial = partial_of(target)
    partial.total, partial.mark = streams.describe(location, settings)
    partial.write(CONTENT[:25_000])
    put_s3(location, CONTENT[::-1])
    receive(location, partial, settings, None)
    assert CONTENT[::-1] == written(target)


@pytest.mark.usefixtures("small_parts")
def test_a_file_replaced_while_its_parts_come_is_noticed(
    s3: str, settings: Storage, target: BinaryIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is asked once more at the end; the bytes are thrown away."""
    location = put_s3(f"{s3}/a.tar", CONTENT)
    real = streams.cat_ranges

    def replaced_after_the_first(*arguments: object) -> list[bytes | BaseException]:
        answers = real(*arguments)  # type: ignore[arg-type]
        put_s3(location, CONTENT[::-1])
        return answers

    monkeypatch.setattr(streams, "cat_ranges", replaced_after_the_first)
    partial = partial_of(target)
    with pytest.raises(Fault, match="changed while it was read"):
        receive(location, partial, settings, None)
    assert b"" == written(target)


@pytest.mark.usefixtures("small_parts")
def test_parts_of_a_disk(tmp_path: Path, settings: Storage, target: BinaryIO) -> None:
    """A store whose file system knows no coroutines."""
    (tmp_path / "a.tar").write_bytes(CONTENT)
    partial = partial_of(target)
    receive(f"file://{tmp_path}/a.tar", partial, settings, None)
    assert CONTENT == written(target)


def test_parts_can_be_stopped(tmp_path: Path, settings: Storage, target: BinaryIO) -> None:
    """Between parts."""
    (tmp_path / "a.tar").write_bytes(CONTENT)
    stop = threading.Event()
    stop.set()
    partial = partial_of(target)
    with pytest.raises(Stopped):
        receive(f"file://{tmp_path}/a.tar", partial, settings, stop)


def test_a_full_disk_is_a_fault_that_does_not_pass() -> None:
    """Trying again would fill it again."""
    with Path("/dev/full").open("wb", buffering=0) as file:
        partial = Partial(file=file, name=Path("copy"), digest_known=False)  # type: ignore[arg-type]
        with pytest.raises(Fault, match=r"copy cannot be written \(No space left on device\)") as info:
            partial.write(b"1")
    assert not info.value.again
