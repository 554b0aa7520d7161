"""Packed rows on a store: the same stream as from local files, whatever the store does on the way."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddkmix.cli import main
from ddkmix.config import Storage, parse_config
from ddkmix.errors import StorageError
from ddkmix.loader import DomainMixture
from ddkmix.pack import open_packed
from ddkmix.records import read_lines
from ddkmix.setup import train
from tests.conftest import ConfigTree
from tests.storage.conftest import _no_connection_left, plain_web, put_s3, s3, s3_endpoint, web
from tests.storage.servers import WebServer, reset, status

__all__ = ["_no_connection_left", "plain_web", "s3", "s3_endpoint", "web"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
STEPS = 12


@pytest.fixture
def published(tmp_path: Path, tiny_config: Callable[..., ConfigTree]) -> Path:
    """Packed rows of the three tiny domains, as `ddkmix pack --out` leaves them."""
    config = tmp_path / "pack.yaml"
    config.write_text(yaml.safe_dump(tiny_config()))
    main(["pack", str(config), "--out", str(tmp_path / "published")])
    return tmp_path / "published"


def upload(published: Path, put: Callable[[str, bytes], object]) -> None:
    """Put every file of the packed rows on a store."""
    for path in sorted(published.rglob("*")):
        if path.is_file():
            put(str(path.relative_to(published)), path.read_bytes())


Make = Callable[..., DomainMixture]


@pytest.fixture
def mixture_of(tmp_path: Path) -> Iterator[Make]:
    """A function that opens the mixture of packed rows at a location; closed with the test."""
    made: list[DomainMixture] = []

    def make(location: str, *, mode: str = "auto", attempts: int = 3, **options: Any) -> DomainMixture:
        storage = Storage(
            mode=mode, folder=tmp_path / f"spool-{len(made)}", attempts=attempts, timeout_s=5.0, max_gb=0.01
        )
        cache = tmp_path / f"cache-{len(made)}"
        rows = {
            name: open_packed(f"{location}/{name}", cache_dir=cache, storage=storage).train
            for name in ("code", "math", "prose")
        }
        made.append(DomainMixture(rows, storage=storage, **{"batch_rows": 6, "block_rows": 16, **options}))
        return made[-1]

    yield make
    for mixture in made:
        mixture.close()


def batches(mixture: DomainMixture, steps: int = STEPS) -> list[Any]:
    """Tokens and labels of the next steps, weights changed in the middle."""
    found = []
    for step in range(steps):
        if step == steps // 2:
            mixture.set_weights({"code": 1.0, "math": 1.0, "prose": 1.0})
        batch = next(mixture)
        found.append((batch["input_ids"].tolist(), batch["labels"].tolist(), batch["domain_ids"].tolist()))
    return found


@pytest.mark.parametrize(("mode", "num_workers"), [("ranged", 0), ("ranged", 2), ("spool", 0), ("spool", 2)])
def test_rows_on_a_web_server_are_the_local_ones(
    published: Path, mixture_of: Make, web: WebServer, mode: str, num_workers: int
) -> None:
    """By ranges or from spooled shards, in this process or in workers."""
    upload(published, web.put)
    expected = batches(mixture_of(str(published)))
    assert expected == batches(mixture_of(web.url("").rstrip("/"), mode=mode, num_workers=num_workers))
    shards = [path.relative_to(published) for path in published.rglob("train/*.tar")]
    asked = [part for shard in shards for part in web.ranges_asked(str(shard))]
    rows = [part for part in asked if part not in (None, "bytes=0-0")]
    assert (mode == "ranged") == bool(rows)
    assert (mode == "spool") == (None in asked)


def test_a_server_without_ranges_is_spooled(published: Path, mixture_of: Make, plain_web: WebServer) -> None:
    """`auto` finds out by itself."""
    upload(published, plain_web.put)
    assert batches(mixture_of(str(published))) == batches(mixture_of(plain_web.url("").rstrip("/")))


def test_auto_reads_ranges_until_the_copies_are_there(
    published: Path, mixture_of: Make, web: WebServer
) -> None:
    """The first rows come at once; when the shards have arrived, nothing is asked any more."""
    upload(published, web.put)
    expected = batches(mixture_of(str(published), block_rows=1000))
    mixture = mixture_of(web.url("").rstrip("/"), block_rows=1000)
    start = mixture.state_dict()
    found = batches(mixture)
    shards = [str(path.relative_to(published)) for path in published.rglob("train/*.tar")]
    end = time.monotonic() + 20
    while time.monotonic() < end and not all(None in web.ranges_asked(shard) for shard in shards):
        time.sleep(0.01)
        mixture.load_state_dict(start)
        next(mixture)
    assert [1] * len(shards) == [web.ranges_asked(shard).count(None) for shard in shards]
    assert expected == found


def test_rows_in_a_bucket_are_the_local_ones(published: Path, mixture_of: Make, s3: str) -> None:
    """S3, with credentials from the environment."""
    upload(published, lambda name, data: put_s3(f"{s3}/{name}", data))
    assert batches(mixture_of(str(published))) == batches(mixture_of(s3))


def test_failures_on_the_way_change_nothing(published: Path, mixture_of: Make, web: WebServer) -> None:
    """Two answers of every shard fail before it is served: the rows are the same and none is substituted."""
    upload(published, web.put)
    for path in published.rglob("train/*.tar"):
        web.put(str(path.relative_to(published)), path.read_bytes(), status(503), reset(10))
    mixture = mixture_of(web.url("").rstrip("/"), attempts=6)
    assert batches(mixture_of(str(published))) == batches(mixture)
    assert [] == mixture.substitutions


def test_a_copy_that_rots_is_fetched_again(
    published: Path, mixture_of: Make, web: WebServer, tmp_path: Path
) -> None:
    """Bytes of the spooled shards change on this machine's disk: the store still has the rows."""
    upload(published, web.put)
    expected = batches(mixture_of(str(published)))
    mixture = mixture_of(web.url("").rstrip("/"), mode="spool")
    first = next(mixture)["input_ids"].tolist()
    copies = list((tmp_path / "spool-1").glob("*.shard"))
    assert copies
    for copy in copies:
        data = copy.read_bytes()
        copy.write_bytes(bytes(byte ^ 1 for byte in data))
    mixture.load_state_dict(mixture_of(str(published)).state_dict())
    assert first == expected[0][0]
    assert expected == batches(mixture)
    assert [] == mixture.substitutions


def test_a_store_that_is_gone_is_no_damaged_row(published: Path, mixture_of: Make, web: WebServer) -> None:
    """One line, no substitute, and the same step once the store is back."""
    upload(published, web.put)
    expected = batches(mixture_of(str(published)))
    mixture = mixture_of(web.url("").rstrip("/"), mode="ranged", attempts=1)
    for path in published.rglob("train/*.tar"):
        web.put(str(path.relative_to(published)), path.read_bytes(), *[status(500)] * 40)
    with pytest.raises(StorageError) as info:
        next(mixture)
    assert "\n" not in str(info.value)
    assert [] == mixture.substitutions
    assert 0 == mixture.state.step
    upload(published, web.put)
    assert expected == batches(mixture)


def test_a_run_trains_on_remote_rows(
    published: Path,
    tmp_path: Path,
    tiny_config: Callable[..., ConfigTree],
    s3: str,
) -> None:
    """Cards that name packed rows in a bucket: the metrics of the run on local documents, byte for byte."""
    upload(published, lambda name, data: put_s3(f"{s3}/{name}", data))
    for name in ("code", "math", "prose"):
        card = {"name": name, "rows": f"{s3}/{name}", "license": "CC0-1.0"}
        (tmp_path / "cards").mkdir(exist_ok=True)
        (tmp_path / "cards" / f"{name}.yaml").write_text(yaml.safe_dump(card))
    local = tiny_config(run_dir=str(tmp_path / "local"), trainer={"steps": 5})
    remote = tiny_config(
        run_dir=str(tmp_path / "remote"),
        trainer={"steps": 5},
        domains=[str(tmp_path / "cards")],
        cache_dir=str(tmp_path / "cache"),
        storage={"attempts": 2},
    )
    train(parse_config(local, where="test"))
    train(parse_config(remote, where="test"))
    for name in ("metrics.jsonl", "intervals.jsonl"):
        assert [*read_lines(tmp_path / "local" / name)] == [*read_lines(tmp_path / "remote" / name)]
    assert os.environ["AWS_ACCESS_KEY_ID"] not in (tmp_path / "remote" / "data.json").read_text()
