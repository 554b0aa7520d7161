"""How the rows of one step are shared: by hand, against a literal version, and the bounds for any batch."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix import apportion as module
from ddkmix.apportion import ROW, apportion, earliest_deadlines, keeps_bound, largest_credits, share_out

Apportion = Callable[[Sequence[int], Sequence[int], int], list[int]]
HALF, THIRD = ROW // 2, ROW // 3


def exactly(*weights: float) -> list[int]:
    """Weights in units of 2^-32."""
    return list(share_out(ROW, [Fraction(weight) for weight in weights]))


def owed_after(credit: Sequence[int], weights: Sequence[int], rows: int) -> list[int]:
    """Credits with the share of a step added."""
    return [c + rows * w for c, w in zip(credit, weights, strict=True)]


# --- by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "weights", "rows"),
    [
        ([7], [1], 7),
        ([2, 1, 1], [2, 1, 1], 4),
        ([1, 0], [1, 1], 1),
        ([2, 1], [1, 1], 3),
        ([1, 1, 1, 0], [1, 1, 1, 1], 3),
        ([3, 0, 3], [1, 0, 1], 6),
        ([1, 0], [1000, 1], 1),
        ([1000, 1], [1000, 1], 1001),
        ([1000000, 0], [1, 0], 1000000),
    ],
)
def test_first_steps_by_hand(expected: list[int], weights: list[float], rows: int) -> None:
    """From credits of zero: whole shares are served, and of equal remainders the first."""
    exact = exactly(*weights)
    assert expected == apportion(owed_after([0] * len(exact), exact, rows), exact, rows)


def test_a_row_may_come_early_where_its_deadline_is_the_nearest() -> None:
    """Three domains: a row may be served from 1/4 of it on.

    Owed 0.3 at weight 0.1, the deadline at 3/4 is 4.5 rows away; owed 0.2 is too early; 0.5 at weight 0.8
    has its deadline in 0.3125 rows and wins although nobody is owed less of those who may.
    """
    owed = [int(0.3 * ROW), int(0.2 * ROW), ROW - int(0.3 * ROW) - int(0.2 * ROW)]
    assert [0, 0, 1] == earliest_deadlines(owed, exactly(1, 1, 8), 1, range(3))
    assert [1, 0, 0] == earliest_deadlines(
        [int(0.7 * ROW), 0, ROW - int(0.7 * ROW)], exactly(8, 1, 1), 1, range(3)
    )


def test_little_weight_can_wait() -> None:
    """a is owed 0.6 at weight 0.01 (15 rows to its deadline), b 0.4 at 0.9 (0.39 rows): b comes first."""
    owed, weights = [int(0.6 * ROW), ROW - int(0.6 * ROW), 0], exactly(1, 90, 9)
    assert [0, 1, 0] == apportion(owed, weights, 1)
    assert [1, 0, 0] == largest_credits(owed, 1, range(3))


def test_nothing_may_be_served_before_its_time() -> None:
    """Two domains owed half a row each may serve from 1/2 on; a hair less and neither may."""
    assert [1, 0] == earliest_deadlines([HALF, HALF], [HALF, HALF], 1, range(2))
    assert earliest_deadlines([HALF - 1, HALF - 1], [HALF, HALF], 1, range(2)) is None


def test_a_domain_without_weight_waits_for_the_second_rule() -> None:
    """It has no deadline; it is served when all others together are owed too little."""
    owed = [ROW + HALF, HALF, ROW]
    assert [1, 0, 1] == largest_credits(owed, 2, range(3))
    assert [2, 0, 1] == apportion(owed, [0, HALF, HALF], 3)
    assert earliest_deadlines(owed, [0, HALF, HALF], 3, range(3)) is None


def test_largest_credits_by_hand() -> None:
    """Owed 2.5, 1.25 and -0.75: a, a, b."""
    owed = [ROW * 5 // 2, ROW * 5 // 4, -ROW * 3 // 4]
    assert [2, 1, 0] == largest_credits(owed, 3, range(3))
    assert [3, 0, 0] == largest_credits([ROW * 5 // 2, HALF, 0], 3, range(3))


def test_equal_credits_go_to_the_first() -> None:
    """In both rules, and when a row is taken back it is the last one's."""
    assert [1, 1, 0, 0] == largest_credits([HALF] * 4, 2, range(4))
    assert [1, 1, 0, 0] == earliest_deadlines([HALF] * 4, [ROW // 4] * 4, 2, range(4))


def test_only_candidates_serve() -> None:
    """b is owed everything but may not serve; a and c share what nobody owes them."""
    assert [2, 0, 1] == apportion([0, 3 * ROW, 0], exactly(1, 1, 1), 3, [0, 2])
    assert [0, 0, 3] == apportion([0, 3 * ROW, 0], exactly(1, 1, 1), 3, [2])


@pytest.mark.parametrize(
    ("expected", "credit"),
    [
        (True, [ROW, -ROW]),
        (True, [ROW * 3 // 2, -ROW * 3 // 2]),
        (False, [ROW * 3 // 2 + 1, -ROW * 3 // 2 - 1]),
        # three domains: one within 1 + 1/2 + 1/3, two within 2 (1 + 1/3)
        (True, [ROW * 11 // 6, 0, -ROW * 11 // 6]),
        (False, [ROW * 11 // 6 + 1, 0, -ROW * 11 // 6 - 1]),
        (True, [ROW * 4 // 3, ROW * 4 // 3, -ROW * 8 // 3]),
        (False, [ROW * 4 // 3 + 2, ROW * 4 // 3, -ROW * 8 // 3]),
        (False, [ROW * 11 // 6, ROW, -ROW * 17 // 6]),
    ],
)
def test_the_joint_bound_by_hand(expected: bool, credit: list[int]) -> None:
    """k domains are together owed at most k (1 + 1/(k+1) + ... + 1/N) rows."""
    assert expected == keeps_bound(credit)
    assert expected == keeps_bound(credit[::-1])


# --- against a literal version ----------------------------------------------------------------------


def literal_deadlines(
    owed: Sequence[int], weights: Sequence[int], rows: int, candidates: Sequence[int]
) -> list[int] | None:
    """The first rule as its text says it: job after job, with fractions and no heap."""
    early = Fraction(ROW // (2 * len(owed) - 2), ROW)
    counts = [0] * len(owed)
    for _ in range(rows):
        due = {
            i: (1 - early - left) / Fraction(weights[i], ROW)
            for i in candidates
            if weights[i] and (left := Fraction(owed[i], ROW) - counts[i]) >= early
        }
        if not due:
            return None
        counts[min(due, key=lambda i: (due[i], i))] += 1
    return counts


def literal_credits(owed: Sequence[int], rows: int, candidates: Sequence[int]) -> list[int]:
    """The second rule: each row to whoever is owed most at that moment."""
    counts = [0] * len(owed)
    for _ in range(rows):
        counts[max(candidates, key=lambda i: (owed[i] - counts[i] * ROW, -i))] += 1
    return counts


def literal_keeps_bound(credit: Sequence[int]) -> bool:
    """Every set of k largest credits, with fractions."""
    n, ranked = len(credit), sorted(credit, reverse=True)
    sums = list(accumulate(ranked))
    return all(
        Fraction(sums[k - 1], ROW) <= k * (1 + sum(Fraction(1, i) for i in range(k + 1, n + 1)))
        for k in range(1, n)
    )


def literal_apportion(
    owed: Sequence[int], weights: Sequence[int], rows: int, candidates: Sequence[int] | None = None
) -> list[int]:
    """Both rules."""
    chosen = range(len(owed)) if candidates is None else candidates
    if len(chosen) == 1:
        return [rows * (i == chosen[0]) for i in range(len(owed))]
    timely = literal_deadlines(owed, weights, rows, chosen)
    if timely and literal_keeps_bound([x - n * ROW for x, n in zip(owed, timely, strict=True)]):
        return timely
    return literal_credits(owed, rows, chosen)


weight = st.one_of(
    st.just(0), st.just(1), st.integers(1, 10), st.integers(1, ROW), st.just(ROW), st.just(THIRD)
)


Step = tuple[list[int], list[int], int]


@st.composite
def steps(draw: Any) -> Step:
    """Some credits (up to a few rows each), raw weights, and the rows of a step."""
    size = draw(st.integers(1, 7))
    raw = draw(st.lists(weight, min_size=size, max_size=size).filter(any))
    credits_of_others = st.lists(st.integers(-4 * ROW, 4 * ROW) | st.just(0), min_size=size - 1)
    return draw(credits_of_others)[: size - 1], raw, draw(st.integers(1, 25))


def prepared(step: Step) -> Step:
    """Credits that sum to 0 and weights that sum to 2^32."""
    credit, raw, rows = step
    credit = credit + [0] * (len(raw) - 1 - len(credit))
    return [*credit, -sum(credit)], list(share_out(ROW, raw)), rows


@settings(deadline=None, derandomize=True, max_examples=150)
@given(steps())
def test_a_step_is_the_literal_one(step: Step) -> None:
    """Whatever is owed: the same rows as one job after the other, and exactly as many as asked for."""
    credit, weights, rows = prepared(step)
    owed = owed_after(credit, weights, rows)
    counts = apportion(owed, weights, rows)
    assert rows == sum(counts)
    assert min(counts) >= 0
    assert literal_apportion(owed, weights, rows) == counts


@settings(deadline=None, derandomize=True, max_examples=200)
@given(steps())
def test_each_rule_is_the_literal_one(step: Step) -> None:
    """Also where the other rule decided."""
    credit, weights, rows = prepared(step)
    owed, everybody = owed_after(credit, weights, rows), range(len(credit))
    assert literal_credits(owed, rows, everybody) == largest_credits(owed, rows, everybody)
    if len(credit) > 1:
        assert literal_deadlines(owed, weights, rows, everybody) == earliest_deadlines(
            owed, weights, rows, everybody
        )
        assert literal_keeps_bound(credit) == keeps_bound(credit)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(step=steps(), data=st.data())
def test_only_candidates_serve_and_all_rows_are_served(step: Step, data: st.DataObject) -> None:
    """For any choice of candidates, owed or not."""
    credit, weights, rows = prepared(step)
    chosen = data.draw(st.lists(st.integers(0, len(credit) - 1), min_size=1, unique=True))
    owed = owed_after(credit, weights, rows)
    counts = apportion(owed, weights, rows, chosen)
    assert rows == sum(counts)
    assert all(counts[i] == 0 for i in range(len(credit)) if i not in chosen)
    assert literal_apportion(owed, weights, rows, chosen) == counts


@pytest.mark.parametrize("sabotage", ["keeps_bound", "_FINE"])
def test_the_literal_version_notices_other_rules(monkeypatch: pytest.MonkeyPatch, sabotage: str) -> None:
    """Without the joint bound, or with deadlines in whole rows, some step comes out differently."""
    monkeypatch.setattr(module, sabotage, {"keeps_bound": lambda _: True, "_FINE": 0}[sabotage])
    generator = np.random.default_rng(0)
    different = 0
    for _ in range(300):
        weights = list(share_out(ROW, generator.integers(1, 1000, 5).tolist()))
        credit = generator.integers(-2 * ROW, 3 * ROW, 4).tolist()
        owed = owed_after([*credit, -sum(credit)], weights, 6)
        different += literal_apportion(owed, weights, 6) != apportion(owed, weights, 6)
    assert different > 0


# --- the bounds at step boundaries ------------------------------------------------------------------


def harmonic(n: int) -> Fraction:
    """H_n = 1 + 1/2 + ... + 1/n."""
    return sum((Fraction(1, k) for k in range(1, n + 1)), Fraction(0))


def follow(
    sequence: Sequence[tuple[Sequence[int], int]], apportion: Apportion = apportion
) -> list[tuple[int, ...]]:
    """The credits after each of some steps, each with its weights and its rows."""
    credit, found = [0] * len(sequence[0][0]), []
    for weights, rows in sequence:
        owed = owed_after(credit, weights, rows)
        credit = [x - n * ROW for x, n in zip(owed, apportion(owed, weights, rows), strict=True)]
        found.append(tuple(credit))
    return found


def check_within_one_row(
    weights: Sequence[int], sizes: Sequence[int], apportion: Apportion = apportion
) -> None:
    """Constant weights: every credit stays inside (-1, 1) and they cancel."""
    for credit in follow([(weights, rows) for rows in sizes], apportion):
        assert sum(credit) == 0
        assert max(map(abs, credit)) < ROW


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    raw=st.lists(weight, min_size=1, max_size=9).filter(any),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40),
)
def test_constant_weights_are_followed_within_one_row(raw: list[int], sizes: list[int]) -> None:
    """At the end of every step, also when no two steps have the same size."""
    check_within_one_row(share_out(ROW, raw), sizes)


@pytest.mark.parametrize(
    ("num_domains", "sizes"),
    [(2, [1] * 400), (40, [7] * 60), (300, [1] * 40), (300, [64] * 20), (300, [5000, 1, 3, 12345])],
)
@pytest.mark.parametrize("concentration", [0.05, 1.0, 100.0])
def test_many_domains_and_large_batches(num_domains: int, sizes: list[int], concentration: float) -> None:
    """Skewed, random and nearly equal weights."""
    raw = np.random.default_rng(num_domains).dirichlet(np.full(num_domains, concentration))
    check_within_one_row(share_out(ROW, [Fraction(w) for w in raw.tolist()]), sizes)


def test_tiny_weights_are_served_in_time() -> None:
    """1e-9 of a million rows a step: nothing for hundreds of steps, one row before the thousandth."""
    weights, sizes = exactly(1, 1e-9, 1e-9), [10**6] * 1100
    check_within_one_row(weights, sizes)
    owed = [1100 * 10**6 * w for w in weights]
    last = follow([(weights, rows) for rows in sizes])[-1]
    assert [1, 1] == [(x - c) // ROW for x, c in zip(owed[1:], last[1:], strict=True)]


def test_the_work_does_not_depend_on_the_batch() -> None:
    """A batch of 10^15 rows is shared at once."""
    counts = apportion(owed_after([0, 0, 0], exactly(5, 3, 2), 10**15), exactly(5, 3, 2), 10**15)
    assert 10**15 == sum(counts)
    assert [0.5, 0.3, 0.2] == pytest.approx([n / 10**15 for n in counts], abs=1e-9)


CROWD = exactly(4, 4, 4, 1, 1, 1, 1, 1)
"""Three large domains and five small ones that all become due together; found by a search."""


def by_credit(owed: Sequence[int], _: Sequence[int], rows: int) -> list[int]:
    """A saboteur: the second rule alone."""
    return largest_credits(owed, rows, range(len(owed)))


def always_early(owed: Sequence[int], weights: Sequence[int], rows: int) -> list[int]:
    """A saboteur: nearest deadlines without release times."""
    counts = [0] * len(owed)
    for _ in range(rows):
        due = {i: Fraction(ROW - owed[i] + counts[i] * ROW, w) for i, w in enumerate(weights) if w}
        counts[min(due, key=lambda i: (due[i], i))] += 1
    return counts


@pytest.mark.parametrize("sabotaged", [by_credit, always_early])
def test_the_check_of_one_row_notices_other_rules(sabotaged: Apportion) -> None:
    """Largest credit goes past one row on the crowd; deadlines alone serve a lone large domain too often."""
    cases = [(CROWD, [1] * 34), (exactly(98, 1, 1), [1] * 300)]
    for weights, sizes in cases:
        check_within_one_row(weights, sizes)
    with pytest.raises(AssertionError):
        for weights, sizes in cases:
            check_within_one_row(weights, sizes, sabotaged)


def check_joint_bound(
    sequence: Sequence[tuple[Sequence[int], int]], apportion: Apportion = apportion
) -> None:
    """Any weights: the joint bound holds after each step, so no credit passes H_N; none falls to -1."""
    for credit in follow(sequence, apportion):
        assert sum(credit) == 0
        assert literal_keeps_bound(credit)
        assert Fraction(max(credit), ROW) <= harmonic(len(credit))
        assert min(credit) > -ROW


@settings(deadline=None, derandomize=True, max_examples=80)
@given(data=st.data(), num_domains=st.integers(2, 8))
def test_no_sequence_of_weights_and_batches_breaks_the_joint_bound(
    data: st.DataObject, num_domains: int
) -> None:
    """Zeros, trifles, one domain alone; steps of one row and of many."""
    raw = st.lists(weight, min_size=num_domains, max_size=num_domains).filter(any)
    drawn = data.draw(st.lists(st.tuples(raw, st.integers(1, 12)), min_size=1, max_size=30))
    check_joint_bound([(share_out(ROW, weights), rows) for weights, rows in drawn])


@pytest.mark.parametrize("batch_rows", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_an_adversary_that_sees_the_credits_does_not_break_it(seed: int, batch_rows: int) -> None:
    """It gives weight to a few of the largest or the smallest credits, and a trifle to some others."""
    generator, credit = np.random.default_rng(seed), [0] * 9
    for _ in range(150):
        ranked = np.argsort(credit)[:: generator.choice([1, -1])]
        raw = np.where(generator.random(9) < 0.5, 0.0, 1e-6)
        raw[ranked[: generator.integers(1, 6)]] = generator.random() + 1e-3
        weights = share_out(ROW, [Fraction(w) for w in raw.tolist()])
        owed = owed_after(credit, weights, batch_rows)
        credit = [x - n * ROW for x, n in zip(owed, apportion(owed, weights, batch_rows), strict=True)]
        assert literal_keeps_bound(credit)
        assert min(credit) > -ROW


@pytest.mark.parametrize("num_domains", [2, 3, 10, 50])
def test_dropping_each_domain_as_it_is_served_reaches_h_n_minus_1(num_domains: int) -> None:
    """The adversary that no rule escapes: whoever is left last is owed 1/2 + ... + 1/N rows."""
    credit, waiting = [0] * num_domains, set(range(num_domains))
    while len(waiting) > 1:
        weights = share_out(ROW, [int(i in waiting) for i in range(num_domains)])
        owed = owed_after(credit, weights, 1)
        counts = apportion(owed, weights, 1)
        credit = [x - n * ROW for x, n in zip(owed, counts, strict=True)]
        waiting.discard(counts.index(1))
    assert float(harmonic(num_domains) - 1) == pytest.approx(max(credit) / ROW, abs=1e-6)


def squeezed() -> list[tuple[Sequence[int], int]]:
    """Domains are dropped as they are served until three of ten wait; one of them then gets all."""
    sequence, credit = [], [0] * 10
    for row in range(10):
        raw = [Fraction(int(c >= 0)) for c in credit]
        if row >= 7:
            left = [i for i, c in enumerate(credit) if c >= 0]
            raw = [Fraction(1, 10**6) * (c >= 0) for c in credit]
            raw[left[-1]] = Fraction(1)
        weights = share_out(ROW, raw)
        sequence.append((weights, 1))
        credit = list(follow(sequence, without_joint_bound)[-1])
    return sequence


def without_joint_bound(owed: Sequence[int], weights: Sequence[int], rows: int) -> list[int]:
    """A saboteur: the first rule wherever it can be followed."""
    timely = earliest_deadlines(owed, weights, rows, range(len(owed)))
    return timely or largest_credits(owed, rows, range(len(owed)))


def test_the_joint_check_notices_that_deadlines_alone_are_not_enough() -> None:
    """Two domains with a trifle of weight are urgent for ever while the third waits for its rows."""
    sequence = squeezed()
    check_joint_bound(sequence)
    with pytest.raises(AssertionError):
        check_joint_bound(sequence, without_joint_bound)


# --- share_out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "total", "weights"),
    [
        ((10,), 10, [3]),
        ((5, 3, 2), 10, [5, 3, 2]),
        ((4, 3, 3), 10, [1, 1, 1]),
        ((9, 1, 0), 10, [1000, 1, 0]),
        ((8, 1, 1), 10, [1000, 1, 1]),
        ((1, 1, 1), 3, [100, 1, 1]),
        ((3, 7), 10, [Fraction(1, 3), Fraction(2, 3)]),
    ],
)
def test_share_out_by_hand(expected: tuple[int, ...], total: int, weights: list[Any]) -> None:
    """Largest remainders get what is left, and a positive weight is never rounded to nothing."""
    assert expected == share_out(total, weights)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(raw=st.lists(weight, min_size=1, max_size=12).filter(any), total=st.integers(144, 10**12))
def test_shares_sum_to_the_total(raw: list[int], total: int) -> None:
    """Zero exactly where the weight is zero; each within one of its exact share unless lifted to 1."""
    parts, lifted = share_out(total, raw), sum(0 < Fraction(total * w, sum(raw)) < 1 for w in raw)
    assert total == sum(parts)
    assert [w > 0 for w in raw] == [n > 0 for n in parts]
    for w, n in zip(raw, parts, strict=True):
        assert abs(n - Fraction(total * w, sum(raw))) < 1 + lifted
