"""The parts of the loaders' race that need no peers: its server, its tables, and ddkmix as a contestant."""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_loader  # noqa: E402
from loader_bench import child, contestants, environment, own, packed, race, report  # noqa: E402
from loader_bench.corpus import Corpus  # noqa: E402
from loader_bench.server import serve  # noqa: E402

ROWS, SHARD_ROWS, SEQ_LEN = 40, 16, 8


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Two domains of 40 rows; token 0 of a row is its domain, token 1 its number."""
    (tmp_path / "rows").mkdir()
    for i, name in enumerate(("a", "b")):
        rows = np.full((ROWS, SEQ_LEN), 7, dtype=np.uint16)
        rows[:, 0], rows[:, 1] = i, np.arange(ROWS)
        np.save(tmp_path / "rows" / f"{name}.npy", rows)
    return Corpus(
        folder=tmp_path, domains=("a", "b"), rows_per_domain=ROWS, shard_rows=SHARD_ROWS, seq_len=SEQ_LEN
    )


def plan(**changes: Any) -> race.Race:
    """A race of ddkmix alone, as short as can be."""
    settings: dict[str, Any] = {
        "contestants": ("ddkmix",),
        "workers": (0,),
        "files": ("warm",),
        "rounds": 1,
        "seconds": 0.05,
        "batch_rows": 4,
        "python": race.this_python(),
    }
    return race.Race(**{**settings, **changes})


def get(url: str, wanted: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of a request, with a range or without."""
    request = urllib.request.Request(url, headers={"Range": wanted} if wanted else {})
    with urllib.request.urlopen(request) as answer:
        return answer.status, answer.read(), dict(answer.headers)


@pytest.mark.parametrize(
    ("expected", "wanted"),
    [
        ((200, b"0123456789"), None),
        ((206, b"234"), "bytes=2-4"),
        ((206, b"789"), "bytes=7-"),
        ((206, b"89"), "bytes=-2"),
        ((206, b"89"), "bytes=8-100"),
    ],
)
def test_the_server_answers_ranges(expected: tuple[int, bytes], wanted: str | None, tmp_path: Path) -> None:
    """A whole file, a part, from a place on, and the end."""
    (tmp_path / "file").write_bytes(b"0123456789")
    with serve(tmp_path) as url:
        status, body, headers = get(f"{url}/file", wanted)
    assert expected == (status, body)
    assert str(len(body)) == headers["Content-Length"]


def test_the_server_refuses_a_range_behind_the_end(tmp_path: Path) -> None:
    """416, as the standard says."""
    (tmp_path / "file").write_bytes(b"0123456789")
    with serve(tmp_path) as url, pytest.raises(urllib.error.HTTPError) as caught:
        get(f"{url}/file", "bytes=10-")
    assert 416 == caught.value.code
    caught.value.close()


def test_packed_rows_are_the_corpus(corpus: Corpus) -> None:
    """What is written for ddkmix is what the corpus holds, shard by shard, the last one shorter."""
    from ddkmix.rows import RowReader

    packed.write_domain(corpus.folder / "out", "a", corpus.rows("a"), shard_rows=SHARD_ROWS)
    rows = packed.open_domains(corpus.folder / "out", ["a"])["a"]
    reader = RowReader(rows)
    assert [16, 16, 8] == [shard.num_rows for shard in rows.shards]
    assert corpus.rows("a")[37].tolist() == reader.read(2, 5).tolist()
    reader.close()


def test_weights_are_uneven_and_sum_to_one(corpus: Corpus) -> None:
    """Two domains: a third and two thirds."""
    assert {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3)} == corpus.weights


@pytest.mark.parametrize("files", ["warm", "cold", "http"])
def test_ddkmix_races(files: str, corpus: Corpus) -> None:
    """A measurement in a process of its own, on each kind of files."""
    said: list[str] = []
    results = race.run(plan(files=(files,)), corpus, said.append)
    assert {} == results["errors"]
    [measured] = results["rows"][f"ddkmix {files} 0"]
    assert measured["rows_per_s"] > 0
    assert "converting for ddkmix" == said[0]
    if files == "cold":
        assert measured["rows"] <= 2 * ROWS + 4


def test_a_contestant_that_fails_does_not_stop_the_others(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error stands in the results; the rest is measured."""
    monkeypatch.setitem(contestants.MODULES, "nobody", "no_such_module")
    results = race.run(plan(contestants=("nobody", "ddkmix")), corpus, lambda line: None)
    assert ["nobody"] == list(results["errors"])
    assert ["ddkmix warm 0"] == list(results["rows"])
    assert ["ddkmix"] == list(results["versions"])


def test_data_wait_is_also_measured_after_a_weight_change(corpus: Corpus) -> None:
    """Only a stream whose weights can be changed has the second pair of numbers."""
    module = contestants.load("ddkmix")
    module.prepare(corpus, corpus.format_folder("ddkmix"))
    mixture = module.open_stream(corpus, str(corpus.format_folder("ddkmix")), batch_rows=4, workers=0)
    found = child.data_wait(mixture, 0.1, 4, None)
    mixture.close()
    assert {"wait_median_ms", "wait_p99_ms", "change_median_ms", "change_p99_ms"} == set(found)
    plain = child.data_wait(iter(lambda: 0, 1), 0.1, 4, None)
    assert {"wait_median_ms", "wait_p99_ms"} == set(plain)


def test_a_wrong_batch_is_refused() -> None:
    """Other types, other shapes, and labels that are the inputs themselves."""
    import torch

    good = torch.zeros((4, SEQ_LEN), dtype=torch.int64)
    child.check_batch({"input_ids": good, "labels": good.clone()}, 4, SEQ_LEN)
    for wrong in (good, good.clone().int(), good[:3].clone()):
        with pytest.raises(AssertionError):
            child.check_batch({"input_ids": good, "labels": wrong}, 4, SEQ_LEN)


def test_every_contestant_cites_its_documentation() -> None:
    """Each file says where its set-up comes from, and has what the race asks for."""
    for name in contestants.MODULES:
        module = contestants.load(name)
        assert name == module.NAME
        assert module.DOMAINS in ("one", "several")
        assert isinstance(module.HTTP, bool)
        assert any(word in (module.__doc__ or "") for word in ("README", "Docs", "docs")), name


def test_the_peers_are_pinned() -> None:
    """Every contestant but ddkmix has a version in the requirements; torch comes first and alone."""
    pins = environment._REQUIREMENTS.read_text() + environment._WITHOUT_DEPENDENCIES.read_text()
    packages = {contestants.load(name).PACKAGE for name in contestants.MODULES} - {"ddkmix"}
    assert [] == [package for package in packages if f"{package}==" not in pins]
    assert "torch" == environment.commands()[0][-1]
    assert all("--constraint" in arguments for arguments in environment.commands())


def measured(rate: float) -> list[dict[str, float]]:
    """Three rounds around a rate."""
    return [{"rows_per_s": rate * factor, "rows": 100} for factor in (0.9, 1.0, 1.2)]


def test_the_tables_by_hand() -> None:
    """Medians, ranges, ratios to plain webdataset, waits and errors."""
    wait = {"wait_median_ms": 0.5, "wait_p99_ms": 2.0, "change_median_ms": 3.0, "change_p99_ms": 4.0}
    results = {
        "machine": "two cores",
        "date": "2026-01-01",
        "command": "python x",
        "race": {
            "setup": {
                "contestants": ["ddkmix", "webdataset"],
                "workers": [0, 1],
                "files": ["warm"],
                "rounds": 3,
                "seconds": 2.0,
                "batch_rows": 32,
            },
            "corpus": {"domains": ["a"], "rows_per_domain": 8192, "seq_len": 512, "shard_rows": 1024},
            "versions": {"webdataset": "1.0.2"},
            "rows": {"ddkmix warm 0": measured(50_000), "webdataset warm 0": measured(4_000)},
            "wait": {"ddkmix warm 0": [wait]},
            "errors": {"webdataset warm 1": "it broke"},
        },
    }
    text = report.markdown(results)
    assert "| ddkmix | 50,000 (45,000-60,000) **12.5x** |  |" in text
    assert "| webdataset | 4,000 (3,600-4,800) **1.0x** |  |" in text
    assert "| ddkmix, after a weight change | 3.00 / 4.0 |  |" in text
    assert "- webdataset warm 1: it broke" in text


def test_what_only_ddkmix_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its measurements, on a small scale, and their table."""
    monkeypatch.setattr(own, "_SHARD_ROWS", 20)
    found = own.measure(
        lambda line: None, million_rows=80_000, domain_counts=(3,), shard_counts=(10,), seconds=0.05
    )
    assert 80_000 == found["million"]["rows"]
    assert found["million"]["index_bytes_per_row"] > 20
    assert found["plan"]["constant_median_ms"] > 0
    text = "\n".join(report._own(json.loads(json.dumps(found))))
    assert "| 3 domains | " in text
    assert "| 10 shards | " in text
    assert "80,000 rows in 8 domains" in text


def test_wrong_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A contestant that does not exist is named with those that do."""
    with pytest.raises(SystemExit):
        bench_loader.main(["--contestants", "ddkmix,tfdata"])
    assert "tfdata: choose from ddkmix, webdataset" in capsys.readouterr().err
