"""Plans ahead of the loop: consumed in order, taken back whole."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.apportion import ROW
from ddkmix.errors import ConfigError, DataError
from ddkmix.plan_queue import PlanQueue
from ddkmix.planner import OnCap, PlannerState, PlanSettings, plan_step, with_weights

HALF = ROW // 2
START = PlannerState(step=0, version=0, weights=(HALF, HALF), credit=(0, 0), served=(0, 0))


def settings_of(*caps: int | None, on_cap: OnCap = "renormalize") -> PlanSettings:
    """Two domains of ten rows, batches of three."""
    return PlanSettings(
        domains=("a", "b"), batch_rows=3, num_rows=(10, 10), cap_rows=caps or (None, None), on_cap=on_cap
    )


def queue_of(*caps: int | None, on_cap: OnCap = "renormalize") -> PlanQueue:
    """A queue at the start."""
    return PlanQueue(settings_of(*caps, on_cap=on_cap), START, None)


def states(count: int) -> list[PlannerState]:
    """The states after 0, 1, ... steps from the planner alone."""
    found = [START]
    for _ in range(count):
        found.append(plan_step(settings_of(), found[-1])[1])
    return found


def test_plans_are_consumed_in_their_order() -> None:
    """However far ahead they were made, the state is that of the loop."""
    queue, expected = queue_of(), states(5)
    plans = [queue.plan() for _ in range(5)]
    assert START == queue.consumed
    for step in range(5):
        assert plans[step] is queue.consume()
        assert expected[step + 1] == queue.consumed == queue.state_at(step + 1)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.sampled_from(["plan", "consume", "rewind", "change"]), max_size=40))
def test_no_row_is_lost_or_repeated_whatever_is_planned_ahead(actions: list[str]) -> None:
    """Consumed steps are the planner's, one after the other, under the weights of their time."""
    queue, expected, pending = queue_of(), START, 0
    for action in actions:
        if action == "plan":
            assert queue.plan() is not None
            pending += 1
        elif action == "consume" and pending:
            plan, expected = plan_step(settings_of(), expected)
            consumed = queue.consume()
            assert plan.row_numbers.tolist() == consumed.row_numbers.tolist()
            assert (plan.step, plan.version) == (consumed.step, consumed.version)
            pending -= 1
        elif action == "rewind":
            queue.rewind(queue.consumed)
            pending = 0
        elif action == "change":
            expected = with_weights(expected, (ROW // 4 * (1 + expected.version % 3), 0))
            expected = with_weights(expected, (expected.weights[0], ROW - expected.weights[0]))
            queue.rewind(expected)
            pending = 0
        assert expected == queue.consumed


def test_the_state_of_a_recent_step_is_known() -> None:
    """The last 64, the one before the first step included while it is among them."""
    queue, expected = queue_of(), states(70)
    for _ in range(63):
        queue.plan()
        queue.consume()
    assert START == queue.state_at(0)
    for _ in range(7):
        queue.plan()
        queue.consume()
    assert [expected[step] for step in range(7, 71)] == [queue.state_at(step) for step in range(7, 71)]
    with pytest.raises(ConfigError, match=r"state_dict\(step=6\): known steps are \[7, 8, "):
        queue.state_at(6)


def test_a_change_of_weights_is_in_the_state_of_its_step() -> None:
    """The step is the same and what it goes on with is new."""
    queue = queue_of()
    queue.plan()
    queue.consume()
    changed = with_weights(queue.consumed, (ROW, 0))
    queue.rewind(changed)
    assert changed == queue.state_at(1)
    assert START == queue.state_at(0)
    queue.forget()
    queue.rewind(changed)
    with pytest.raises(ConfigError, match=r"state_dict\(step=0\): known steps are \[1\]"):
        queue.state_at(0)


def test_the_end_is_told_when_nothing_more_can_be_planned() -> None:
    """Caps of 2 and 5 rows are two batches of three; then None, again and again, and no state moves."""
    queue = queue_of(2, 5)
    assert [True, True, False, False] == [queue.plan() is not None for _ in range(4)]
    assert not queue.is_exhausted()  # the loop has two steps to come
    queue.consume()
    queue.consume()
    assert queue.is_exhausted()
    assert 6 == sum(queue.consumed.served)


@pytest.mark.parametrize(("on_cap", "ends"), [("stop", True), ("error", False)])
def test_an_end_that_is_an_error_says_so(on_cap: OnCap, ends: bool) -> None:
    """Planning ahead never raises; the loop learns of it when it comes there."""
    queue = queue_of(1, None, on_cap=on_cap)
    assert queue.plan() is None
    if ends:
        assert queue.is_exhausted()
    else:
        with pytest.raises(DataError, match="domain 'a' has served its limit of 1 rows"):
            queue.is_exhausted()


def test_rows_are_counted_in_tokens_where_asked_for() -> None:
    """Rows of a are twice as long, so b serves twice as many."""
    sizes: Any = lambda domain, j: 2 - domain  # noqa: E731
    queue = PlanQueue(settings_of(), START, sizes)
    for _ in range(4):
        queue.plan()
        queue.consume()
    assert (4, 8) == queue.consumed.served


def test_states_that_were_taken_back_are_no_longer_known() -> None:
    """Steps after the one gone back to will be planned anew."""
    queue = queue_of()
    for _ in range(4):
        queue.plan()
        queue.consume()
    queue.rewind(queue.state_at(2))
    assert (2, 1) == (queue.state_at(2).step, queue.state_at(1).step)
    with pytest.raises(ConfigError, match=r"state_dict\(step=3\): known steps are \[0, 1, 2\]"):
        queue.state_at(3)
