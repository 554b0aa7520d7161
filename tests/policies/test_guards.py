"""Guards around any policy: what they promise for every proposal, and what they leave alone."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import Guards
from ddkmix.errors import ConfigError
from ddkmix.policies import Ado, Ddk, Guarded, MarginalGain, Static, guarded, guards, next_state, reweight
from ddkmix.policies.evidence import pairs_of, weight_errors
from ddkmix.policies.guards import describe
from ddkmix.types import DomainLosses
from tests.conftest import domain_losses

SETTINGS = settings(deadline=None, derandomize=True, max_examples=30)
FREE = {"floor": 0.0, "cap": 1.0, "evidence": 0.0}
THIRDS = np.full(3, 1 / 3)


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Weights that follow the gaps at once; remembers how often it was asked."""

    steepness: float = 1.0

    def init(self, losses: DomainLosses, natural_weights: np.ndarray) -> dict[str, Any]:
        """The corpus as it is."""
        return {"mixture_weights": natural_weights.tolist(), "asked": 0}

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """exp(steepness gap), normalised."""
        p = np.exp(self.steepness * (losses.loss_gap - losses.loss_gap.max()))
        return {"mixture_weights": (p / p.sum()).tolist(), "asked": state["asked"] + 1}


def gaps(*values: float, error: float = 0.0) -> DomainLosses:
    """Gaps of so many nats, all with one standard error."""
    return replace(domain_losses(values), gap_error=np.full(len(values), error))


def steps(policy: Any, *measured: DomainLosses, natural: np.ndarray | None = None) -> list[np.ndarray]:
    """The mixtures of a policy over some measurements."""
    count = len(measured[0].domains)
    state, found = None, []
    for losses in measured:
        state = next_state(policy, state, losses, np.full(count, 1 / count) if natural is None else natural)
        state = json.loads(json.dumps(state))  # as a checkpoint would
        found.append(np.array(state["mixture_weights"]))
    return found


def held(**changes: Any) -> Guards:
    """Guards of which only those named do anything."""
    return Guards.model_validate({**FREE, **changes})


# --- each guard by hand -----------------------------------------------------------------------------


def test_floor_and_cap_by_hand() -> None:
    """exp of ln 8, ln 1, ln 1 is (0.8, 0.1, 0.1): a cap of 0.5 leaves 0.5 for the two others, a floor of 0.2
    takes 0.2 from the first."""
    measured = gaps(math.log(8), 0.0, 0.0)
    assert [0.5, 0.25, 0.25] == pytest.approx(steps(guarded(Softmax(), held(cap=0.5)), measured, measured)[1])
    assert [0.6, 0.2, 0.2] == pytest.approx(steps(guarded(Softmax(), held(floor=0.2)), measured, measured)[1])


def test_floor_and_cap_hold_the_first_mixture_too() -> None:
    """A corpus of 0.9, 0.05, 0.05 under a cap of 0.5."""
    policy = guarded(Softmax(), held(cap=0.5))
    (first,) = steps(policy, gaps(1.0, 1.0, 1.0), natural=np.array([0.9, 0.05, 0.05]))
    assert [0.5, 0.25, 0.25] == pytest.approx(first)


def test_the_largest_move_by_hand() -> None:
    """From a third each towards (0.8, 0.1, 0.1) in moves of at most 0.1: 0.433, 0.533, 0.633, 0.733, 0.8."""
    measured = gaps(math.log(8), 0.0, 0.0)
    found = steps(guarded(Softmax(), held(max_move=0.1)), *[measured] * 7)
    assert [1 / 3, 0.4333333, 0.5333333, 0.6333333, 0.7333333, 0.8, 0.8] == pytest.approx(
        [w[0] for w in found], abs=1e-6
    )


def test_warm_up_keeps_the_first_mixture_and_the_policys_memory() -> None:
    """Two updates change nothing; the third is the policy's, which was asked all the time."""
    policy = guarded(Softmax(), held(warmup_intervals=2))
    measured, natural = gaps(math.log(8), 0.0, 0.0), np.array([0.5, 0.3, 0.2])
    found = steps(policy, *[measured] * 4, natural=natural)
    assert [[0.5, 0.3, 0.2]] * 3 == [w.tolist() for w in found[:3]]
    assert [0.8, 0.1, 0.1] == pytest.approx(found[3])
    state = policy.init(measured, natural)
    assert [1, 2] == [(state := policy.update(state, measured))["policy"]["asked"] for _ in range(2)]


def test_evidence_by_hand() -> None:
    """Weights linear in the gaps, w = 0.5 + (gap_a - gap_b) / 20. Errors of sqrt(2) nats each make 2 of the
    difference and 0.1 of w. Towards (0.8, 0.2) two of them take 0.2 of 0.3, three take all."""

    class Linear:
        def init(self, losses: DomainLosses, natural_weights: np.ndarray) -> dict[str, Any]:
            return {"mixture_weights": natural_weights.tolist()}

        def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
            up = 0.5 + (losses.loss_gap[0] - losses.loss_gap[1]) / 20
            return {"mixture_weights": [up, 1 - up]}

    for error, evidence_, expected in (
        (math.sqrt(2), 2.0, 0.6),
        (math.sqrt(2), 1.0, 0.7),
        (math.sqrt(2), 0.0, 0.8),
        (math.sqrt(2), 3.0, 0.5),
        (math.sqrt(2), 9.0, 0.5),
        (0.0, 9.0, 0.8),
    ):
        measured = gaps(8.0, 2.0, error=error)
        found = steps(guarded(Linear(), held(evidence=evidence_)), measured, measured)[1]
        assert [expected, 1 - expected] == pytest.approx(found)
    state = guarded(Linear(), held(evidence=2.0)).init(measured, np.array([0.5, 0.5]))
    after = guarded(Linear(), held(evidence=2.0)).update(state, gaps(8.0, 2.0, error=math.sqrt(2)))
    assert [0.1, 0.1] == pytest.approx(after["weight_errors"])


def test_a_domain_without_evidence_does_not_pay_for_the_others() -> None:
    """A share whose own move is not sure stays to the last bit; the others exchange among themselves."""
    measured = replace(domain_losses([3.0, 1.0, 2.0]), gap_error=np.array([0.01, 0.01, 0.8]))
    _, found = steps(guarded(Softmax(), held(evidence=2.0)), measured, measured)
    assert 1 / 3 == found[2]
    assert found[0] > 0.4 and found[1] < 0.3
    assert 1.0 == pytest.approx(found.sum())


def test_noise_alone_moves_nothing() -> None:
    """DDK as published follows the last digit of gaps around 16 nats with half the mixture. With an error of
    0.4 nats, as the quickstart measures, nothing moves at two standard errors."""
    measured = gaps(16.8, 16.5, 16.6, error=0.4)
    assert 0.66 < steps(Ddk(), measured, measured)[1][0]
    assert [1 / 3] * 3 == steps(guarded(Ddk(), held(evidence=2.0)), measured, measured)[1].tolist()


# --- what holds for every proposal ------------------------------------------------------------------


Run = tuple[Guards, list[tuple[list[float], list[float]]], list[float]]


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Feasible guards, gaps and errors of four measurements, a corpus."""
    count = draw(st.integers(1, 6))
    vectors = st.lists(st.floats(0, 1), min_size=count, max_size=count)
    floor = draw(st.floats(0, 1)) / count
    cap = min(1.0, (1 + draw(st.floats(0, 1)) * (count - 1)) / count + 1e-9)
    settings_ = Guards(
        floor=floor,
        cap=cap,
        max_move=draw(st.floats(0.01, 1)),
        warmup_intervals=draw(st.integers(0, 2)),
        evidence=draw(st.floats(0, 3)),
    )
    return settings_, [(draw(vectors), draw(vectors)) for _ in range(4)], draw(vectors)


def built(run: Run) -> tuple[Guards, list[DomainLosses], np.ndarray]:
    """Made outside of the strategy, because checks of types draw random numbers, which hypothesis forbids."""
    limits, numbers, natural = run
    measured = [
        replace(domain_losses([10 * x for x in values]), gap_error=np.array(errors))
        for values, errors in numbers
    ]
    return limits, measured, (np.array(natural) + 0.01) / (np.array(natural) + 0.01).sum()


def check_run(policy: Any, limits: Guards, measured: list[DomainLosses], natural: np.ndarray) -> None:
    """Mixtures within floor and cap, moves within the largest and within what evidence leaves of each."""
    state, before = None, None
    for losses in measured:
        state = next_state(policy, state, losses, natural)
        now = np.array(state["mixture_weights"])
        assert 1.0 == pytest.approx(now.sum(), abs=1e-9)
        assert (now >= limits.floor - 1e-12).all() and (now <= limits.cap + 1e-12).all()
        if before is not None:
            move = np.abs(now - before)
            assert (move <= limits.max_move + 1e-12).all()
            if state["updates"] <= limits.warmup_intervals:
                assert (move <= 1e-12).all()
            elif limits.evidence > 0:
                proposed = np.array(state["policy"]["mixture_weights"])
                sure = np.abs(proposed - before) - limits.evidence * np.array(state["weight_errors"])
                assert (move <= np.maximum(sure, 0) + 1e-12).all()
        before = now


@SETTINGS
@given(runs())
def test_every_guard_holds_at_every_update(run: Run) -> None:
    """Around a policy that jumps, and around DDK with its memory."""
    limits, measured, natural = built(run)
    for policy in (Softmax(), Ddk(signal="loss_gap", first_interval="eq1")):
        check_run(Guarded(policy=policy, guards=limits), limits, measured, natural)


@SETTINGS
@given(runs(), st.randoms(use_true_random=False))
def test_the_order_of_the_domains_does_not_count(run: Run, random: Any) -> None:
    """Names, losses and corpus in another order: the same shares in that order."""
    limits, measured, natural = built(run)
    order = np.argsort([random.random() for _ in natural])
    policy = Guarded(policy=Softmax(), guards=limits)
    there = [
        replace(
            losses,
            student_loss=losses.student_loss[order],
            gap_error=losses.gap_error[order],
            domains=tuple(losses.domains[i] for i in order),
        )
        for losses in measured
    ]
    found = steps(policy, *there, natural=natural[order])
    for expected, actual in zip(steps(policy, *measured, natural=natural), found, strict=True):
        assert expected[order] == pytest.approx(actual, abs=1e-9)


@SETTINGS
@given(runs())
def test_guards_never_touch_the_policys_memory(run: Run) -> None:
    """Inside the guards is the very state of the policy without them."""
    limits, measured, natural = built(run)
    free, bound = Ddk(signal="loss_gap"), Guarded(policy=Ddk(signal="loss_gap"), guards=limits)
    alone = state = None
    for losses in measured:
        alone = next_state(free, alone, losses, natural)
        state = next_state(bound, state, losses, natural)
        assert alone == state["policy"]


def no_bounds(self: Guarded, natural: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sabotage: floor and cap are forgotten."""
    return np.zeros(len(natural)), np.ones(len(natural))


def no_reach(self: Guarded, now: np.ndarray, *_: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sabotage: neither the largest move nor evidence counts."""
    return np.zeros(len(now)), np.ones(len(now))


def renormalised(wanted: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Sabotage: clip, then normalise."""
    clipped = np.clip(wanted, low, high)
    return np.asarray(clipped / clipped.sum())


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [
        (Guarded, "_bounds", no_bounds),
        (Guarded, "_reach", no_reach),
        (guards, "nearest_mixture", renormalised),
    ],
    ids=["no bounds", "no reach", "renormalised"],
)
def test_a_guard_that_lets_through_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, broken: Callable[..., Any]
) -> None:
    """The checks above fail on each."""
    limits = Guards(floor=0.15, cap=0.45, max_move=0.2, evidence=1.0)
    measured, natural = [gaps(5.0, 0.0, 1.0, error=0.3)] * 4, np.array([0.2, 0.4, 0.4])
    policy = Guarded(policy=Softmax(), guards=limits)
    check_run(policy, limits, measured, natural)
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(AssertionError):
        check_run(policy, limits, measured, natural)


# --- guards that are not set ------------------------------------------------------------------------


def test_unset_bounds_are_those_of_published_ddk() -> None:
    """alpha = 0.5 gives a domain at least 0.5 / N and at most (1 + 1 / N) / 2: DDK never meets them."""
    settings_ = Guards(evidence=0.0)
    for count in (2, 3, 8):
        measured = gaps(*[9.0, *[0.0] * (count - 1)])
        free, bound = (steps(policy, *[measured] * 4) for policy in (Ddk(), guarded(Ddk(), settings_)))
        assert [w.tolist() for w in free] == [w.tolist() for w in bound]
        assert (1 + 1 / count) / 2 == pytest.approx(free[-1].max(), abs=1e-6)


def test_unset_bounds_keep_a_steep_policy_from_collapsing() -> None:
    """Without a uniform share one of four domains would take all; now (1 + 1/4) / 2, and 0.1 / 4 at least."""
    measured = gaps(90.0, 1.0, 2.0, 6.0)
    _, found = steps(guarded(Softmax(), Guards(evidence=0.0)), measured, measured)
    assert 0.625 == pytest.approx(found.max())
    assert 0.025 == pytest.approx(found.min())


def test_unset_bounds_spare_a_corpus_that_lies_outside() -> None:
    """Natural weights of 0.9 and 0.001 are left as they are, and not exceeded."""
    natural = np.array([0.9, 0.099, 0.001])
    policy = guarded(Softmax(), Guards(evidence=0.0))
    up, down = gaps(50.0, 1.0, 0.0), gaps(0.0, 50.0, 40.0)
    first, second, third = steps(policy, up, up, down, natural=natural)
    assert natural.tolist() == first.tolist()
    assert 0.9 == pytest.approx(second[0]) and second[2] >= 0.001
    assert 2 / 3 == pytest.approx(third[1])


@pytest.mark.parametrize("weights", [{"a": 98.0, "b": 1.0, "c": 1.0}, "natural", "uniform"])
def test_a_mixture_that_never_moves_is_left_alone(weights: Any) -> None:
    """Somebody asked for it; errors of the gaps may be missing. What is set explicitly holds all the same."""
    measured = DomainLosses.from_means({"a": 1.0, "b": 2.0, "c": 9.0})
    natural = np.array([0.97, 0.02, 0.01])
    free = steps(Static(weights=weights), measured, measured, natural=natural)
    found = steps(guarded(Static(weights=weights), True), measured, measured, natural=natural)
    assert [w.tolist() for w in free] == [w.tolist() for w in found]
    capped = steps(guarded(Static(weights=weights), {"cap": 0.5}), measured, measured, natural=natural)
    assert 0.5 + 1e-12 >= max(w.max() for w in capped)


@pytest.mark.parametrize("nothing", [None, False, FREE, {**FREE, "max_move": 1}])
def test_guards_that_do_nothing_are_not_there(nothing: Any) -> None:
    """The policy itself, with its own state: as published."""
    policy = Ddk()
    assert policy is guarded(policy, nothing)


def test_what_a_policy_needs_is_what_the_policy_inside_needs() -> None:
    """The evaluator is told."""

    class Needy(Softmax):
        needs = frozenset({"excess_loss"})

    assert frozenset({"excess_loss"}) == guarded(Needy(), True).needs  # type: ignore[attr-defined]
    assert frozenset() == guarded(Softmax(), True).needs  # type: ignore[attr-defined]


# --- standard errors of weights ---------------------------------------------------------------------


def softmax_at(losses: DomainLosses) -> np.ndarray:
    """w = softmax(gap)."""
    p = np.exp(losses.loss_gap - losses.loss_gap.max())
    return np.asarray(p / p.sum())


def jacobian_errors(losses: DomainLosses) -> np.ndarray:
    """The delta method by hand: dw_i / dgap_j = w_i (1[i = j] - w_j)."""
    w = softmax_at(losses)
    return np.asarray(np.sqrt(((np.diag(w) - np.outer(w, w)) ** 2) @ losses.gap_error**2))


def test_errors_of_weights_are_those_of_the_delta_method() -> None:
    """Small errors, softmax: the closed form."""
    losses = replace(domain_losses([1.0, 2.0, 0.5]), gap_error=np.array([0.01, 0.02, 0.005]))
    assert jacobian_errors(losses) == pytest.approx(weight_errors(softmax_at, losses), rel=1e-3)


def test_errors_of_weights_are_those_of_a_simulation() -> None:
    """20,000 draws of the gaps: the spread of the weights."""
    losses = replace(domain_losses([1.0, 2.0, 0.5]), gap_error=np.array([0.1, 0.2, 0.15]))
    drawn = np.random.default_rng(0).normal(losses.loss_gap, losses.gap_error, (20_000, 3))
    p = np.exp(drawn)
    spread = (p / p.sum(axis=1, keepdims=True)).std(axis=0)
    assert spread == pytest.approx(weight_errors(softmax_at, losses), rel=0.05)


def many(count: int, seed: int = 0) -> DomainLosses:
    """So many domains with gaps and errors of different size."""
    generator = np.random.default_rng(seed)
    losses = DomainLosses.from_means({f"d{i:03}": 2 + generator.random() for i in range(count)})
    return replace(losses, gap_error=generator.uniform(0.01, 0.05, count))


def test_many_domains_move_together_and_cost_few_updates() -> None:
    """For 300 domains: close to the closed form where a weight hangs on few gaps, within the third or so
    that is promised where it hangs on all of them (1 / sqrt(2 x 4)), and the same every time."""
    calls = []

    def asked(losses: DomainLosses) -> np.ndarray:
        calls.append(1)
        return softmax_at(losses)

    ratios = weight_errors(asked, many(300)) / jacobian_errors(many(300))
    assert 8 == len(calls)
    assert np.ones(300) == pytest.approx(ratios, abs=0.15)
    assert weight_errors(softmax_at, many(300)).tolist() == weight_errors(softmax_at, many(300)).tolist()
    found = []
    for seed in range(60):
        factors = np.random.default_rng(seed).normal(size=300)
        (error, *_) = weight_errors(lambda losses, f=factors: f @ losses.loss_gap * np.ones(300), many(300))
        found.append(error / np.sqrt(factors**2 @ many(300).gap_error ** 2))
    assert 1.0 == pytest.approx(np.square(found).mean(), abs=0.15)
    assert 1 / np.sqrt(8) == pytest.approx(np.std(found), rel=0.3)


@pytest.mark.parametrize(
    ("count", "pairs", "of_fits"),
    [
        (1, 1, 1),
        (20, 20, 20),
        (21, 21, 16),
        (32, 32, 12),
        (33, 16, 12),
        (75, 16, 5),
        (300, 4, 2),
        (5000, 2, 2),
    ],
)
def test_pairs_of_updates_are_fewer_the_more_an_update_costs(count: int, pairs: int, of_fits: int) -> None:
    """One for each domain where there are few, 16 and less where there are many, never below 2."""
    assert (pairs, of_fits) == (pairs_of(count), pairs_of(count, fits_laws=True))


@pytest.mark.parametrize(("count", "pairs"), [(40, 10), (300, 2)])
def test_fewer_directions_still_give_evidence_its_size(count: int, pairs: int) -> None:
    """Of a policy that fits laws, softmax again: in closed form 1 on average and for each domain nearly so,
    and for weights that hang on all gaps alike 1 in the mean of the squares."""
    calls = []

    def asked(losses: DomainLosses) -> np.ndarray:
        calls.append(1)
        return softmax_at(losses)

    ratios = weight_errors(asked, many(count), fits_laws=True) / jacobian_errors(many(count))
    assert 2 * pairs == len(calls)
    assert 1.0 == pytest.approx(ratios.mean(), abs=0.02)
    assert np.ones(count) == pytest.approx(ratios, abs=0.25)
    found = []
    for seed in range(60):
        factors = np.random.default_rng(seed).normal(size=count)
        (error, *_) = weight_errors(
            lambda losses, f=factors: f @ losses.loss_gap * np.ones(count), many(count), fits_laws=True
        )
        found.append(error / np.sqrt(factors**2 @ many(count).gap_error ** 2))
    assert 1.0 == pytest.approx(np.square(found).mean(), abs=0.25)


def test_errors_are_of_the_update_from_the_state_before_it() -> None:
    """DDK has a memory: from the state after the update it would be moved by the same losses twice."""
    policy, measured = Ddk(signal="loss_gap"), gaps(1.5, 0.0, 0.5, error=0.1)
    bound = Guarded(policy=policy, guards=held(evidence=1.0))
    state = bound.init(measured, THIRDS)

    def errors_from(memory: dict[str, Any]) -> list[float]:
        def at(other: DomainLosses) -> np.ndarray:
            return np.array(policy.update(memory, other)["mixture_weights"])

        return weight_errors(at, measured).tolist()

    after = bound.update(state, measured)
    assert errors_from(state["policy"]) == after["weight_errors"]
    assert errors_from(after["policy"]) != pytest.approx(after["weight_errors"], rel=0.01)


def test_evidence_does_not_act_on_a_policy_that_weighs_errors_itself(monkeypatch: Any) -> None:
    """marginal_gain is asked once an update, its weights are its own (the other guards hold), errors may be
    missing, and who reads what holds it is told."""
    calls = []
    own = MarginalGain.update
    monkeypatch.setattr(MarginalGain, "update", lambda *a: calls.append(1) or own(*a))
    policy = guarded(MarginalGain(), True)
    measured = [gaps(3.0, 2.0, 1.0, error=0.3), gaps(2.0, 1.9, 0.5, error=0.3)]
    free = steps(MarginalGain(), *measured)
    calls.clear()
    assert [w.tolist() for w in free] == [w.tolist() for w in steps(policy, *measured)]
    assert 1 == len(calls)
    assert isinstance(policy, Guarded) and not policy.reads_errors
    assert policy.update(policy.init(measured[0], THIRDS), measured[1])["weight_errors"] is None
    steps(policy, *(DomainLosses.from_means({"a": 3.0, "b": top}) for top in (2.0, 1.0)))
    assert "floor 0.03333, cap 0.6667, evidence left to the policy" == describe(policy, 3)
    assert "evidence 1 standard errors" in describe(guarded(Ado(), True), 3)
    assert "evidence" not in describe(guarded(Ado(), {"evidence": 0.0}), 3)


def test_the_errors_of_many_domains_do_not_depend_on_their_order() -> None:
    """Signs belong to names, not to places."""
    losses, order = many(40), np.random.default_rng(1).permutation(40)
    there = replace(
        losses,
        domains=tuple(losses.domains[i] for i in order),
        student_loss=losses.student_loss[order],
        gap_error=losses.gap_error[order],
    )
    assert weight_errors(softmax_at, losses)[order] == pytest.approx(weight_errors(softmax_at, there))


def test_optional_losses_move_with_the_gap() -> None:
    """A policy that looks at the excess or the KL has errors too; neither falls below 0."""
    losses = replace(
        gaps(1.0, 1.0, error=0.1), excess_loss=np.array([1.0, 0.05]), forward_kl=np.array([0.05, 1.0])
    )
    for name in ("excess_loss", "forward_kl"):
        seen: list[np.ndarray] = []

        def look(moved: DomainLosses, name: str = name, seen: list[np.ndarray] = seen) -> np.ndarray:
            seen.append(getattr(moved, name))
            return np.full(2, 0.5)

        weight_errors(look, losses)
        assert 0.0 == min(column.min() for column in seen)
        assert 1.1 == pytest.approx(max(column.max() for column in seen))


def test_a_gap_without_an_error_is_one_line() -> None:
    """At the first measurement, not after an interval; never taken for no error or for an infinite one."""
    single = replace(gaps(1.0, 2.0, error=0.1), gap_error=np.array([0.1, np.nan]))
    with pytest.raises(ConfigError) as error:
        reweight("ddk", single, guards=True)
    assert "guards.evidence needs the standard error of every gap, and b has none" in str(error.value)
    assert "\n" not in str(error.value)
    _, state = reweight("ddk", gaps(1.0, 2.0, error=0.1), guards=True)
    with pytest.raises(ConfigError, match="and b has none"):
        reweight("ddk", single, state, guards=True)
    assert reweight("ddk", single, guards={"evidence": 0.0})[0] == {"a": 0.5, "b": 0.5}


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"floor": 0.4},
            "guards.floor = 0.4 for each of 3 domains is 1.2, more than the whole mixture; use at",
        ),
        ({"cap": 0.3}, "guards.cap = 0.3 for each of 3 domains is 0.9, less than the whole mixture; use at"),
        ({"floor": 0.2, "cap": 0.1}, "floor = 0.2 is above cap = 0.1; lower it or raise the cap"),
        ({"flor": 0.2}, "unknown key flor in guards; did you mean 'floor'?"),
        ({"floor": -0.1}, "floor = -0.1 in guards; input should be greater than or equal to 0."),
        ({"max_move": 0}, "max_move = 0 in guards; input should be greater than 0."),
        ({"evidence": math.nan}, "evidence = nan in guards; input should be"),
        ({"evidence": math.inf}, "evidence = inf in guards; input should be a finite number."),
        ({"warmup_intervals": 1.5}, "warmup_intervals = 1.5 in guards; input should be a valid integer"),
    ],
)
def test_wrong_guards_are_one_line(wrong: Any, message: str) -> None:
    """What, the value, the rule and the way out."""
    with pytest.raises(ConfigError) as error:
        reweight("ddk", gaps(1.0, 2.0, 3.0), guards=wrong)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_word_for_guards_is_on_or_off() -> None:
    """Anything else is named with the words that there are."""
    assert guarded(Ddk(), "on") == guarded(Ddk(), True) != guarded(Ddk(), "off") == Ddk()
    with pytest.raises(
        ConfigError, match=r"^guards = 'maybe'; give on, off or settings such as {cap: 0.4}.$"
    ):
        guarded(Ddk(), "maybe")


def test_bounds_that_just_fit_are_fine() -> None:
    """Ten floors of 0.1, or caps, are the uniform mixture, whatever rounding says."""
    for count, bound in ((10, 0.1), (49, 1 / 49), (3, 1 / 3)):
        for name in ("floor", "cap"):
            measured = DomainLosses.from_means({f"d{i:02}": float(i) for i in range(count)})
            found = steps(guarded(Softmax(), held(**{name: bound})), measured, measured)[1]
            assert np.full(count, 1 / count) == pytest.approx(found)


def test_guards_around_guards_are_refused() -> None:
    """One of them would not see what the other does."""
    with pytest.raises(ConfigError, match="policy Ddk has guards already; give them once"):
        guarded(guarded(Ddk(), True), True)


def test_a_policy_inside_guards_is_held_to_its_promises() -> None:
    """Its mistakes are reported under its own name."""

    class Negative(Softmax):
        def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
            return {"mixture_weights": [1.5, -0.5, 0.0]}

    with pytest.raises(ConfigError, match="policy Negative gave mixture weights"):
        steps(guarded(Negative(), True), gaps(1.0, 2.0, 3.0), gaps(1.0, 2.0, 3.0))


def test_no_more_updates_are_asked_for_than_evidence_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """2N + 1 in all; one where evidence is off or the mixture warms up."""
    calls: list[int] = []

    class Counting(Softmax):
        def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
            calls.append(1)
            return super().update(state, losses)

    for limits, expected in (
        (held(evidence=1.0), 7),
        (held(cap=0.9), 1),
        (held(evidence=1.0, warmup_intervals=1), 1),
    ):
        calls.clear()
        steps(guarded(Counting(), limits), gaps(1.0, 2.0, 3.0), gaps(1.0, 2.0, 3.0))
        assert expected == len(calls)
