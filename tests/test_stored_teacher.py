"""Training from captured signals: the same run as with the live teacher, without one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddkmix.teaching
from ddkmix.batch import RoutedSignal, TruncatedSignal
from ddkmix.capture import capture
from ddkmix.config import RunConfig, parse_config
from ddkmix.errors import ConfigError, DataError, RowError
from ddkmix.preflight import check
from ddkmix.prepare import open_mixture, open_rows
from ddkmix.records import read_lines
from ddkmix.setup import train
from ddkmix.stored_teacher import StoredTeacher
from ddkmix.teaching import open_store, open_teachers, teacher_of_all
from tests.conftest import ConfigTree

LOSS = [
    {"name": "cross_entropy", "weight": "rest"},
    {"name": "forward_kl", "weight": 0.6, "temperature": 2.0},
]
EVERY_CLASS = {"keep": "top_k", "k": 320, "log_prob_bytes": 2}


@pytest.fixture
def config_of(tiny_config: Callable[..., ConfigTree], tmp_path: Path) -> Callable[..., RunConfig]:
    """A function that gives a config with a logits folder of its own; keywords as in `tiny_config`."""

    def make(run: str = "run", **sections: Any) -> RunConfig:
        capturing = {"folder": str(tmp_path / "logits"), **sections.pop("capture", {})}
        tree = tiny_config(
            loss=LOSS,
            run_dir=str(tmp_path / run),
            capture=capturing,
            **{"signal": {"source": "store"}, **sections},
        )
        return parse_config(tree, where="test")

    return make


def history(run: str, folder: Path, key: str) -> list[float]:
    """One number of each step of a run."""
    return [record[key] for record in read_lines(folder / run / "metrics.jsonl")]


def no_teacher(*_: Any) -> Any:
    """Stands where models would be loaded."""
    raise AssertionError("a teacher was loaded")


def test_a_run_from_the_store_is_the_run_with_the_live_teacher(
    config_of: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All classes kept in half precision: losses of every step agree to its rounding, gaps exactly, and no
    teacher is loaded, because the capture has measured it on the held-out rows too."""
    stored = config_of(capture=EVERY_CLASS)
    capture(stored)
    train(config_of(run="live", signal={"source": "live"}, capture=EVERY_CLASS))
    monkeypatch.setattr(ddkmix.teaching, "load_teacher", no_teacher)
    train(stored)
    for key in ("train/forward_kl", "train/cross_entropy", "train/objective"):
        np.testing.assert_allclose(
            history("live", tmp_path, key), history("run", tmp_path, key), rtol=2e-3, atol=2e-4
        )
    first = [next(iter(read_lines(tmp_path / run / "intervals.jsonl"))) for run in ("live", "run")]
    assert first[0]["losses"] == first[1]["losses"]
    assert first[0]["weights"] == first[1]["weights"]


def test_a_store_that_was_carried_elsewhere_needs_no_teacher(
    config_of: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine has the store and no cache: the teacher's held-out losses come with the store."""
    kept = {"folder": str(tmp_path / "store")}
    capture(config_of(capture=kept))
    monkeypatch.setattr(ddkmix.teaching, "load_teacher", no_teacher)
    train(config_of(run="here", capture=kept))
    train(config_of(run="elsewhere", capture=kept, cache_dir=str(tmp_path / "empty")))
    here, elsewhere = (
        [record["losses"] for record in read_lines(tmp_path / run / "intervals.jsonl")]
        for run in ("here", "elsewhere")
    )
    assert here == elsewhere


def test_one_store_serves_other_policies_seeds_and_orders(
    config_of: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured once; a run with another seed, policy, batch and block size, over several epochs, finds
    every row's own record: its KL is that of the live teacher on the same rows."""
    capture(config_of(capture=EVERY_CLASS))
    others: dict[str, Any] = {
        "seed": 7,
        "policy": {"name": "static"},
        "mixture": {"interval_steps": 10, "block_rows": 3},
        "trainer": {"steps": 12, "batch_rows": 8, "log_steps": 1, "microbatch_rows": 3},
        "capture": EVERY_CLASS,
    }
    train(config_of(run="live", **others, signal={"source": "live"}))
    monkeypatch.setattr(ddkmix.teaching, "load_teacher", no_teacher)
    train(config_of(**others, loader={"workers": 1}))
    np.testing.assert_allclose(
        history("live", tmp_path, "train/forward_kl"),
        history("run", tmp_path, "train/forward_kl"),
        rtol=2e-3,
        atol=2e-4,
    )


def test_a_run_from_the_store_resumes_bit_for_bit(
    config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Stopped after a checkpoint and resumed: metrics are those of the run that was not stopped."""
    capture(config_of())
    train(config_of(run="whole"))

    class Stop(Exception):
        pass

    def stop(step: int, *_: Any) -> None:
        if step == 8:
            raise Stop

    with pytest.raises(Stop):
        train(config_of(), on_losses=stop)
    train(config_of(), resume=True)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (
        tmp_path / "run" / "metrics.jsonl"
    ).read_text()


@pytest.fixture
def teacher_of(config_of: Callable[..., RunConfig]) -> Callable[..., tuple[Any, Any, Any]]:
    """A function: (mixture, live teacher, stored one) of a captured config, shards of some domains gone."""

    def make(*, lacking: tuple[str, ...] = (), **sections: Any) -> tuple[Any, Any, Any]:
        config = config_of(**sections)
        capture(config)
        prepared = check(config)
        packed = open_rows(prepared, shown=False)
        mixture = open_mixture(config, packed)
        rows = {name: domain.train for name, domain in packed.items()}
        store = open_store(prepared, rows)
        for name in lacking:
            store.path(name, 0).unlink()
        device = torch.device("cpu")
        live = teacher_of_all(prepared, open_teachers(prepared, device), mixture.domains)
        return mixture, live, StoredTeacher(store, mixture.domains, device=device, fallback=live)

    return make


def test_rows_that_were_not_captured_are_the_live_teachers(
    teacher_of: Callable[..., tuple[Any, Any, Any]],
) -> None:
    """Each row of a batch is answered for once, by the store where it can."""
    mixture, live, stored = teacher_of(lacking=("code",))
    batch = next(mixture)
    batch["row_places"] = torch.from_numpy(mixture.row_places)
    said = stored.signal(batch)
    assert isinstance(said, RoutedSignal)
    captured, others = said.rows
    assert sorted([*captured.tolist(), *others.tolist()]) == list(range(len(batch["input_ids"])))
    assert {mixture.domains.index("code")} == set(batch["domain_ids"][others].tolist())
    assert isinstance(said.signals[0], TruncatedSignal)
    whole = live.signal(batch)
    torch.testing.assert_close(whole.hidden[others], said.signals[1].hidden, rtol=1e-4, atol=1e-5)


def test_hidden_states_say_what_the_live_teacher_says(
    teacher_of: Callable[..., tuple[Any, Any, Any]],
) -> None:
    """In single precision every predicting position has the state of the live model."""
    mixture, live, stored = teacher_of(capture={"keep": "hidden", "hidden_bytes": 4})
    batch = next(mixture)
    batch["row_places"] = torch.from_numpy(mixture.row_places)
    said, whole = stored.signal(batch), live.signal(batch)
    predicting = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(
        whole.hidden[:, :-1][predicting], said.hidden[:, :-1][predicting], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(whole.head.weight, said.head.weight)


# --- what is refused --------------------------------------------------------------------------------


def test_a_run_without_its_store_is_refused_before_a_model_is_loaded(
    config_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No store at all, then one that was captured in another way: what differs, and what to do."""
    monkeypatch.setattr(ddkmix.teaching, "load_teacher", no_teacher)
    with pytest.raises(DataError, match="holds no logits store; make one with `ddkmix capture CONFIG`"):
        train(config_of())
    monkeypatch.undo()
    capture(config_of(capture={"k": 20}))
    monkeypatch.setattr(ddkmix.teaching, "load_teacher", no_teacher)
    with pytest.raises(DataError, match=r"k 20 \(wanted: 50\)"):
        train(config_of())


def test_a_store_with_gaps_is_refused_unless_the_live_teacher_may_fill_them(
    config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The line counts shards by domain; with signal.missing = live the run is whole."""
    capture(config_of())
    for path in (tmp_path / "logits").glob("*/code/*.logits"):
        path.unlink()
    with pytest.raises(DataError, match="lacks shards: 2 of 2 in code"):
        train(config_of())
    train(config_of(signal={"source": "store", "missing": "live"}))
    assert 10 == len(history("run", tmp_path, "train/forward_kl"))


def test_a_changed_record_stops_the_run_with_its_name(
    config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """One flipped byte in every record of a domain: the row, the file and the way out."""
    capture(config_of())
    for path in (tmp_path / "logits").glob("*/*/*.logits"):
        data = bytearray(path.read_bytes())
        data[4096:-4096:50] = bytes(byte ^ 1 for byte in data[4096:-4096:50])
        path.write_bytes(bytes(data))
    with pytest.raises(RowError, match=r"\.tar#\d+: its record in .* Delete that file and capture again"):
        train(config_of())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"signal": {"source": "store", "tail": "drop"}, "loss": [{"name": "reverse_kl"}]}, "kind 'drop'"),
        ({"capture": {"keep": "drawn"}, "loss": [{"name": "jsd"}]}, "kind 'drawn'"),
        (
            {"signal": {"source": "store"}, "loss": [{"name": "mse", "of": "logits"}]},
            "kind 'bucket'",
        ),
    ],
)
def test_a_loss_that_a_store_cannot_serve_is_refused_by_lint(
    config_of: Callable[..., RunConfig], sections: dict[str, Any], message: str
) -> None:
    """Before anything is read."""
    tree = json.loads(config_of().model_dump_json()) | {
        name: value for name, value in sections.items() if name == "loss"
    }
    tree |= {name: value for name, value in sections.items() if name != "loss"}
    with pytest.raises(ConfigError, match=message):
        check(parse_config(tree, where="test"))
