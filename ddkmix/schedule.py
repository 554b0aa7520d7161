"""The learning rate as a pure function of the step, so that nothing about it has to be saved."""

import math

from ddkmix.config import Schedule
from ddkmix.sections import DecayShape


def lr_multiplier(schedule: Schedule, step: int, steps: int) -> float:
    """Learning rate of a step as a multiple of the peak.

    Args:
        schedule: shape and lengths.
        step: optimizer step, counted from 0.
        steps: optimizer steps of the run.

    Warm-up rises linearly and reaches 1 at its last step. `cosine` then falls to `final_ratio` at the last
    step of the run; `wsd` stays at 1 and falls to it over its decay only.
    """
    return multiplier(
        step,
        steps,
        warmup=length(schedule.warmup_steps, schedule.warmup_share, steps),
        decay=decay_length(schedule, steps),
        shape=schedule.decay,
        final=schedule.final_ratio,
    )


def multiplier(
    step: int, steps: int, *, warmup: int, decay: int, shape: DecayShape = "cosine", final: float = 0.0
) -> float:
    """A linear rise to 1, then 1, then a fall to `final` at the last step.

    Args:
        step: optimizer step, counted from 0.
        steps: optimizer steps of the run.
        warmup: steps of the rise.
        decay: steps of the fall; the fall begins after the rise, however long it is.
        shape: how it falls, see `fall`.
        final: share of the peak that is left at the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, steps - decay)
    if step < start or decay == 0:
        return 1.0
    progress = (step - start + 1) / max(steps - start, 1)
    return final + (1 - final) * fall(progress, shape)


def fall(progress: float, shape: DecayShape) -> float:
    """What is left after a share `progress` of a decay: 1 at its beginning, 0 at its end.

    `cosine`: (1 + cos pi x) / 2, as pre-training distillation's WSD (arXiv 2410.16215). `linear`: 1 - x.
    `sqrt`: 1 - sqrt(x), the best of the shapes tried in arXiv 2405.18392.
    """
    if shape == "linear":
        return 1 - progress
    if shape == "sqrt":
        return 1 - math.sqrt(progress)
    return 0.5 * (1 + math.cos(math.pi * progress))


def length(in_steps: int | None, share: float | None, steps: int) -> int:
    """A part of a run in steps, given as steps or as a share of `steps`, which is at least one step.

    Shares are rounded to the nearest step: 0.1 x 30 is 3.0000000000000004 in float64.
    """
    if share:
        return max(1, round(share * steps))
    return in_steps or 0


def decay_length(schedule: Schedule, steps: int) -> int:
    """Steps of a learning rate's decay."""
    if schedule.name == "constant":
        return 0
    return steps if schedule.name == "cosine" else length(schedule.decay_steps, schedule.decay_share, steps)
