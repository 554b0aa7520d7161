"""Weights that move: the published ones by hand, literally, and as users write them."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import Named, Schedule
from ddkmix.errors import ConfigError
from ddkmix.losses import LossTerm, build_terms, check_weights, terms_at
from ddkmix.losses.weights import WEIGHT_SCHEDULES, Linear, Periodic, Rest, WeightSchedule, Wsd, build_weight
from ddkmix.schedule import lr_multiplier

COSINE = Schedule()
PUBLISHED = Schedule(name="wsd", warmup_share=0.1, decay_share=0.01, final_ratio=0.1)


def curve(weight: WeightSchedule, steps: int, schedule: Schedule = COSINE) -> list[float]:
    """The weight of every step of a run."""
    return [weight.at(step, steps, schedule) for step in range(steps)]


def objective(*weights: Any) -> tuple[LossTerm, ...]:
    """Cross-entropy, forward KL and reverse KL with these weights, as a config writes them."""
    names = ["cross_entropy", "forward_kl", "reverse_kl"]
    return build_terms(
        [Named.model_validate({"name": n, "weight": w}) for n, w in zip(names, weights, strict=False)]
    )


def message_of(*weights: Any, steps: int = 20, schedule: Schedule = COSINE) -> str:
    """What a wrong weight is told, in one line."""
    with pytest.raises(ConfigError) as error:
        check_weights(objective(*weights), steps, schedule)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- as published -----------------------------------------------------------------------------------


def test_pre_training_distillations_alpha_at_twenty_steps_by_hand():
    """WSD-alpha 0.9 with its WSD learning rate, `rest` on the language-modelling loss. Warm-up 10 % is two
    steps, 0.45 and 0.9; decay 1 % is one step, the last, at 0; the two weights are 1 - alpha and alpha."""
    terms = objective("rest", {"schedule": "wsd", "peak": 0.9})
    weights = [[term.weight for term in terms_at(terms, step, 20, PUBLISHED)] for step in range(20)]
    alpha = [0.45, *[0.9] * 18, 0.0]
    assert alpha == [pair[1] for pair in weights]
    assert [1 - a for a in alpha] == [pair[0] for pair in weights]


def test_alpha_follows_the_learning_rate_and_ends_at_zero():
    """A longer decay of five steps: 0.9 times the multiplier of a learning rate that ends at 0, although this
    one ends at a tenth of its peak."""
    schedule = Schedule(name="wsd", warmup_steps=2, decay_steps=5, final_ratio=0.1)
    actual = curve(Wsd(peak=0.9), 20, schedule)
    cosines = [0.45 * (1 + math.cos(math.pi * k / 5)) for k in range(1, 6)]
    assert [0.45, *[0.9] * 14, *cosines] == pytest.approx(actual, abs=1e-12)
    to_zero = schedule.model_copy(update={"final_ratio": 0.0})
    assert [0.9 * lr_multiplier(to_zero, t, 20) for t in range(20)] == pytest.approx(actual, abs=1e-12)


def test_alpha_may_end_elsewhere_than_at_zero():
    """`final` is the weight of the last step, not a ratio: as the learning rate's own, 0.09 is a tenth."""
    schedule = Schedule(name="wsd", warmup_steps=2, decay_steps=5, final_ratio=0.1)
    expected = [0.9 * lr_multiplier(schedule, t, 20) for t in range(20)]
    assert expected == pytest.approx(curve(Wsd(peak=0.9, final=0.09), 20, schedule))


def test_alpha_with_lengths_of_its_own_does_not_ask_the_learning_rate():
    """The study's WSD-alpha with a cosine learning rate is the alpha of its WSD run."""
    own = Wsd(peak=0.9, warmup_share=0.1, decay_share=0.01)
    assert curve(Wsd(peak=0.9), 50, PUBLISHED) == curve(own, 50, COSINE)
    assert curve(own, 50, COSINE) == curve(own, 50, Schedule(name="wsd", decay_steps=30))


def test_alpha_falls_as_the_learning_rate_unless_told_otherwise():
    """The form of the decay is the learning rate's too."""
    schedule = Schedule(name="wsd", decay_steps=4, decay="linear")
    assert [0.75, 0.5, 0.25, 0.0] == pytest.approx(curve(Wsd(peak=1.0), 4, schedule))
    assert 1 - math.sqrt(0.5) == pytest.approx(curve(Wsd(peak=1.0, decay="sqrt"), 4, schedule)[1])


def test_knowledge_inheritance_by_hand_and_literally():
    """a_t = max(0, 1 - t / T_distil), here T = 4 of 8 steps; 1 - a_t on the language-modelling loss."""
    weight = {"schedule": "linear", "start": 1, "end": 0, "steps": 4}
    terms = objective("rest", weight)
    weights = [[term.weight for term in terms_at(terms, t, 8, COSINE)] for t in range(8)]
    assert [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0] == [pair[1] for pair in weights]
    for t, (language, divergence) in enumerate(weights):
        assert (max(0, 1 - t / 4), 1 - max(0, 1 - t / 4)) == (divergence, language)


def test_linear_weights_run_over_the_whole_run_unless_told_otherwise():
    """Up and down, by hand; one step short of the end at the last step."""
    assert [1.0, 0.75, 0.5, 0.25] == curve(Linear(start=1.0, end=0.0), 4)
    assert [0.0, 0.2, 0.4, 0.6, 0.8] == pytest.approx(curve(Linear(start=0.0, end=1.0), 5))
    assert curve(Linear(start=1.0, end=0.5, steps=11), 25) == curve(
        Linear(start=1.0, end=0.5, share=0.44), 25
    )
    assert [1.0, 0.5, 0.5] == curve(Linear(start=1.0, end=0.5, steps=1), 3)


def test_periods_by_hand():
    """Four steps a period: high, half way, low, half way."""
    assert [1.0, 0.5, 0.0, 0.5, 1.0, 0.5] == pytest.approx(curve(Periodic(steps=4), 6))
    triangle = Periodic(steps=4, high=0.8, low=0.4, shape="triangle")
    assert [0.8, 0.6, 0.4, 0.6, 0.8, 0.6] == pytest.approx(curve(triangle, 6))
    assert [1, 1, 0, 0, 1, 1] == curve(Periodic(steps=4, shape="square"), 6)
    assert [1, 1, 0, 1, 1] == curve(Periodic(steps=3, shape="square"), 5)
    assert curve(Periodic(share=0.25), 8) == curve(Periodic(steps=2), 8)


def test_a_cosine_period_is_the_literal_one():
    """low + (high - low) (1 + cos(2 pi t / P)) / 2 at every step, however many periods ago it began."""
    for t, actual in enumerate(curve(Periodic(steps=7, high=0.9, low=0.2), 40)):
        assert 0.2 + 0.35 * (1 + math.cos(2 * math.pi * t / 7)) == pytest.approx(actual, abs=1e-12)


# --- rest ---------------------------------------------------------------------------------------------


def test_rest_is_what_all_the_others_leave():
    """Three terms: 1 - 0.25 - a_t."""
    terms = objective("rest", 0.25, {"schedule": "linear", "start": 0.75, "end": 0, "steps": 3})
    rests = [terms_at(terms, step, 4, COSINE)[0].weight for step in range(4)]
    assert [0.0, 0.25, 0.5, 0.75] == pytest.approx(rests)
    assert 0.8 == pytest.approx(terms_at(objective("rest", 0.2), 0, 1, COSINE)[0].weight)


def test_rest_may_stand_anywhere():
    """WSD-beta: the language-modelling loss has the schedule, the divergence the rest."""
    terms = objective({"schedule": "wsd", "peak": 0.9}, "rest")
    assert [(0.45, 0.55), (0.9, 0.1)] == [
        pytest.approx(tuple(term.weight for term in terms_at(terms, step, 20, PUBLISHED))) for step in (0, 1)
    ]


SCHEDULES = st.one_of(
    st.builds(
        Linear, start=st.floats(0, 1), end=st.floats(0, 1), steps=st.one_of(st.none(), st.integers(1, 90))
    ),
    st.builds(
        Periodic,
        high=st.floats(0, 1),
        low=st.floats(0, 1),
        steps=st.integers(1, 90),
        shape=st.sampled_from(["cosine", "triangle", "square"]),
    ),
    st.builds(
        Wsd,
        peak=st.floats(0.01, 1),
        warmup_share=st.floats(0, 1),
        decay_share=st.floats(0.001, 1),
        decay=st.sampled_from([None, "linear", "sqrt"]),
    ),
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(SCHEDULES, st.integers(1, 60))
def test_every_weight_keeps_its_bounds_and_the_rest_completes_it(weight, steps):
    """Between its own lowest and highest value, a rest that sums to 1 in exact arithmetic, and the same
    value when it is asked again, in any order."""
    bounds = {Linear: ("start", "end"), Periodic: ("high", "low"), Wsd: ("peak", "final")}[type(weight)]
    low, high = sorted(getattr(weight, name) for name in bounds)
    values = curve(weight, steps)
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)
    assert values[::-1] == [weight.at(step, steps, COSINE) for step in reversed(range(steps))]
    terms = tuple(
        replace(term, schedule=rule) for term, rule in zip(objective(0.5, 0.5), (Rest(), weight), strict=True)
    )
    for step in range(steps):
        pair = [Fraction(term.weight) for term in terms_at(terms, step, steps, COSINE)]
        assert abs(sum(pair) - 1) < Fraction(1, 10**15)
        assert min(pair) >= 0


# --- terms --------------------------------------------------------------------------------------------


def test_constant_weights_are_the_same_at_every_step():
    """Numbers stay what they are, and `terms_at` gives the very terms of the config."""
    terms = objective(1.0, 0.2)
    assert terms == terms_at(terms, 0, 10, COSINE) == terms_at(terms, 9, 10, COSINE)


def test_a_weight_that_nobody_asked_for_a_step_is_not_a_number():
    """A loop that forgets `terms_at` gets an objective that is not finite, never a wrong one."""
    terms = objective("rest", {"schedule": "linear", "start": 1, "end": 0})
    assert all(math.isnan(term.weight) for term in terms)
    assert [Rest(), Linear(start=1.0, end=0.0)] == [term.schedule for term in terms]


@dataclass(frozen=True, kw_only=True)
class Halving:
    """A schedule from outside the package."""

    first: float = 1.0

    def at(self, step: int, steps: int, schedule: Schedule) -> float:
        """Half of what it was at the step before."""
        return self.first / 2**step


@dataclass(frozen=True, kw_only=True)
class Negative:
    """A schedule that gives no weight from step 3 on."""

    def at(self, step: int, steps: int, schedule: Schedule) -> float:
        """1, 0, -1, ..."""
        return 1.0 - step


@dataclass(frozen=True, kw_only=True)
class NotASchedule:
    """It has no `at`."""


HERE = "tests.losses.test_weights"


def test_a_schedule_from_outside_the_package_is_named_by_module_and_class():
    """As a policy or a loss is."""
    (term,) = objective({"schedule": f"{HERE}:Halving", "first": 8})
    assert [8.0, 4.0, 2.0] == [terms_at((term,), step, 9, COSINE)[0].weight for step in range(3)]


def test_the_table_names_every_schedule():
    """What a config can name, each of them a WeightSchedule."""
    built = {
        "linear": {"start": 0, "end": 1},
        "periodic": {"steps": 2},
        "wsd": {"peak": 1},
    }
    assert set(WEIGHT_SCHEDULES) == set(built)
    for name, parameters in built.items():
        weight = build_weight({"schedule": name, **parameters}, where="loss.0.weight")
        assert isinstance(weight, WeightSchedule)


# --- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            "rests",
            "loss.0.weight = 'rests'; a loss weight is a finite number >= 0, `rest`, or a mapping such",
        ),
        ([1], "loss.0.weight = [1]; a loss weight is a finite number"),
        (-0.1, "loss.0.weight = -0.1; a loss weight is a finite number"),
        ({}, "loss.0.weight.schedule is missing; known: linear, periodic, wsd."),
        ({"peak": 0.9}, "loss.0.weight.schedule is missing; known: linear, periodic, wsd."),
        ({"schedule": "wds", "peak": 1}, "loss.0.weight.schedule = 'wds' is unknown; did you mean 'wsd'?"),
        (
            {"schedule": "wsd", "peek": 1},
            "loss.0.weight (wsd) has no parameter 'peek'; did you mean 'peak'?",
        ),
        ({"schedule": "wsd"}, "loss.0.weight.peak: Field required."),
        ({"schedule": "wsd", "peak": -1}, "loss.0.weight.peak = -1: Input should be greater than or equal"),
        ({"schedule": "wsd", "peak": 0}, "loss.0.weight: peak = 0.0 must be above 0 and not below final = 0"),
        ({"schedule": "wsd", "peak": 0.1, "final": 0.2}, "loss.0.weight: peak = 0.1 must be above 0 and not"),
        (
            {"schedule": "wsd", "peak": 0.9, "warmup_share": 0.1},
            "loss.0.weight: a warm-up of its own needs a decay of its own: `decay_steps` or `decay_share`.",
        ),
        (
            {"schedule": "wsd", "peak": 0.9, "decay_steps": 3, "decay_share": 0.1},
            "loss.0.weight: decay_steps = 3 and decay_share = 0.1 both say how long it is; remove one.",
        ),
        ({"schedule": "linear", "start": 1}, "loss.0.weight.end: Field required."),
        (
            {"schedule": "linear", "start": math.nan, "end": 0},
            "loss.0.weight.start = nan: Input should be ",
        ),
        (
            {"schedule": "linear", "start": 1, "end": math.inf},
            "loss.0.weight.end = inf: Input should be less",
        ),
        (
            {"schedule": "linear", "start": 1, "end": 0, "steps": 0},
            "loss.0.weight.steps = 0: Input should be",
        ),
        (
            {"schedule": "linear", "start": 1, "end": 0, "steps": 3, "share": 0.5},
            "loss.0.weight: steps = 3 and share = 0.5 both say how long it is; remove one.",
        ),
        ({"schedule": "periodic"}, "loss.0.weight: a period needs `steps`, or `share` of the run's steps."),
        (
            {"schedule": "periodic", "steps": 3, "shape": "sine"},
            "loss.0.weight.shape = 'sine': Input should be 'cosine', 'triangle' or 'square'.",
        ),
        (
            {"schedule": "no_such_module:Thing"},
            "loss.0.weight.schedule = 'no_such_module:Thing' cannot be imported",
        ),
        (
            {"schedule": f"{HERE}:NotASchedule"},
            f"loss.0.weight.schedule = '{HERE}:NotASchedule' has no method `at`; give it one.",
        ),
        (
            {"schedule": "wsd", "peak": 0.9},
            "schedule 'wsd' without lengths follows the learning rate, and schedule.name = 'cosine'; use a "
            "'wsd' learning rate, or give warmup_share and decay_share here.",
        ),
        (
            {"schedule": f"{HERE}:Negative"},
            "loss: Negative() gives the weight -1.0 at step 3; it must be >= 0.",
        ),
    ],
)
def test_a_wrong_weight_is_one_line(weight, message):
    """Place, value, rule and way out."""
    assert message_of(weight).startswith(message)


def test_weights_that_leave_less_than_nothing_are_refused_with_the_step():
    """0.25 + 0.5 + 0.1 t is over 1 at the fourth step; a sum of 1 within rounding leaves a rest of 0."""
    rising = {"schedule": "linear", "start": 0.5, "end": 1.0, "steps": 5}
    message = message_of("rest", 0.25, rising)
    assert message.startswith("loss: the weights sum to 1.05 at step 4, which leaves less than nothing for")
    assert 0.0 == terms_at(objective("rest", 0.7, 0.3), 0, 1, COSINE)[0].weight
    assert 0.0 == terms_at(objective("rest", 0.7, 0.3 + 1e-12), 0, 1, COSINE)[0].weight


def test_only_one_term_can_have_the_rest():
    """Two would be undetermined."""
    message = message_of("rest", "rest", 0.5)
    assert "loss: ['cross_entropy', 'forward_kl'] both have the weight `rest`; only one term can" in message


def test_a_rest_alone_is_one():
    """An objective of one term."""
    assert 1.0 == terms_at(objective("rest"), 0, 1, COSINE)[0].weight


def test_a_schedule_of_nothing_is_refused():
    """No step at which anything would be learnt."""
    never = {"schedule": "linear", "start": 0, "end": 0}
    assert message_of(never, 0.0) == "loss: every weight is 0 at all 20 steps; nothing would be learnt."


@pytest.mark.parametrize("steps", [2, 9_999, 10_000, 25_000])
def test_a_run_of_any_length_is_tried_to_its_last_step(steps):
    """A long run is tried at some of its steps only, and always at the last one, here the only wrong one."""
    rising = {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": steps - 1}
    assert f"at step {steps}, which leaves less" in message_of("rest", 0.5 / steps, rising, steps=steps)
