"""Damaged rows in a run: replaced, written down, limited, and shown by `ddkmix seen`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddkmix.cli import main
from ddkmix.config import parse_config
from ddkmix.errors import RowError
from ddkmix.index import read_index
from ddkmix.records import read_lines
from ddkmix.setup import train
from tests.conftest import ConfigTree, write_domain


@pytest.fixture
def damaged(tmp_path: Path, tiny_config: Callable[..., ConfigTree]) -> Callable[..., ConfigTree]:
    """A function that gives the config of a run whose domain `code` has some damaged rows."""
    cards = tmp_path / "cards"
    for name in ("code", "math"):
        write_domain(cards, name, per_shard=6)

    def make(rows: int, **sections: Any) -> ConfigTree:
        cache = tmp_path / f"cache-{rows}"
        tree = tiny_config(domains=[str(cards)], cache_dir=str(cache), **sections)
        config = tmp_path / "pack.yaml"
        config.write_text(yaml.safe_dump(tree))
        main(["pack", str(config)])
        (shard,) = cache.glob("rows/code-*/train/train-000000.tar")
        index = read_index(shard)
        with shard.open("r+b") as file:
            for row in range(rows):
                file.seek(int(index.offsets[row]))
                byte = file.read(1)
                file.seek(int(index.offsets[row]))
                file.write(bytes([byte[0] ^ 1]))
        return tree

    return make


def test_damaged_rows_are_replaced_written_down_and_seen(
    damaged: Callable[..., ConfigTree], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every damaged row that is met has a line with shard and offset; counts stay those of the whole data."""
    run = tmp_path / "run"
    train(parse_config(damaged(6), where="test"))
    records = list(read_lines(run / "substitutions.jsonl"))
    assert records
    assert {("code", "train-000000.tar")} == {(r["domain"], r["shard"]) for r in records}
    assert all(" bytes have changed at offset " in r["reason"] for r in records)
    whole = tmp_path / "whole"
    tree = damaged(0, run_dir=str(whole))
    train(parse_config(tree, where="test"))
    served = [[r["served"] for r in read_lines(d / "intervals.jsonl")] for d in (run, whole)]
    assert served[0] == served[1]
    capsys.readouterr()
    step = str(records[0]["step"])
    main(["seen", str(run), "--step", step, "--format", "json"])
    shown = json.loads(capsys.readouterr().out)
    assert records[0]["reason"] in json.dumps(shown)


@pytest.mark.parametrize("most", [0, 1])
def test_too_many_damaged_rows_stop_the_run(
    damaged: Callable[..., ConfigTree], tmp_path: Path, most: int
) -> None:
    """0 is strict. The limit holds over resumes; with a higher one the run goes on."""
    tree = damaged(6, loader={"max_substitutes": most})
    with pytest.raises(RowError, match=f"max_substitutes allows {most}") as info:
        train(parse_config(tree, where="test"))
    assert "\n" not in str(info.value)
    with pytest.raises(RowError):
        train(parse_config(tree, where="test"), resume=True)
    tree["loader"] = {"max_substitutes": 100}
    train(parse_config(tree, where="test"), resume=True)
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_a_resumed_run_writes_the_same_substitutions(
    damaged: Callable[..., ConfigTree], tmp_path: Path
) -> None:
    """Stopped by the limit in the middle, then finished: the file of the run that was never stopped."""
    whole = damaged(6)
    train(parse_config(whole, where="test"))
    expected = (tmp_path / "run" / "substitutions.jsonl").read_text()
    (tmp_path / "run").rename(tmp_path / "first")
    limited = {**whole, "loader": {"max_substitutes": len(expected.splitlines()) - 1}}
    with pytest.raises(RowError):
        train(parse_config(limited, where="test"))
    train(parse_config({**whole, "loader": {"workers": 1}}, where="test"), resume=True)
    assert expected == (tmp_path / "run" / "substitutions.jsonl").read_text()
    for name in ("metrics.jsonl", "intervals.jsonl"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "run" / name).read_text()
