"""The replay buffer: bounded, first in first out, the same after a resume, sampled by seed and step alone."""

from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ddkmix.checkpoint import load_arrays, save_checkpoint
from ddkmix.errors import RunError
from ddkmix.generation.replay_buffer import ReplayBuffer, Rollout


def rollout(number: int) -> Rollout:
    """One that can be told from others by every field."""
    ids = np.arange(number, number + 1 + number % 4)
    return Rollout(domain=number % 3, shard=number % 5, row=number, step=10 * number, ids=ids)


def fields(rollouts: list[Rollout]) -> list[tuple[int, int, int, int, list[int]]]:
    """Comparable with ==."""
    return [(one.domain, one.shard, one.row, one.step, one.ids.tolist()) for one in rollouts]


def filled(count: int, capacity: int = 8, seed: int = 0) -> ReplayBuffer:
    """A buffer that rollouts 0, 1, ... were pushed into."""
    buffer = ReplayBuffer(capacity, seed=seed)
    buffer.push([rollout(i) for i in range(count)])
    return buffer


def everything(buffer: ReplayBuffer) -> list[int]:
    """Rows of what it holds, oldest first."""
    return buffer.state_dict()["row"].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 12), max_size=8))
def test_the_newest_are_kept_in_order(capacity: int, pushes: list[int]) -> None:
    """However many come at once."""
    buffer, seen = ReplayBuffer(capacity, seed=0), []
    for count in pushes:
        new = list(range(len(seen), len(seen) + count))
        buffer.push([rollout(i) for i in new])
        seen += new
        assert seen[-capacity:] == everything(buffer)
        assert min(capacity, len(seen)) == len(buffer)


@pytest.mark.parametrize("count", [0, 1, 5, 8, 20])
def test_a_resumed_buffer_goes_on_bit_for_bit(tmp_path: Path, count: int) -> None:
    """Through a checkpoint: the same state, samples and forgetting afterwards."""
    buffer = filled(count)
    arrays = buffer.state_dict()
    path = save_checkpoint(Accelerator(cpu=True), tmp_path, {"step": 3}, keep=1, arrays=arrays)
    resumed = ReplayBuffer(8, seed=0)
    resumed.push([rollout(77)])  # what it held before is gone
    resumed.load_state_dict(load_arrays(path))
    for step in range(3):
        assert len(buffer) == len(resumed)
        taken = min(3, len(buffer))
        assert fields(buffer.sample(taken, step)) == fields(resumed.sample(taken, step))
        for one in (buffer, resumed):
            one.push([rollout(100 + step), rollout(200 + step)])
    one, other = buffer.state_dict(), resumed.state_dict()
    assert {name: array.tobytes() for name, array in one.items()} == {
        name: array.tobytes() for name, array in other.items()
    }


def test_a_smaller_buffer_keeps_the_newest() -> None:
    """Where the capacity was changed for the rest of a run."""
    small = ReplayBuffer(3, seed=0)
    small.load_state_dict(filled(8).state_dict())
    assert [5, 6, 7] == everything(small)


def test_the_state_is_small() -> None:
    """40 bytes a rollout and 4 a token: a thousand rollouts of 256 tokens fit into 1.1 MB."""
    buffer = ReplayBuffer(1000, seed=0)
    ids = np.arange(256)
    buffer.push([Rollout(domain=0, shard=0, row=i, step=0, ids=ids) for i in range(1000)])
    assert 1000 * (5 * 8 + 256 * 4) == sum(array.nbytes for array in buffer.state_dict().values())


def test_what_a_step_takes_depends_on_seed_and_step_alone() -> None:
    """The same however often it is asked and whatever was asked before; other steps and seeds take others."""
    buffer = filled(8)
    first = fields(buffer.sample(4, step=7))
    buffer.sample(2, step=3)
    assert first == fields(buffer.sample(4, step=7)) == fields(filled(8).sample(4, step=7))
    taken = {tuple(one.row for one in buffer.sample(4, step)) for step in range(20)}
    assert len(taken) > 15
    assert first != fields(filled(8, seed=1).sample(4, step=7))
    assert first[:2] == fields(buffer.sample(2, step=7))


def test_samples_are_different_and_each_as_likely() -> None:
    """Without replacement; a chi-square test over 4,000 steps."""
    buffer = filled(8)
    rows = [[one.row for one in buffer.sample(3, step)] for step in range(4000)]
    assert {3} == {len(set(own)) for own in rows}
    assert 1e-3 < chisquare(np.bincount(np.concatenate(rows), minlength=8)).pvalue
    assert sorted(range(8)) == sorted(one.row for one in buffer.sample(8, step=0))
    assert [] == buffer.sample(0, step=0) == ReplayBuffer(2, seed=0).sample(0, step=0)


@pytest.mark.parametrize("name", ["domain", "lengths", "ids", "step"])
def test_a_damaged_state_is_refused_and_changes_nothing(name: str) -> None:
    """An array that is missing or cut; one line."""
    state, buffer = filled(5).state_dict(), filled(2)
    for damaged in ({**state, name: state[name][:-1]}, {k: v for k, v in state.items() if k != name}):
        with pytest.raises(RunError, match="the replay buffer of the checkpoint is damaged"):
            buffer.load_state_dict(damaged)
        assert [0, 1] == everything(buffer)
    with pytest.raises(RunError, match="damaged"):
        buffer.load_state_dict({**state, "lengths": np.array([0, 3, 3, 4, 1])})
