"""ADO against the data policy of arXiv 2410.11820 as its code has it, written out literally."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.policies import Ado
from ddkmix.policies.power_law import fit_power_laws
from tests.conftest import domain_losses
from tests.policies.family import full_losses

SETTINGS = settings(deadline=None, derandomize=True, max_examples=6)


def gaps_at(step, exponents):
    """Losses over a teacher at 2 nats: 1 + 2 step^-exponent nats each; what a model would show."""
    return [3.0 * max(step, 0.5) ** -exponent for exponent in exponents]


def drive(policy, served, exponents, natural):
    """The states of a run in which each interval served these rows."""
    total = np.zeros(len(natural), dtype=int)
    state = policy.init(full_losses(gaps_at(0, exponents), rows=total.tolist()), np.array(natural))
    found = [state]
    for step, rows in enumerate(served, start=1):
        total = total + np.array(rows)
        losses = full_losses(gaps_at(step, exponents), rows=total.tolist())
        found.append(policy.update(found[-1], losses))
    return found


def published(served, exponents, prior, *, own, least=0.01):
    """The weights after each update; laws are fitted by ours, which test_power_law.py holds to theirs."""
    prior = np.array(prior)
    p_avg, counts, losses, found = prior, [], [], [prior]
    for t, rows in enumerate(served, start=1):
        h = np.array(rows) / np.sum(rows)
        done = (counts[-1] if counts else 0) + np.array(rows)
        counts.append(done)
        losses.append([2.0 + gap for gap in gaps_at(t, exponents)])
        if t < 4:
            found.append(prior)
            continue
        n = np.array(counts) if own else np.sum(counts, axis=1, keepdims=True) * np.ones(len(prior))
        laws = fit_power_laws(np.maximum(n, 1).astype(float), np.array(losses))
        irreducible, exponent = laws.floor, np.maximum(laws.exponent, 0.05)
        current = laws.floor + laws.scale
        slope = exponent * (current - irreducible) / n[-1]
        rho = slope * prior * h**0.5
        rho = rho / rho.sum()
        rho = np.maximum(rho, least)
        rho = rho / rho.sum()
        found.append(0.9 * p_avg + 0.1 * rho)
        p_avg = (1 - 1 / (t + 1)) * p_avg + 1 / (t + 1) * rho
    return found


def check(policy, served, exponents, prior, *, own=False):
    """The policy gives what the code's rule gives, after every update."""
    expected = published(served, exponents, prior, own=own)
    for literal, state in zip(expected, drive(policy, served, exponents, prior), strict=True):
        assert literal.tolist() == pytest.approx(state["mixture_weights"], rel=1e-9)


@pytest.mark.parametrize("own", [False, True])
def test_weights_are_the_rule(own):
    """Over up to seven updates with rows as they come, counting rows of all domains or of each."""

    @SETTINGS
    @given(
        st.lists(st.lists(st.integers(1, 500), min_size=3, max_size=3), min_size=4, max_size=7),
        st.lists(st.floats(0.05, 0.8), min_size=3, max_size=3),
    )
    def compare(served, exponents):
        policy = Ado(rows="own") if own else Ado()
        check(policy, served, exponents, [0.5, 0.3, 0.2], own=own)

    compare()


SERVED, EXPONENTS, PRIOR = [[100, 60, 40]] * 6, [0.1, 0.4, 0.7], [0.5, 0.3, 0.2]


@pytest.mark.parametrize(
    "policy",
    [Ado(prior="uniform"), Ado(rows="own"), Ado(newest=0.5), Ado(min_share=0.2)],
    ids=["prior", "rows", "newest", "least"],
)
def test_another_setting_would_be_noticed(policy):
    """The comparison fails for each of the settings that the rule has."""
    served = [[100, 60, 40], [10, 100, 90], [100, 50, 50], [20, 20, 160], [100, 50, 50]]
    check(Ado(), served, EXPONENTS, PRIOR)
    with pytest.raises(AssertionError):
        check(policy, served, EXPONENTS, PRIOR)


def test_a_domain_that_is_still_falling_gets_more():
    """Two domains alike but for their curves: the one that falls faster draws rows, at most 0.1 at once."""
    found = drive(Ado(), [[100, 100]] * 6, [0.0, 0.5], [0.5, 0.5])
    assert [0.5, 0.5] == found[3]["mixture_weights"]
    shares = [state["mixture_weights"][1] for state in found[4:]]
    assert 0.5 < shares[0] <= 0.55
    assert shares == sorted(shares)


def test_the_recent_share_takes_credit():
    """A domain that was hardly served gets less of the credit for the loss that fell: sqrt(h)."""
    evenly = drive(Ado(), [[100, 100]] * 4, [0.4, 0.4], [0.5, 0.5])[-1]
    hardly = drive(Ado(), [[100, 100]] * 3 + [[1, 199]], [0.4, 0.4], [0.5, 0.5])[-1]
    assert [0.5, 0.5] == pytest.approx(evenly["mixture_weights"])
    assert hardly["mixture_weights"][0] < 0.47


def test_where_nothing_falls_the_prior_stays():
    """Flat losses have no slope at all, and no reason to move."""
    found = drive(Ado(), [[100, 100]] * 6, [0.0, 0.0], [0.7, 0.3])
    assert [0.7, 0.3] == pytest.approx(found[-1]["mixture_weights"])


def test_an_interval_without_rows_changes_no_share():
    """Measured twice at one step (a resumed run may): the credit of the last interval stands."""
    found = drive(Ado(), [[100, 300], [0, 0]], [0.1, 0.2], [0.5, 0.5])
    assert [0.25, 0.75] == found[1]["recent"] == found[2]["recent"]


def test_a_run_that_was_joined_late_counts_from_there():
    """Rows served before `init` are of no interval of ours; the share is of what came since."""
    policy = Ado()
    state = policy.init(full_losses([1.0, 1.0], rows=[900, 100]), np.array([0.5, 0.5]))
    state = policy.update(state, full_losses([1.0, 1.0], rows=[1000, 200]))
    assert [0.5, 0.5] == state["recent"]
    assert [[1200.0]] == state["rows"]


def test_old_points_are_thinned_and_the_first_and_the_newest_stay():
    """Twenty evaluations, at most eight kept, in order."""
    found = drive(Ado(most_points=8), [[10, 10]] * 20, [0.2, 0.4], [0.5, 0.5])[-1]
    totals = [point[0] for point in found["rows"]]
    assert 4 < len(totals) <= 8
    assert len(totals) == len(found["losses"])
    assert totals == sorted(totals)
    assert (20.0, 400.0) == (totals[0], totals[-1])


def test_with_more_than_a_hundred_domains_the_floor_is_uniform():
    """0.01 each is more than there is; the code's own clip would turn negative at 200."""
    count = 120
    names = [f"d{i:03d}" for i in range(count)]
    policy, uniform = Ado(), np.full(count, 1 / count)
    rows = np.zeros(count, dtype=int)
    losses = domain_losses([1.0] * count, domains=names)
    state = policy.init(replace(losses, rows_served=rows), uniform)
    for step in range(1, 6):
        falling = domain_losses([3.0 * step ** -(0.005 * i) for i in range(count)], domains=names)
        state = policy.update(state, replace(falling, rows_served=rows + 10 * step))
    assert 1.0 == pytest.approx(sum(state["mixture_weights"]))
    assert min(state["mixture_weights"]) > 0.9 / count


def test_exponents_below_their_least_count_as_the_least():
    """Losses that fall by 0.02 and 0.03 have laws of those exponents; both slopes are taken with 0.05."""
    served = [[100, 100]] * 6
    check(Ado(), served, [0.02, 0.03], [0.5, 0.5])
    total = np.cumsum(np.array(served).sum(axis=1)).astype(float)[:, None] * np.ones(2)
    losses = np.array([[2.0 + gap for gap in gaps_at(step, [0.02, 0.03])] for step in range(1, 7)])
    assert (fit_power_laws(total, losses).exponent < 0.05).any()
