"""Standard errors that are right: how often the interval of a gap holds the true gap.

A domain is a population of rows whose tokens are correlated, skewed, and easier or harder with their row, and
whose lengths differ and say something about the gap. Held-out sets are drawn from it thousands of times.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ddkmix.errors import ConfigError
from ddkmix.evaluator import _effective_rows, _mean_and_error
from ddkmix.types import DomainLosses

ROWS, TOKENS, DRAWS = 20_000, 64, 3_000


@cache
def population(lengths: str) -> tuple[np.ndarray, np.ndarray]:
    """(gap summed over the row, tokens) of every row of a domain."""
    generator = np.random.default_rng(0)
    counts = {
        "equal": lambda: np.full(ROWS, TOKENS),
        "uneven": lambda: generator.integers(4, TOKENS + 1, ROWS),
        "long tail": lambda: np.minimum(np.ceil(6 * generator.pareto(1.2, ROWS)) + 2, TOKENS).astype(int),
    }[lengths]()
    noise = generator.gamma(2.0, 0.5, (ROWS, TOKENS)) - 1
    tokens = np.empty_like(noise)
    tokens[:, 0] = noise[:, 0]
    for i in range(1, TOKENS):  # neighbours are alike: correlation 0.7
        tokens[:, i] = 0.7 * tokens[:, i - 1] + np.sqrt(1 - 0.7**2) * noise[:, i]
    hardness = 0.6 * generator.gamma(2.0, 0.5, ROWS) + 0.3 * counts / TOKENS
    gaps = 1.5 + hardness[:, None] + 1.2 * tokens
    return (gaps * (np.arange(TOKENS) < counts[:, None])).sum(axis=1), counts


Measure = Callable[[np.ndarray, np.ndarray], tuple[float, float]]


def coverage(lengths: str, rows: int, measure: Measure = _mean_and_error, *, t: bool = True) -> float:
    """Share of held-out sets of so many rows whose 95 % interval holds the gap of the population."""
    sums, counts = population(lengths)
    truth = sums.sum() / counts.sum()
    drawn = np.random.default_rng(1).integers(0, ROWS, (DRAWS, rows))
    found = np.array([measure(sums[i], counts[i]) for i in drawn])
    losses = DomainLosses.from_means({f"{i:06}": mean for i, mean in enumerate(found[:, 0])})
    losses = replace(losses, gap_error=found[:, 1])
    if t:
        losses = replace(losses, effective_rows=np.array([_effective_rows(counts[i]) for i in drawn]))
    low, high = losses.gap_interval()
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        *(("equal", rows) for rows in (4, 8, 16, 64, 500)),
        *(("uneven", rows) for rows in (4, 8, 16, 64, 500)),
        *(("long tail", rows) for rows in (64, 128, 500)),
    ],
)
def test_the_interval_covers_the_gap(lengths: str, rows: int) -> None:
    """Between 93 and 97 % of the time: from 4 rows on, and from 64 where few rows hold most of the tokens."""
    assert 0.93 <= coverage(lengths, rows) <= 0.97


def test_few_rows_with_most_of_the_tokens_cover_less() -> None:
    """Fewer than 64 such rows do not reach it: about 92 %."""
    assert 0.91 <= coverage("long tail", 16) < 0.93


@pytest.mark.parametrize(("rows", "enough"), [(4, False), (16, False), (64, True), (500, True)])
def test_the_normal_quantile_is_enough_for_64_rows(rows: int, enough: bool) -> None:
    """And too narrow below, which is why intervals are formed with Student's t."""
    assert enough == (coverage("uneven", rows, t=False) >= 0.93)


def over_tokens(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Sabotage: tokens taken for independent."""
    mean, error = _mean_and_error(sums, counts)
    return mean, error / np.sqrt(counts.mean())


def mean_of_means(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Sabotage: every row counts alike, whatever its length."""
    means = sums / counts
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


def numerator_alone(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Sabotage: the lengths taken for constants, so that long rows look like hard ones."""
    mean, _ = _mean_and_error(sums, counts)
    return mean, float(np.sqrt(len(sums)) * sums.std(ddof=1) / counts.sum())


@pytest.mark.parametrize("broken", [over_tokens, mean_of_means, numerator_alone])
def test_a_wrong_estimator_would_be_noticed(broken: Measure) -> None:
    """Its intervals cover too little or too much."""
    assert not 0.93 <= coverage("uneven", 500, broken) <= 0.97


def test_an_interval_by_hand() -> None:
    """Student's t with 9 degrees of freedom: 2.262; without a count of rows the normal 1.960."""
    losses = replace(DomainLosses.from_means({"a": 1.0}), gap_error=np.array([0.1]))
    assert (0.804, 1.196) == tuple(pytest.approx(end[0], abs=1e-4) for end in losses.gap_interval())
    low, high = replace(losses, effective_rows=np.array([10.0])).gap_interval()
    assert (0.7738, 1.2262) == (pytest.approx(low[0], abs=1e-4), pytest.approx(high[0], abs=1e-4))
    narrow = replace(losses, effective_rows=np.array([10.0])).gap_interval(0.5)
    assert 1 - 0.0703 == pytest.approx(narrow[0][0], abs=1e-4)


def test_one_row_has_no_interval() -> None:
    """nan at both ends, without a warning."""
    losses = replace(DomainLosses.from_means({"a": 1.0}), effective_rows=np.array([1.0]))
    assert np.isnan(losses.gap_interval()).all()


@pytest.mark.parametrize("share", [0.0, 1.0, 95.0, float("nan")])
def test_a_share_that_is_none_is_one_line(share: float) -> None:
    """95 is no share."""
    with pytest.raises(ConfigError, match=r"an interval covers a share between 0 and 1, such as 0.95"):
        DomainLosses.from_means({"a": 1.0}).gap_interval(share)


def test_effective_rows_by_hand() -> None:
    """Equal rows count fully; of 3 and 1 tokens (3 + 1)^2 / (9 + 1) = 1.6."""
    assert 5.0 == _effective_rows(np.full(5, 64))
    assert 1.6 == _effective_rows(np.array([3, 1]))
