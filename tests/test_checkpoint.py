"""The run directory: whose it is, and that a checkpoint is whole or not there."""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import Accelerator

from ddkmix.checkpoint import (
    claim_run,
    find_run,
    latest_checkpoint,
    load_arrays,
    prune,
    remove_partial,
    save_checkpoint,
)
from ddkmix.config import dump_config, parse_config
from ddkmix.errors import RunError
from ddkmix.records import read_lines
from ddkmix.resolved_config import read_run_config
from ddkmix.run_changes import changes_since, config_changes, settings_of
from ddkmix.setup import train
from tests.conftest import ConfigTree

Make = Callable[..., ConfigTree]


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """A disk that is full as soon as one file passes `size` bytes: the kernel refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_older_checkpoint_and_no_part_of_the_new_one(
    tmp_path: Path, tiny_config: Make
) -> None:
    """The run stops with one error that names the checkpoint to go on from; when there is space again, it
    goes on from there and ends as if nothing had happened."""
    tree = tiny_config(trainer={"steps": 6, "checkpoint_steps": 2, "keep_checkpoints": 9})
    full = parse_config({**tree, "run_dir": str(tmp_path / "full")}, where="test")
    train(full)
    config = parse_config(tree, where="test")

    def fill(step: int, *_: object) -> None:
        if step == 4:  # the evaluation before step 5; step-000004 is written, step-000006 will not be
            limit.__enter__()

    limit = no_file_larger_than(20_000)
    try:
        message = r"step-000006 cannot be written .* from step-000004 with --resume"
        with pytest.raises(RunError, match=message):
            train(config, on_losses=fill)
    finally:
        limit.__exit__(None, None, None)
    names = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
    assert ["step-000002", "step-000004"] == names
    train(config, resume=True)
    for name in ("metrics.jsonl", "student/model.safetensors"):
        assert (full.run_dir / name).read_bytes() == (config.run_dir / name).read_bytes()


def test_checkpoints_are_pruned_to_the_newest(tmp_path: Path, tiny_config: Make) -> None:
    """Only `keep_checkpoints` remain, and they are the last ones."""
    tree = tiny_config(trainer={"steps": 5, "checkpoint_steps": 1, "keep_checkpoints": 2})
    config = parse_config(tree, where="test")
    train(config)
    names = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
    assert ["step-000004", "step-000005"] == names


def test_the_newest_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    """Step 1,000,000 comes after step 999,999, though its name sorts before; partial ones do not count."""
    for name in ("step-999999", "step-1000000", ".partial-step-2000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-1000000"
    prune(tmp_path, keep=1)
    remove_partial(tmp_path)
    assert ["step-1000000"] == [path.name for path in (tmp_path / "checkpoints").iterdir()]


def test_a_run_directory_that_holds_a_run_is_not_overwritten(tmp_path: Path, tiny_config: Make) -> None:
    """Starting again without --resume is refused, with the two ways out."""
    config = parse_config(tiny_config(), where="test")
    assert find_run(config, resume=False) is None
    claim_run(config)
    with pytest.raises(RunError, match="already holds a run; go on with --resume, or choose another"):
        find_run(config, resume=False)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "lr", 0.5),
        ("trainer", "batch_rows", 12),
        ("trainer", "steps", 11),
        ("mixture", "interval_steps", 5),
    ],
)
def test_resuming_with_another_config_is_refused(
    tiny_config: Make, section: str, key: str, value: float
) -> None:
    """The message names the key, the old value and the new one."""
    tree = tiny_config()
    claim_run(parse_config(tree, where="test"))
    changed = parse_config({**tree, section: {**tree[section], key: value}}, where="test")
    with pytest.raises(RunError, match=rf"another run: {section}\.{key} was .* and is now {value}"):
        find_run(changed, resume=True)


def test_a_run_from_before_there_were_guards_goes_on_without_them(tiny_config: Make) -> None:
    """Its config has no such section, so nothing held its weights: `guards: off` goes on exactly. The default
    of today is another run, on request."""
    off, today = (parse_config(tiny_config(guards=on), where="test") for on in (False, True))
    claim_run(off)
    saved = off.run_dir / "config.yaml"
    tree = yaml.safe_load(saved.read_text())
    del tree["guards"], tree["generate"]  # the latter came later, and changes nothing
    saved.write_text(yaml.safe_dump(tree))
    assert find_run(off, resume=True) is None
    with pytest.raises(RunError, match=r"guards.floor was 0.0 and is now None\. .*add --allow-changes"):
        find_run(today, resume=True)
    assert find_run(today, resume=True, allow_changes=True) is None
    assert ["guards.floor", "guards.cap", "guards.evidence"] == [
        change.split()[0] for change in config_changes(today)
    ]


def test_what_changes_no_result_may_change_at_resume(tiny_config: Make) -> None:
    """Workers, checkpoint settings and the place of the cache are free."""
    tree = tiny_config()
    claim_run(parse_config(tree, where="test"))
    tree = tiny_config(
        loader={"workers": 3},
        trainer={**tree["trainer"], "keep_checkpoints": 7, "microbatch_rows": 1},
        cache_dir="elsewhere",
        generate={"folder": "moved", "batch_rows": 3},
        capture={"folder": "moved", "batch_rows": 3},
    )
    assert find_run(parse_config(tree, where="test"), resume=True) is None


def test_micro_batches_that_are_compared_may_not_change(tiny_config: Make) -> None:
    """A mean over their rows is a matter of their size."""
    tree = tiny_config(objective={"name": "minillm", "whiten": True})
    claim_run(parse_config(tree, where="test"))
    changed = {**tree, "trainer": {**tree["trainer"], "microbatch_rows": 2}}
    with pytest.raises(RunError, match=r"trainer\.microbatch_rows was None and is now 2"):
        find_run(parse_config(changed, where="test"), resume=True)


def test_a_checkpoint_knows_what_it_was_written_under(tiny_config: Make) -> None:
    """As JSON; what may change on request is compared, and a checkpoint of before says nothing."""
    one, other = (parse_config(tiny_config(policy={"name": name}), where="test") for name in ("ddk", "odm"))
    state = json.loads(json.dumps({"settings": settings_of(one)}))
    assert [] == changes_since(state, one)
    assert "policy.name was 'ddk' and is 'odm'" in changes_since(state, other)
    assert [] == changes_since({}, other)


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path, tiny_config: Make) -> None:
    """Somebody's files in run_dir are an error; so is resuming where there is nothing."""
    config = parse_config(tiny_config(), where="test")
    with pytest.raises(RunError, match="holds no run to resume"):
        find_run(config, resume=True)
    config.run_dir.mkdir()
    (config.run_dir / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="exists and is not a run"):
        find_run(config, resume=False)
    assert ["thesis.txt"] == [path.name for path in config.run_dir.iterdir()]
    with pytest.raises(RunError, match="is not a run directory"):
        read_run_config(config.run_dir)


def test_the_run_directory_describes_the_run(tiny_config: Make) -> None:
    """The resolved config reads back unchanged, and the versions are there."""
    config = parse_config(tiny_config(trainer={"steps": 2}), where="test")
    train(config)
    tree = yaml.safe_load((config.run_dir / "config.yaml").read_text())
    assert dump_config(config) == tree == dump_config(parse_config(tree, where="saved"))
    versions = yaml.safe_load((config.run_dir / "versions.json").read_text())
    assert {"python", "ddkmix", "torch", "transformers", "accelerate"} <= versions.keys()
    names = {path.name for path in config.run_dir.iterdir()}
    expected = {
        "config.yaml",
        "data.json",
        "versions.json",
        "metrics.jsonl",
        "intervals.jsonl",
        "timings.jsonl",
    }
    assert expected | {"checkpoints", "student"} == names
    assert 2 == len(list(read_lines(config.run_dir / "metrics.jsonl")))


def test_arrays_come_back_and_damage_is_one_line(tmp_path: Path) -> None:
    """Beside state.json, with their types; a checkpoint without any has none."""
    arrays = {"ids": np.arange(5, dtype=np.int32), "empty": np.zeros(0, dtype=np.int64)}
    path = save_checkpoint(Accelerator(cpu=True), tmp_path, {"step": 1}, keep=3, arrays=arrays)
    found = load_arrays(path)
    assert {n: (a.dtype, a.tolist()) for n, a in arrays.items()} == {
        n: (a.dtype, a.tolist()) for n, a in found.items()
    }
    os.truncate(path / "arrays.safetensors", 20)
    with pytest.raises(RunError, match=r"step-000001 cannot be read .*resume from an older one"):
        load_arrays(path)
    assert {} == load_arrays(save_checkpoint(Accelerator(cpu=True), tmp_path, {"step": 2}, keep=3))
