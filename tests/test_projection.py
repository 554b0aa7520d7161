"""Projections to the end of a run: by hand, and against planning every single step of it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ddkmix.errors import DataError
from ddkmix.planner import (
    OnCap,
    PlannerState,
    PlanSettings,
    initial_state,
    plan_step,
    quantise,
    with_weights,
)
from ddkmix.projection import DomainProjection, Projection, cap_warning, end_warning, news, project

Project = Callable[[PlanSettings, PlannerState, int], Projection]
NAMES = "abcdefghijklmnopqrstuvwxyz"


def simplex(*weights: float) -> np.ndarray:
    """Weights, normalised."""
    vector = np.array(weights, dtype=np.float64)
    return vector / vector.sum()


def settings_of(
    caps: Sequence[int | None], *, batch_rows: int = 4, on_cap: OnCap = "renormalize"
) -> PlanSettings:
    """Domains a, b, c, ... of ten rows each."""
    return PlanSettings(
        domains=tuple(NAMES[: len(caps)]),
        batch_rows=batch_rows,
        num_rows=(10,) * len(caps),
        cap_rows=tuple(caps),
        on_cap=on_cap,
    )


def numbers(projection: Projection) -> dict[str, tuple[float, int | None]]:
    """Rows, rounded for comparison, and the step of the cap."""
    return {name: (round(d.rows, 6), d.cap_step) for name, d in projection.domains.items()}


# --- by hand ----------------------------------------------------------------------------------------


def test_without_caps_rows_are_weight_times_rows() -> None:
    """10 steps of 4 rows at (3/4, 1/4) are 30 and 10 rows: 3 epochs and 1."""
    options = settings_of([None, None])
    projection = project(options, initial_state(options, simplex(3, 1)), 10)
    assert {"a": (30.0, None), "b": (10.0, None)} == numbers(projection)
    assert [3.0, 1.0] == [domain.epochs for domain in projection.domains.values()]
    assert (10, {}) == (projection.end_step, projection.capped())


def test_what_a_capped_domain_leaves_speeds_up_the_others() -> None:
    """a takes 15 of its 3/4 in step 5 (20 rows); the other 20 go to b and c, 3 : 1 above 3.75 and 1.25."""
    options = settings_of([15, None, None])
    projection = project(options, initial_state(options, simplex(12, 3, 1)), 10)
    assert {"a": (15.0, 5), "b": (18.75, None), "c": (6.25, None)} == numbers(projection)
    assert {"a": {"epochs": 1.5, "cap_step": 5}} == projection.capped()


def test_one_cap_brings_the_next_one_forward() -> None:
    """At (1/2, 1/4, 1/4) a stops at 4 rows after 8; b then takes half, so its 7 come 10 rows later (step 5),
    and c, which had 7 as well, takes all of the last 2 rows. At its first speed b would have had 5."""
    options = settings_of([4, 7, None])
    projection = project(options, initial_state(options, simplex(2, 1, 1)), 5)
    assert {"a": (4.0, 2), "b": (7.0, 5), "c": (9.0, None)} == numbers(projection)


@pytest.mark.parametrize("on_cap", ["stop", "error"])
def test_stop_and_error_end_at_the_first_cap(on_cap: OnCap) -> None:
    """a has 20 rows and takes 3 a step: the 7th step would need 21, so 6 are taken, and b serves 6 rows."""
    options = settings_of([20, 7], on_cap=on_cap)
    projection = project(options, initial_state(options, simplex(3, 1)), 10)
    assert {"a": (18.0, 7), "b": (6.0, None)} == numbers(projection)
    assert 6 == projection.end_step


@pytest.mark.parametrize("on_cap", ["renormalize", "stop"])
def test_a_cap_that_is_just_enough_is_none(on_cap: OnCap) -> None:
    """30 and 10 rows are allowed and 30 and 10 are served: nothing happens before the end."""
    options = settings_of([30, 10], on_cap=on_cap)
    projection = project(options, initial_state(options, simplex(3, 1)), 10)
    assert {"a": (30.0, None), "b": (10.0, None)} == numbers(projection)
    assert 10 == projection.end_step


def test_rows_that_do_not_last_end_the_run_at_a_whole_step() -> None:
    """14 + 8 rows are five batches of 4 and two rows that nobody gets."""
    options = settings_of([14, 8])
    projection = project(options, initial_state(options, simplex(3, 1)), 10)
    assert 5 == projection.end_step
    assert {"a": (14.0, 5), "b": (6.0, 5)} == numbers(projection)


def test_a_domain_without_weight_stays_where_it_is() -> None:
    """It is not served, its cap is never reached, and it cannot keep a run going."""
    options = settings_of([8, 5])
    projection = project(options, initial_state(options, simplex(1, 0)), 10)
    assert {"a": (8.0, 2), "b": (0.0, None)} == numbers(projection)
    assert 2 == projection.end_step


def test_a_domain_at_its_cap_says_the_present_step() -> None:
    """a served its 3 rows in step 1; at step 2 it is history, and b takes everything."""
    options = settings_of([3, None])
    state = initial_state(options, simplex(3, 1))
    for _ in range(2):
        _, state = plan_step(options, state)
    assert {"a": (3.0, 2), "b": (37.0, None)} == numbers(project(options, state, 10))


def test_after_the_last_step_a_projection_is_what_was_served() -> None:
    """Whatever is still owed."""
    options = settings_of([None, None, None])
    state = initial_state(options, simplex(5, 2, 1))
    for _ in range(3):
        _, state = plan_step(options, state)
    projection = project(options, state, 3)
    assert [float(rows) for rows in state.served] == [d.rows for d in projection.domains.values()]
    assert 3 == projection.end_step


def test_shares_of_tokens_become_rows_of_their_size() -> None:
    """Equal shares of tokens, rows of 10 and 30 tokens: three rows of a for each of b."""
    options = settings_of([None, None])
    projection = project(options, initial_state(options, simplex(1, 1)), 10, row_sizes=[10.0, 30.0])
    assert {"a": (30.0, None), "b": (10.0, None)} == numbers(projection)
    options = settings_of([15, None])
    projection = project(options, initial_state(options, simplex(1, 1)), 10, row_sizes=[10.0, 30.0])
    assert {"a": (15.0, 5), "b": (25.0, None)} == numbers(projection)


# --- against the plan of every step -----------------------------------------------------------------


def planned(options: PlanSettings, state: PlannerState, steps: int) -> tuple[PlannerState, list[int | None]]:
    """The state at the end, by really planning, and the step in which each domain got to its cap."""
    reached: list[int | None] = [
        state.step if cap is not None and served >= cap else None
        for cap, served in zip(options.cap_rows, state.served, strict=True)
    ]
    while state.step < steps:
        try:
            _, state = plan_step(options, state)
        except DataError:
            break
        for i, cap in enumerate(options.cap_rows):
            if reached[i] is None and cap is not None and state.served[i] >= cap:
                reached[i] = state.step
    return state, reached


def moved(options: PlanSettings, vectors: Sequence[Sequence[float]]) -> PlannerState:
    """A state with a history: some steps under each of the weights."""
    state = initial_state(options, simplex(*vectors[0]))
    for vector in vectors:
        state = with_weights(state, quantise(simplex(*vector)))
        for _ in range(3):
            try:
                _, state = plan_step(options, state)
            except DataError:
                return state
    return state


def check_projection(
    options: PlanSettings, state: PlannerState, steps: int, project: Project = project
) -> None:
    """Rows at the end, steps of caps and the last step agree with planning every step."""
    projection = project(options, state, steps)
    end, reached = planned(options, state, steps)
    # a row comes at any time within its window, which is 1 / weight rows of the mixture long
    least = min(w for w in state.weights if w) / sum(state.weights)
    late = math.ceil(2 * sum(1 / k for k in range(1, len(reached) + 1)) / least / options.batch_rows) + 1
    if options.on_cap == "renormalize":
        assert abs(projection.end_step - end.step) <= 1
        tolerance = len(reached) + 1.0 + options.batch_rows * abs(projection.end_step - end.step)
    else:
        assert 0 <= end.step - projection.end_step <= late
        tolerance = len(reached) + 1.0 + options.batch_rows * (end.step - projection.end_step)
    for i, name in enumerate(options.domains):
        domain = projection.domains[name]
        assert domain.epochs == domain.rows / options.num_rows[i]
        assert abs(domain.rows - end.served[i]) <= tolerance, (name, domain, end)
        assert domain.rows <= (options.cap_rows[i] or math.inf) + 1e-6
        if domain.cap_step is not None and reached[i] is not None:
            assert abs(domain.cap_step - reached[i]) <= late
    assert sum(d.rows for d in projection.domains.values()) == pytest.approx(
        sum(state.served) + (projection.end_step - state.step) * options.batch_rows, abs=len(reached)
    )


weight = st.one_of(st.just(0.0), st.floats(0.02, 1.0))


def drawn(data: Any, on_cap: OnCap) -> tuple[PlanSettings, PlannerState]:
    """Any caps, weights and history."""
    count = data.draw(st.integers(1, 5))
    caps = data.draw(st.lists(st.one_of(st.none(), st.integers(1, 150)), min_size=count, max_size=count))
    vector = st.lists(weight, min_size=count, max_size=count).filter(any)
    options = settings_of(caps, batch_rows=data.draw(st.integers(1, 9)), on_cap=on_cap)
    return options, moved(options, data.draw(st.lists(vector, min_size=1, max_size=4)))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_a_projection_is_the_plan_within_a_few_rows(data: Any) -> None:
    """Under `renormalize`, for any weights, caps and history, to the end of the run or of the rows."""
    options, state = drawn(data, "renormalize")
    check_projection(options, state, state.step + 40)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data(), on_cap=st.sampled_from(["stop", "error"]))
def test_a_projection_knows_where_a_run_stops(data: Any, on_cap: OnCap) -> None:
    """Under `stop` and `error` it never promises a step that is not taken."""
    options, state = drawn(data, on_cap)
    # a domain without weight may be due for what it is owed from before; that is not followed
    assume(all(w or c <= 0 for w, c in zip(state.weights, state.credit, strict=True)))
    check_projection(options, state, state.step + 40)


def ignoring_the_others(options: PlanSettings, state: PlannerState, steps: int) -> Projection:
    """A saboteur: what one domain leaves is lost (as `planner.project_epochs` had it)."""
    rows = (steps - state.step) * options.batch_rows
    domains = {}
    for i, name in enumerate(options.domains):
        cap = options.cap_rows[i] or math.inf
        served = float(min(state.served[i] + rows * state.weights[i] / sum(state.weights), cap))
        at = None if served < cap else state.step + 1
        domains[name] = DomainProjection(rows=served, epochs=served / options.num_rows[i], cap_step=at)
    return Projection(domains=domains, end_step=steps)


def forgetting_credit(options: PlanSettings, state: PlannerState, steps: int) -> Projection:
    """A saboteur: what is owed from before does not count."""
    blank = PlannerState(
        step=state.step,
        version=0,
        weights=state.weights,
        credit=tuple(50 * c for c in state.credit),
        served=state.served,
    )
    return project(options, blank, steps)


@pytest.mark.parametrize("sabotaged", [ignoring_the_others, forgetting_credit])
def test_the_check_notices_wrong_projections(sabotaged: Project) -> None:
    """Rows that are lost, and credit that counts fifty times."""
    options = settings_of([40, None, None])
    state = moved(options, [[6, 2, 1], [5, 3, 1]])
    check_projection(options, state, 60)
    with pytest.raises(AssertionError):
        check_projection(options, state, 60, project=sabotaged)


def test_many_domains_are_projected_within_a_few_rows() -> None:
    """Every one of them reaches its cap at another time."""
    generator = np.random.default_rng(0)
    caps = [int(cap) for cap in generator.integers(10, 120, size=26)]
    options = settings_of([*caps[:25], None], batch_rows=16)
    state = initial_state(options, generator.dirichlet(np.ones(26)))
    end, _ = planned(options, state, 150)
    projection = project(options, state, 150)
    assert sum(d.cap_step is not None for d in projection.domains.values()) > 20
    for name, served in zip(options.domains, end.served, strict=True):
        assert served == pytest.approx(projection.domains[name].rows, abs=3)


# --- words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_cap", "then"),
    [
        ("renormalize", "then the other domains share its weight"),
        ("stop", "then the run ends"),
        ("error", "then the run fails"),
    ],
)
def test_a_warning_says_when_and_what_then(on_cap: OnCap, then: str) -> None:
    """Domain, limit, step of how many, and what on_cap does."""
    options = settings_of([15, None], on_cap=on_cap)
    projection = project(options, initial_state(options, simplex(3, 1)), 10)
    expected = (
        f"a reaches its limit of 1.5 epochs (15 rows) at step 5 of 10; {then} (mixture.on_cap: {on_cap})."
    )
    assert expected == cap_warning(options, "a", projection, 10)


def test_a_run_that_ends_early_says_so() -> None:
    """The last step, how many were asked for, and two ways out."""
    options = settings_of([14, 8])
    projection = project(options, initial_state(options, simplex(3, 1)), 10)
    expected = [
        "under these weights the run ends after step 5 of 10, when no row may be served (mixture.on_cap: "
        "renormalize); raise mixture.max_epochs or lower trainer.steps."
    ]
    assert expected == end_warning(options, projection, 10)
    assert [] == end_warning(options, projection, 5)


def test_news_come_once_per_change() -> None:
    """a will reach its limit; still so: silence; no longer; again; and then it is there: silence after it."""
    options = settings_of([20, None])
    state = initial_state(options, simplex(3, 1))
    lines, before = [], None
    for weights in ([3, 1], [3, 1], [1, 9], [3, 1], [3, 1], [3, 1], [3, 1]):
        state = with_weights(state, quantise(simplex(*weights)))
        projection = project(options, state, 12)
        lines.append(news(options, state, 12, projection, before))
        before = {"step": state.step, "projected": projection.capped()}
        for _ in range(2):
            _, state = plan_step(options, state)
    assert [[True], [], [True], [True], [], [True], []] == [[bool(x) for x in line] for line in lines]
    assert "a reaches its limit of 2 epochs (20 rows) at step 7 of 12" in lines[0][0]
    assert "a no longer reaches its limit before step 12 under the new weights." == lines[2][0]
    assert "a reaches its limit" in lines[3][0]
    assert "a is at its limit of 2 epochs since step 10" in lines[5][0]


def test_news_of_an_early_end_come_with_the_news_of_a_cap() -> None:
    """Both lines at once, and neither again."""
    options = settings_of([14, 8])
    state = initial_state(options, simplex(3, 1))
    projection = project(options, state, 10)
    lines = news(options, state, 10, projection, None)
    assert ["a reaches", "b reaches", "under these"] == [" ".join(line.split()[:2]) for line in lines]
    assert [] == news(options, state, 10, projection, {"step": 0, "projected": projection.capped()})
