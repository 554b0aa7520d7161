"""Which domain serves each row: one plan per optimizer step for the global batch, in integers.

A step is a pure function of a state of a few hundred bytes: ranks cannot diverge, a weight change rolls back
by taking the older state, and resume is exact. `apportion` says how many rows each domain serves and keeps
served rows within one row of the mixture weights while these are constant, and within H_N rows whatever
they do. Where weights count tokens, credits are tokens: domains are chosen one row after the other, always
the one with the largest credit, which keeps every credit below H_N rows of the largest size (the same
argument as in `apportion`, with the size of the row in place of 1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from ddkmix.apportion import ROW, apportion, share_out, split
from ddkmix.errors import ConfigError, DataError, MixtureExhausted
from ddkmix.fingerprint import hash_json

__all__ = ["PlanSettings", "PlannerState", "StepPlan", "quantise"]

OnCap = Literal["renormalize", "stop", "error"]
TokensOf = Callable[[int, int], int]
"""(domain, j) -> tokens without padding in the domain's j-th row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSettings:
    """What stays the same during a run."""

    domains: tuple[str, ...]
    """Names, sorted; the other tuples are in this order."""
    batch_rows: int
    """Rows in the global batch of one optimizer step."""
    num_rows: tuple[int, ...]
    """Train rows of each domain: one epoch."""
    cap_rows: tuple[int | None, ...]
    """Rows that each domain may serve in the run; None means no limit."""
    on_cap: OnCap = "renormalize"
    """At that limit: share the domain's weight among the others, end the stream, or raise an error."""


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
    """Rows (or tokens) owed minus served, in units of 2^-32; they sum to 0."""
    served: tuple[int, ...]
    """Rows served: the j of each domain's next row."""

    def to_json(self) -> dict[str, Any]:
        """A few hundred bytes of JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PlannerState":
        """The state that `to_json` wrote.

        Args:
            value: its dict, unchanged.
        """
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
    """The global batch of one optimizer step; slot i holds row `row_numbers[i]` of domain `domain_ids[i]`.

    Axis letter: B rows in the global batch.
    """

    step: int
    """Number of the step, from 0."""
    version: int
    """Number of the weight change that it follows, from 0."""
    domain_ids: Int[np.ndarray, " B"]
    """Places in `PlanSettings.domains`; sorted, so that ranks and micro-batches that take every n-th slot
    share each domain evenly."""
    row_numbers: Int[np.ndarray, " B"]
    """Rows that the domain has served before this one, over all epochs and ranks."""


def quantise(weights: Float[np.ndarray, " N"]) -> tuple[int, ...]:
    """Mixture weights as integers that sum to 2^32; a positive weight never becomes 0.

    >>> import numpy as np
    >>> from ddkmix.planner import quantise
    >>> quantise(np.array([0.75, 0.25]))
    (3221225472, 1073741824)

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
    return share_out(ROW, [Fraction(weight) for weight in weights.tolist()])


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


def plan_step(
    settings: PlanSettings, state: PlannerState, tokens_of: TokensOf | None = None
) -> tuple[StepPlan, PlannerState]:
    """The next global batch and the state after it.

    Args:
        settings: what stays the same.
        state: before the step.
        tokens_of: size of each row where weights count tokens; None where they count rows.

    Raises:
        MixtureExhausted: `on_cap` is "stop" and a domain at its cap is due, or every wanted domain is at
            its cap.
        DataError: `on_cap` is "error" and a domain at its cap is due.
    """
    weights = effective_weights(settings, state)
    if tokens_of is None:
        counts, credit = _serve_rows(settings, state, weights)
    else:
        counts, credit = _serve_tokens(settings, state, weights, tokens_of)
    served = tuple(s + n for s, n in zip(state.served, counts, strict=True))
    row_numbers = [np.arange(s, e) for s, e in zip(state.served, served, strict=True) if s < e]
    plan = StepPlan(
        step=state.step,
        version=state.version,
        domain_ids=np.repeat(np.arange(len(counts)), counts),
        row_numbers=np.concatenate(row_numbers),
    )
    return plan, replace(state, step=state.step + 1, credit=tuple(credit), served=served)


def deal(plan: StepPlan, rank: int, world_size: int) -> Int[np.ndarray, " b"]:
    """The slots of one rank: every world_size-th one, so each domain is split as evenly as can be.

    The offset turns with the step: two equal domains on two ranks would otherwise give each rank one
    domain for ever.
    """
    return np.arange((rank - plan.step) % world_size, len(plan.domain_ids), world_size)


def _serve_rows(
    settings: PlanSettings, state: PlannerState, weights: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """Rows of each domain in one step, and the credits after it."""
    left = settings.batch_rows
    owed = [c + left * w for c, w in zip(state.credit, weights, strict=True)]
    counts = [0] * len(owed)
    room = _room(settings, state.served)
    while True:
        candidates = None
        if room is not None and settings.on_cap == "renormalize":
            candidates = [i for i, r in enumerate(room) if r is None or r > counts[i]]
        step = apportion(owed, weights, left, candidates)
        full = [i for i, n in enumerate(step) if room and (r := room[i]) is not None and n > r - counts[i]]
        if not full:
            break
        if settings.on_cap != "renormalize":
            _refuse(settings, full[0], state.step)
        for i in full:  # they serve what they may; the others share the rest of the step
            assert room is not None
            rows = (room[i] or 0) - counts[i]
            owed[i] -= rows * ROW
            counts[i] += rows
            left -= rows
        weights = _without_capped(settings, state.weights, _sum(state.served, counts))
        for i in full:
            _hand_over(owed, i, weights)
    counts = [a + b for a, b in zip(counts, step, strict=True)]
    credit = [x - n * ROW for x, n in zip(owed, step, strict=True)]
    if room is not None and settings.on_cap == "renormalize":
        for i, r in enumerate(room):
            if r is not None and counts[i] == r:
                _hand_over(credit, i, weights)
    return counts, credit


def _serve_tokens(
    settings: PlanSettings, state: PlannerState, weights: tuple[int, ...], tokens_of: TokensOf
) -> tuple[list[int], list[int]]:
    """As `_serve_rows`, with credits in tokens: each row goes to the largest credit."""
    credit, counts = list(state.credit), [0] * len(weights)
    room = _room(settings, state.served)
    for _ in range(settings.batch_rows):
        candidates = [
            i
            for i, weight in enumerate(weights)
            if (weight or credit[i] > 0)
            and (settings.on_cap != "renormalize" or not room or room[i] is None or counts[i] < room[i])  # type: ignore[operator]
        ]
        chosen = max(candidates, key=lambda i: (credit[i], weights[i], -i))
        limit = room[chosen] if room else None
        if limit is not None and counts[chosen] >= limit:
            _refuse(settings, chosen, state.step)
        size = tokens_of(chosen, state.served[chosen] + counts[chosen])
        for i, weight in enumerate(weights):
            credit[i] += size * weight
        credit[chosen] -= size * ROW
        counts[chosen] += 1
        if limit == counts[chosen] and settings.on_cap == "renormalize":
            if sum(counts) < settings.batch_rows:
                weights = _without_capped(settings, state.weights, _sum(state.served, counts))
            _hand_over(credit, chosen, weights)
    return counts, credit


def _room(settings: PlanSettings, served: Sequence[int]) -> list[int | None] | None:
    """Rows that each domain may still serve; None where nothing is capped (the usual case, and cheap)."""
    if not any(cap is not None for cap in settings.cap_rows):
        return None
    pairs = zip(settings.cap_rows, served, strict=True)
    return [None if cap is None else max(cap - rows, 0) for cap, rows in pairs]  # a resume may lower caps


def _sum(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(first, second, strict=True)]


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
    return _renormalise(tuple(kept))


@lru_cache(maxsize=64)
def _renormalise(kept: tuple[int, ...]) -> tuple[int, ...]:
    return share_out(ROW, kept)


def _hand_over(credit: list[int], capped: int, weights: tuple[int, ...]) -> None:
    """Spread the credit of a domain that may not serve again over the others, in whole units."""
    owed, credit[capped] = credit[capped], 0
    heirs = [0 if i == capped else weight for i, weight in enumerate(weights)]
    if not any(heirs):
        credit[capped] = owed
        return
    for i, share in enumerate(split(owed, heirs)):
        credit[i] += share


def _refuse(settings: PlanSettings, domain: int, step: int) -> None:
    message = (
        f"domain {settings.domains[domain]!r} has served its limit of {settings.cap_rows[domain]} rows "
        f"({settings.num_rows[domain]} in an epoch) at step {step} and mixture.on_cap is "
        f"{settings.on_cap!r}; raise max_epochs, lower its weight, or use on_cap: renormalize."
    )
    raise MixtureExhausted(message) if settings.on_cap == "stop" else DataError(message)
