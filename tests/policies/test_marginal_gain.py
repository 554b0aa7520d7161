"""Our policy: where it puts the rows ahead, how far it trusts itself, and what it remembers."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.policies import build_policy, next_state
from ddkmix.policies.gap_law import GapLaws, fit_gap_laws
from ddkmix.policies.marginal_gain import (
    MarginalGain,
    _evidence,
    _log_weight,
    fill,
    moves,
    remember,
    trust,
)
from tests.conftest import domain_losses

SETTINGS = settings(deadline=None, derandomize=True, max_examples=25)
OBJECTIVES = ["mean", 4.0, "worst"]


def known(start, floor, scale, exponent, rows, error=0.0):
    """Laws that are certain but for the size of the fall, one shape for each domain, nothing shared."""
    start, floor, rows = (np.array(a, dtype=float) for a in (start, floor, rows))
    count = len(rows)
    return GapLaws(
        rows=rows,
        sharing=np.zeros(count),
        scale=np.array(scale, dtype=float),
        exponent=np.array(exponent, dtype=float),
        probability=np.eye(count),
        level=np.tile(start, (count, 1)),
        fall=np.tile(start - floor, (count, 1)),
        fall_error=np.full((count, count), error),
    )


def gaps_at(rows, start, floor, scale, exponent):
    """The law."""
    start, floor, scale, exponent = map(np.array, (start, floor, scale, exponent))
    return floor + (start - floor) * (1 + rows / scale) ** -exponent


def run(policy, gap_of, count, intervals=10, noise=0.0, rows_per_interval=1000, counted=True, seed=0):
    """States of a policy in a world where gap_of(rows) is the truth."""
    rng, rows, state, states = np.random.default_rng(seed), np.zeros(count), None, []
    for _ in range(intervals):
        gaps = gap_of(rows) + noise * rng.standard_normal(count)
        losses = replace(
            domain_losses(gaps.tolist(), domains=[f"d{i:03d}" for i in range(count)]),
            gap_error=np.full(count, max(noise, 0.002)),
            rows_served=np.rint(rows).astype(np.int64) if counted else None,
        )
        state = next_state(policy, state, losses, np.full(count, 1 / count))
        rows = rows + rows_per_interval * np.array(state["mixture_weights"])
        states.append(state)
    return states


# --- water-filling ----------------------------------------------------------------------------------


def test_water_filling_by_hand():
    """4/(1+a/100) and 1/(1+b/100), 400 rows: 4/(1+a/100)^2 = 1/(1+b/100)^2, so a = 300, b = 100."""
    laws = known([4.0, 1.0], [0.0, 0.0], [100.0, 100.0], [1.0, 1.0], [0.0, 0.0])
    assert [300.0, 100.0] == pytest.approx(fill(laws, 400.0, 1.0, 0.0), rel=0.02)


def test_rows_that_were_served_already_count():
    """The same, but the first domain has had 200 rows: it gets 100 of the 200 that are left."""
    laws = known([4.0, 1.0], [0.0, 0.0], [100.0, 100.0], [1.0, 1.0], [200.0, 0.0])
    assert [100.0, 100.0] == pytest.approx(fill(laws, 200.0, 1.0, 0.0), rel=0.02)


def test_the_worst_gap_is_brought_down_to_the_next():
    """4/(1+a/100) = 2/(1+b/100) with a + b = 700: a = 500, b = 200, both gaps 2/3, within the 32nd power."""
    laws = known([4.0, 2.0], [0.0, 0.0], [100.0, 100.0], [1.0, 1.0], [0.0, 0.0])
    assert [500.0, 200.0] == pytest.approx(fill(laws, 700.0, 32.0, 0.0), rel=0.06)


def test_a_gap_known_roughly_counts_by_what_it_may_be():
    """log E[(g + s z)^31] against a numerical integral; without an error it is 31 log g."""
    z = np.linspace(-12, 12, 200_001)
    for gap, error in ((1.2, 0.3), (1.6, 0.3), (1.6, 0.02)):
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * np.maximum(gap + error * z, 0) ** 31
        exact = math.log(density.sum() * (z[1] - z[0]))
        # the maximum of the integrand leaves out the width of its peak, less than half a nat
        assert exact == pytest.approx(_log_weight(np.array([[gap]]), np.array([error]), 31.0)[0, 0], abs=0.5)
    assert 31 * math.log(1.6) == pytest.approx(_log_weight(np.array([[1.6]]), 0.0, 31.0)[0, 0])


def test_rough_gaps_are_shared_more_evenly_under_the_worst_gap():
    """Gaps of 1.2 and 1.0 that fall alike, 100 rows: the larger gets less the less is known of both."""
    laws = known([1.2, 1.0], [0.2, 0.0], [100.0] * 2, [0.5] * 2, [0.0, 0.0])
    firsts = [fill(laws, 100.0, 32.0, 0.0, error)[0] for error in (0.0, 0.1, 0.5, 2.0)]
    assert sorted(firsts, reverse=True) == firsts
    assert firsts[0] > 80
    assert firsts[-1] < 70


@pytest.mark.parametrize("power", [1.0, 4.0, 32.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_allocation_is_better(power, seed):
    """Marginal gains are equal where there is more than the floor; 2,000 random allocations are no better."""
    rng = np.random.default_rng(seed)
    traits = (rng.uniform(1, 4, 6), rng.uniform(0, 0.8, 6), rng.uniform(50, 900, 6), rng.uniform(0.3, 1, 6))
    rows = rng.uniform(0, 300, 6)
    planned = fill(known(*traits, rows), 1000.0, power, 0.1)
    assert 1000.0 == pytest.approx(planned.sum())
    assert planned.min() >= 0.1 * 1000 / 6 - 1e-9
    others = 100 / 6 + 900 * rng.dirichlet(np.ones(6), 2000)
    values = (gaps_at(rows + others, *traits) ** power).sum(axis=1) ** (1 / power)
    mine = (gaps_at(rows + planned, *traits) ** power).sum() ** (1 / power)
    assert mine <= values.min() * 1.002


def test_equal_domains_share_alike():
    """Five curves of one form: 200 rows each of 1,000, under any objective."""
    laws = known([2.0] * 5, [0.5] * 5, [100.0] * 5, [0.5] * 5, [50.0] * 5)
    for power in (1.0, 4.0, 32.0):
        assert [200.0] * 5 == pytest.approx(fill(laws, 1000.0, power, 0.1))


def test_a_gap_that_never_falls_gets_the_floor_even_under_the_worst_gap():
    """5 nats for ever; the rest share what is left."""
    laws = known([5.0, 2.0, 2.0], [5.0, 0.0, 0.0], [100.0] * 3, [0.5] * 3, [100.0] * 3)
    for power in (1.0, 4.0, 32.0):
        assert [30.0, 435.0, 435.0] == pytest.approx(fill(laws, 900.0, power, 0.1), rel=1e-3)


def test_where_nothing_falls_the_mixture_is_uniform():
    """No gain anywhere."""
    laws = known([5.0, 2.0], [5.0, 2.0], [100.0] * 2, [0.5] * 2, [100.0] * 2)
    assert [50.0, 50.0] == fill(laws, 100.0, 1.0, 0.1).tolist()


def test_a_floor_of_one_is_uniform():
    """Everything is spread evenly."""
    laws = known([5.0, 2.0], [0.0, 0.0], [100.0] * 2, [0.5] * 2, [100.0] * 2)
    assert [50.0, 50.0] == pytest.approx(fill(laws, 100.0, 1.0, 1.0))


# --- trust ------------------------------------------------------------------------------------------


def test_what_is_certain_is_trusted_and_what_gains_nothing_is_not():
    """No variance: all of the plan. The plan is uniform: there is no gain, and nothing to do."""
    laws = known([4.0, 1.0], [0.0, 0.0], [100.0, 100.0], [1.0, 1.0], [0.0, 0.0])
    assert 1.0 == trust(laws, np.array([300.0, 100.0]), 1.0)
    assert 0.0 == trust(laws, np.array([200.0, 200.0]), 1.0)
    assert 0.0 == trust(laws, np.array([0.0, 400.0]), 1.0)


def test_trust_by_hand():
    """Uniform 200, 200: gaps 4/3, 1/3. Planned 300, 100: 1, 1/2, so the mean gains 1/12.

    The slopes' errors are 0.1/900 a row, over 100 rows, halved: variance 2 (1/180)^2.
    """
    laws = known([4.0, 1.0], [0.0, 0.0], [100.0, 100.0], [1.0, 1.0], [0.0, 0.0], error=0.1)
    variance = 2 * (0.5 * 0.1 / 900 * 100) ** 2
    assert (1 / 12) ** 2 / ((1 / 12) ** 2 + variance) == pytest.approx(
        trust(laws, np.array([300.0, 100.0]), 1.0)
    )


# --- memory -----------------------------------------------------------------------------------------


def test_the_two_nearest_measurements_become_one():
    """Of 0, 100, 200, 240, 500 rows the third and fourth: the means of rows and gaps, the error of a mean."""
    history = {
        "measurements": [1, 1, 1, 3, 1], "rows": [[0.0], [100.0], [200.0], [240.0], [500.0]],
        "gaps": [[3.0], [2.0], [1.8], [1.4], [1.0]], "errors": [[0.1]] * 3 + [[0.2], [0.1]],
    }  # fmt: skip
    found = remember(history, 4)
    assert [1, 1, 4, 1] == found["measurements"]
    assert [0.0, 100.0, 230.0, 500.0] == [row[0] for row in found["rows"]]
    assert [3.0, 2.0, 1.5, 1.0] == pytest.approx([gap[0] for gap in found["gaps"]])
    assert math.hypot(0.1 / 4, 3 * 0.2 / 4) == pytest.approx(found["errors"][2][0])
    assert history == remember(history, 5)


def test_the_state_does_not_grow_for_ever():
    """After 60 intervals it holds as many measurements as `memory` says, the first among them."""
    last = run(MarginalGain(memory=8), lambda rows: 1 + 2 / (1 + rows / 5000), 3, intervals=60)[-1]
    assert 8 == len(last["rows"]) == len(last["gaps"]) == len(last["errors"])
    assert 60 == sum(last["measurements"])
    assert [0.0] * 3 == last["rows"][0]


# --- the policy -------------------------------------------------------------------------------------


def test_the_first_interval_is_uniform():
    """Nothing is known yet, whatever the corpus holds."""
    state = MarginalGain().init(domain_losses([1.0, 5.0]), np.array([0.9, 0.1]))
    assert [0.5, 0.5] == state["mixture_weights"]


def test_an_update_is_fit_fill_and_trust():
    """From the same numbers: confidence x plan + (1 - confidence) x uniform."""
    policy = MarginalGain(objective=4.0)
    first = replace(domain_losses([3.0, 2.0]), rows_served=np.array([50, 70]))
    second = replace(domain_losses([1.5, 1.9]), rows_served=np.array([550, 570]))
    state = policy.update(policy.init(first, np.array([0.5, 0.5])), second)
    gaps = np.array([[3.0, 2.0], [1.5, 1.9]])
    ago = np.array([[math.log(1.02 / 0.02)], [0.0]])  # the law is less sure of what was long ago
    errors = np.hypot(0.01, gaps[0] * (0.003 + 0.01 * ago))
    laws = fit_gap_laws(np.array([[0.0, 0.0], [500.0, 500.0]]), gaps, errors)
    plan = fill(laws, 1000.0, 4.0, policy.floor, np.array([0.01, 0.01]))
    share = trust(laws, plan, 4.0)
    assert share == pytest.approx(state["confidence"])
    assert share * plan / 1000 + (1 - share) / 2 == pytest.approx(np.array(state["mixture_weights"]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_do_not_go_where_the_gap_is_merely_large(objective):
    """5 nats that never fall beside 2 that do: the large gap gets less than its uniform share."""

    def gap_of(rows):
        return np.array([5.0, 0.2, 0.2]) + np.array([0.0, 2.0, 2.0]) / np.sqrt(1 + rows / 500)

    states = run(MarginalGain(objective=objective), gap_of, 3, intervals=12, noise=0.01)
    assert states[-1]["mixture_weights"][0] < 0.2


def test_the_mean_follows_the_slope_and_the_worst_the_gap():
    """A small gap that falls fast beside a large one that falls slowly: the objective decides."""

    def gap_of(rows):
        return np.array([1.5, 4.0]) / (1 + rows / np.array([3000.0, 30000.0])) ** 0.9

    mean, worst = (run(MarginalGain(objective=o), gap_of, 2, intervals=3)[-1] for o in ("mean", "worst"))
    assert mean["mixture_weights"][0] > 0.6
    assert worst["mixture_weights"][1] > 0.8


def test_noise_alone_moves_little():
    """Gaps of one law in much noise: nobody gets twice the uniform share."""

    def gap_of(rows):
        return 1 + 2 / np.sqrt(1 + rows / 500)

    for seed in range(3):
        states = run(MarginalGain(), gap_of, 5, intervals=8, noise=0.3, seed=seed)
        assert max(max(state["mixture_weights"]) for state in states) < 0.4


def test_a_domain_whose_repeated_rows_teach_nothing_more_is_left():
    """Its curve ends at 800 rows; later it gets little more than the floor."""

    def gap_of(rows):
        return 0.3 + 3 / (1 + np.minimum(rows, [800, np.inf]) / 1000) ** 0.8

    assert run(MarginalGain(), gap_of, 2, intervals=16, noise=0.005)[-1]["mixture_weights"][0] < 0.2


def test_without_rows_served_an_interval_counts_as_one_row_by_its_weights():
    """The same weights as with rows, since only their proportions count."""

    def gap_of(rows):
        return np.array([1.0, 0.2, 0.5]) + 2 / (1 + rows / np.array([500, 2000, 9000])) ** 0.5

    with_rows = run(MarginalGain(), gap_of, 3, rows_per_interval=1_000_000_000)
    without = run(MarginalGain(), gap_of, 3, rows_per_interval=1_000_000_000, counted=False)
    assert with_rows[-1]["mixture_weights"] == pytest.approx(without[-1]["mixture_weights"], rel=1e-4)
    assert 9.0 == pytest.approx(sum(without[-1]["rows"][-1]))


def test_rows_that_are_missing_later_are_a_mistake():
    """One line that says how to go on."""
    policy = MarginalGain()
    state = policy.init(replace(domain_losses([1.0]), rows_served=np.array([0])), np.array([1.0]))
    with pytest.raises(
        ConfigError, match="policy marginal_gain got losses with rows_served at first and now"
    ):
        policy.update(state, domain_losses([0.9]))


def test_rows_before_the_first_measurement_do_not_count():
    """A policy that takes over in the middle of a run starts from there."""
    policy = MarginalGain()
    state = policy.init(replace(domain_losses([3.0, 3.0]), rows_served=np.array([900, 100])), np.full(2, 0.5))
    state = policy.update(state, replace(domain_losses([2.0, 2.5]), rows_served=np.array([1000, 200])))
    assert [[0.0, 0.0], [100.0, 100.0]] == state["rows"]


def test_a_second_measurement_before_any_row_changes_nothing():
    """There is nothing to fit a law to."""
    policy, losses = MarginalGain(), replace(domain_losses([3.0, 1.0]), rows_served=np.array([0, 0]))
    state = policy.update(policy.init(losses, np.full(2, 0.5)), losses)
    assert [0.5, 0.5] == state["mixture_weights"]


def test_unknown_standard_errors_are_taken_for_2_percent_of_the_gap():
    """And an error of exactly 0 is no division by zero."""
    losses = replace(domain_losses([3.0, 1.0]), gap_error=np.array([np.nan, 0.0]))
    state = MarginalGain().init(losses, np.full(2, 0.5))
    assert [[0.06, 0.0]] == state["errors"]
    state = MarginalGain().update(state, replace(losses, student_loss=losses.student_loss - 0.1))
    assert 1.0 == pytest.approx(sum(state["mixture_weights"]))


@SETTINGS
@given(
    st.integers(1, 6).flatmap(
        lambda count: st.lists(
            st.lists(st.floats(-20, 50), min_size=count, max_size=count), min_size=2, max_size=5
        )
    ),
    st.sampled_from(OBJECTIVES),
)
def test_any_gaps_give_weights_above_the_floor_and_a_state_that_is_json(history, objective):
    """Gaps that rise, jump or are negative: a distribution, a JSON round trip, the old state untouched."""
    policy, count = MarginalGain(objective=objective), len(history[0])
    state = None
    for gaps in history:
        restored, before = json.loads(json.dumps(state)), json.dumps(state)
        losses = domain_losses(gaps)
        new = next_state(policy, state, losses, np.full(count, 1 / count))
        assert new == next_state(policy, restored, losses, np.full(count, 1 / count))
        assert before == json.dumps(state)
        assert min(new["mixture_weights"]) >= policy.floor / count - 1e-9
        state = new


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_order_of_the_domains_does_not_matter(objective):
    """Permuting the domains permutes the weights."""
    rng, order = np.random.default_rng(0), [3, 1, 4, 0, 2]
    offset, scale = rng.uniform(0.5, 2, 5), rng.uniform(300, 5000, 5)

    def gap_of(rows):
        return offset + 2 / np.sqrt(1 + rows / scale)

    def permuted(rows):
        return offset[order] + 2 / np.sqrt(1 + rows / scale[order])

    straight = run(MarginalGain(objective=objective), gap_of, 5, intervals=6)
    other = run(MarginalGain(objective=objective), permuted, 5, intervals=6)
    for a, b in zip(straight, other, strict=True):
        # rows are rounded to whole ones, which the last bits may tip
        assert [a["mixture_weights"][i] for i in order] == pytest.approx(b["mixture_weights"], abs=1e-4)


def test_300_domains_get_weights():
    """With a full memory, in the middle of a run; `tools/bench_policies.py` says how fast."""
    rng = np.random.default_rng(0)
    offset, scale = rng.uniform(0, 1, 300), rng.uniform(10, 1000, 300)
    policy = MarginalGain(objective="worst", memory=24)
    state = run(policy, lambda rows: offset + 2 / np.sqrt(1 + rows / scale), 300, intervals=3)[-1]
    for name in ("rows", "gaps", "errors"):
        rows = np.linspace(0, 1, 24)[:, None] * np.array(state[name][-1])
        state[name] = (rows + 0.01).tolist()
    state["measurements"] = [1] * 24
    losses = replace(
        domain_losses([1.0] * 300, domains=[f"d{i:03d}" for i in range(300)]), rows_served=np.full(300, 90)
    )
    weights = np.array(policy.update(state, losses)["mixture_weights"])
    assert (300,) == weights.shape
    assert 1.0 == pytest.approx(weights.sum())
    assert weights.min() > 0


def test_one_domain_gets_everything():
    """Under any objective."""
    for objective in OBJECTIVES:
        assert [1.0] == pytest.approx(
            run(MarginalGain(objective=objective), lambda rows: 2 / (1 + rows / 500), 1)[-1][
                "mixture_weights"
            ]
        )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"objective": "median"}, "policy.objective = 'median': "),
        ({"objective": 0.5}, "policy.objective = 0.5: "),
        ({"floor": 1.5}, "policy.floor = 1.5: Input should be less than or equal to 1."),
        ({"lookahead": 0}, "policy.lookahead = 0: Input should be greater than 0."),
        ({"memory": 3}, "policy.memory = 3: Input should be greater than or equal to 4."),
    ],
)
def test_a_wrong_parameter_is_one_line(parameters, message):
    """The message holds the key, the value that was found and the rule."""
    with pytest.raises(ConfigError) as error:
        build_policy(Named.model_validate({"name": "marginal_gain", **parameters}))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_exponent_reaches_from_the_mean_to_the_worst():
    """1 is the mean; 32 and all above stand for the worst."""
    powers = [MarginalGain(objective=o)._power for o in ("mean", 1.0, 4.0, 32.0, 1e9, "worst")]
    assert [1.0, 1.0, 4.0, 32.0, 32.0, 32.0] == powers


@pytest.mark.parametrize("wrong", [1e-9, 1.0])
def test_the_lookahead_counts(wrong):
    """After many short intervals a quarter of the rows so far is planned, not an interval's."""

    def gap_of(rows):
        return np.array([0.1, 1.0]) + 3 / (1 + rows / np.array([200.0, 4000.0])) ** 0.7

    at = [
        run(MarginalGain(lookahead=x), gap_of, 2, intervals=9)[-1]["mixture_weights"] for x in (0.25, wrong)
    ]
    assert at[0] != pytest.approx(at[1], rel=1e-3)


def test_some_luck_keeps_a_domain_in_the_game():
    """A fall of nothing known to 0.1 nats of 2 may be one of 1 % and more; known for certain it is not."""
    flat = ([2.0, 2.0], [2.0, 1.0], [100.0] * 2, [0.5] * 2, [100.0] * 2)
    assert [False, True] == moves(known(*flat), 100.0).tolist()
    assert [True, True] == moves(known(*flat, error=0.5), 100.0).tolist()


def test_the_newest_errors_are_those_of_the_gaps_to_fill():
    """Two histories whose first errors are the same, and whose last are not, share the rows differently."""
    found = []
    for last in (0.01, 0.6):
        state = None
        for step, error in enumerate((0.3, 0.3, 0.3, last)):
            losses = replace(
                domain_losses([4.0 * (1 + step) ** -0.4, 3.6 * (1 + step) ** -0.4]),
                gap_error=np.full(2, error),
                rows_served=np.full(2, 500 * step),
            )
            state = next_state(MarginalGain(objective="worst"), state, losses, np.full(2, 0.5))
        history = {key: state[key] for key in ("rows", "gaps", "errors")}
        laws = fit_gap_laws(*_evidence(history))
        total = np.array(state["rows"][-1]).sum()
        plan = fill(laws, total / 3, 32.0, 0.1, np.full(2, last))
        share = trust(laws, plan, 32.0)
        expected = share * plan / plan.sum() + (1 - share) / 2
        assert expected == pytest.approx(np.array(state["mixture_weights"]), abs=1e-9)
        stale = fill(laws, total / 3, 32.0, 0.1, np.full(2, 0.3))
        found.append(np.abs(stale - plan).max() / plan.sum())
    assert max(found) > 0.001
