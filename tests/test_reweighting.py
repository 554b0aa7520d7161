"""Measure, ask the policy, set the weights: when, from what, and what a resumed run remembers."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from ddkmix import DomainLosses, DomainMixture, GapEvaluator, MixtureBatchSampler, Reweighter
from ddkmix.errors import ConfigError, DataError, NumericsError, RunError
from ddkmix.policies.ddk import Ddk
from ddkmix.reweighting import check_evaluator
from tests.integrations.policies import Rotating
from tests.reference_loop import BATCH_ROWS, COUNTS, DATASETS, INDICES, SEED

LOSSES = {"code": 3.0, "math": 2.0, "prose": 4.0}


class Measures:
    """An evaluator whose losses fall with every measurement."""

    domains = tuple(COUNTS)

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def measure(self, model: Any) -> DomainLosses:
        """A little less than before."""
        self.calls.append(model)
        return DomainLosses.from_means({name: loss - 0.1 * len(self.calls) for name, loss in LOSSES.items()})


def mixture_of(datasets: Any = DATASETS, **options: Any) -> DomainMixture:
    """A mixture of the three datasets."""
    return DomainMixture.from_datasets(
        datasets, **{"batch_rows": BATCH_ROWS, "seed": SEED, "collate_fn": list, **options}
    )


def reweighter_of(
    mixture: Any = None, evaluator: Any = None, policy: Any = None, **options: Any
) -> Reweighter:
    """One that measures every other step and rotates."""
    return Reweighter(
        mixture or mixture_of(),
        evaluator or Measures(),
        policy or Rotating(),
        **{"interval_steps": 2, **options},
    )


def run(reweighter: Reweighter, steps: int) -> list[Any]:
    """A loop from where the mixture is; its batches."""
    done, found = reweighter.mixture.state.step, []
    reweighter.step("model", done)
    for batch in reweighter.mixture.loader(steps=steps):  # type: ignore[attr-defined]
        found.append(batch)
        done += 1
        reweighter.step("model", done)
    return found


def test_it_measures_where_intervals_end() -> None:
    """Before the first step and after every second, with the model it was given; losses are handed out."""
    seen: list[tuple[int, float, float]] = []
    reweighter = reweighter_of(
        on_losses=lambda step, losses, weights: seen.append((step, losses.student_loss[0], weights["code"]))
    )
    run(reweighter, 5)
    assert [0, 2, 4] == [step for step, _, _ in seen]
    assert [2.9, 2.8, 2.7] == pytest.approx([loss for _, loss, _ in seen])
    assert [0.9, 0.05, 0.05] == pytest.approx([weight for _, _, weight in seen])
    assert ["model"] * 3 == reweighter._evaluator.calls  # type: ignore[union-attr]
    assert reweighter.losses is not None


def test_a_step_is_measured_once() -> None:
    """However often a framework calls."""
    reweighter = reweighter_of()
    assert [True, False, False] == [reweighter.step("model", 0) is not None for _ in range(3)]


def test_the_policy_sees_the_rows_that_were_served() -> None:
    """At every update the rows of each domain in all batches so far, counted here one by one; a count that
    the losses bring stays."""
    seen: list[list[int]] = []

    class Counting(Rotating):
        def init(self, losses: DomainLosses, natural_weights: Any) -> dict[str, Any]:
            return self.update({"turn": -1}, losses)

        def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
            assert losses.rows_served is not None
            seen.append(losses.rows_served.tolist())
            return super().update(state, losses)

    reweighter = reweighter_of(policy=Counting())
    batches = run(reweighter, 4)
    items = [[item for batch in batches[:steps] for item in batch] for steps in (0, 2, 4)]
    assert [[sum(item in INDICES[name] for item in each) for name in COUNTS] for each in items] == seen
    assert reweighter.losses is not None
    reweighter.update(replace(reweighter.losses, rows_served=np.array([7, 8, 9])))
    assert [7, 8, 9] == seen[-1]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize("measured", [False, True])
def test_a_run_goes_on_as_if_it_had_not_stopped(stop: int, measured: bool) -> None:
    """Saved before or after the measurement of its step, through JSON: the same batches, every interval
    measured once, the policy's memory kept."""
    whole = reweighter_of()
    wanted = run(whole, 8)
    first = reweighter_of()
    found = run(first, stop - 1) if stop > 1 else []
    first.step("model", stop - 1)
    found.append(next(iter(first.mixture.loader(steps=stop))))  # type: ignore[attr-defined]
    if measured:
        first.step("model", stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = reweighter_of()
    assert [] == second.load_state_dict(state)
    found += run(second, 8)
    assert wanted == found
    counts = [len(each._evaluator.calls) for each in (whole, first, second)]  # type: ignore[union-attr]
    assert counts[0] == counts[1] + counts[2]
    assert whole.state_dict() == second.state_dict()


def test_the_state_is_small_and_plain() -> None:
    """JSON of some hundred bytes."""
    reweighter = reweighter_of(policy="ddk")
    run(reweighter, 2)
    assert len(json.dumps(reweighter.state_dict())) < 2000


def test_a_loop_that_reads_ahead_saves_the_step_it_is_at() -> None:
    """The mixture's state is that step's, the policy's is the last."""
    reweighter = reweighter_of(interval_steps=4)
    run(reweighter, 5)
    assert 4 == reweighter.state_dict(done=4)["mixture"]["planner"]["step"]
    with pytest.raises(ConfigError, match=r"known steps are \[0, 1, 2, 3, 4, 5\]"):
        reweighter.state_dict(done=9)


@pytest.mark.parametrize(
    ("expected", "done"),
    [
        ("finished 1 optimizer steps and the mixture has handed out the rows of 2: something reads ahead", 1),
        ("finished 3 optimizer steps and the mixture has handed out the rows of 2: load the state", 3),
    ],
)
def test_a_loop_and_a_mixture_at_different_steps_are_refused(expected: str, done: int) -> None:
    """A change of weights would come late, or at the wrong step; not only where an interval ends."""
    reweighter = reweighter_of()
    next(reweighter.mixture)  # type: ignore[call-overload]
    next(reweighter.mixture)  # type: ignore[call-overload]
    with pytest.raises(RunError) as info:
        reweighter.step("model", done)
    assert expected in str(info.value)
    assert [] == reweighter._evaluator.calls  # type: ignore[union-attr]


def test_losses_that_are_no_numbers_change_nothing() -> None:
    """Weights, memory and place stay, and the step can be measured again."""
    reweighter = reweighter_of(policy="ddk")
    reweighter.step("model", 0)
    before = reweighter.state_dict()
    with pytest.raises(NumericsError, match="student_loss is not finite"):
        reweighter.update(DomainLosses.from_means({**LOSSES, "math": float("inf")}))
    assert before == reweighter.state_dict()


def test_ones_own_losses_lead_to_the_same_weights() -> None:
    """`update` is `step` without an evaluator."""
    own, measured = Reweighter(mixture_of(), None, "ddk"), reweighter_of(policy="ddk")
    losses = measured.step("model", 0)
    assert losses is not None
    assert measured.mixture.weights == own.update(losses)
    with pytest.raises(ConfigError, match=r"has no evaluator; give it one, or call update"):
        Reweighter(mixture_of(), None, "ddk").step("model", 0)


def test_losses_of_other_domains_are_refused() -> None:
    """They would be taken for those of the mixture's by position."""
    with pytest.raises(ConfigError, match=r"losses are of \['code', 'web'\] and the mixture has"):
        reweighter_of().update(DomainLosses.from_means({"code": 1.0, "web": 2.0}))


def test_a_sampler_is_a_mixture() -> None:
    """What `follow` gives is weighted as what a loader gives."""
    sampler = MixtureBatchSampler(INDICES, batch_rows=BATCH_ROWS, seed=SEED, steps=6)
    reweighter, found = reweighter_of(sampler), []
    reweighter.step("model", 0)
    for done, batch in enumerate(sampler.follow(ListLoader(sampler)), start=1):
        found.append(batch)
        reweighter.step("model", done)
    assert run(reweighter_of(), 6) == found


class ListLoader:
    """A loader that has read everything before it gives anything."""

    def __init__(self, sampler: MixtureBatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Any:
        return iter(list(self.sampler))


def test_metrics_are_numbers_with_names() -> None:
    """Weights and epochs always, losses once there are some."""
    reweighter = reweighter_of()
    names = [f"{kind}/{name}" for kind in ("mixture/weight", "mixture/epochs") for name in COUNTS]
    assert names == list(reweighter.metrics())
    run(reweighter, 2)
    metrics = reweighter.metrics()
    names += [f"{kind}/{name}" for name in COUNTS for kind in ("student_loss", "loss_gap")]
    assert names == list(metrics)
    assert {float} == {type(value) for value in metrics.values()}
    assert 1.0 == pytest.approx(sum(metrics[f"mixture/weight/{name}"] for name in COUNTS))
    assert 2.8 == pytest.approx(metrics["student_loss/code"])


# --- changes ----------------------------------------------------------------------------------------


def saved(steps: int = 3, **options: Any) -> dict[str, Any]:
    """The state after some steps."""
    reweighter = reweighter_of(**options)
    run(reweighter, steps)
    return reweighter.state_dict()


@dataclass(frozen=True)
class Other(Rotating):
    """Another policy of the same form."""


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        ("policy was 'tests.integrations.policies:Rotating Rotating(share=0.9)' and is", {"policy": Other()}),
        (
            "and is 'tests.integrations.policies:Rotating Rotating(share=0.8)'",
            {"policy": Rotating(share=0.8)},
        ),
        ("ddkmix.policies.ddk:Ddk Ddk(uniform_mix=0.5", {"policy": Ddk()}),
    ],
)
def test_another_policy_is_refused_or_begins_anew_at_once(expected: str, options: dict[str, Any]) -> None:
    """With the memory of the old one it would go wrong without a word; it does not wait for the interval."""
    reweighter = reweighter_of(**options)
    with pytest.raises(DataError) as info:
        reweighter.load_state_dict(saved())
    assert expected in str(info.value)
    assert 0 == reweighter.mixture.state.step
    assert 1 == len(reweighter.load_state_dict(saved(), allow_changes=True))
    assert reweighter.step("model", 3) is not None
    assert reweighter.step("model", 3) is None


def test_another_interval_keeps_the_memory() -> None:
    """It is stated, no more."""
    reweighter = reweighter_of(interval_steps=3)
    with pytest.raises(DataError, match="interval_steps was 2 and is 3"):
        reweighter.load_state_dict(saved(4))
    assert ["interval_steps was 2 and is 3"] == reweighter.load_state_dict(saved(4), allow_changes=True)
    assert {"turn": 2} == {"turn": reweighter.state_dict()["policy"]["turn"]}
    assert reweighter.step("model", 4) is None


def test_other_domains_begin_anew_at_once() -> None:
    """The policy has no memory of them; a state saved before the measurement remembers that it is due."""

    class MeasuresTwo(Measures):
        domains = ("code", "math")

        def measure(self, model: Any) -> DomainLosses:
            """Of two domains."""
            return DomainLosses.from_means({"code": 1.0, "math": 2.0})

    def of_two() -> Reweighter:
        return reweighter_of(mixture_of({name: DATASETS[name] for name in ("code", "math")}), MeasuresTwo())

    reweighter = of_two()
    with pytest.raises(DataError, match="domain 'prose' was removed"):
        reweighter.load_state_dict(saved())
    assert ["domain 'prose' was removed"] == reweighter.load_state_dict(saved(), allow_changes=True)
    again = of_two()
    again.load_state_dict(reweighter.state_dict())
    for each in (reweighter, again):
        assert each.step("model", 3) is not None
        assert each.step("model", 3) is None


@pytest.mark.parametrize(
    "state", [{}, {"format": 1}, {"format": 7, "mixture": {}}, {"format": 2, "planner": {}}]
)
def test_what_is_no_state_is_refused(state: dict[str, Any]) -> None:
    """Also a mixture's own."""
    with pytest.raises(DataError, match="this is no state of a Reweighter of this version"):
        reweighter_of().load_state_dict(state)


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        ("interval_steps = 0; it must be at least 1", {"interval_steps": 0}),
        ("policy.name = 'dkd' is unknown; did you mean 'ddk'?", {"policy": "dkd"}),
        ("policy (ddk) has no parameter 'alpha'", {"policy": {"name": "ddk", "alpha": 1}}),
    ],
)
def test_wrong_arguments_are_one_line(expected: str, options: dict[str, Any]) -> None:
    """Before anything is measured."""
    with pytest.raises(ConfigError) as info:
        reweighter_of(**options)
    assert expected in str(info.value)


def test_an_evaluator_of_other_domains_is_refused() -> None:
    """When it is made, not at the first measurement."""

    class OfOne(Measures):
        domains = ("code",)

    with pytest.raises(ConfigError, match=r"the evaluator measures \['code'\] and the mixture has"):
        reweighter_of(evaluator=OfOne())


@pytest.mark.parametrize("evaluator", [{"code": 1.0}, GapEvaluator])
def test_what_cannot_measure_is_no_evaluator(evaluator: Any) -> None:
    """A dict of losses, or the class in place of an object; said at once."""
    with pytest.raises(ConfigError, match="give a GapEvaluator, or an object with measure"):
        check_evaluator(evaluator, ("code", "math"))


# --- guards -----------------------------------------------------------------------------------------

CAPPED = {"cap": 0.5, "evidence": 0.0}


def test_guards_hold_the_weights_of_any_policy() -> None:
    """Rotating asks for 0.9; a cap of 0.5 gives half, the others share what is left."""
    reweighter = reweighter_of(guards=CAPPED)
    reweighter.step("model", 0)
    assert {"code": 0.5, "math": 0.25, "prose": 0.25} == pytest.approx(reweighter.mixture.weights)


def test_a_guarded_run_goes_on_as_if_it_had_not_stopped() -> None:
    """The policy's memory is in its state, inside that of the guards."""
    guards = {"max_move": 0.1, "evidence": 0.0}
    whole = reweighter_of(guards=guards)
    wanted = run(whole, 8)
    first = reweighter_of(guards=guards)
    found = run(first, 4)
    second = reweighter_of(guards=guards)
    assert [] == second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert wanted == found + run(second, 8)
    assert whole.state_dict() == second.state_dict()


def test_other_guards_are_another_reweighter() -> None:
    """Refused; on request begun anew with a measurement. A state from before there were guards had none."""
    first = reweighter_of(guards=CAPPED)
    run(first, 2)
    state = json.loads(json.dumps(first.state_dict()))
    with pytest.raises(DataError, match=r"guards was \{.*'cap': 0.5.*\} and is None"):
        reweighter_of().load_state_dict(state)
    second = reweighter_of(guards={**CAPPED, "cap": 0.6})
    (change,) = second.load_state_dict(state, allow_changes=True)
    assert "'cap': 0.6" in change
    assert second.policy_state is None
    assert second.step("model", 2) is not None
    plain = reweighter_of()
    run(plain, 2)
    old = plain.state_dict()
    del old["settings"]["guards"]
    assert [] == reweighter_of().load_state_dict(old)


def test_guards_that_no_mixture_keeps_are_refused_at_once() -> None:
    """Before anything is measured."""
    with pytest.raises(ConfigError, match=r"guards.floor = 0.4 for each of 3 domains is 1.2"):
        reweighter_of(guards={"floor": 0.4})


def test_a_policy_that_is_no_dataclass_is_still_known_by_its_name() -> None:
    """No address of an object in the settings, with guards or without."""

    class Plain:
        def init(self, losses: DomainLosses, natural_weights: Any) -> dict[str, Any]:
            return {"mixture_weights": natural_weights.tolist()}

        def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
            return state

    for guards in (None, CAPPED):
        one, other = (reweighter_of(policy=Plain(), guards=guards).state_dict() for _ in range(2))
        assert one["settings"] == other["settings"]
        assert (guards is None) == (one["settings"]["guards"] is None)
