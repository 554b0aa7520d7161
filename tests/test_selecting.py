"""Selection by difference in whole runs: which rows are kept, what that changes, and what it must not."""

import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from ddkmix import selecting
from ddkmix.config import parse_config
from ddkmix.errors import ConfigError, DataError, ModelError, RunError
from ddkmix.models import build_student, load_teacher
from ddkmix.preflight import check
from ddkmix.prepare import open_mixture, open_rows
from ddkmix.records import read_lines
from ddkmix.replay import Replay
from ddkmix.selected import planned, predicted_tokens, read_kept, with_kept, write_kept
from ddkmix.selecting import select_rows
from ddkmix.setup import train
from tests.conftest import ConfigTree, save_tiny_model
from tests.test_resume import assert_same_outcome, rewound

Make = Callable[..., ConfigTree]
HALF = {"name": "difference", "share": 0.5}
CPU = torch.device("cpu")


@pytest.fixture
def half(tiny_config: Make, tmp_path: Path, tiny_domains: Path) -> Make:
    """As `tiny_config`, with half of the rows, and with losses and decisions of this test alone."""

    def make(**sections: Any) -> ConfigTree:
        cache = tmp_path / "cache"
        if not cache.exists() and (tiny_domains / "cache").exists():
            shutil.copytree(tiny_domains / "cache", cache)
            for name in ("row_nats", "selection"):
                shutil.rmtree(cache / name, ignore_errors=True)
        return tiny_config(**{"cache_dir": str(cache), "selection": HALF, **sections})

    return make


def run(tree: ConfigTree, run_dir: Path, **options: Any) -> Path:
    """Train in this process."""
    train(parse_config({**tree, "run_dir": str(run_dir)}, where="test"), **options)
    return run_dir


def selected(tree: ConfigTree) -> tuple[Any, Any, Any]:
    """The checked config, its packed rows, and those that it keeps."""
    prepared = check(parse_config(tree, where="test"))
    packed = open_rows(prepared, shown=False)
    return prepared, packed, select_rows(prepared, packed, CPU, shown=False)


def means_by_hand(model: torch.nn.Module, rows: Any) -> list[float]:
    """Nats per predicted token of every row that has one, from full logits, one row at a time."""
    found = []
    for shard in rows.shards:
        data = Path(shard.location).read_bytes()
        for offset, length in zip(shard.offsets.tolist(), shard.num_tokens.tolist(), strict=True):
            if length < 2:
                continue
            ids = np.frombuffer(data, dtype=shard.dtype, count=length, offset=offset).astype(np.int64)
            row = torch.from_numpy(ids)[None]
            with torch.no_grad():
                logits = model(input_ids=row).logits[0, :-1].double()
            found.append(F.cross_entropy(logits, row[0, 1:]).item())
    return found


def test_the_rows_kept_are_those_of_full_logits(half: Make) -> None:
    """In every domain, the better half by log p(x) - log p_ref(x) per token, of the teacher and of the
    student before its first step, from logits made here."""
    prepared, packed, (after, kept) = selected(half())
    config = prepared.config
    teacher = load_teacher(config.teacher)
    student = build_student(config.student, config.teacher, seed=0).eval()
    for name, domain in packed.items():
        pairs = zip(means_by_hand(student, domain.train), means_by_hand(teacher, domain.train), strict=True)
        difference = [theirs - own for theirs, own in pairs]
        ranked = sorted(range(len(difference)), key=lambda i: -difference[i])
        chosen = ranked[: math.floor(len(ranked) / 2 + 0.5)]
        offered = np.flatnonzero(predicted_tokens(domain.train))
        assert len(offered) == len(difference)
        best = sorted(chosen)
        assert offered[best].tolist() == np.flatnonzero(after[name].train.kept).tolist()
        assert min(difference[i] for i in best) == pytest.approx(kept[name].threshold, rel=1e-4)
        assert (len(difference), len(best)) == (kept[name].offered, kept[name].kept)
        assert after[name].held_out is domain.held_out


def served(run_dir: Path, steps: int) -> list[list[str]]:
    """Names of the rows of every step, from the run directory alone."""
    replay = Replay(run_dir)
    return [[row.name for row in replay.rows(step, step)] for step in range(1, steps + 1)]


def test_a_run_serves_only_kept_rows_by_their_old_names(half: Make, tmp_path: Path) -> None:
    """Several epochs; every kept row comes equally often, to one; counts are in RUN/selection.json, and the
    names that `seen` tells are those that the mixture reads."""
    tree = half(trainer={"steps": 30}, policy={"name": "static"})
    prepared, _, (after, kept) = selected(tree)
    directory = run(tree, tmp_path / "run")
    steps = served(directory, 30)
    names = [name for step in steps for name in step]
    for domain, rows in ((name, one.train) for name, one in after.items()):
        own = [name for name in names if name.startswith(f"{domain}/")]
        places = zip(np.repeat(range(len(rows.shards)), rows.shard_rows), rows.kept_rows, strict=True)
        allowed = {rows.name_of(int(shard), int(row)) for shard, row in places}
        counts = {name: own.count(name) for name in allowed}
        assert set(own) <= allowed
        assert sum(counts.values()) == len(own)
        assert max(counts.values()) - min(counts.values()) <= 1
    mixture = open_mixture(prepared.config, after)
    mixture.set_weights(dict.fromkeys(mixture.domains, 1 / 3))
    for step in range(30):
        next(mixture)
        assert mixture.row_names(mixture.last_plan) == steps[step]
    record = json.loads((directory / "selection.json").read_text())
    assert {name: one.kept for name, one in kept.items()} == {name: r["kept"] for name, r in record.items()}
    assert all(r["kept"] == math.floor(r["offered"] / 2 + 0.5) for r in record.values())
    assert not (run(half(selection=None, trainer={"steps": 1}), tmp_path / "all") / "selection.json").exists()


def test_losses_are_measured_once(half: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run finds the decision; another share finds the losses; a torn decision costs a decision, a
    torn file of losses its shard; and neither changes what is kept."""
    measured: list[str] = []
    real = selecting._measure

    def counting(measuring: Any, one: Any, nats: Any) -> Any:
        measured.append(one.rows.shards[0].name)
        return real(measuring, one, nats)

    monkeypatch.setattr(selecting, "_measure", counting)
    tree = half()
    _, packed, (first, _) = selected(tree)
    shards = sum(len(domain.train.shards) for domain in packed.values())
    assert 2 * shards == len(measured)
    measured.clear()
    cache = Path(tree["cache_dir"])
    decisions, losses = (sorted((cache / name).iterdir()) for name in ("selection", "row_nats"))
    assert (3, 2 * shards) == (len(decisions), len(losses))

    def same() -> bool:
        _, _, (again, _) = selected(tree)
        return all(again[n].train.fingerprint == first[n].train.fingerprint for n in first)

    assert same()
    decisions[0].write_text(decisions[0].read_text().replace('"kept": ', '"kept": 1'))
    decisions[1].write_text("{")
    assert same() and [] == measured
    selected(half(selection={**HALF, "share": 0.25}))
    assert [] == measured
    losses[0].write_bytes(losses[0].read_bytes()[:-8])
    for path in (cache / "selection").iterdir():
        path.unlink()
    assert same() and 1 == len(measured)


def test_measuring_changes_nothing_else(half: Make, tmp_path: Path) -> None:
    """A run that measures is the run that finds the decision, to the last bit, dropout and all."""
    tree = half(trainer={"steps": 4})
    first = run(tree, tmp_path / "first")
    assert_same_outcome(first, run(tree, tmp_path / "second"))


@pytest.mark.parametrize("step", [3, 6])
def test_resume_is_exact(half: Make, tmp_path: Path, step: int) -> None:
    """From an early and from a later checkpoint, also where the decisions are gone and are made again."""
    tree = half(trainer={"steps": 8, "keep_checkpoints": 99})
    full = run(tree, tmp_path / "full")
    part = rewound(full, tmp_path / "part", step)
    if step == 6:
        shutil.rmtree(Path(tree["cache_dir"]) / "selection")
        shutil.rmtree(Path(tree["cache_dir"]) / "row_nats")
    assert_same_outcome(full, run(tree, part, resume=True))


def test_another_selection_is_refused_or_stated(half: Make, tmp_path: Path) -> None:
    """Resumed with another share: one line; with --allow-changes the domains begin anew, and both are told in
    changes.jsonl. The past steps stay what they were."""
    tree = half(trainer={"steps": 8})
    directory = run(half(trainer={"steps": 6}), tmp_path / "run")
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["trainer"]["steps"] = 8
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    before = served(directory, 6)
    other = {**tree, "selection": {**HALF, "share": 0.25}}
    with pytest.raises(RunError, match=r"selection\.share was 0\.5 and is now 0\.25\..*add --allow-changes"):
        run(other, directory, resume=True)
    run(other, directory, resume=True, allow_changes=True)
    (record,) = read_lines(directory / "changes.jsonl")
    assert any("selection.share was 0.5" in change for change in record["changes"])
    assert any("the data of domain 'code' changed" in change for change in record["changes"])
    assert before == served(directory, 8)[:6]


def test_another_teacher_makes_other_data(half: Make, tmp_path: Path, tokenizer_folder: Path) -> None:
    """The same settings and other losses: what is kept differs, and with it the fingerprint of the data."""
    _, _, (first, _) = selected(half())
    other = save_tiny_model(tmp_path / "other", tokenizer_folder, seed=5)
    _, _, (second, _) = selected(half(teacher={"model": str(other)}))
    assert {n for n in first if first[n].train.fingerprint != second[n].train.fingerprint}


def test_a_named_reference_is_used(half: Make, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Its losses, not the student's, by full logits."""
    small = save_tiny_model(tmp_path / "small", tokenizer_folder, seed=8, num_hidden_layers=1)
    reference = {"model": str(small), "dtype": "float32"}
    prepared, packed, (after, kept) = selected(half(selection={**HALF, "reference": reference}))
    teacher, other = load_teacher(prepared.config.teacher), load_teacher(prepared.selection.reference)
    theirs, own = (means_by_hand(model, packed["math"].train) for model in (other, teacher))
    difference = np.array(theirs) - np.array(own)
    best = np.sort(np.argsort(-difference, kind="stable")[: kept["math"].kept])
    offered = np.flatnonzero(predicted_tokens(packed["math"].train))
    assert offered[best].tolist() == np.flatnonzero(after["math"].train.kept).tolist()


def test_plan_knows_what_will_be_kept(half: Make) -> None:
    """Before anything is measured the counts, afterwards the rows; without a model either time."""
    tree = half()
    prepared = check(parse_config(tree, where="test"))
    packed = open_rows(prepared, shown=False)
    early, line = planned(prepared, packed)
    assert line is not None and "is decided when `train` has measured them" in line
    _, _, (after, kept) = selected(tree)
    late, line = planned(prepared, packed)
    assert line is not None and "decided" not in line
    assert f"code {kept['code'].kept} of {kept['code'].rows} rows (from " in line
    for name, domain in after.items():
        assert early[name].train.num_rows == late[name].train.num_rows == domain.train.num_rows
        assert late[name].train.fingerprint == domain.train.fingerprint
    assert read_kept(prepared, prepared.selection, packed["code"].train) == kept["code"]
    assert with_kept(packed, {})["code"] is packed["code"]


def test_two_ranks_keep_the_same_rows(half: Make, tmp_path: Path) -> None:
    """Blocks of rows are dealt to ranks and not cut anew: the very losses of one process, bit by bit."""
    trees = {}
    for world in (1, 2):
        tree = half(run_dir=str(tmp_path / f"run{world}"), trainer={"steps": 3, "checkpoint_steps": 3})
        if world == 2:
            tree["cache_dir"] = str(tmp_path / "cache2")
        path = tmp_path / f"{world}.yaml"
        path.write_text(yaml.safe_dump(tree))
        trees[world] = tree
        command = [sys.executable, "-m", "ddkmix", "train", str(path)]
        if world == 2:
            port = str(random.randint(20000, 40000))
            launch = ["torch.distributed.run", "--nproc_per_node=2", "--master_port", port]
            command = [sys.executable, "-m", *launch, *command[1:]]
        subprocess.run(command, check=True, capture_output=True, timeout=500)
    files = []
    for tree in trees.values():
        cache = Path(tree["cache_dir"])
        files.append(
            {p.name: p.read_bytes() for d in ("row_nats", "selection") for p in (cache / d).iterdir()}
        )
    assert files[0] == files[1]
    assert served(tmp_path / "run1", 3) == served(tmp_path / "run2", 3)


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"name": "diference"}, r"^selection\.name = 'diference' is unknown; did you mean 'difference'\?"),
        ({"name": "difference", "share": 0}, r"^selection\.share = 0: Input should be greater than 0\.$"),
        (
            {"name": "difference", "shares": 1},
            r"^selection \(difference\) has no parameter 'shares'; did you",
        ),
        ({"name": "difference", "reference": {"modell": "x"}}, r"^selection\.reference = .*: "),
        ({"name": "confidence", "decay": 1}, r"^selection\.decay = 1: Input should be less than 1\.$"),
        ({"name": "ddkmix.losses.mse:MSE"}, r"is a MSE; a run knows how to use confidence and difference"),
        ({"share": 0.5}, r"selection\.name"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_is_loaded(half: Make, selection: Any, message: str) -> None:
    """What, where, the rule; at `lint`."""
    with pytest.raises(ConfigError, match=message) as info:
        check(parse_config(half(selection=selection), where="test"))
    assert "\n" not in str(info.value)


def test_a_reference_that_cannot_be_compared_is_refused(
    half: Make, tmp_path: Path, tiny_teacher: Path, other_teacher: Path, tokenizer_folder: Path
) -> None:
    """The teacher itself, another tokenizer, too few positions, no model at all."""

    def refusal(model: Path, kind: type[Exception]) -> str:
        with pytest.raises(kind) as info:
            check(parse_config(half(selection={**HALF, "reference": {"model": str(model)}}), where="test"))
        return str(info.value)

    assert "is the teacher itself" in refusal(tiny_teacher, ConfigError)
    assert "has another tokenizer than the rows" in refusal(other_teacher, ConfigError)
    short = save_tiny_model(tmp_path / "short", tokenizer_folder, max_position_embeddings=16)
    assert "has 16 positions, use at most that" in refusal(short, ConfigError)
    narrow = save_tiny_model(tmp_path / "narrow", tokenizer_folder, vocab_size=200)
    assert "the selection.reference has 200 output classes" in refusal(narrow, ModelError)
    refusal(tmp_path / "nowhere", ModelError)


def test_a_cache_that_cannot_be_written_is_named(half: Make, tmp_path: Path) -> None:
    """One line with the path."""
    tree = half()
    prepared, packed, (_, kept) = selected(tree)
    shutil.rmtree(tmp_path / "cache" / "selection")
    (tmp_path / "cache" / "selection").write_text("a file")
    with pytest.raises(DataError, match=r"selection/.* cannot be written"):
        write_kept(prepared, prepared.selection, packed["code"].train, kept["code"])
