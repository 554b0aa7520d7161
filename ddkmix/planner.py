"""Which domain serves each row: one plan per optimizer step for the global batch, in integers.

A domain with mixture weight w is owed w rows for each row of the batch. Its *credit* is what it is owed
minus what it was served. Two rules choose who serves the next row:

- the most urgent of the domains that are owed at least 1/(2N-2) of a row, where urgent means that its
  credit would soonest pass 1 - 1/(2N-2) under the present weights. While weights are constant this keeps
  every credit inside (-1, 1) after every row (R. Tijdeman, The chairman assignment problem, 1980);
- but if that would leave some k domains with more than k(1 + 1/(k+1) + ... + 1/N) rows of credit together,
  the domain with the largest credit. Serving the largest never breaks that bound, so no credit passes
  H_N = 1 + 1/2 + ... + 1/N under *any* sequence of weights. The first rule alone does not give this.

Credits are integers in units of 2^-32 row and a step is a pure function of a state of a few hundred
bytes: ranks cannot diverge, a weight change rolls back by taking the older state, and resume is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from ddkmix.errors import ConfigError, DataError, MixtureExhausted
from ddkmix.fingerprint import hash_json

ROW = 1 << 32
"""One row in units of credit; quantised mixture weights sum to it."""

OnCap = Literal["renormalize", "stop", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSettings:
    """What stays the same during a run."""

    domains: tuple[str, ...]
    batch_rows: int
    """Rows in the global batch of one optimizer step."""
    num_rows: tuple[int, ...]
    """Train rows of each domain: one epoch."""
    cap_rows: tuple[int | None, ...]
    """Rows that each domain may serve in the run; None means no limit."""
    on_cap: OnCap = "renormalize"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerState:
    """Everything that the next plan depends on."""

    step: int
    """Steps planned so far."""
    version: int
    """Weight changes so far."""
    weights: tuple[int, ...]
    """Requested mixture weights in units of 2^-32; they sum to 2^32."""
    credit: tuple[int, ...]
    """Rows owed minus rows served, in units of 2^-32 row; they sum to 0."""
    served: tuple[int, ...]
    """Rows served: the j of each domain's next row."""

    def to_json(self) -> dict[str, Any]:
        """A few hundred bytes of JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PlannerState":
        """The state that `to_json` wrote."""
        return cls(
            step=value["step"],
            version=value["version"],
            weights=tuple(value["weights"]),
            credit=tuple(value["credit"]),
            served=tuple(value["served"]),
        )

    def fingerprint(self) -> str:
        """Equal on two ranks exactly when they will plan the same batches."""
        return hash_json(self.to_json())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepPlan:
    """The global batch of one optimizer step; slot i holds row `row_numbers[i]` of domain `domain_ids[i]`."""

    step: int
    """Counted from 0."""
    version: int
    """The weight change that it follows."""
    domain_ids: Int[np.ndarray, " B"]
    """Sorted, so that ranks and micro-batches that take every n-th slot share each domain evenly."""
    row_numbers: Int[np.ndarray, " B"]
    """The j of `order.locate`."""


def quantise(weights: Float[np.ndarray, " N"]) -> tuple[int, ...]:
    """Mixture weights as integers that sum to 2^32; a positive weight never becomes 0.

    Args:
        weights: a point of the simplex.

    Raises:
        ConfigError: a weight is negative or not finite, or they do not sum to 1.
    """
    if not np.isfinite(weights).all() or (weights < 0).any() or abs(weights.sum() - 1) > 1e-6:
        raise ConfigError(
            f"mixture weights {weights.tolist()} are not a distribution; each must be finite and >= 0 and "
            "they must sum to 1."
        )
    return _share_out(ROW, [Fraction(weight) for weight in weights.tolist()])


def initial_state(settings: PlanSettings, weights: Float[np.ndarray, " N"]) -> PlannerState:
    """The state before the first step."""
    zeros = (0,) * len(settings.domains)
    return PlannerState(step=0, version=0, weights=quantise(weights), credit=zeros, served=zeros)


def with_weights(state: PlannerState, weights: tuple[int, ...]) -> PlannerState:
    """The state after a weight change; credits carry over, so nobody loses what it is owed."""
    return replace(state, weights=weights, version=state.version + 1)


def effective_weights(settings: PlanSettings, state: PlannerState) -> tuple[int, ...]:
    """Requested weights with the domains at their cap taken out and the rest renormalised.

    Raises:
        MixtureExhausted: nothing is left.
    """
    if settings.on_cap != "renormalize":
        return state.weights
    return _without_capped(settings, state.weights, state.served)


def plan_step(settings: PlanSettings, state: PlannerState) -> tuple[StepPlan, PlannerState]:
    """The next global batch and the state after it.

    Raises:
        MixtureExhausted: `on_cap` is "stop" and a domain at its cap is due, or every wanted domain is at
            its cap.
        DataError: `on_cap` is "error" and a domain at its cap is due.
    """
    weights = effective_weights(settings, state)
    credit, served = list(state.credit), list(state.served)
    domain_ids, row_numbers = [], []
    for _ in range(settings.batch_rows):
        for i, weight in enumerate(weights):
            credit[i] += weight
        chosen = _next_domain(credit, weights, _open(settings, served))
        cap = settings.cap_rows[chosen]
        if cap is not None and served[chosen] >= cap:
            _refuse(settings, chosen, state.step)
        domain_ids.append(chosen)
        row_numbers.append(served[chosen])
        credit[chosen] -= ROW
        served[chosen] += 1
        if served[chosen] == cap and settings.on_cap == "renormalize":
            if len(domain_ids) < settings.batch_rows:
                weights = _without_capped(settings, state.weights, served)
            _hand_over(credit, chosen, weights)
    order = np.argsort(domain_ids, kind="stable")
    plan = StepPlan(
        step=state.step,
        version=state.version,
        domain_ids=np.array(domain_ids, dtype=np.int64)[order],
        row_numbers=np.array(row_numbers, dtype=np.int64)[order],
    )
    after = replace(state, step=state.step + 1, credit=tuple(credit), served=tuple(served))
    return plan, after


def deal(plan: StepPlan, rank: int, world_size: int) -> Int[np.ndarray, " b"]:
    """The slots of one rank: every world_size-th one, so each domain is split as evenly as can be.

    The offset turns with the step: two equal domains on two ranks would otherwise give each rank one
    domain for ever.
    """
    return np.arange((rank - plan.step) % world_size, len(plan.domain_ids), world_size)


def project_epochs(
    settings: PlanSettings, state: PlannerState, steps: int
) -> dict[str, tuple[float, int | None]]:
    """Per domain: epochs served after `steps` steps under the present weights, and the step of its cap.

    Ignores what renormalising at a cap would add to the others.
    """
    remaining = max(steps - state.step, 0) * settings.batch_rows
    projection: dict[str, tuple[float, int | None]] = {}
    for i, domain in enumerate(settings.domains):
        rate = state.weights[i] / ROW
        rows, cap = state.served[i] + remaining * rate, settings.cap_rows[i]
        at = None
        if cap is not None and rows > cap and rate > 0:
            at = state.step + int((cap - state.served[i]) / (rate * settings.batch_rows))
            rows = cap
        projection[domain] = (rows / settings.num_rows[i], at)
    return projection


def _open(settings: PlanSettings, served: Sequence[int]) -> Sequence[bool] | None:
    """Under `renormalize`, which domains may still serve; None means all (the usual case, and cheap)."""
    if settings.on_cap != "renormalize":
        return None
    closed = [c is not None and s >= c for c, s in zip(settings.cap_rows, served, strict=True)]
    return [not c for c in closed] if any(closed) else None


def _next_domain(credit: Sequence[int], weights: Sequence[int], is_open: Sequence[bool] | None) -> int:
    """Who serves the next row, given credits that already include it."""
    candidates = range(len(credit))
    if is_open is not None:
        candidates = [i for i in candidates if is_open[i]]  # type: ignore[assignment]
    if len(candidates) == 1:
        return candidates[0]
    urgent = _most_urgent(credit, weights, candidates)
    if urgent is not None and _keeps_bound(credit, urgent):
        return urgent
    return max(candidates, key=lambda i: (credit[i], -i))


def _most_urgent(credit: Sequence[int], weights: Sequence[int], candidates: Sequence[int]) -> int | None:
    """Tijdeman's choice: least (1 - 1/(2N-2) - credit) / weight among those owed 1/(2N-2) of a row."""
    threshold = ROW // (2 * len(credit) - 2)
    best, best_slack, best_weight = None, 0, 1
    for i in candidates:
        if credit[i] < threshold or weights[i] == 0:
            continue
        slack = ROW - threshold - credit[i]
        # slack / weight < best_slack / best_weight, without leaving the integers
        if best is None or slack * best_weight < best_slack * weights[i]:
            best, best_slack, best_weight = i, slack, weights[i]
    return best


def _keeps_bound(credit: Sequence[int], chosen: int) -> bool:
    """Whether the k largest credits stay within their joint bound, for every k, after `chosen` serves."""
    after = [c - ROW if i == chosen else c for i, c in enumerate(credit)]
    if max(after) <= ROW:
        return True  # every joint bound is at least k rows
    total = 0
    for value, bound in zip(sorted(after, reverse=True), _joint_bounds(len(after)), strict=False):
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


def _share_out(total: int, weights: Sequence[Fraction | int]) -> tuple[int, ...]:
    """`total` split in proportion to `weights` by largest remainder; a positive weight gets at least 1."""
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


def _without_capped(
    settings: PlanSettings, weights: tuple[int, ...], served: Sequence[int]
) -> tuple[int, ...]:
    kept = [
        0 if cap is not None and rows >= cap else weight
        for weight, rows, cap in zip(weights, served, settings.cap_rows, strict=True)
    ]
    if kept == list(weights):
        return weights
    if not any(kept):
        raise MixtureExhausted(
            f"every domain with a positive weight is at its limit of rows {list(settings.cap_rows)}; raise "
            "mixture.max_epochs (and max_epochs of the cards) or train for fewer steps."
        )
    return _share_out(ROW, kept)


def _hand_over(credit: list[int], capped: int, weights: tuple[int, ...]) -> None:
    """Spread the credit of a domain that may not serve again over the others, in whole units."""
    owed, credit[capped] = credit[capped], 0
    heirs = [0 if i == capped else weight for i, weight in enumerate(weights)]
    total = sum(heirs)
    if not total:
        credit[capped] = owed
        return
    shares = [owed * heir // total for heir in heirs]
    shares[heirs.index(max(heirs))] += owed - sum(shares)
    for i, share in enumerate(shares):
        credit[i] += share


def _refuse(settings: PlanSettings, domain: int, step: int) -> None:
    message = (
        f"domain {settings.domains[domain]!r} has served its limit of {settings.cap_rows[domain]} rows "
        f"({settings.num_rows[domain]} in an epoch) at step {step} and mixture.on_cap is "
        f"{settings.on_cap!r}; raise max_epochs, lower its weight, or use on_cap: renormalize."
    )
    raise MixtureExhausted(message) if settings.on_cap == "stop" else DataError(message)
