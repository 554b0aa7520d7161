"""Measure, ask the policy, set the weights: the same for every loop that is not ours.

    loop --(model, steps done)--> Reweighter --(losses)--> policy --(weights)--> mixture

A loop calls `step` before its first step and after every optimizer step. Adapters do nothing else, but find
the places where their framework lets them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ddkmix.config import Guards
from ddkmix.errors import ConfigError, DataError, DdkmixError, RunError
from ddkmix.measures import needs_of
from ddkmix.planned_mixture import PlannedMixture
from ddkmix.planner import quantise
from ddkmix.policies import PolicyState, WeightPolicy, next_state, policy_of, weights_of
from ddkmix.policies.guards import Guarded, check_guards, guarded, unguarded
from ddkmix.policies.protocol import at_interval
from ddkmix.ranks import everyones, from_main
from ddkmix.types import DomainLosses

__all__ = ["MeasuresModels", "Reweighter"]

STATE_FORMAT = 1
_STATE_KEYS = {"mixture", "policy", "settings", "measured_at", "measure_now"}


@runtime_checkable
class MeasuresModels(Protocol):
    """What a `Reweighter` wants of an evaluator; `GapEvaluator` is one."""

    def measure(self, model: Any, /) -> DomainLosses:
        """Held-out losses of every domain, nats per token.

        Args:
            model: the student as it is now.
        """
        ...


class Reweighter:
    """Keeps the weights of a mixture where a policy wants them.

    On several ranks every one makes the same calls, and what rank 0's losses lead to counts for all. All that
    a resumed run needs is in `state_dict`: the mixture's place, the policy's memory, when was measured last.

    Args:
        mixture: a `DomainMixture` or a `MixtureBatchSampler`.
        evaluator: a `GapEvaluator`, or anything with `measure(model) -> DomainLosses`; None if you call
            `update` with your own losses.
        policy: a name ("ddk"), a name with parameters ({"name": "ddk", "signal": "loss_gap"}), or an object
            with `init` and `update`.
        interval_steps: optimizer steps between two measurements.
        guards: what holds the weights, as a config has it ({"cap": 0.4, "evidence": 0.0}; True for a config's
            defaults); None leaves them to the policy.
        on_losses: called with (step, losses, weights now in force) after every measurement.

    Raises:
        ConfigError: the policy or its guards are wrong, `interval_steps` is below 1, evaluator and mixture
            are of different domains, or the evaluator does not measure what the policy needs.
    """

    def __init__(
        self,
        mixture: PlannedMixture[Any],
        evaluator: MeasuresModels | None,
        policy: str | Mapping[str, Any] | WeightPolicy = "ddk",
        *,
        interval_steps: int = 1000,
        guards: Guards | Mapping[str, Any] | bool | None = None,
        on_losses: Callable[[int, DomainLosses, Mapping[str, float]], None] = lambda *_: None,
    ) -> None:
        if interval_steps < 1:
            raise ConfigError(f"interval_steps = {interval_steps}; it must be at least 1 optimizer step.")
        check_evaluator(evaluator, mixture.domains)
        policy = at_interval(policy_of(policy), interval_steps)
        _check_measures(evaluator, policy)
        self.mixture: PlannedMixture[Any] = mixture
        """What it sets the weights of."""
        self.policy: WeightPolicy = guarded(policy, guards)
        """What it asks; a `ddkmix.policies.Guarded` where there are guards."""
        if isinstance(self.policy, Guarded):
            check_guards(self.policy.guards, len(mixture.domains))
        self.interval_steps: int = interval_steps
        """Optimizer steps between two measurements."""
        self.losses: DomainLosses | None = None
        """The last measurement in this process."""
        self._evaluator, self._on_losses = evaluator, on_losses
        self.policy_state: PolicyState | None = None
        """What the policy remembers, with its `mixture_weights`; None before the first measurement."""
        self._measured_at: int | None = None
        self._measure_now = False
        """Whether the policy has lost its memory, so that weights do not wait for the interval's end."""

    def step(self, model: Any, done: int) -> DomainLosses | None:
        """Measure and set the weights if an interval ends here; call it after every optimizer step.

        Args:
            model: the student as it is now.
            done: optimizer steps that the loop has finished in the run; 0 before the first.

        Returns:
            The losses where it measured, else None.

        Raises:
            RunError: the mixture has handed out another number of steps: something reads ahead of the
                loop, and a change would come late.
            ConfigError: there is no evaluator.
            NumericsError: a loss is not finite; the weights stay.
        """
        self.check_step(done)
        due = done % self.interval_steps == 0 or self._measure_now
        if not due or done == self._measured_at:
            return None
        if self._evaluator is None:
            raise ConfigError("this Reweighter has no evaluator; give it one, or call update(losses).")
        losses = self._evaluator.measure(model)
        self.update(losses)
        return losses

    def check_step(self, done: int) -> None:
        """Refuse to go on when the mixture is not where the loop is.

        Args:
            done: optimizer steps that the loop has finished in the run.

        Raises:
            RunError: the mixture has handed out another number of steps.
        """
        handed_out = self.mixture.state.step
        if handed_out != done:
            way_out = (
                "something reads ahead of the loop; give it the loader of DomainMixture.loader as it is, or "
                "iterate over MixtureBatchSampler.follow(loader)"
                if handed_out > done
                else "load the state that was saved with the model, or iterate over this mixture's loader"
            )
            raise RunError(
                f"the loop has finished {done} optimizer steps and the mixture has handed out the rows of "
                f"{handed_out}: {way_out}."
            )

    def update(self, losses: DomainLosses) -> dict[str, float]:
        """Ask the policy and set the weights, which the next step follows.

        Args:
            losses: of every domain, measured by whomever (`DomainLosses.from_means`).

        Returns:
            The mixture weights now in force, by domain.

        Raises:
            ConfigError: the losses are of other domains, or the policy's weights are no distribution.
            NumericsError: a loss is not finite; the weights stay.
        """
        if losses.domains != tuple(self.mixture.domains):
            raise ConfigError(
                f"losses are of {list(losses.domains)} and the mixture has {list(self.mixture.domains)}."
            )
        if losses.rows_served is None:
            served = self.mixture.served
            losses = replace(losses, rows_served=np.array([served[name] for name in losses.domains]))
        state, exact = self._decide(losses)
        self.mixture.set_weights(exact)
        check_agreement(self.mixture, "weight update")
        self.policy_state, self._measured_at, self.losses = state, self.mixture.state.step, losses
        self._measure_now = False
        self._on_losses(self.mixture.state.step, losses, self.mixture.weights)
        return self.mixture.weights

    def _decide(self, losses: DomainLosses) -> tuple[PolicyState, tuple[int, ...]]:
        """Rank 0's policy state and weights (or its error) on every rank, so that none goes on alone."""
        state: PolicyState = {}
        exact: tuple[int, ...] = ()
        problem = None
        try:
            state = next_state(self.policy, self.policy_state, losses, self.mixture.natural_weights)
            wanted = weights_of(state, losses)
            exact = quantise(np.array([wanted[name] for name in self.mixture.domains]))
        except DdkmixError as error:
            problem = error
        state, exact, problem = from_main((state, exact, problem))
        if problem is not None:
            raise problem
        return state, exact

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: weights and epochs of every domain, and the losses of the last measurement.

        Weights are shares, epochs passes over a domain's rows, losses and gaps nats per token.
        """
        found = {f"mixture/weight/{name}": weight for name, weight in self.mixture.weights.items()}
        found |= {f"mixture/epochs/{name}": epochs for name, epochs in self.mixture.epochs.items()}
        if self.losses is not None:
            for i, name in enumerate(self.losses.domains):
                found[f"student_loss/{name}"] = float(self.losses.student_loss[i])
                found[f"loss_gap/{name}"] = float(self.losses.loss_gap[i])
        return found

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """JSON-able state from which mixture and policy go on exactly; the same on every rank.

        Args:
            done: optimizer steps that the loop has finished, for loops that read ahead; None is all that the
                mixture has handed out.

        Raises:
            ConfigError: that step is not among the last 64.
        """
        return {
            "format": STATE_FORMAT,
            "mixture": self.mixture.state_dict(done),
            "policy": self.policy_state,
            "settings": self._settings(),
            "measured_at": self._measured_at,
            "measure_now": self._measure_now,
        }

    def _settings(self) -> dict[str, Any]:
        """What weights depend on beside losses; JSON-able."""
        policy, guards = unguarded(self.policy), getattr(self.policy, "guards", None)
        name = f"{type(policy).__module__}:{type(policy).__qualname__}"
        return {
            "policy": f"{name} {policy!r}" if is_dataclass(policy) else name,
            "guards": guards.model_dump() if isinstance(guards, Guards) else None,
            "interval_steps": self.interval_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Go on from a saved state.

        Args:
            state: what `state_dict` gave.
            allow_changes: go on although domains, their data, settings, the policy, its guards or the
                interval have changed; a policy that is another, or of other guards or domains, begins anew at
                once, with a measurement.

        Returns:
            What has changed, one phrase each; empty when everything goes on exactly.

        Raises:
            DataError: it is no such state, or something has changed and `allow_changes` is not set.
        """
        if state.get("format") != STATE_FORMAT or not set(state) >= _STATE_KEYS:
            raise DataError(
                f"this is no state of a Reweighter of this version (format {state.get('format')!r}, wanted "
                f"{STATE_FORMAT}); load what its state_dict gave."
            )
        was, now = state["settings"], self._settings()
        changed = [name for name in now if was.get(name) != now[name]]
        own = [f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in changed]
        if own and not allow_changes:
            raise DataError(
                f"the saved state is of another Reweighter: {'; '.join(own)}. Restore these to go on "
                "exactly, or load it with allow_changes=True."
            )
        changes = self.mixture.load_state_dict(state["mixture"], allow_changes=allow_changes)
        same_domains = list(state["mixture"]["data"]) == list(self.mixture.domains)
        anew = not same_domains or "policy" in changed or "guards" in changed
        self.policy_state = None if anew else state["policy"]
        self._measured_at = None if anew else state["measured_at"]
        self._measure_now = anew or state["measure_now"]
        return changes + own


def check_evaluator(evaluator: object, domains: Sequence[str]) -> None:
    """Refuse what cannot measure the domains of a mixture, before anything expensive starts.

    Args:
        evaluator: see `Reweighter`; one that does not say its `domains` is believed.
        domains: of the mixture.

    Raises:
        ConfigError: it has no `measure`, or measures other domains.
    """
    if isinstance(evaluator, type) or not (evaluator is None or isinstance(evaluator, MeasuresModels)):
        raise ConfigError(
            f"evaluator is a {type(evaluator).__name__}; give a GapEvaluator, or an object with "
            "measure(model) -> DomainLosses."
        )
    measured, wanted = list(getattr(evaluator, "domains", domains)), sorted(domains)
    if sorted(measured) != wanted:
        raise ConfigError(
            f"the evaluator measures {measured} and the mixture has {wanted}; they must be of the same "
            "domains. from_cards takes a folder, a glob or a list: give it the cards of these domains."
        )


def _check_measures(evaluator: object, policy: WeightPolicy) -> None:
    """An evaluator that says what it measures must measure what the policy needs."""
    lacking = sorted(needs_of(policy) - getattr(evaluator, "measures", needs_of(policy)))
    if lacking:
        raise ConfigError(
            f"policy {type(policy).__name__} needs {' and '.join(lacking)}, which this evaluator does not "
            f"measure; GapEvaluator(..., measures={lacking})."
        )


def check_agreement(mixture: PlannedMixture[Any], when: str) -> None:
    """Every rank must hold the same plan; a run that diverged must not go on.

    Args:
        mixture: this rank's.
        when: for the message.

    Raises:
        RunError: ranks differ.
    """
    found = everyones(mixture.state.fingerprint()[:12])
    if len(set(found)) > 1:
        raise RunError(
            f"ranks hold different plans at step {mixture.state.step} ({when}): state hashes {found}. Resume "
            "from the last checkpoint; if it happens again, a rank reads other data or makes other calls."
        )
