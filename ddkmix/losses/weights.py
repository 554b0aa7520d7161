"""Weights of loss terms that move: pure functions of the step, so that nothing about them is saved.

In a config a weight is a number, a schedule, or `rest`: what the other weights leave of 1. Pre-training
distillation's L = (1 - alpha) L_lm + alpha L_kd (arXiv 2410.16215, Eq. 1) names alpha once:

    loss:
      - {name: cross_entropy, weight: rest}
      - {name: forward_kl, weight: {schedule: wsd, peak: 0.9}}

To add a schedule: a frozen dataclass with `at`, and a line in `WEIGHT_SCHEDULES`. Outside the package:
`schedule: package.module:Class`. This module imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from ddkmix.errors import ConfigError
from ddkmix.plugins import build
from ddkmix.schedule import decay_length, length, multiplier
from ddkmix.sections import DecayShape, Schedule

__all__ = ["WEIGHT_SCHEDULES", "Linear", "Periodic", "Rest", "WeightSchedule", "Wsd", "build_weight"]

_MOST = 1e6
_Weight = Annotated[float, Field(ge=0, lt=_MOST)]
_Steps = Annotated[int, Field(ge=1)]
_Length = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Part = Annotated[float, Field(gt=0, le=1)]


@runtime_checkable
class WeightSchedule(Protocol):
    """A weight that moves."""

    def at(self, step: int, steps: int, schedule: Schedule) -> float:
        """The weight of a step, at least 0.

        Args:
            step: optimizer step, counted from 0.
            steps: optimizer steps of the run.
            schedule: that of the run's learning rate.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rest:
    """1 minus all the other weights, at every step. At most one term of an objective may have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """From `start` to `end` along a line, then `end`: w(t) = start + (end - start) min(1, t / T).

    Knowledge Inheritance is start 1 and end 0: a_t = max(0, 1 - t / T) on the divergence and 1 - a_t
    (`rest`) on the language-modelling loss (arXiv 2105.13880; T there is 55,000 of 125,000 steps). The linear
    rows of pre-training distillation (arXiv 2410.16215) run over the whole run, which is the default here.

    >>> from ddkmix import RunConfig
    >>> from ddkmix.losses.weights import Linear
    >>> schedule = RunConfig.model_fields["schedule"].default
    >>> [Linear(start=1.0, end=0.0, steps=4).at(t, 8, schedule) for t in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    start: _Weight
    """Weight of step 0."""
    end: _Weight
    """Weight of step T and of all steps after it."""
    steps: _Steps | None = None
    """T in steps."""
    share: _Part | None = None
    """T as a share of the run's steps. The whole run when both are unset: its last step is then one step
    short of `end`."""

    def __post_init__(self) -> None:
        _not_both("steps", self.steps, "share", self.share)

    def at(self, step: int, steps: int, schedule: Schedule) -> float:
        """The weight of a step.

        Args:
            step: optimizer step, counted from 0.
            steps: optimizer steps of the run.
            schedule: that of the run's learning rate.
        """
        span = length(self.steps, self.share, steps) or steps
        return self.end if step >= span else self.start + (self.end - self.start) * step / span


@dataclass(frozen=True, kw_only=True, slots=True)
class Periodic:
    """Between `high` and `low`, again and again, beginning with `high`.

    With x the share of the present period that is over: `cosine` low + (high - low) (1 + cos 2 pi x) / 2,
    `triangle` a line down to `low` and one up again, `square` `high` for half a period, then `low`.
    Pre-training distillation (arXiv 2410.16215) reports a periodic weight as no better than none; which form
    and period it used is not in what we have read, so all three are ours. For one that begins with `low`,
    let the other term be periodic and this one `rest`.
    """

    high: _Weight = 1.0
    """Weight at the beginning of a period."""
    low: _Weight = 0.0
    """Weight half a period later."""
    steps: _Steps | None = None
    """Steps of a period."""
    share: _Part | None = None
    """A period as a share of the run's steps; one of the two is needed."""
    shape: Literal["cosine", "triangle", "square"] = "cosine"
    """What lies between."""

    def __post_init__(self) -> None:
        _not_both("steps", self.steps, "share", self.share)
        if self.steps is None and self.share is None:
            raise ValueError("a period needs `steps`, or `share` of the run's steps")

    def at(self, step: int, steps: int, schedule: Schedule) -> float:
        """The weight of a step.

        Args:
            step: optimizer step, counted from 0.
            steps: optimizer steps of the run.
            schedule: that of the run's learning rate.
        """
        period = length(self.steps, self.share, steps)
        x = step % period / period
        shares = {
            "cosine": 0.5 * (1 + math.cos(2 * math.pi * x)),
            "triangle": abs(1 - 2 * x),
            "square": 1.0 if x < 0.5 else 0.0,
        }
        return self.low + (self.high - self.low) * shares[self.shape]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wsd:
    """Warm-up to `peak`, stable, decay to `final`: pre-training distillation's WSD-alpha.

    alpha = peak x the multiplier of a warm-up-stable-decay learning rate (arXiv 2410.16215). Published: peak
    0.9 with a WSD learning rate is the best of the weights tried, "warm-up 10 %, decay 1 %", linear up,
    cosine down. Seen in one summary of the paper only. Not seen, and assumed here: that alpha ends at 0
    (`final`), and that the 1 % is the length of the decay.

    Without lengths of its own it rises and falls with the learning rate, whose schedule must then be `wsd`.
    With any length given it has a shape of its own, whatever the learning rate does (the study's WSD-alpha
    with a cosine learning rate). Given to the language-modelling term with `rest` on the divergence it is
    the study's WSD-beta.
    """

    peak: _Weight
    """Weight of the stable phase."""
    final: _Weight = 0.0
    """Weight of the last step."""
    warmup_steps: _Length | None = None
    """Steps of the rise, whose last one is at `peak`."""
    warmup_share: _Share | None = None
    """The same as a share of the run's steps."""
    decay_steps: _Steps | None = None
    """Steps of the fall, the last ones of the run."""
    decay_share: _Part | None = None
    """The same as a share of the run's steps."""
    decay: DecayShape | None = None
    """How it falls; as the learning rate does when unset."""

    def __post_init__(self) -> None:
        _not_both("warmup_steps", self.warmup_steps, "warmup_share", self.warmup_share)
        _not_both("decay_steps", self.decay_steps, "decay_share", self.decay_share)
        if self._has_lengths and self.decay_steps is None and self.decay_share is None:
            raise ValueError("a warm-up of its own needs a decay of its own: `decay_steps` or `decay_share`")
        if self.final > self.peak or self.peak == 0:
            raise ValueError(f"peak = {self.peak} must be above 0 and not below final = {self.final}")

    @property
    def _has_lengths(self) -> bool:
        lengths = (self.warmup_steps, self.warmup_share, self.decay_steps, self.decay_share)
        return any(given is not None for given in lengths)

    def at(self, step: int, steps: int, schedule: Schedule) -> float:
        """The weight of a step.

        Args:
            step: optimizer step, counted from 0.
            steps: optimizer steps of the run.
            schedule: that of the run's learning rate.

        Raises:
            ConfigError: it has no lengths, and the learning rate has none to follow.
        """
        if self._has_lengths:
            warmup = length(self.warmup_steps, self.warmup_share, steps)
            decay = length(self.decay_steps, self.decay_share, steps)
        elif schedule.name == "wsd":
            warmup = length(schedule.warmup_steps, schedule.warmup_share, steps)
            decay = decay_length(schedule, steps)
        else:
            raise ConfigError(
                "schedule 'wsd' without lengths follows the learning rate, and schedule.name = "
                f"{schedule.name!r}; use a 'wsd' learning rate, or give warmup_share and decay_share here."
            )
        shape, final = self.decay or schedule.decay, self.final / self.peak
        return self.peak * multiplier(step, steps, warmup=warmup, decay=decay, shape=shape, final=final)


WEIGHT_SCHEDULES: dict[str, type] = {"linear": Linear, "periodic": Periodic, "wsd": Wsd}
"""The schedules that a config can name."""


def build_weight(value: Any, *, where: str) -> float | WeightSchedule | Rest:
    """A weight of a config: a number, `rest`, or a mapping with `schedule` and its parameters.

    Args:
        value: what the config says.
        where: the place in the config, for messages ("loss.1.weight").

    Raises:
        ConfigError: it is none of them, or a parameter is wrong.
    """
    if value == "rest":
        return Rest()
    if isinstance(value, Mapping):
        schedule: WeightSchedule = build(value, WEIGHT_SCHEDULES, where=where, key="schedule")
        if not isinstance(schedule, WeightSchedule):
            raise ConfigError(f"{where}.schedule = {value['schedule']!r} has no method `at`; give it one.")
        return schedule
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MOST:
        raise ConfigError(
            f"{where} = {value!r}; a loss weight is a finite number >= 0, `rest`, or a mapping such as "
            "{schedule: wsd, peak: 0.9}."
        )
    return float(value)


def weights_at(
    weights: Sequence[float | WeightSchedule | Rest], step: int, steps: int, schedule: Schedule
) -> list[float]:
    """The weights of one step, in order.

    Raises:
        ConfigError: a schedule gives no weight, or the others leave less than 0 for `rest`.
    """
    values = [_value(weight, step, steps, schedule) for weight in weights]
    for weight, value in zip(weights, values, strict=True):
        if not 0 <= value < _MOST:
            raise ConfigError(f"loss: {weight} gives the weight {value} at step {step + 1}; it must be >= 0.")
    if not any(isinstance(weight, Rest) for weight in weights):
        return values
    rest = 1 - sum(values)
    if rest < -1e-9:  # sums to 1 may round
        raise ConfigError(
            f"loss: the weights sum to {1 - rest:.6g} at step {step + 1}, which leaves less than nothing for "
            "the weight `rest`; they may sum to 1 at most."
        )
    return [
        max(rest, 0.0) if isinstance(weight, Rest) else value
        for weight, value in zip(weights, values, strict=True)
    ]


def _value(weight: float | WeightSchedule | Rest, step: int, steps: int, schedule: Schedule) -> float:
    if isinstance(weight, float):  # asking whether it is a WeightSchedule would take most of the time
        return weight
    return 0.0 if isinstance(weight, Rest) else weight.at(step, steps, schedule)


def _not_both(first: str, steps: object, second: str, share: object) -> None:
    if steps is not None and share is not None:
        raise ValueError(f"{first} = {steps} and {second} = {share} both say how long it is; remove one")
