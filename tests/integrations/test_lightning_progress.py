"""Lightning's counters, by hand: what a checkpoint says, and what it must say to begin at a whole step."""

from typing import Any

import pytest

from ddkmix.integrations.lightning_progress import begin_at_a_step

EVENTS = ("ready", "started", "processed", "completed")
Counts = tuple[int, int, int, int]


def saved(done: int, total: Counts, current: Counts, *, last: bool = False) -> dict[str, Any]:
    """As much of a checkpoint as matters."""
    progress = {
        "total": dict(zip(EVENTS, total, strict=True)),
        "current": dict(zip(EVENTS, current, strict=True)),
        "is_last_batch": last,
    }
    loops = {"epoch_loop.batch_progress": progress, "epoch_loop.state_dict": {"_batches_that_stepped": 99}}
    return {"global_step": done, "loops": {"fit_loop": loops}}


def counters(checkpoint: dict[str, Any]) -> tuple[Counts, Counts, bool, int]:
    """(total, current, is_last_batch, steps logged)."""
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    total, current = (tuple(progress[name][event] for event in EVENTS) for name in ("total", "current"))
    return total, current, progress["is_last_batch"], loops["epoch_loop.state_dict"]["_batches_that_stepped"]


@pytest.mark.parametrize("completed", [5, 6])
def test_counters_at_the_end_of_a_step_stay(completed: int) -> None:
    """In on_train_batch_end the batch is not completed yet, in a validation it is: Lightning knows both."""
    counts = (6, 6, 6, completed)
    checkpoint = saved(2, counts, counts, last=True)
    begin_at_a_step(checkpoint, was=3, now=3)
    assert (counts, counts, True, 99) == counters(checkpoint)


@pytest.mark.parametrize(
    "counts",
    [
        (7, 7, 6, 6),  # the first micro-batch of step 3 failed
        (8, 8, 7, 7),  # the second
        (9, 9, 8, 8),  # the third
        (8, 7, 7, 7),  # in on_train_batch_start
        (7, 7, 7, 6),  # saved in on_train_batch_end in the middle of a step
        (8, 8, 8, 8),  # in a validation after two micro-batches
        (6, 6, 5, 5),  # after the optimizer's step, before its batch was counted
    ],
)
def test_counters_within_a_step_go_back_to_its_begin(counts: Counts) -> None:
    """As ModelCheckpoint would have saved them after step 2: six batches, the sixth not yet completed."""
    checkpoint = saved(2, counts, counts, last=True)
    begin_at_a_step(checkpoint, was=3, now=3)
    assert ((6, 6, 6, 5), (6, 6, 6, 5), False, 1) == counters(checkpoint)


def test_counters_before_the_first_step_are_zero() -> None:
    """An exception in the first batch."""
    checkpoint = saved(0, (1, 1, 0, 0), (1, 1, 0, 0))
    begin_at_a_step(checkpoint, was=1, now=1)
    assert ((0, 0, 0, 0), (0, 0, 0, 0), False, 0) == counters(checkpoint)


def test_batches_of_earlier_epochs_are_kept_apart() -> None:
    """Four steps of three were an epoch; step 6 failed in its second micro-batch."""
    checkpoint = saved(5, (17, 17, 16, 16), (5, 5, 4, 4))
    begin_at_a_step(checkpoint, was=3, now=3)
    assert ((15, 15, 15, 14), (3, 3, 3, 2), False, 4) == counters(checkpoint)


def test_an_epoch_that_has_no_step_yet_begins_anew() -> None:
    """Its first step failed: nothing of it counts, and nothing is left to complete."""
    checkpoint = saved(4, (14, 14, 13, 13), (2, 2, 1, 1))
    begin_at_a_step(checkpoint, was=3, now=3)
    assert ((12, 12, 12, 12), (0, 0, 0, 0), False, 4) == counters(checkpoint)


@pytest.mark.parametrize(("was", "now", "batches"), [(3, 1, 5), (1, 3, 15), (3, 2, 10)])
def test_steps_of_other_micro_batches_are_counted_in_those(was: int, now: int, batches: int) -> None:
    """Five steps are five times as many batches as a step has from now on."""
    counts = (5 * was, 5 * was, 5 * was, 5 * was - 1)
    checkpoint = saved(5, counts, counts, last=True)
    begin_at_a_step(checkpoint, was=was, now=now)
    expected = (batches, batches, batches, batches - 1)
    assert (expected, expected, True, 4) == counters(checkpoint)
