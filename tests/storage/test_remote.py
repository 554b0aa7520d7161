"""Asking stores, with every way that a server or a network can get it wrong."""

import hashlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddkmix.config import Storage
from ddkmix.errors import DataError, StorageError
from ddkmix.storage.faults import Missing
from ddkmix.storage.remote import Downloaded, Stat, download, exists, list_files, read_ranges, stat
from tests.storage import servers
from tests.storage.conftest import FAST, put_s3
from tests.storage.servers import WebServer

CONTENT = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ETAG = f'"{hashlib.md5(CONTENT).hexdigest()}"'


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, checked to be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


# --- stat -------------------------------------------------------------------------------------------


def test_a_web_server_with_ranges(web: WebServer, settings: Storage) -> None:
    """One request for one byte says the size, the mark, and that ranges work."""
    url = web.put("a.tar", CONTENT)
    assert Stat(size=300_000, mark=ETAG, ranges=True) == stat(url, settings)
    assert ["bytes=0-0"] == web.ranges_asked("a.tar")
    assert 1 == web.sent["a.tar"]


def test_a_web_server_without_ranges(plain_web: WebServer, settings: Storage) -> None:
    """It sends everything; the size is in the head, and the body is not waited for."""
    url = plain_web.put("a.tar", CONTENT, servers.slow(30.0))
    start = time.monotonic()
    assert Stat(size=300_000, mark=None, ranges=False) == stat(url, settings)
    assert time.monotonic() - start < 15


def test_an_empty_file(web: WebServer, plain_web: WebServer, settings: Storage) -> None:
    """It has no first byte to answer with."""
    assert 0 == stat(web.put("a.tar", b""), settings).size
    assert 0 == stat(plain_web.put("a.tar", b""), settings).size


def test_a_weak_etag_is_no_mark(web: WebServer, settings: Storage) -> None:
    """It may stay the same when bytes change."""
    web.etags = False
    weak: servers.Fault = lambda handler: handler.start(200, 0, ETag='W/"1"')  # noqa: E731
    assert stat(web.put("a.tar", b"", weak), settings).mark is None


def test_a_claim_of_ranges_is_not_believed(web: WebServer, settings: Storage) -> None:
    """A server that says 206 and sends other bytes, or more of them, has no ranges for us."""
    assert not stat(web.put("a.tar", CONTENT, servers.shifted), settings).ranges
    assert not stat(web.put("a.tar", CONTENT, servers.nameless_range), settings).ranges
    assert not stat(web.put("a.tar", CONTENT, servers.longer), settings).ranges


def test_stat_on_s3(s3: str, settings: Storage) -> None:
    """The ETag of a file that was put in one piece is its MD5."""
    location = put_s3(f"{s3}/a/b.tar", CONTENT)
    assert Stat(size=300_000, mark=ETAG, ranges=True) == stat(location, settings)


def test_stat_on_a_disk(tmp_path: Path, settings: Storage) -> None:
    """A disk states no digest."""
    (tmp_path / "a.tar").write_bytes(CONTENT)
    assert Stat(size=300_000, mark=None, ranges=True) == stat(f"file://{tmp_path}/a.tar", settings)


def test_a_command_is_not_run_to_be_asked(tmp_path: Path) -> None:
    """Nothing is known of its output."""
    settings = Storage(allow_pipe=True)
    assert Stat(size=None, mark=None, ranges=False) == stat(f"pipe:touch {tmp_path}/ran", settings)
    assert [] == list(tmp_path.iterdir())


def test_a_folder_is_no_file(tmp_path: Path, s3: str, settings: Storage) -> None:
    """On a disk and on S3."""
    put_s3(f"{s3}/a/b.tar", CONTENT)
    for location in (f"file://{tmp_path}", f"{s3}/a"):
        with pytest.raises(Missing, match="does not exist"):
            stat(location, settings)


def test_existence(web: WebServer, s3: str, tmp_path: Path, settings: Storage) -> None:
    """There, and not there, on each kind of store."""
    (tmp_path / "a.tar").touch()
    for location in (web.put("a.tar", b"1"), put_s3(f"{s3}/a.tar", b"1"), f"file://{tmp_path}/a.tar"):
        assert exists(location, settings)
        assert not exists(location.replace("a.tar", "b.tar"), settings)


def test_a_refusal_is_not_absence(web: WebServer, settings: Storage) -> None:
    """403 says nothing about whether the file is there."""
    with pytest.raises(StorageError, match="access refused"):
        exists(web.put("a.tar", b"1", servers.status(403)), settings)


# --- listing ----------------------------------------------------------------------------------------


def test_stores_that_list(s3: str, tmp_path: Path, settings: Storage) -> None:
    """Sorted locations that can be read again; a file written meanwhile is seen."""
    for folder in (s3, f"file://{tmp_path}"):
        for i in (1, 0):
            write = (
                put_s3
                if folder == s3
                else lambda at, data: Path(at.removeprefix("file://")).write_bytes(data)
            )
            write(f"{folder}/a{i}.tar", b"1")  # type: ignore[operator]
            listed = list_files(f"{folder}/*.tar", settings)
            assert [f"{folder}/a{j}.tar" for j in range(i, 2)] == listed


def test_web_servers_do_not_list(settings: Storage) -> None:
    """The message says what to write instead."""
    with pytest.raises(StorageError, match="with braces"):
        list_files("https://host/*.tar", settings)


# --- ranges -----------------------------------------------------------------------------------------


def test_ranges_of_several_stores_in_one_call(
    web: WebServer, s3: str, tmp_path: Path, settings: Storage
) -> None:
    """In the order of the requests, whatever the store; an empty one costs no request."""
    (tmp_path / "a.tar").write_bytes(CONTENT)
    places = [web.put("a.tar", CONTENT), put_s3(f"{s3}/a.tar", CONTENT), f"file://{tmp_path}/a.tar"]
    ranges = random.Random(1).sample(range(299_000), 30)
    requests = [(places[i % 3], start, i * 7) for i, start in enumerate(ranges)]
    assert [CONTENT[start : start + length] for _, start, length in requests] == read_ranges(
        requests, settings
    )
    assert [] == read_ranges([], settings)
    assert 9 == len(web.asked)


def test_requests_of_a_call_are_under_way_together(web: WebServer, settings: Storage) -> None:
    """Twenty answers, of which none comes before all are asked for."""
    barrier = threading.Barrier(20, timeout=30)
    urls = [web.put(f"{i}.tar", CONTENT, servers.together(barrier)) for i in range(20)]
    assert [CONTENT[5:15]] * 20 == read_ranges([(url, 5, 10) for url in urls], settings)
    assert not barrier.broken


def test_the_end_of_a_file_can_be_read(web: WebServer, settings: Storage) -> None:
    """Up to and with its last byte."""
    assert [CONTENT[-1:]] == read_ranges([(web.put("a.tar", CONTENT), 299_999, 1)], settings)


@pytest.mark.parametrize("offset", [299_999, 300_000, 400_000])
def test_what_lies_behind_the_end_is_an_error(web: WebServer, settings: Storage, offset: int) -> None:
    """At once, as trying again cannot help."""
    url = web.put("a.tar", CONTENT)
    with pytest.raises(StorageError, match=r"shorter than expected|has 300000 bytes"):
        read_ranges([(url, offset, 2)], settings, backoff_s=FAST)
    assert 1 == len(web.asked)


def test_what_lies_behind_the_end_of_other_stores_is_an_error(
    s3: str, tmp_path: Path, settings: Storage
) -> None:
    """They answer with fewer bytes, or with a refusal."""
    (tmp_path / "a.tar").write_bytes(CONTENT)
    for location in (put_s3(f"{s3}/a.tar", CONTENT), f"file://{tmp_path}/a.tar"):
        with pytest.raises(StorageError, match="1 of 2 bytes came at offset 299999"):
            read_ranges([(location, 299_999, 2)], settings, backoff_s=FAST)
        with pytest.raises(StorageError):
            read_ranges([(location, 300_000, 2)], settings, backoff_s=FAST)


def test_a_flood_is_not_read(web: WebServer) -> None:
    """The right range in the head, and the whole file behind it."""

    def flood(handler: servers.Handler) -> None:
        handler.start(206, len(handler.content), Content_Range=f"bytes 5-14/{len(handler.content)}")
        handler.body(handler.content)

    url = web.put("a.tar", bytes(30_000_000), flood)
    with pytest.raises(StorageError, match="30000000 bytes of 10 are to come"):
        read_ranges([(url, 5, 10)], Storage(attempts=1), backoff_s=FAST)
    assert web.sent.get("a.tar", 0) < 30_000_000


PASSING: dict[str, servers.Fault] = {
    "reset before the body": servers.reset(0),
    "reset in the body": servers.reset(40),
    "cut": servers.cut(40),
    "500": servers.status(500),
    "502": servers.status(502),
    "503": servers.status(503),
    "429": servers.status(429),
    "408": servers.status(408),
    "silent beyond the timeout": servers.silent(3.0),
    "closed without an answer": servers.silent(0),
}
WRONG_RANGES: dict[str, servers.Fault] = {
    "the whole file": servers.whole,
    "other bytes": servers.shifted,
    "bytes without a place": servers.nameless_range,
    "a byte more": servers.longer,
}


@pytest.mark.parametrize("name", [*PASSING, *WRONG_RANGES])
def test_a_range_survives_what_passes(web: WebServer, name: str) -> None:
    """One failure, then the right bytes; only the request that failed is made again."""
    fault = {**PASSING, **WRONG_RANGES}[name]
    bad, good = web.put("bad.tar", CONTENT, fault), web.put("good.tar", CONTENT)
    settings = Storage(attempts=2, timeout_s=1.0)
    expected = [CONTENT[5:105], CONTENT[200:300]]
    assert expected == read_ranges([(bad, 5, 100), (good, 200, 100)], settings, backoff_s=FAST)
    assert (2, 1) == (len(web.ranges_asked("bad.tar")), len(web.ranges_asked("good.tar")))


@pytest.mark.parametrize("name", ["reset in the body", "cut", "500"])
def test_a_range_that_never_comes_is_an_error(web: WebServer, settings: Storage, name: str) -> None:
    """After so many attempts, in one line: where, how often, what, and the way out."""
    url = web.put("a.tar", CONTENT, *[PASSING[name]] * 3)
    with pytest.raises(StorageError) as info:
        read_ranges([(url, 5, 100)], settings, backoff_s=FAST)
    message = one_line(info)
    assert message.startswith(f"{url} cannot be read: 3 attempts failed, the last with: ")
    assert message.endswith(
        "check the store and the network, or raise storage.attempts or storage.timeout_s."
    )
    assert 3 == len(web.asked)


def test_a_server_that_always_sends_everything_is_named(plain_web: WebServer, settings: Storage) -> None:
    """And its megabytes are not read."""
    url = plain_web.put("a.tar", bytes(30_000_000))
    with pytest.raises(StorageError, match=r"ignores Range.*set storage\.mode=spool"):
        read_ranges([(url, 5, 100)], settings, backoff_s=FAST)
    assert plain_web.sent.get("a.tar", 0) < 3 * 30_000_000


@pytest.mark.parametrize(
    ("code", "said"), [(401, "refused"), (403, "refused"), (404, "does not exist"), (400, "400")]
)
def test_what_does_not_pass_is_said_at_once(web: WebServer, settings: Storage, code: int, said: str) -> None:
    """One request; trying again would only annoy the server."""
    url = web.put("a.tar", CONTENT, *[servers.status(code)] * 3)
    with pytest.raises(StorageError, match=said) as info:
        read_ranges([(url, 5, 100)], settings, backoff_s=FAST)
    assert str(code) in one_line(info)
    assert 1 == len(web.asked)


def test_a_fault_that_lasts_wins_over_one_that_passes(web: WebServer, settings: Storage) -> None:
    """And the message names its file."""
    busy, gone = web.put("busy.tar", CONTENT, *[servers.status(503)] * 9), web.url("gone.tar")
    with pytest.raises(Missing) as info:
        read_ranges([(busy, 0, 1), (gone, 0, 1)], settings, backoff_s=FAST)
    assert f"{gone} does not exist (404 Not Found); check its name and where it should lie." == one_line(info)


def test_retry_after_is_kept(web: WebServer, settings: Storage) -> None:
    """A server that says when to come back is not asked before."""
    url = web.put("a.tar", CONTENT, None, servers.status(429, Retry_After="1"))
    read_ranges([(url, 5, 1)], settings)
    start = time.monotonic()
    assert [CONTENT[5:6]] == read_ranges([(url, 5, 1)], settings, backoff_s=FAST)
    assert time.monotonic() - start >= 1.0


def test_slow_but_steady_is_no_failure(web: WebServer, tmp_path: Path) -> None:
    """The timeout is for silence, not for the whole."""
    url = web.put("a.tar", CONTENT, servers.slow(0.3, pieces=6))
    settings = Storage(attempts=1, timeout_s=1.0)
    assert Downloaded(size=300_000, sha256=DIGEST) == download(url, tmp_path / "a", settings)


def test_s3_is_asked_again_and_not_more_often(
    s3: str, settings: Storage, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries' own retries are off, so an attempt is an attempt."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", web.url("").rstrip("/"))
    web.put("bucket/a.tar", CONTENT, servers.status(500), servers.reset(10))
    assert [CONTENT[5:105]] == read_ranges([("s3://bucket/a.tar", 5, 100)], settings, backoff_s=FAST)
    assert 3 == len(web.asked)
    for name, fault in {"b.tar": servers.status(503), "c.tar": servers.cut(10)}.items():
        web.put(f"bucket/{name}", CONTENT, *[fault] * 20)
        with pytest.raises(StorageError, match="3 attempts failed"):
            read_ranges([(f"s3://bucket/{name}", 5, 100)], settings, backoff_s=FAST)
    assert 9 == len(web.asked)
    web.put("bucket/d.tar", CONTENT, servers.status(403))
    with pytest.raises(StorageError, match="access refused"):
        read_ranges([("s3://bucket/d.tar", 5, 100)], settings, backoff_s=FAST)
    with pytest.raises(Missing):
        read_ranges([("s3://bucket/gone.tar", 5, 100)], settings, backoff_s=FAST)
    assert 11 == len(web.asked)


def test_a_server_that_is_not_there(settings: Storage) -> None:
    """Refused connections pass, so they are tried; the message says what happened."""
    with pytest.raises(StorageError, match=r"3 attempts failed.*[Cc]onnect"):
        stat("http://127.0.0.1:9/a.tar", settings, backoff_s=FAST)


# --- downloads --------------------------------------------------------------------------------------


def fetched(location: str, folder: Path, settings: Storage, **expected: object) -> bytes:
    """Download and check what can be seen from outside: the bytes, the digest, and that nothing is left."""
    target = folder / "copy"
    answer = download(location, target, settings, backoff_s=FAST, **expected)  # type: ignore[arg-type]
    data = target.read_bytes()
    assert Downloaded(size=len(data), sha256=hashlib.sha256(data).hexdigest()) == answer
    assert ["copy"] == sorted(path.name for path in folder.iterdir())
    return data


def test_a_whole_file(
    web: WebServer, plain_web: WebServer, s3: str, tmp_path: Path, settings: Storage
) -> None:
    """From every kind of store, with and without knowing what must come."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.tar").write_bytes(CONTENT)
    places = [web.put("a.tar", CONTENT), plain_web.put("a.tar", CONTENT), put_s3(f"{s3}/a.tar", CONTENT)]
    for location in [*places, f"file://{tmp_path}/disk/a.tar"]:
        for expected in ({}, {"size": 300_000}, {"sha256": DIGEST}, {"size": 300_000, "sha256": DIGEST}):
            assert CONTENT == fetched(location, tmp_path / "to", settings, **expected)
    assert [None] * 4 == web.ranges_asked("a.tar")


def test_an_empty_file_is_downloaded(web: WebServer, s3: str, tmp_path: Path, settings: Storage) -> None:
    """It is short, and whole."""
    assert b"" == fetched(web.put("a.tar", b""), tmp_path, settings)
    assert b"" == fetched(put_s3(f"{s3}/a.tar", b""), tmp_path, settings)


def test_a_download_goes_on_where_it_broke_off(web: WebServer, tmp_path: Path, settings: Storage) -> None:
    """After a reset in mid-body the rest is asked for, of the same version of the file."""
    url = web.put("a.tar", CONTENT, servers.reset(131_072))
    assert CONTENT == fetched(url, tmp_path, settings)
    assert [None, "bytes=131072-"] == web.ranges_asked("a.tar")
    assert ETAG == web.asked[1].headers["If-Range"]
    assert len(CONTENT) == web.sent["a.tar"]


@pytest.mark.parametrize("name", PASSING)
def test_a_download_survives_what_passes(web: WebServer, tmp_path: Path, name: str) -> None:
    """Two failures, then the whole file."""
    url = web.put("a.tar", CONTENT, PASSING[name], None if name.startswith("silent") else PASSING[name])
    assert CONTENT == fetched(url, tmp_path, Storage(attempts=3, timeout_s=1.0))


def test_a_download_from_a_server_without_ranges_starts_over(
    plain_web: WebServer, tmp_path: Path, settings: Storage
) -> None:
    """It has no other choice, and the bytes are not doubled, digest known or not."""
    for expected in ({}, {"sha256": DIGEST}):
        url = plain_web.put("a.tar", CONTENT, servers.reset(131_072))
        assert CONTENT == fetched(url, tmp_path, settings, **expected)


def test_a_file_without_a_mark_is_not_pieced_together(tmp_path: Path, settings: Storage) -> None:
    """Ranges alone are not enough: the second half could be another file's. With a digest it is safe."""
    with servers.web_server(etags=False) as server:
        url = server.put("a.tar", CONTENT, servers.reset(131_072))
        assert CONTENT == fetched(url, tmp_path, settings)
        assert [None, None] == server.ranges_asked("a.tar")
        url = server.put("b.tar", CONTENT, servers.reset(131_072))
        assert CONTENT == fetched(url, tmp_path, settings, sha256=DIGEST)
        assert [None, "bytes=131072-"] == server.ranges_asked("b.tar")


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_is_replaced_in_between_is_not_mixed(
    tmp_path: Path, settings: Storage, etags: bool
) -> None:
    """Half of the old file, then the new one: the new one comes, from its beginning."""
    other = CONTENT[::-1]
    with servers.web_server(etags=etags) as server:
        url = server.put("a.tar", CONTENT, servers.reset(131_072), servers.replaced(other))
        assert other == fetched(url, tmp_path, settings)


def test_a_server_that_ignores_the_condition_is_caught(
    web: WebServer, tmp_path: Path, settings: Storage
) -> None:
    """A 206 of another version, which If-Range forbids, is thrown away."""
    other = CONTENT[::-1]

    def rest_of_the_other(handler: servers.Handler) -> None:
        del handler.headers["If-Range"]
        servers.replaced(other)(handler)

    url = web.put("a.tar", CONTENT, servers.reset(131_072), rest_of_the_other)
    assert other == fetched(url, tmp_path, settings)


def test_chunked_answers_have_an_end(web: WebServer, tmp_path: Path, settings: Storage) -> None:
    """Without Content-Length, the last chunk says that all is there; without it, the transfer was cut."""
    assert CONTENT == fetched(web.put("a.tar", CONTENT, servers.chunked()), tmp_path, settings)
    cut = servers.chunked(131_072, end=False)
    assert CONTENT == fetched(web.put("b.tar", CONTENT, cut), tmp_path, settings)
    assert CONTENT == fetched(web.put("c.tar", CONTENT, cut, cut), tmp_path, settings, sha256=DIGEST)


def test_a_short_answer_that_says_it_is_whole_is_noticed_by_its_size(
    web: WebServer, tmp_path: Path, settings: Storage
) -> None:
    """A proxy that gave up early and ended its chunks properly."""
    short = servers.chunked(131_072)
    assert CONTENT == fetched(web.put("a.tar", CONTENT, short), tmp_path, settings, size=300_000)
    assert CONTENT == fetched(web.put("b.tar", CONTENT, short), tmp_path, settings, sha256=DIGEST)


def test_an_end_that_cannot_be_told_is_refused(web: WebServer, tmp_path: Path, settings: Storage) -> None:
    """As HTTP/1.0 has it. With a size or a digest it is fine, and a cut one is noticed."""
    url = web.put("a.tar", CONTENT, servers.without_length(1000))
    with pytest.raises(StorageError, match="does not say how long the file is"):
        download(url, tmp_path / "copy", settings, backoff_s=FAST)
    for expected in ({"size": 300_000}, {"sha256": DIGEST}):
        url = web.put("a.tar", CONTENT, servers.without_length(1000), servers.without_length())
        assert CONTENT == fetched(url, tmp_path, settings, **expected)


def test_damage_on_the_way_is_noticed(web: WebServer, tmp_path: Path, settings: Storage) -> None:
    """One bit; the digest finds it, and the file is fetched again."""
    url = web.put("a.tar", CONTENT, servers.corrupted)
    assert CONTENT == fetched(url, tmp_path, settings, sha256=DIGEST)
    url = web.put("a.tar", CONTENT, *[servers.corrupted] * 3)
    with pytest.raises(StorageError, match=f"SHA-256 is [0-9a-f]{{64}} instead of {DIGEST}"):
        download(url, tmp_path / "other", settings, sha256=DIGEST, backoff_s=FAST)


def test_a_file_of_another_size_is_another_file(
    web: WebServer, s3: str, tmp_path: Path, settings: Storage
) -> None:
    """The store is sure of it, so it is said at once, and nothing is left on disk."""
    for location in (web.put("a.tar", CONTENT), put_s3(f"{s3}/a.tar", CONTENT)):
        with pytest.raises(
            StorageError, match="it has 300000 bytes instead of 300001; the file on the store was"
        ):
            download(location, tmp_path / "copy", settings, size=300_001, backoff_s=FAST)
    assert 1 == len(web.asked)
    assert [] == list(tmp_path.iterdir())


def test_compression_on_the_way_is_refused(web: WebServer, tmp_path: Path, settings: Storage) -> None:
    """Its bytes are not the file's; but a stored .tar.gz may be declared so, and comes as it is."""
    with pytest.raises(StorageError, match=r"compresses on the way \(Content-Encoding: gzip\)"):
        download(web.put("a.tar", CONTENT, servers.compressed), tmp_path / "copy", settings)
    stored = web.put("a.tar.gz", CONTENT, servers.compressed)
    assert CONTENT != fetched(stored, tmp_path, settings)
    assert {"identity"} == {asked.headers["Accept-Encoding"] for asked in web.asked}


def test_large_files_come_in_parts(
    s3: str, tmp_path: Path, settings: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are put together in order, the last one shorter."""
    monkeypatch.setattr("ddkmix.storage.streams._PART", 7000)
    assert CONTENT == fetched(put_s3(f"{s3}/a.tar", CONTENT), tmp_path, settings)


def test_a_disk_that_cannot_be_written_is_no_fault_of_the_store(
    web: WebServer, tmp_path: Path, settings: Storage
) -> None:
    """Said at once, with the path."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/copy cannot be written \((Not a directory|File exists)\)"):
        download(web.put("a.tar", CONTENT), tmp_path / "file" / "copy", settings)


def test_a_failed_download_leaves_what_was_there(web: WebServer, tmp_path: Path, settings: Storage) -> None:
    """The old copy stays until a new one is whole."""
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(StorageError):
        download(
            web.put("a.tar", CONTENT, *[servers.cut(9)] * 3), tmp_path / "copy", settings, backoff_s=FAST
        )
    assert ["copy"] == [path.name for path in tmp_path.iterdir()]
    assert b"old" == (tmp_path / "copy").read_bytes()


# --- messages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [403, 404, 500])
def test_no_message_holds_a_secret(
    web: WebServer, settings: Storage, code: int, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Neither user, password nor query of the URL, in errors and in logs, and they do reach the server."""
    web.put("a.tar", CONTENT, *[servers.status(code)] * 9)
    url = web.url("a.tar?sig=hush").replace("http://", "http://me:hush@")
    calls: list[Callable[[], object]] = [
        lambda: stat(url, settings, backoff_s=FAST),
        lambda: read_ranges([(url, 0, 1)], settings, backoff_s=FAST),
        lambda: download(url, tmp_path / "copy", settings, backoff_s=FAST),
    ]
    for call in calls:
        with pytest.raises(StorageError) as info:
            call()
        assert web.url("a.tar") in one_line(info)
        assert "hush" not in one_line(info)
    assert "hush" not in caplog.text
    assert all(asked.headers["Authorization"].startswith("Basic ") for asked in web.asked)


def test_a_local_path_is_not_for_here(tmp_path: Path, settings: Storage) -> None:
    """A path that slipped through is said to be one."""
    with pytest.raises(StorageError, match="is a local path"):
        stat(str(tmp_path), settings)


def test_a_command_needs_the_opt_in(settings: Storage, tmp_path: Path) -> None:
    """Every door checks it, also for locations that no card was checked for."""
    location = f"pipe:touch {tmp_path}/ran"
    calls: list[Callable[[], object]] = [
        lambda: stat(location, settings),
        lambda: read_ranges([(location, 0, 1)], settings),
        lambda: download(location, tmp_path / "copy", settings),
    ]
    for call in calls:
        with pytest.raises(DataError, match=r"set storage\.allow_pipe=true"):
            call()
    assert [] == list(tmp_path.iterdir())
    with pytest.raises(StorageError, match="is a stream"):
        read_ranges([(location, 0, 1)], Storage(allow_pipe=True))


def test_the_hub_offline_is_one_line() -> None:
    """Tests have no network, and the Hub's own message is longer."""
    with pytest.raises(StorageError) as info:
        stat("hf://datasets/nobody/nothing/a.tar", Storage(attempts=1), backoff_s=FAST)
    assert one_line(info).startswith("hf://datasets/nobody/nothing/a.tar ")
