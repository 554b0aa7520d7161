"""The learning rate by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import Schedule
from ddkmix.schedule import length, lr_multiplier, multiplier


def curve(steps, **schedule):
    """The multiplier of every step of a run."""
    return [lr_multiplier(Schedule(**schedule), step, steps) for step in range(steps)]


def test_cosine_without_warm_up_by_hand():
    """Four steps from 1 to 0: 1/2 (1 + cos pi k/4) for k = 1 .. 4."""
    half = math.sqrt(0.5) / 2
    assert [0.5 + half, 0.5, 0.5 - half, 0.0] == pytest.approx(curve(4, final_ratio=0.0), abs=1e-12)


def test_cosine_with_warm_up_by_hand():
    """Two steps up to the peak, then four down to a fifth: 0.2 + 0.8 x the curve above."""
    half = math.sqrt(0.5) / 2
    falling = [0.2 + 0.8 * x for x in (0.5 + half, 0.5, 0.5 - half, 0.0)]
    assert [0.5, 1.0, *falling] == pytest.approx(curve(6, warmup_steps=2, final_ratio=0.2))


def test_wsd_by_hand():
    """Warm-up, stable, then a cosine over the last two steps only."""
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1]
    assert expected == pytest.approx(curve(8, name="wsd", warmup_steps=2, decay_steps=2))


def test_wsd_decays_in_what_the_warm_up_leaves():
    """A decay longer than the run starts after the warm-up, not in it."""
    expected = [0.5, 1.0, 0.55, 0.1]
    assert expected == pytest.approx(curve(4, name="wsd", warmup_steps=2, decay_steps=100))


def test_constant_stays_at_the_peak():
    """Only the warm-up moves it; final_ratio has no say."""
    assert [1 / 3, 2 / 3, 1.0, 1.0, 1.0] == pytest.approx(curve(5, name="constant", warmup_steps=3))


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_a_run_of_nothing_but_warm_up_ends_at_the_peak(name):
    """warmup_steps = steps is allowed."""
    assert [0.25, 0.5, 0.75, 1.0] == pytest.approx(curve(4, name=name, warmup_steps=4))


def test_a_run_of_one_step_is_at_the_final_ratio():
    """The last step of a cosine is its end, even when it is the first."""
    assert [0.1] == pytest.approx(curve(1))


def test_the_published_schedule():
    """DDK: 1,000 steps up to 3e-5, a cosine to 3e-6 at step 30,000."""
    schedule = Schedule(warmup_steps=1000, final_ratio=0.1)
    rates = [3e-5 * lr_multiplier(schedule, step, 30_000) for step in (0, 999, 15_499, 29_999)]
    assert [3e-8, 3e-5, 1.65e-5, 3e-6] == pytest.approx(rates)


def test_the_schedule_of_pre_training_distillation_at_twenty_steps():
    """WSD with a warm-up of 10 % and a decay of 25 % to 0: 1/2, 1, then 1 until step 15, then a cosine over
    five steps, the last of which is 0: (1 + cos 36 k degrees) / 2 for k = 1 .. 5."""
    falling = [0.9045084972, 0.6545084972, 0.3454915028, 0.0954915028, 0.0]
    expected = [0.5, *[1.0] * 14, *falling]
    actual = curve(20, name="wsd", warmup_share=0.1, decay_share=0.25, final_ratio=0.0)
    assert expected == pytest.approx(actual, abs=1e-9)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("linear", [0.75, 0.5, 0.25, 0.0]), ("sqrt", [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0])],
)
def test_other_decays_by_hand(decay, expected):
    """Four steps down: 1 - k/4, and 1 - sqrt(k/4), for k = 1 .. 4."""
    schedule = {"name": "wsd", "decay_steps": 4, "decay": decay}
    assert [1.0, 1.0, *expected] == pytest.approx(curve(6, **schedule, final_ratio=0.0), abs=1e-12)
    raised = [0.2 + 0.8 * value for value in expected]
    assert [1.0, 1.0, *raised] == pytest.approx(curve(6, **schedule, final_ratio=0.2))


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [(0.1, 30, 3), (0.01, 20, 1), (0.5, 5, 2), (0.5, 7, 4), (1.0, 9, 9), (0.29, 100, 29), (0.0, 10, 0)],
)
def test_a_share_is_rounded_to_steps_and_is_never_nothing(share, steps, expected):
    """0.1 x 30 and 0.29 x 100 are not whole in float64 and must not count one step too many or too few;
    1 % of 20 steps is one step."""
    assert expected == length(0, share, steps)
    rising = [x for x in curve(steps, name="constant", warmup_share=share) if x < 1]
    assert max(expected - 1, 0) == len(rising)


def test_a_length_in_steps_and_as_a_share_are_the_same_schedule():
    """A tenth and a quarter of 40 steps."""
    by_share = curve(40, name="wsd", warmup_share=0.1, decay_share=0.25)
    assert curve(40, name="wsd", warmup_steps=4, decay_steps=10) == by_share


def test_the_stable_phase_is_exactly_the_peak():
    """No rounding of final + (1 - final): a weight of 0.9 is 0.9 there, bit for bit."""
    for final in (0.1, 0.3, 0.7):
        values = [multiplier(step, 20, warmup=2, decay=5, final=final) for step in range(1, 15)]
        assert [1.0] * 14 == values


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.integers(1, 60),
    st.integers(0, 60),
    st.integers(1, 60),
    st.floats(0, 1),
    st.sampled_from(["cosine", "linear", "sqrt"]),
)
def test_every_schedule_rises_once_falls_once_and_keeps_its_bounds(name, steps, warmup, decay, final, shape):
    """It rises strictly to exactly 1 during warm-up, never rises again, and ends at its final value."""
    warmup = min(warmup, steps)
    wsd = {"decay_steps": decay, "decay": shape} if name == "wsd" else {}
    schedule = Schedule(name=name, warmup_steps=warmup, final_ratio=final, **wsd)
    values = [lr_multiplier(schedule, step, steps) for step in range(steps)]
    rising, falling = values[:warmup], values[warmup:]
    assert rising == sorted(set(rising))
    assert not rising or rising[-1] == 1.0
    assert falling == pytest.approx(sorted(falling, reverse=True))
    assert all(0 < value <= 1 for value in rising)
    assert all(final - 1e-12 <= value <= 1 for value in falling)
    if falling:
        assert (1.0 if name == "constant" else final) == pytest.approx(falling[-1], abs=1e-12)
