"""Steps planned ahead of the loop, and taken back when the plan changes.

    consumed (the loop has it) <- pending, oldest first <- ahead (the planner's next state)

Readers ask for plans long before the loop receives their rows. `consumed` is the only state that is ever
saved, and going back to it is all that a change of weights needs.
"""

from collections import OrderedDict, deque

from ddkmix.errors import ConfigError, DataError, MixtureExhausted
from ddkmix.planner import (
    PlannerState,
    PlanSettings,
    StepPlan,
    TokensOf,
    effective_weights,
    plan_step,
)

_KEPT_STATES = 64
"""Loops that read ahead ask for the state of a recent step; more is never read ahead."""


class PlanQueue:
    """Plans between the planner and the loop."""

    def __init__(self, settings: PlanSettings, state: PlannerState, tokens_of: TokensOf | None) -> None:
        self.settings = settings
        self._tokens_of = tokens_of
        self.consumed = state
        """The state after the last step that the loop received."""
        self.ahead = state
        """The state after the last step that was planned."""
        self._recent: OrderedDict[int, PlannerState] = OrderedDict({state.step: state})
        self._pending: deque[tuple[StepPlan, PlannerState]] = deque()

    def plan(self) -> StepPlan | None:
        """Plan one more step ahead; None where none can be planned (`is_exhausted` says why)."""
        try:
            plan, self.ahead = plan_step(self.settings, self.ahead, self._tokens_of)
        except DataError:
            return None
        self._pending.append((plan, self.ahead))
        return plan

    def consume(self) -> StepPlan:
        """The loop has received the oldest pending step."""
        plan, self.consumed = self._pending.popleft()
        self._recent[self.consumed.step] = self.consumed
        while len(self._recent) > _KEPT_STATES:
            self._recent.popitem(last=False)
        return plan

    def rewind(self, state: PlannerState) -> None:
        """Go on from `state`; nothing is pending any more, and what came after it never was."""
        self.consumed = self.ahead = state
        for step in [step for step in self._recent if step > state.step]:
            del self._recent[step]
        self._recent[state.step] = state
        self._pending.clear()

    def forget(self) -> None:
        """The states of earlier steps belong to another stream."""
        self._recent.clear()

    def weights_after(self, state: PlannerState) -> tuple[int, ...]:
        """In force at the step after it, in units of 2^-32; all 0 when nothing may be served any more."""
        try:
            return effective_weights(self.settings, state)
        except MixtureExhausted:
            return (0,) * len(self.settings.domains)

    def state_at(self, step: int) -> PlannerState:
        """The state after `step` steps.

        Raises:
            ConfigError: that step is not among the last 64.
        """
        state = self._recent.get(step)
        if state is None:
            raise ConfigError(f"state_dict(step={step}): known steps are {list(self._recent)}.")
        return state

    def is_exhausted(self) -> bool:
        """Whether no step can be planned; raises DataError where `on_cap` is "error"."""
        try:
            plan_step(self.settings, self.consumed, self._tokens_of)
        except MixtureExhausted:
            return True
        return False
