"""Where a run is heading: rows and epochs of every domain at its end if the weights stay as they are.

Under constant weights served rows are straight lines. At a domain's cap, `on_cap: renormalize` hands its
weight to the others, whose lines get steeper; `stop` and `error` end the run. So a projection is a few
straight pieces, one for each cap, followed here as a fluid: N domains cost at most N passes over N numbers,
whatever the number of steps. What is really planned stays within a few rows of it, because the planner keeps
every domain within a row or so of its line.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddkmix.planner import PlannerState, PlanSettings

_SLACK = 1e-9
"""Rounding of floats, in rows: a cap that is reached at the end of step 6 is not reached in step 7."""
_THEN = {
    "renormalize": "then the other domains share its weight",
    "stop": "then the run ends",
    "error": "then the run fails",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainProjection:
    """One domain at the end of the run."""

    rows: float
    """Rows served; a fraction of a row is its chance."""
    epochs: float
    """Passes over the domain's train rows."""
    cap_step: int | None
    """Step, counted as in metrics.jsonl, in which it will have reached its cap (or, under `stop` and `error`,
    would pass it); the present step if it is there already, None if it gets nowhere near."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """A run at its end."""

    domains: dict[str, DomainProjection]
    end_step: int
    """The last step that can be taken; fewer than asked for where the rows do not last."""

    def capped(self) -> dict[str, dict[str, Any]]:
        """The domains that reach their cap, for intervals.jsonl."""
        return {
            name: {"epochs": domain.epochs, "cap_step": domain.cap_step}
            for name, domain in self.domains.items()
            if domain.cap_step is not None
        }


def project(
    settings: PlanSettings, state: PlannerState, steps: int, row_sizes: Sequence[float] | None = None
) -> Projection:
    """Rows and epochs of every domain after `steps` steps under the weights of `state`.

    Args:
        settings: of the planner.
        state: the present: weights, credits and rows served.
        steps: of the whole run.
        row_sizes: mean tokens of a row of each domain where weights are shares of tokens; None where they
            are shares of rows.
    """
    fluid = _Fluid(settings, state, row_sizes)
    taken = fluid.run(max(steps - state.step, 0))
    domains = {}
    for i, name in enumerate(settings.domains):
        served = float(state.served[i])
        # nothing that was served is taken back, whatever the credit says
        rows = served if i in fluid.full or not taken else max(fluid.rows[i], served)
        cap_step = state.step if i in fluid.full else None
        if i in fluid.cap_after:
            more = math.ceil(fluid.cap_after[i] / settings.batch_rows - _SLACK)
            cap_step = cap_step or state.step + max(more, 1)
        domains[name] = DomainProjection(rows=rows, epochs=rows / settings.num_rows[i], cap_step=cap_step)
    return Projection(domains=domains, end_step=state.step + taken)


def cap_warning(settings: PlanSettings, name: str, projection: Projection, steps: int) -> str:
    """One line: which domain reaches its limit, when, and what happens then."""
    i = settings.domains.index(name)
    cap = settings.cap_rows[i]
    assert cap is not None
    return (
        f"{name} reaches its limit of {cap / settings.num_rows[i]:g} epochs ({cap:,} rows) at step "
        f"{projection.domains[name].cap_step:,} of {steps:,}; {_THEN[settings.on_cap]} "
        f"(mixture.on_cap: {settings.on_cap})."
    )


def end_warning(settings: PlanSettings, projection: Projection, steps: int) -> list[str]:
    """A line if the rows do not last until the end."""
    if projection.end_step >= steps:
        return []
    return [
        f"under these weights the run ends after step {projection.end_step:,} of {steps:,}, when no row may "
        f"be served (mixture.on_cap: {settings.on_cap}); raise mixture.max_epochs or lower trainer.steps."
    ]


def news(
    settings: PlanSettings,
    state: PlannerState,
    steps: int,
    projection: Projection,
    before: Mapping[str, Any] | None,
) -> list[str]:
    """A line for each domain whose outlook changed since the last weight update.

    Args:
        settings: of the planner.
        state: after the update.
        steps: of the whole run.
        projection: what is projected now.
        before: the record of the last update in intervals.jsonl: its `step` and what was `projected`.
    """
    before = before or {"step": 0}
    then, now, lines = before.get("projected", {}), projection.capped(), []
    for name in settings.domains:
        was, will = _status(then.get(name), before["step"]), _status(now.get(name), state.step)
        if was == will:
            continue
        if will == "at its limit":
            lines.append(
                f"{name} is at its limit of {projection.domains[name].epochs:g} epochs since step "
                f"{state.step:,} at the latest (mixture.on_cap: {settings.on_cap})."
            )
        elif will == "soon":
            lines.append(cap_warning(settings, name, projection, steps))
        else:
            lines.append(f"{name} no longer reaches its limit before step {steps:,} under the new weights.")
    return lines + (end_warning(settings, projection, steps) if lines else [])


def _status(entry: Mapping[str, Any] | None, step: int) -> str | None:
    if entry is None:
        return None
    return "at its limit" if entry["cap_step"] <= step else "soon"


class _Fluid:
    """Rows of every domain as they flow: what each is owed, fractions of a row included."""

    def __init__(
        self, settings: PlanSettings, state: PlannerState, row_sizes: Sequence[float] | None
    ) -> None:
        unit = sum(state.weights)  # of weights, and of credits
        self._sizes = row_sizes or [1.0] * len(state.weights)
        self._caps, self._batch_rows = settings.cap_rows, settings.batch_rows
        self._renormalises = settings.on_cap == "renormalize"
        self._speed = [w / unit / m for w, m in zip(state.weights, self._sizes, strict=True)]
        self.rows = [
            s + c / unit / m for s, c, m in zip(state.served, state.credit, self._sizes, strict=True)
        ]
        self.full = {i for i, cap in enumerate(self._caps) if cap is not None and state.served[i] >= cap}
        """Domains that are at their cap from the start."""
        self.cap_after: dict[int, float] = {}
        """Rows of the whole mixture after which the others get there."""
        self._capacity = sum(
            math.inf if cap is None else cap - state.served[i]
            for i, cap in enumerate(self._caps)
            if self._speed[i] and i not in self.full
        )

    def run(self, steps: int) -> int:
        """Flow for so many steps, or until it dries up; returns whole steps taken."""
        return self._run_renormalised(steps) if self._renormalises else self._run_until_cap(steps)

    def _run_until_cap(self, steps: int) -> int:
        total = sum(self._speed)
        flow, first = self._next_cap(total)
        if flow < steps * self._batch_rows - _SLACK:
            self.cap_after[first] = flow
            steps = int(flow / self._batch_rows + _SLACK)
        self._advance(steps * self._batch_rows / total)
        return steps

    def _run_renormalised(self, steps: int) -> int:
        wanted = {i for i, speed in enumerate(self._speed) if speed} - self.full
        dry = self._capacity < steps * self._batch_rows
        if dry:
            steps = int(self._capacity) // self._batch_rows
        left = rows = float(steps * self._batch_rows)
        for i in self.full:
            self._speed[i] = 0.0
        while left > _SLACK and (total := sum(self._speed)):
            flow, i = self._next_cap(total)
            self._advance(min(flow, left) / total)
            if flow > left - _SLACK:
                break
            left -= flow
            self.cap_after[i] = rows - left
            self._close(i)
        if dry:  # these are why it ends
            self.cap_after |= {i: rows for i in wanted if i not in self.cap_after}
        return steps

    def _next_cap(self, total: float) -> tuple[float, int]:
        """Rows of the whole mixture until the next domain reaches its cap, and that domain; inf if none."""
        found = (math.inf, -1)
        for i, cap in enumerate(self._caps):
            if cap is not None and self._speed[i]:
                found = min(found, (max(cap - self.rows[i], 0.0) / self._speed[i] * total, i))
        return found

    def _advance(self, time: float) -> None:
        for i, speed in enumerate(self._speed):
            self.rows[i] += speed * time

    def _close(self, i: int) -> None:
        """Take a domain out; what it is still owed goes to the others, as the planner hands over credit."""
        cap = float(self._caps[i] or 0)
        owed, self.rows[i], self._speed[i] = (self.rows[i] - cap) * self._sizes[i], cap, 0.0
        shares = [speed * size for speed, size in zip(self._speed, self._sizes, strict=True)]
        if total := sum(shares):
            for k, share in enumerate(shares):
                self.rows[k] += owed * share / total / self._sizes[k]
