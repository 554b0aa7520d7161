"""The planner: which domain serves each row, and how far it may stray from the mixture weights."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix import apportion, planner
from ddkmix.apportion import ROW
from ddkmix.errors import ConfigError, DataError, MixtureExhausted
from ddkmix.planner import (
    OnCap,
    PlannerState,
    PlanSettings,
    StepPlan,
    TokensOf,
    deal,
    effective_weights,
    initial_state,
    plan_step,
    quantise,
    with_weights,
)

Plan = Callable[[PlanSettings, PlannerState], tuple[StepPlan, PlannerState]]
NAMES = "abcdefghijklmnopqrstuvwxyz"


def simplex(*weights: float) -> np.ndarray:
    """Weights, normalised."""
    vector = np.array(weights, dtype=np.float64)
    return vector / vector.sum()


def settings_of(
    num_domains: int,
    *,
    batch_rows: int = 1,
    caps: Sequence[int | None] | None = None,
    on_cap: OnCap = "renormalize",
) -> PlanSettings:
    """Domains a, b, c, ... of ten rows each."""
    return PlanSettings(
        domains=tuple(NAMES[:num_domains]),
        batch_rows=batch_rows,
        num_rows=(10,) * num_domains,
        cap_rows=(None,) * num_domains if caps is None else tuple(caps),
        on_cap=on_cap,
    )


def plan_until_exhausted(options: PlanSettings, state: PlannerState) -> PlannerState:
    """The last state from which nothing more can be planned."""
    for _ in range(1000):
        try:
            _, state = plan_step(options, state)
        except MixtureExhausted:
            return state
    raise AssertionError("still not exhausted after 1000 steps")


# --- quantise ---------------------------------------------------------------------------------------

weight = st.one_of(st.just(0.0), st.just(1e-6), st.just(1.0), st.floats(1e-6, 1.0))
simplexes = st.lists(weight, min_size=1, max_size=10).filter(any).map(lambda weights: simplex(*weights))


@pytest.mark.parametrize(
    ("expected", "weights"),
    [
        ((ROW,), [1.0]),
        ((ROW // 2, ROW // 2), [0.5, 0.5]),
        ((ROW // 4 * 3, 0, ROW // 4), [0.75, 0.0, 0.25]),
        ((1431655766, 1431655765, 1431655765), [1 / 3, 1 / 3, 1 / 3]),
        ((ROW - 1, 1), [1.0, 1e-300]),
        ((ROW - 3, 1, 1, 1), [1.0, 1e-12, 1e-12, 1e-12]),
    ],
)
def test_quantise_by_hand(expected: tuple[int, ...], weights: list[float]) -> None:
    """Weights become integers that sum to 2^32; the remainder goes to the largest fractions."""
    assert expected == quantise(np.array(weights))


Quantise = Callable[[np.ndarray], tuple[int, ...]]


def check_quantised(weights: np.ndarray, quantise: Quantise = quantise) -> None:
    """Integers sum to 2^32, are within a few units of the weights, and 0 exactly where the weight is 0."""
    exact = quantise(weights)
    assert sum(exact) == ROW
    assert [w > 0 for w in weights] == [e > 0 for e in exact]
    assert all(abs(e - w * ROW) <= len(weights) for e, w in zip(exact, weights, strict=True))
    assert exact == quantise(np.array(exact) / ROW)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(simplexes)
def test_quantised_weights_are_exact_enough(weights: np.ndarray) -> None:
    """For any weights, and weights that went through integers once come back as the same integers."""
    check_quantised(weights)


def rounded(weights: np.ndarray) -> tuple[int, ...]:
    """A saboteur: rounds each weight by itself."""
    return tuple(round(weight * ROW) for weight in weights.tolist())


def remainder_to_the_first(weights: np.ndarray) -> tuple[int, ...]:
    """A saboteur: the sum is right, but the first may get the share of one that is 0 or tiny."""
    rest = [int(weight * ROW) for weight in weights.tolist()[1:]]
    return (ROW - sum(rest), *rest)


@pytest.mark.parametrize("sabotaged", [rounded, remainder_to_the_first])
@pytest.mark.parametrize("weights", [simplex(1, 1, 1), simplex(1, 1e-12)])
def test_the_check_notices_weights_that_are_lost(sabotaged: Quantise, weights: np.ndarray) -> None:
    """Thirds that do not sum to one, and a tiny weight that becomes 0."""
    check_quantised(weights)
    if sabotaged is rounded or weights[1] < 0.1:
        with pytest.raises(AssertionError):
            check_quantised(weights, sabotaged)


@pytest.mark.parametrize(
    "weights",
    [[0.5, 0.4], [0.5, 0.5 + 1e-5], [1.5, -0.5], [float("nan"), 1.0], [float("inf"), 0.0], [0.0, 0.0]],
)
def test_quantise_refuses_what_is_no_distribution(weights: list[float]) -> None:
    """The message shows the weights and the rule, in one line."""
    with pytest.raises(ConfigError, match="not a distribution; each must be finite and >= 0") as info:
        quantise(np.array(weights))
    assert str(weights) in str(info.value)
    assert "\n" not in str(info.value)


# --- constant weights: within one row ---------------------------------------------------------------


def check_within_one_row(weights: np.ndarray, rows: int, plan: Plan = plan_step, batch_rows: int = 1) -> None:
    """After every batch each domain has been served within one row of its share of all rows so far."""
    options = settings_of(len(weights), batch_rows=batch_rows)
    state = initial_state(options, weights)
    exact = state.weights
    for step in range(1, rows // batch_rows + 1):
        batch, state = plan(options, state)
        assert batch_rows == len(batch.domain_ids)
        assert step * batch_rows == sum(state.served)
        for share, served, credit in zip(exact, state.served, state.credit, strict=True):
            owed = step * batch_rows * share - served * ROW
            assert -ROW < owed < ROW
            assert owed == credit


@settings(deadline=None, derandomize=True, max_examples=40)
@given(weights=simplexes)
def test_constant_weights_are_followed_within_one_row(weights: np.ndarray) -> None:
    """Served rows differ from weight x rows by less than one row, after every single row."""
    check_within_one_row(weights, rows=300)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(weights=simplexes, batch_rows=st.integers(2, 40))
def test_whole_batches_are_followed_within_one_row(weights: np.ndarray, batch_rows: int) -> None:
    """The same after every batch, whatever its size: rows are handed out a batch at a time."""
    check_within_one_row(weights, rows=12 * batch_rows, batch_rows=batch_rows)


@pytest.mark.parametrize("num_domains", [2, 3, 10, 26])
def test_long_runs_stay_within_one_row(num_domains: int) -> None:
    """Random weights over 5000 rows in batches of 7."""
    weights = np.random.default_rng(num_domains).dirichlet(np.full(num_domains, 0.3))
    check_within_one_row(weights, rows=5000, batch_rows=7)


# Three large domains and five small ones that all become due together; found by a search.
CROWD = simplex(4, 4, 4, 1, 1, 1, 1, 1)


def test_a_crowd_of_small_domains_stays_within_one_row() -> None:
    """The weights that take "always the largest credit" past one row."""
    check_within_one_row(CROWD, rows=340)


def rounded_without_carry(options: PlanSettings, state: PlannerState) -> tuple[StepPlan, PlannerState]:
    """A saboteur: each batch rounds its own shares and forgets the remainder."""
    counts = apportion.share_out(options.batch_rows, [max(w, 1) for w in state.weights])
    credit = [
        c + options.batch_rows * w - n * ROW
        for c, w, n in zip(state.credit, state.weights, counts, strict=True)
    ]
    served = tuple(s + n for s, n in zip(state.served, counts, strict=True))
    numbers = [np.arange(s, e) for s, e in zip(state.served, served, strict=True)]
    ids = np.repeat(np.arange(len(counts)), counts)
    plan = StepPlan(step=state.step, version=0, domain_ids=ids, row_numbers=np.concatenate(numbers))
    return plan, replace(state, step=state.step + 1, credit=tuple(credit), served=served)


def test_rounding_each_batch_without_carry_fails_the_check() -> None:
    """Batches of 10 over (0.55, 0.45): 1 row is lost every second batch."""
    check_within_one_row(simplex(55, 45), rows=100, batch_rows=10)
    with pytest.raises(AssertionError):
        check_within_one_row(simplex(55, 45), rows=100, batch_rows=10, plan=rounded_without_carry)


def test_serving_the_largest_credit_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """On (4, 4, 4, 1, 1, 1, 1, 1)/17 the greedy rule owes a domain 18/17 of a row after 13 rows."""
    monkeypatch.setattr(apportion, "earliest_deadlines", lambda *_: None)
    options = settings_of(len(CROWD))
    state = initial_state(options, CROWD)
    for _ in range(13):
        _, state = plan_step(options, state)
    assert round(18 / 17, 6) == round(max(state.credit) / ROW, 6)
    with pytest.raises(AssertionError):
        check_within_one_row(CROWD, rows=340)


# --- changing weights: within H_N rows --------------------------------------------------------------

Adversary = Callable[[PlannerState, int], np.ndarray]
"""From the state and the row number to the weights of the next row."""


def harmonic(n: int) -> Fraction:
    """H_n = 1 + 1/2 + ... + 1/n."""
    return sum((Fraction(1, k) for k in range(1, n + 1)), Fraction(0))


def largest_credit_against(adversary: Adversary, num_domains: int, rows: int) -> Fraction:
    """The largest distance, in rows, that any domain gets from the integral of its weight."""
    options = settings_of(num_domains)
    state = initial_state(options, simplex(*[1] * num_domains))
    owed, worst = [0] * num_domains, 0
    for row in range(rows):
        state = with_weights(state, quantise(adversary(state, row)))
        owed = [o + w for o, w in zip(owed, state.weights, strict=True)]
        _, state = plan_step(options, state)
        credit = [o - s * ROW for o, s in zip(owed, state.served, strict=True)]
        assert tuple(credit) == state.credit
        worst = max(worst, *(abs(c) for c in credit))
    return Fraction(worst, ROW)


def check_within_harmonic_bound(adversary: Adversary, num_domains: int, rows: int) -> None:
    """No domain gets H_N rows away from the integral of its weight."""
    assert largest_credit_against(adversary, num_domains, rows) < harmonic(num_domains)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data(), num_domains=st.integers(2, 8))
def test_changing_weights_are_followed_within_h_n_rows(data: Any, num_domains: int) -> None:
    """Any sequence of weights: zeros, 1e-6, one-hot, random; kept for one row or for many."""
    vectors = data.draw(
        st.lists(
            st.tuples(
                st.lists(weight, min_size=num_domains, max_size=num_domains).filter(any),
                st.integers(1, 10),
            ),
            min_size=1,
            max_size=20,
        )
    )
    sequence = [simplex(*weights) for weights, repeats in vectors for _ in range(repeats)]
    check_within_harmonic_bound(lambda _, row: sequence[row], num_domains, len(sequence))


@pytest.mark.parametrize("seed", range(4))
def test_weights_that_follow_the_credits_stay_within_h_n_rows(seed: int) -> None:
    """An adversary that sees the credits and gives weight to a few of the largest or the smallest."""
    generator = np.random.default_rng(seed)

    def adversary(state: PlannerState, _: int) -> np.ndarray:
        ranked = np.argsort(state.credit)[:: generator.choice([1, -1])]
        weights = np.where(generator.random(10) < 0.5, 0.0, 1e-6)
        weights[ranked[: generator.integers(1, 6)]] = generator.random() + 1e-3
        return simplex(*weights)

    check_within_harmonic_bound(adversary, 10, rows=1000)


def drop_each_as_served(state: PlannerState, _: int) -> np.ndarray:
    """Equal weights for the domains not yet served, 0 for the others."""
    waiting = [served == 0 for served in state.served]
    return simplex(*waiting)


@pytest.mark.parametrize(
    ("num_domains", "expected"), [(2, 0.5), (3, 0.833333), (4, 1.083333), (10, 1.928968)]
)
def test_the_adversary_that_drops_served_domains_reaches_h_n_minus_1(
    num_domains: int, expected: float
) -> None:
    """Whoever is left last is owed 1/2 + ... + 1/N rows: no online rule can do better, so none promises 1."""
    reached = largest_credit_against(drop_each_as_served, num_domains, num_domains - 1)
    assert expected == pytest.approx(float(reached), abs=1e-6)
    assert float(harmonic(num_domains) - 1) == pytest.approx(float(reached), abs=1e-6)
    assert reached < harmonic(num_domains)


def drop_then_squeeze(state: PlannerState, row: int) -> np.ndarray:
    """Drop served domains until three of ten are left, then give one of them all and two a trifle.

    The two are urgent (little weight, much credit), so the first waits while it is owed a row per row.
    """
    waiting = [i for i, served in enumerate(state.served) if served == 0]
    if row < 7:
        return drop_each_as_served(state, row)
    weights = np.full(10, 0.0)
    weights[waiting] = 1e-6
    weights[waiting[-1]] = 1.0
    return simplex(*weights)


def test_urgency_alone_fails_the_harmonic_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the joint bound, the squeezed domain waits until it is owed more than H_10 = 2.93 rows."""
    check_within_harmonic_bound(drop_then_squeeze, 10, rows=9)
    monkeypatch.setattr(apportion, "keeps_bound", lambda *_: True)
    with pytest.raises(AssertionError):
        check_within_harmonic_bound(drop_then_squeeze, 10, rows=9)


def test_a_weight_change_keeps_what_domains_are_owed() -> None:
    """b is owed half a row under the old weights and gets it first under the new ones."""
    options = settings_of(2)
    _, state = plan_step(options, initial_state(options, simplex(1, 1)))
    assert (1, 0) == state.served
    changed = with_weights(state, quantise(simplex(1, 1)))
    assert (state.credit, state.served, 1) == (changed.credit, changed.served, changed.version)
    _, state = plan_step(options, changed)
    assert (1, 1) == state.served


# --- one plan ---------------------------------------------------------------------------------------


def test_a_plan_by_hand() -> None:
    """Weights (1/2, 1/4, 1/4), batches of 4: two rows of a, one of b, one of c, and again."""
    options = settings_of(3, batch_rows=4)
    first, state = plan_step(options, initial_state(options, simplex(2, 1, 1)))
    second, state = plan_step(options, state)
    assert [0, 0, 1, 2] == first.domain_ids.tolist()
    assert [0, 1, 0, 0] == first.row_numbers.tolist()
    assert [0, 0, 1, 2] == second.domain_ids.tolist()
    assert [2, 3, 1, 1] == second.row_numbers.tolist()
    assert (0, 1) == (first.step, second.step)
    assert (
        PlannerState(
            step=2, version=0, weights=quantise(simplex(2, 1, 1)), credit=(0, 0, 0), served=(4, 2, 2)
        )
        == state
    )


def test_rare_domains_are_never_rounded_away() -> None:
    """A weight of 1/1000 in batches of 10 gives 3 rows in 300 batches."""
    options = settings_of(2, batch_rows=10)
    state = initial_state(options, simplex(999, 1))
    for _ in range(300):
        _, state = plan_step(options, state)
    assert (2997, 3) == state.served


def test_a_domain_without_weight_is_never_served() -> None:
    """Weight 0 from the start means no row at all."""
    options = settings_of(3, batch_rows=100)
    _, state = plan_step(options, initial_state(options, simplex(1, 0, 2)))
    assert 0 == state.served[1]
    assert 0 == state.credit[1]


def test_planning_is_a_pure_function() -> None:
    """The same state gives the same plan and is not changed by planning."""
    options = settings_of(3, batch_rows=5)
    state = initial_state(options, simplex(3, 2, 1))
    before = state.to_json()
    first, second = plan_step(options, state), plan_step(options, state)
    assert first[0].domain_ids.tolist() == second[0].domain_ids.tolist()
    assert first[1] == second[1]
    assert before == state.to_json()


# --- caps -------------------------------------------------------------------------------------------


def check_caps(options: PlanSettings, vectors: Sequence[Sequence[float]], plan: Plan = plan_step) -> None:
    """No domain passes its cap, credits sum to 0, no row is skipped, and what can be served is."""
    state = initial_state(options, simplex(*vectors[0]))
    for vector in vectors:
        state = with_weights(state, quantise(simplex(*vector)))
        for _ in range(5):
            before = state
            try:
                batch, state = plan(options, state)
            except MixtureExhausted:
                rows_left = [
                    options.batch_rows if cap is None else cap - served
                    for cap, served, wanted in zip(options.cap_rows, state.served, vector, strict=True)
                    if wanted
                ]
                assert sum(rows_left) < options.batch_rows
                break
            assert sum(state.credit) == 0
            for domain, cap in enumerate(options.cap_rows):
                assert cap is None or state.served[domain] <= cap
                rows = batch.row_numbers[batch.domain_ids == domain].tolist()
                assert list(range(before.served[domain], state.served[domain])) == rows


@settings(deadline=None, derandomize=True, max_examples=80)
@given(data=st.data(), num_domains=st.integers(1, 5), batch_rows=st.integers(1, 9))
def test_caps_hold_and_credits_cancel(data: Any, num_domains: int, batch_rows: int) -> None:
    """Under `renormalize` no domain ever passes its cap, whatever the weights and their changes.

    Planning ends only when fewer than a batch of wanted rows is left, and no credit gets lost.
    """
    cap = st.one_of(st.none(), st.integers(0, 30))
    vector = st.lists(weight, min_size=num_domains, max_size=num_domains).filter(any)
    caps = data.draw(st.lists(cap, min_size=num_domains, max_size=num_domains))
    vectors = data.draw(st.lists(vector, min_size=1, max_size=6))
    check_caps(settings_of(num_domains, batch_rows=batch_rows, caps=caps), vectors)


def without_caps(options: PlanSettings, state: PlannerState) -> tuple[StepPlan, PlannerState]:
    """A saboteur: plans as if nothing were capped."""
    return plan_step(replace(options, cap_rows=(None,) * len(options.domains)), state)


def stopping_early(options: PlanSettings, state: PlannerState) -> tuple[StepPlan, PlannerState]:
    """A saboteur: gives up when the first domain is at its cap."""
    if any(s == cap for s, cap in zip(state.served, options.cap_rows, strict=True)):
        raise MixtureExhausted("early")
    return plan_step(options, state)


@pytest.mark.parametrize("sabotaged", [without_caps, stopping_early])
def test_the_cap_check_notices_broken_planners(sabotaged: Plan) -> None:
    """It fails for planning past a cap and for ending at the first one."""
    options = settings_of(2, batch_rows=4, caps=(4, None))
    check_caps(options, [[1, 1]])
    with pytest.raises(AssertionError):
        check_caps(options, [[1, 1]], plan=sabotaged)


def test_the_cap_check_notices_lost_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails when a capped domain takes its credit with it."""
    options = settings_of(3, batch_rows=3, caps=(1, None, None))
    check_caps(options, [[1, 3, 5]])
    monkeypatch.setattr(planner, "_hand_over", lambda credit, capped, _: credit.__setitem__(capped, 0))
    with pytest.raises(AssertionError):
        check_caps(options, [[1, 3, 5]])


def test_others_share_what_a_capped_domain_leaves() -> None:
    """a stops at 4 rows; the other 36 of 40 go to b and c as 3 : 2, which is 21.6 and 14.4."""
    options = settings_of(3, caps=(4, None, None))
    state = initial_state(options, simplex(5, 3, 2))
    for _ in range(40):
        _, state = plan_step(options, state)
    assert 4 == state.served[0]
    assert state.served[1:] in {(21, 15), (22, 14)}
    assert [0, 3 / 5, 2 / 5] == pytest.approx([w / ROW for w in effective_weights(options, state)], abs=1e-9)


def test_a_cap_in_the_middle_of_a_batch() -> None:
    """a has two rows left; the batch of ten is filled up by b."""
    options = settings_of(2, batch_rows=10, caps=(2, None))
    plan, state = plan_step(options, initial_state(options, simplex(1, 1)))
    assert [0, 0, 1, 1, 1, 1, 1, 1, 1, 1] == plan.domain_ids.tolist()
    assert (2, 8) == state.served
    assert (0, 0) == state.credit


@pytest.mark.parametrize(("batch_rows", "steps"), [(1, 8), (3, 2), (4, 2), (8, 1), (9, 0)])
def test_the_mixture_ends_when_every_cap_is_reached(batch_rows: int, steps: int) -> None:
    """Caps of 3 and 5 rows hold eight rows: as many whole batches as fit, then MixtureExhausted."""
    options = settings_of(2, batch_rows=batch_rows, caps=(3, 5))
    state = plan_until_exhausted(options, initial_state(options, simplex(1, 1)))
    assert steps == state.step
    with pytest.raises(MixtureExhausted, match=r"limit of rows \[3, 5\]; raise mixture.max_epochs"):
        plan_step(options, state)


def test_wanted_domains_alone_decide_when_the_mixture_ends() -> None:
    """b has rows left but no weight; giving it weight goes on."""
    options = settings_of(2, caps=(3, 5))
    state = plan_until_exhausted(options, initial_state(options, simplex(1, 0)))
    assert (3, 0) == state.served
    state = plan_until_exhausted(options, with_weights(state, quantise(simplex(1, 1))))
    assert (3, 5) == state.served


def test_a_capped_domain_that_is_still_owed_is_not_served() -> None:
    """a is owed 2/3 of a row when it reaches its cap with nobody to hand it to; b and c go on without it."""
    options = settings_of(3, caps=(2, None, None))
    state = initial_state(options, simplex(0.998, 1.001, 1.001))
    for weights, steps in ((None, 2), ((1, 0, 0), 2), ((0, 1, 1), 6)):
        if weights:
            state = with_weights(state, quantise(simplex(*weights)))
        for _ in range(steps):
            _, state = plan_step(options, state)
    assert (2, 4, 4) == state.served


@pytest.mark.parametrize(("on_cap", "kind"), [("stop", MixtureExhausted), ("error", DataError)])
def test_stop_and_error_end_when_a_capped_domain_is_due(on_cap: OnCap, kind: type[Exception]) -> None:
    """a may serve 2 rows: four rows are planned, and the fifth, which would be a's third, is refused."""
    options = settings_of(2, caps=(2, None), on_cap=on_cap)
    state = initial_state(options, simplex(1, 1))
    for _ in range(4):
        _, state = plan_step(options, state)
    assert (2, 2) == state.served
    with pytest.raises(DataError) as info:
        plan_step(options, state)
    assert kind is type(info.value)
    assert str(info.value) == (
        "domain 'a' has served its limit of 2 rows (10 in an epoch) at step 4 and mixture.on_cap is "
        f"{on_cap!r}; raise max_epochs, lower its weight, or use on_cap: renormalize."
    )


def test_a_refused_step_leaves_no_trace() -> None:
    """The state before a refused batch is still usable with other weights."""
    options = settings_of(2, batch_rows=4, caps=(1, None), on_cap="stop")
    state = initial_state(options, simplex(1, 1))
    with pytest.raises(MixtureExhausted):
        plan_step(options, state)
    assert (0, 0) == state.served
    _, state = plan_step(options, with_weights(state, quantise(simplex(0, 1))))
    assert (0, 4) == state.served


def test_a_cap_below_what_was_served_is_a_cap_that_is_reached() -> None:
    """A resume may lower max_epochs: a has served 5 rows of now 3, and its credit goes to b."""
    options = settings_of(2, batch_rows=2, caps=(3, None))
    state = PlannerState(step=5, version=0, weights=(ROW // 2, ROW // 2), credit=(7, -7), served=(5, 5))
    plan, state = plan_step(options, state)
    assert [1, 1] == plan.domain_ids.tolist()
    assert ((5, 7), (0, 0)) == (state.served, state.credit)


@pytest.mark.parametrize("on_cap", ["stop", "error"])
def test_a_passed_cap_without_weight_stops_nothing(on_cap: OnCap) -> None:
    """Only a domain that is due is refused."""
    options = settings_of(2, batch_rows=2, caps=(3, None), on_cap=on_cap)
    state = PlannerState(step=5, version=0, weights=(0, ROW), credit=(0, 0), served=(5, 5))
    _, state = plan_step(options, state)
    assert (5, 7) == state.served


# --- weights that count tokens ----------------------------------------------------------------------


def sizes_of(*sizes: Sequence[int]) -> TokensOf:
    """Each domain's rows have these sizes, over and over."""
    return lambda domain, j: sizes[domain][j % len(sizes[domain])]


def by_tokens(tokens_of: TokensOf) -> Plan:
    """The planner with credits in tokens."""
    return lambda options, state: plan_step(options, state, tokens_of)


def by_rows(_: TokensOf) -> Plan:
    """A saboteur that counts rows although weights are shares of tokens."""
    return plan_step


def check_tokens(
    vectors: Sequence[np.ndarray],
    tokens_of: TokensOf,
    largest: int,
    *,
    batch_rows: int = 1,
    planner_of: Callable[[TokensOf], Plan] = by_tokens,
) -> None:
    """Credits are what the weights say minus the tokens served, and lie in (-L, H_(N-1) L]."""
    num_domains, plan = len(vectors[0]), planner_of(tokens_of)
    options = settings_of(num_domains, batch_rows=batch_rows)
    state = initial_state(options, vectors[0])
    owed = [0] * num_domains
    for vector in vectors:
        state = with_weights(state, quantise(vector))
        batch, after = plan(options, state)
        assert batch_rows == len(batch.domain_ids)
        served = [
            sum(tokens_of(i, j) for j in range(first, end))
            for i, (first, end) in enumerate(zip(state.served, after.served, strict=True))
        ]
        owed = [o + sum(served) * w - s * ROW for o, w, s in zip(owed, state.weights, served, strict=True)]
        state = after
        assert tuple(owed) == state.credit
        assert sum(state.credit) == 0
        assert min(state.credit) > -largest * ROW
        assert Fraction(max(state.credit), ROW) <= harmonic(num_domains - 1) * largest


@settings(deadline=None, derandomize=True, max_examples=80)
@given(data=st.data(), num_domains=st.integers(1, 6), batch_rows=st.integers(1, 9))
def test_token_credits_stay_bounded_under_any_weights(data: Any, num_domains: int, batch_rows: int) -> None:
    """Rows of 1 to 100 tokens, weights that change with every step or not at all."""
    sizes = data.draw(st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=5), min_size=num_domains))[
        :num_domains
    ]
    vector = st.lists(weight, min_size=num_domains, max_size=num_domains).filter(any)
    drawn = data.draw(st.lists(st.tuples(vector, st.integers(1, 8)), min_size=1, max_size=6))
    vectors = [simplex(*weights) for weights, repeats in drawn for _ in range(repeats)]
    largest = max(max(rows) for rows in sizes)
    check_tokens(vectors, sizes_of(*sizes), largest, batch_rows=batch_rows)


def test_counting_rows_fails_the_token_check() -> None:
    """Rows of 100 and of 10 tokens at equal weights."""
    vectors, sizes = [simplex(1, 1)] * 40, sizes_of([100], [10])
    check_tokens(vectors, sizes, 100, batch_rows=3)
    with pytest.raises(AssertionError):
        check_tokens(vectors, sizes, 100, batch_rows=3, planner_of=by_rows)


def token_shares(
    weights: np.ndarray, tokens_of: TokensOf, *, steps: int = 60, plan: Plan | None = None
) -> list[float]:
    """Shares of the tokens served after batches of 20 rows."""
    options = settings_of(len(weights), batch_rows=20)
    state = initial_state(options, weights)
    for _ in range(steps):
        _, state = (plan or by_tokens(tokens_of))(options, state)
    tokens = [sum(tokens_of(i, j) for j in range(count)) for i, count in enumerate(state.served)]
    return [count / sum(tokens) for count in tokens]


def test_token_shares_follow_the_weights_where_rows_differ_in_length() -> None:
    """A domain of full rows, one of rows a tenth as long, one of both: within one row of 1,200."""
    weights, tokens_of = simplex(5, 3, 2), sizes_of([2048], [200, 210], [2048, 31, 1000])
    assert weights.tolist() == pytest.approx(token_shares(weights, tokens_of), abs=5e-3)
    by_count = token_shares(weights, tokens_of, plan=plan_step)
    assert weights.tolist() != pytest.approx(by_count, abs=0.1)


def test_a_plan_in_tokens_by_hand() -> None:
    """Equal weights, rows of 4 and 2 tokens: a, then b twice to catch up, and again.

    After a the credits are (-2, 2), after b (-1, 1), after b (0, 0).
    """
    options = settings_of(2, batch_rows=6)
    plan, state = plan_step(options, initial_state(options, simplex(1, 1)), sizes_of([4], [2]))
    assert [0, 0, 1, 1, 1, 1] == plan.domain_ids.tolist()
    assert [0, 1, 0, 1, 2, 3] == plan.row_numbers.tolist()
    assert ((2, 4), (0, 0)) == (state.served, state.credit)
    _, state = plan_step(settings_of(2, batch_rows=2), state, sizes_of([4], [2]))
    assert ((3, 5), (-ROW, ROW)) == (state.served, state.credit)


def test_a_domain_without_weight_serves_only_what_it_is_owed_in_tokens() -> None:
    """b is owed 50 tokens when it loses its weight: one row of 30, one more for the 20 left, then none."""
    options, tokens_of = settings_of(3), sizes_of([100], [30], [10])
    _, state = plan_step(options, initial_state(options, simplex(1, 1, 0)), tokens_of)
    assert ((1, 0, 0), (-50 * ROW, 50 * ROW, 0)) == (state.served, state.credit)
    state = with_weights(state, quantise(simplex(1, 0, 0)))
    for _ in range(20):
        _, state = plan_step(options, state, tokens_of)
    assert (2, 0) == state.served[1:]
    assert -30 * ROW < state.credit[1] <= 0


@settings(deadline=None, derandomize=True, max_examples=50)
@given(data=st.data(), num_domains=st.integers(1, 4), batch_rows=st.integers(1, 9))
def test_caps_hold_where_weights_count_tokens(data: Any, num_domains: int, batch_rows: int) -> None:
    """Caps stay counts of rows: none is passed, and planning ends only when too few are left."""
    cap = st.one_of(st.none(), st.integers(0, 30))
    vector = st.lists(weight, min_size=num_domains, max_size=num_domains).filter(any)
    caps = data.draw(st.lists(cap, min_size=num_domains, max_size=num_domains))
    vectors = data.draw(st.lists(vector, min_size=1, max_size=6))
    sizes = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1), min_size=4, max_size=4))
    check_caps(
        settings_of(num_domains, batch_rows=batch_rows, caps=caps), vectors, by_tokens(sizes_of(*sizes))
    )


@pytest.mark.parametrize(("on_cap", "kind"), [("stop", MixtureExhausted), ("error", DataError)])
def test_a_capped_domain_that_is_due_ends_token_plans(on_cap: OnCap, kind: type[Exception]) -> None:
    """Rows of equal size, so the same as for rows: the fifth would be a's third."""
    options, tokens_of = settings_of(2, caps=(2, None), on_cap=on_cap), sizes_of([7], [7])
    state = initial_state(options, simplex(1, 1))
    for _ in range(4):
        _, state = plan_step(options, state, tokens_of)
    with pytest.raises(DataError, match=r"domain 'a' has served its limit of 2 rows .* at step 4") as info:
        plan_step(options, state, tokens_of)
    assert kind is type(info.value)


def test_token_plans_are_pure_and_survive_json() -> None:
    """The same state, before and after JSON, gives the same plan."""
    options, tokens_of = settings_of(3, batch_rows=5), sizes_of([9, 3], [2], [5, 5, 1])
    state = initial_state(options, simplex(3, 2, 1))
    for _ in range(10):
        again = PlannerState.from_json(json.loads(json.dumps(state.to_json())))
        first, after = plan_step(options, state, tokens_of)
        second, after_again = plan_step(options, again, tokens_of)
        assert first.row_numbers.tolist() == second.row_numbers.tolist()
        assert after == after_again
        state = after


# --- the state --------------------------------------------------------------------------------------


def test_the_state_survives_json() -> None:
    """Twice through JSON text and the next plans are the same."""
    options = settings_of(3, batch_rows=7, caps=(20, None, None))
    state = initial_state(options, simplex(5, 3, 1e-6))
    for _ in range(8):
        again = PlannerState.from_json(json.loads(json.dumps(state.to_json())))
        again = PlannerState.from_json(json.loads(json.dumps(again.to_json())))
        assert state == again
        assert state.fingerprint() == again.fingerprint()
        plan, state = plan_step(options, state)
        assert plan.domain_ids.tolist() == plan_step(options, again)[0].domain_ids.tolist()


def test_the_state_of_ten_domains_is_below_a_kilobyte() -> None:
    """Even after ten billion rows."""
    state = PlannerState(
        step=10**9,
        version=10**6,
        weights=quantise(simplex(*[1] * 10)),
        credit=(-ROW + 1, ROW - 1) * 5,
        served=(10**9,) * 10,
    )
    assert len(json.dumps(state.to_json())) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"step": 4},
        {"version": 1},
        {"weights": (ROW // 2 + 1, ROW // 2 - 1)},
        {"credit": (1, -1)},
        {"served": (2, 4)},
    ],
)
def test_the_fingerprint_tells_states_apart(change: dict[str, Any]) -> None:
    """Ranks compare fingerprints: any difference that changes a plan changes the fingerprint."""
    state = PlannerState(step=3, version=0, weights=(ROW // 2, ROW // 2), credit=(0, 0), served=(3, 3))
    assert state.fingerprint() == replace(state).fingerprint()
    assert state.fingerprint() != replace(state, **change).fingerprint()


# --- dealing to ranks -------------------------------------------------------------------------------

Deal = Callable[[StepPlan, int, int], np.ndarray]


def plan_of(*counts: int, step: int = 0) -> StepPlan:
    """A plan with so many rows of each domain."""
    ids = np.repeat(np.arange(len(counts)), counts)
    return StepPlan(step=step, version=0, domain_ids=ids, row_numbers=np.zeros_like(ids))


def check_deals_evenly(plan: StepPlan, world_size: int, deal: Deal = deal) -> None:
    """Each slot goes to one rank; ranks and their domains differ by at most one row."""
    hands = [deal(plan, rank, world_size).tolist() for rank in range(world_size)]
    assert list(range(len(plan.domain_ids))) == sorted(slot for hand in hands for slot in hand)
    sizes = [len(hand) for hand in hands]
    assert max(sizes) - min(sizes) <= (1 if len(plan.domain_ids) % world_size else 0)
    for domain in range(plan.domain_ids.max(initial=0) + 1):
        counts = [sum(plan.domain_ids[slot] == domain for slot in hand) for hand in hands]
        assert max(counts) - min(counts) <= 1


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    world_size=st.integers(1, 9),
    step=st.integers(0, 10**6),
)
def test_slots_are_dealt_evenly(counts: list[int], world_size: int, step: int) -> None:
    """Every slot once; equal hands when ranks divide the batch; each domain split floor/ceil over ranks."""
    check_deals_evenly(plan_of(*counts, step=step), world_size)


def contiguous(plan: StepPlan, rank: int, world_size: int) -> np.ndarray:
    """A saboteur: rank r takes the r-th stretch of the batch."""
    return np.array_split(np.arange(len(plan.domain_ids)), world_size)[rank]


def overlapping(plan: StepPlan, rank: int, world_size: int) -> np.ndarray:
    """A saboteur: every rank takes the same slots."""
    return deal(plan, 0, world_size)


@pytest.mark.parametrize("sabotaged", [contiguous, overlapping])
def test_the_dealing_check_notices_uneven_hands(sabotaged: Deal) -> None:
    """Stretches of a sorted batch would give each rank other domains."""
    check_deals_evenly(plan_of(4, 4, 4), 2)
    with pytest.raises(AssertionError):
        check_deals_evenly(plan_of(4, 4, 4), 2, deal=sabotaged)


def test_two_equal_domains_on_two_ranks_take_turns() -> None:
    """One row of each per step: rank 0 gets a, then b, then a; without the turn it would see only a."""
    turns = [
        int(plan_of(1, 1, step=step).domain_ids[deal(plan_of(1, 1, step=step), 0, 2)[0]]) for step in range(4)
    ]
    assert [0, 1, 0, 1] == turns
