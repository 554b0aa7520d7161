"""Bytes of remote shards: by ranges where the store can, from a copy where it cannot."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ddkmix.config import Storage
from ddkmix.errors import StorageError
from ddkmix.storage.reader import ByteReader
from ddkmix.storage.spool import StoredShard
from tests.storage import servers
from tests.storage.conftest import FAST, put_s3
from tests.storage.servers import WebServer
from tests.storage.test_connections import in_child
from tests.storage.test_spool import content_of, put


def reader(folder: Path, mode: str = "auto", **changes: object) -> ByteReader:
    """A reader with little patience."""
    settings = Storage.model_validate({"mode": mode, "attempts": 2, "timeout_s": 5.0, **changes})
    return ByteReader(settings, folder / "shards", backoff_s=FAST)


def expected(i: int) -> bytes:
    """Bytes 100 to 149 of shard i."""
    return content_of(i)[100:150]


@pytest.mark.parametrize(("mode", "copies"), [("auto", 0), ("ranged", 0), ("spool", 1)])
def test_modes_on_a_store_with_ranges(web: WebServer, tmp_path: Path, mode: str, copies: int) -> None:
    """The bytes are the same; only `spool` keeps copies."""
    shard = put(web, 0)
    assert [expected(0)] * 2 == reader(tmp_path, mode).read([(shard, 100, 50)] * 2)
    assert copies == len(list(tmp_path.glob("shards/*.shard")))
    assert (copies == 0) == ("bytes=100-149" in web.ranges_asked("0.tar"))


def test_auto_spools_where_there_are_no_ranges(plain_web: WebServer, tmp_path: Path) -> None:
    """Each shard is downloaded once, however many rows are read."""
    shards = [put(plain_web, i) for i in range(2)]
    ours = reader(tmp_path)
    for _ in range(3):
        requests = [(shards[i % 2], 100, 50) for i in range(6)]
        assert [expected(i % 2) for i in range(6)] == ours.read(requests)
    assert [None] == plain_web.ranges_asked("1.tar")
    assert 2 == len(list(tmp_path.glob("shards/*.shard")))


def test_ranged_needs_a_store_that_can(plain_web: WebServer, tmp_path: Path) -> None:
    """One line with the way out, before a whole shard goes over the network for every row."""
    shard = put(plain_web, 0)
    with pytest.raises(StorageError) as info:
        reader(tmp_path, "ranged").read([(shard, 100, 50)])
    assert (
        f"storage.mode = 'ranged', but the store of {shard.location} has no ranged reads; set "
        "storage.mode=spool or auto."
    ) == str(info.value)
    with pytest.raises(StorageError, match="has no ranged reads"):
        reader(tmp_path, "ranged", allow_pipe=True).read([(StoredShard("pipe:cat a.tar", 9), 0, 1)])


def test_a_command_is_spooled(tmp_path: Path) -> None:
    """Its output is kept, so it runs once."""
    (tmp_path / "a.tar").write_bytes(content_of(0))
    shard = StoredShard(f"pipe:echo >> {tmp_path}/ran; cat {tmp_path}/a.tar", 1000)
    ours = reader(tmp_path, allow_pipe=True)
    assert [expected(0)] * 4 == [ours.read([(shard, 100, 50)])[0] for _ in range(4)]
    assert "\n" == (tmp_path / "ran").read_text()


def test_stores_of_both_kinds_in_one_call(
    web: WebServer, plain_web: WebServer, s3: str, tmp_path: Path
) -> None:
    """Answers come in the order of the requests."""
    shards = [put(web, 0), put(plain_web, 1), StoredShard(put_s3(f"{s3}/2.tar", content_of(2)), 1000)]
    order = [2, 1, 0, 0, 1, 2, 1]
    assert [expected(i) for i in order] == reader(tmp_path).read([(shards[i], 100, 50) for i in order])
    assert [] == reader(tmp_path).read([])


def test_a_store_is_asked_once_what_it_can(
    web: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not for every shard; and the answer is logged once."""
    shards = [put(web, i) for i in range(5)]
    ours = reader(tmp_path)
    with caplog.at_level(logging.INFO, logger="ddkmix"):
        for _ in range(2):
            ours.read([(shard, 100, 50) for shard in shards])
    assert 1 == [asked.range for asked in web.asked].count("bytes=0-0")
    assert [f"{web.url('').rstrip('/')}: has ranged reads"] == caplog.messages


def test_the_hub_is_spooled(tmp_path: Path) -> None:
    """It counts requests. Nothing is asked to decide it."""
    assert reader(tmp_path).spools("hf://datasets/o/n/a.tar")


@pytest.mark.parametrize("mode", ["ranged", "spool"])
@pytest.mark.parametrize(
    "fault", [servers.cut(30), servers.reset(30), servers.status(503), servers.silent(0)]
)
def test_what_passes_is_not_noticed(web: WebServer, tmp_path: Path, mode: str, fault: servers.Fault) -> None:
    """One failure after the store was asked what it can."""
    shard, ours = put(web, 0), reader(tmp_path, mode)
    ours.spools(shard.location)
    web.faults["0.tar"] = [fault]
    assert [expected(0)] == ours.read([(shard, 100, 50)])


@pytest.mark.parametrize("mode", ["ranged", "spool"])
def test_a_store_that_fails_is_never_bad_data(web: WebServer, tmp_path: Path, mode: str) -> None:
    """A StorageError, also when too few bytes come again and again."""
    shard, ours = put(web, 0), reader(tmp_path, mode)
    ours.spools(shard.location)
    web.faults["0.tar"] = [servers.cut(30)] * 2
    with pytest.raises(StorageError, match="2 attempts failed"):
        ours.read([(shard, 100, 50)])
    assert [expected(0)] == ours.read([(shard, 100, 50)])


@pytest.mark.parametrize("mode", ["ranged", "spool"])
def test_bytes_behind_the_end_are_an_error(web: WebServer, tmp_path: Path, mode: str) -> None:
    """Never fewer bytes than asked for."""
    with pytest.raises(StorageError, match="1000"):
        reader(tmp_path, mode).read([(put(web, 0), 990, 20)])


@pytest.mark.parametrize("mode", ["ranged", "spool"])
def test_a_reader_works_in_other_processes(web: WebServer, tmp_path: Path, mode: str) -> None:
    """Pickled, and inherited by a fork after it was used."""
    shard, ours = put(web, 0), reader(tmp_path, mode)
    requests = [(shard, 100, 50)]
    assert [expected(0)] == ours.read(requests)
    assert in_child(lambda: ours.read(requests) == [expected(0)])
    assert [expected(0)] == pickle.loads(pickle.dumps(ours)).read(requests)
    assert [expected(0)] == ours.read(requests)


def test_workers_of_a_data_loader(web: WebServer, tmp_path: Path) -> None:
    """torch forks them after the parent has used the readers; the spooled shard is downloaded once."""
    ranged, spooled = put(web, 0), put(web, 1)
    code = f"""
from pathlib import Path
from torch.utils.data import DataLoader
from ddkmix.config import Storage
from ddkmix.storage.reader import ByteReader
from ddkmix.storage.spool import StoredShard
readers = [ByteReader(Storage(mode=mode), Path({str(tmp_path)!r})) for mode in ("ranged", "spool")]
shards = [StoredShard(*fields) for fields in {[(s.location, s.size, s.sha256) for s in (ranged, spooled)]!r}]
class Rows:
    def __getitem__(self, i):
        return [r.read([(s, i, 1)])[0][0] for r, s in zip(readers, shards)]
    def __len__(self):
        return 40
first = Rows()[0]
print(list(DataLoader(Rows(), batch_size=None, num_workers=2)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert 0 == done.returncode, done.stderr
    rows = [list(pair) for pair in zip(content_of(0)[:40], content_of(1)[:40], strict=True)]
    assert str(rows) == done.stdout.strip()
    assert [None] == web.ranges_asked("1.tar")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_nothing_stays_open_between_reads(plain_web: WebServer, tmp_path: Path) -> None:
    """Twenty shards, and not one descriptor more."""
    shards = [put(plain_web, i) for i in range(20)]
    ours = reader(tmp_path)
    ours.read([(shards[0], 0, 1)])
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    ours.read([(shard, 0, 1) for shard in shards])
    ours.close()
    assert before == len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert [content_of(7)[:1]] == ours.read([(shards[7], 0, 1)])


def test_readers_with_little_room(plain_web: WebServer, tmp_path: Path) -> None:
    """A folder for one shard is enough for a batch over five."""
    shards = [put(plain_web, i) for i in range(5)]
    ours = reader(tmp_path, max_gb=1.5e-6)
    order = [0, 3, 1, 4, 2, 0]
    assert [expected(i) for i in order] == ours.read([(shards[i], 100, 50) for i in order])
    assert 1 == len(list(tmp_path.glob("shards/*.shard")))
