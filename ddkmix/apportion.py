"""How many rows of a step each domain serves, in integers.

A domain with mixture weight w is owed w rows for each row of the batch; its *credit* is what it is owed minus
what it was served. A step hands out all its rows at once, by one of two rules:

- Earliest deadline first. A domain may serve a row while it is owed at least 1/(2N-2) of it, and must
  before its credit passes 1 - 1/(2N-2) under the present weights; rows go to the nearest deadlines. While
  weights are constant every credit stays inside (-1, 1): Tijdeman (The chairman assignment problem, 1980)
  proves that these windows can be kept one row at a time, a step is a relaxation of its rows, and earliest
  deadline first keeps whatever windows can be kept.
- But if that would leave some k domains with more than k(1 + 1/(k+1) + ... + 1/N) rows of credit together,
  rows go to the largest credits. That never breaks this bound: if the k domains with most credit got all the
  rows, they have less than before; else some other domain was served while it was owed at least as much as
  each of them, and the bound for k + 1 gives the bound for k. So no credit passes H_N = 1 + 1/2 + ... + 1/N
  under *any* sequence of weights. The first rule alone does not give this.

The work is proportional to the number of domains, whatever the size of the batch.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heapify, heappop, heapreplace

ROW = 1 << 32
"""One row in units of credit; quantised mixture weights sum to it."""
_FINE = 64
"""Bits behind the point of a deadline, so that comparing deadlines stays within the integers."""


def apportion(
    owed: Sequence[int], weights: Sequence[int], rows: int, candidates: Sequence[int] | None = None
) -> list[int]:
    """Rows for each domain.

    Args:
        owed: credit of each domain with this step's share added, in units of 2^-32 row.
        weights: mixture weights in the same units.
        rows: how many to hand out; what is owed sums to this.
        candidates: domains that may serve; all when None.
    """
    chosen = range(len(owed)) if candidates is None else candidates
    if len(chosen) == 1:
        counts = [0] * len(owed)
        counts[chosen[0]] = rows
        return counts
    timely = earliest_deadlines(owed, weights, rows, chosen)
    if timely is not None and keeps_bound([x - n * ROW for x, n in zip(owed, timely, strict=True)]):
        return timely
    return largest_credits(owed, rows, chosen)


def earliest_deadlines(
    owed: Sequence[int], weights: Sequence[int], rows: int, candidates: Sequence[int]
) -> list[int] | None:
    """The rows whose deadlines are nearest; None where fewer than `rows` may be served."""
    early = ROW // (2 * len(owed) - 2)
    counts = [0] * len(owed)
    last = []
    for i in candidates:
        if weights[i] and owed[i] >= early:
            counts[i] = (owed[i] - early) // ROW + 1  # all that may be served
            left = counts[i] * ROW - early - owed[i]  # until the last of them must be
            last.append((-((left << _FINE) // weights[i]), -i))
    surplus = sum(counts) - rows
    if surplus < 0:
        return None
    _take_back(counts, last, surplus, lambda i: (ROW << _FINE) // weights[i])
    return counts


def largest_credits(owed: Sequence[int], rows: int, candidates: Sequence[int]) -> list[int]:
    """One row after the other to whoever is owed most, the first of equals."""
    counts = [0] * len(owed)
    for i in candidates:
        counts[i] = max(-(-owed[i] // ROW), 0)  # while something is owed
    last = [(owed[i] - (counts[i] - 1) * ROW, -i) for i in candidates if counts[i]]
    _take_back(counts, last, sum(counts) - rows, lambda _: ROW)
    for _ in range(rows - sum(counts)):  # a capped domain holds what these are owed
        counts[max(candidates, key=lambda i: (owed[i] - counts[i] * ROW, -i))] += 1
    return counts


def _take_back(
    counts: list[int], last: list[tuple[int, int]], surplus: int, distance: Callable[[int], int]
) -> None:
    """Take `surplus` rows back, one by one, from the domain whose last row has the smallest key."""
    heapify(last)
    for _ in range(surplus):
        key, i = last[0]
        counts[-i] -= 1
        if counts[-i]:
            heapreplace(last, (key + distance(-i), i))
        else:
            heappop(last)


def keeps_bound(credit: Sequence[int]) -> bool:
    """Whether the k largest credits stay within their joint bound, for every k."""
    if max(credit) <= ROW:
        return True  # every joint bound is at least k rows
    total = 0
    for value, bound in zip(sorted(credit, reverse=True), _joint_bounds(len(credit)), strict=False):
        total += value
        if total > bound:
            return False
    return True


@lru_cache(maxsize=8)
def _joint_bounds(num_domains: int) -> tuple[int, ...]:
    """For k = 1 .. N-1: floor of k (1 + 1/(k+1) + ... + 1/N) rows, in units of credit."""
    bounds, tail = [], Fraction(1)
    for k in range(num_domains - 1, 0, -1):
        tail += Fraction(1, k + 1)
        bounds.append(int(k * tail * ROW))
    return tuple(reversed(bounds))


def split(total: int, parts: Sequence[int]) -> list[int]:
    """An integer, also a negative one, in proportion to `parts`; the largest takes what rounding leaves."""
    whole = sum(parts)
    shares = [total * part // whole for part in parts]
    shares[parts.index(max(parts))] += total - sum(shares)
    return shares


def share_out(total: int, weights: Sequence[Fraction | int]) -> tuple[int, ...]:
    """`total` split in proportion to `weights` by largest remainder; a positive weight gets at least 1.

    `total` must be at least the square of the number of weights, so that the largest can pay for that.
    """
    whole = sum(weights)
    exact = [Fraction(total) * weight / whole for weight in weights]
    parts = [max(int(e), 1) if weight > 0 else 0 for e, weight in zip(exact, weights, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    missing = total - sum(parts)
    for i in by_remainder[: max(missing, 0)]:
        parts[i] += 1
    if missing < 0:  # raising tiny weights to 1 overdrew; the largest does not notice
        parts[parts.index(max(parts))] += missing
    return tuple(parts)
