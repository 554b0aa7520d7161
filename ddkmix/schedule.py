"""The learning rate as a pure function of the step, so that nothing about it has to be saved."""

import math

from ddkmix.config import Schedule


def lr_multiplier(schedule: Schedule, step: int, steps: int) -> float:
    """Learning rate of a step as a multiple of the peak.

    Args:
        schedule: shape and lengths.
        step: optimizer step, counted from 0.
        steps: optimizer steps of the run.

    Warm-up rises linearly and reaches 1 at its last step. `cosine` then falls to `final_ratio` at the last
    step of the run; `wsd` stays at 1 and falls along a cosine over the last `decay_steps`.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    start = schedule.warmup_steps
    if schedule.name == "wsd":
        start = max(start, steps - schedule.decay_steps)
    progress = (step - start + 1) / max(steps - start, 1) if step >= start else 0.0
    low = schedule.final_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
