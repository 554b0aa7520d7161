"""Saved states: exact where nothing has changed, refused or followed where something has."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix import mixture_state
from ddkmix.apportion import ROW, share_out, split
from ddkmix.errors import DataError
from ddkmix.index import DomainRows
from ddkmix.loader import DomainMixture
from ddkmix.mixture_state import StreamIdentity, from_json, to_json
from ddkmix.planner import PlannerState
from tests.hand_made import numbered_rows, unread_rows

SETTINGS = {"batch_rows": 4, "seed": 0, "count": "rows"}
HALF = ROW // 2


def identity_of(*domains: str, data: Mapping[str, str] | None = None, **changes: Any) -> StreamIdentity:
    """Domains a, b, ... with data of the same name, unless told otherwise."""
    named = {name: f"data of {name}" for name in sorted(domains)}
    return StreamIdentity(data={**named, **(data or {})}, settings={**SETTINGS, **changes})


def state_of(weights: Sequence[int], credit: Sequence[int], served: Sequence[int]) -> PlannerState:
    """A planner's state in the middle of a run."""
    return PlannerState(step=7, version=3, weights=tuple(weights), credit=tuple(credit), served=tuple(served))


def saved(identity: StreamIdentity, planner: PlannerState) -> dict[str, Any]:
    """Through JSON, with keys in another order, as a file may give it back."""
    return json.loads(json.dumps(to_json(identity, planner), sort_keys=True))


def equal_weights(count: int) -> tuple[int, ...]:
    """Natural weights of domains of equal size."""
    return share_out(ROW, [1] * count)


AB = state_of([HALF, HALF], [5, -5], [10, 12])

# --- the same stream --------------------------------------------------------------------------------


def test_a_state_comes_back_whole() -> None:
    """The planner's state, and nothing to tell."""
    for allow_changes in (False, True):
        state = saved(identity_of("a", "b"), AB)
        assert (AB, []) == from_json(
            state, identity_of("a", "b"), equal_weights(2), allow_changes=allow_changes
        )


@pytest.mark.parametrize("state", [{}, {"format": 1}, {"format": "2"}])
def test_another_format_is_refused(state: dict[str, Any]) -> None:
    """Also when changes are allowed: the message names both formats."""
    with pytest.raises(DataError, match=r"has format .* and this version reads 2; go on with the version"):
        from_json(state, identity_of("a"), (ROW,), allow_changes=True)


# --- what has changed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "identity"),
    [
        (["domain 'b' was removed"], identity_of("a")),
        (["domain 'c' was added"], identity_of("a", "b", "c")),
        (["domain 'b' was removed", "domain 'c' was added"], identity_of("a", "c")),
        (
            ["the data of domain 'b' changed (data of b to other data o)"],
            identity_of("a", "b", data={"b": "other data of b"}),
        ),
        (["count was 'rows' and is 'tokens'"], identity_of("a", "b", count="tokens")),
        (["new was None and is 3"], identity_of("a", "b", new=3)),
        (
            ["domain 'a' was removed", "domain 'c' was added", "batch_rows was 4 and is 8"],
            identity_of("b", "c", batch_rows=8),
        ),
    ],
)
def test_each_change_is_refused_and_told(expected: list[str], identity: StreamIdentity) -> None:
    """One line by default; the same phrases, one by one, when changes are allowed."""
    natural = equal_weights(len(identity.data))
    with pytest.raises(DataError) as info:
        from_json(saved(identity_of("a", "b"), AB), identity, natural)
    assert (
        f"the saved mixture state is of another stream: {'; '.join(expected)}. Restore these to go on "
        "exactly, or allow changes (load_state_dict(..., allow_changes=True); ddkmix train --resume "
        "--allow-changes)."
    ) == str(info.value)
    _, changes = from_json(saved(identity_of("a", "b"), AB), identity, natural, allow_changes=True)
    assert expected == changes


@pytest.mark.parametrize("allow_changes", [False, True])
def test_another_order_is_always_refused(allow_changes: bool) -> None:
    """In the middle of an epoch it would serve some rows twice and others never."""
    with pytest.raises(DataError) as info:
        from_json(
            saved(identity_of("a", "b"), AB),
            identity_of("a", "b", seed=1),
            equal_weights(2),
            allow_changes=allow_changes,
        )
    assert (
        "the saved mixture state has seed = 0 and this mixture 1; it orders the rows, so a change would "
        "repeat some and lose others. Restore it, or start a new run."
    ) == str(info.value)


@pytest.mark.parametrize("missing", ["data", "settings", "planner"])
def test_a_damaged_state_is_one_line(missing: str) -> None:
    """A file that was edited by hand."""
    state = {k: v for k, v in saved(identity_of("a", "b"), AB).items() if k != missing}
    with pytest.raises(DataError, match="the saved mixture state is damaged") as info:
        from_json(state, identity_of("a", "b"), equal_weights(2))
    assert "\n" not in str(info.value)


def followed(
    planner: PlannerState,
    old: StreamIdentity,
    new: StreamIdentity,
    natural: Sequence[int] | None = None,
) -> PlannerState:
    """The state after an allowed change."""
    natural = natural or equal_weights(len(new.data))
    return from_json(saved(old, planner), new, natural, allow_changes=True)[0]


def test_a_new_domain_by_hand() -> None:
    """c comes with its natural third; a and b keep 3 : 1 of the rest, their places and their credits."""
    planner = state_of([HALF + HALF // 2, HALF // 2], [5, -5], [10, 12])
    found = followed(planner, identity_of("a", "b"), identity_of("a", "b", "c"))
    assert [0.5, 1 / 6, 1 / 3] == pytest.approx([w / ROW for w in found.weights], abs=1e-9)
    assert ((5, -5, 0), (10, 12, 0)) == (found.credit, found.served)
    assert (7, 4) == (found.step, found.version)


def test_a_new_name_between_others_moves_nobody() -> None:
    """Domains are told apart by name and not by place."""
    found = followed(AB, identity_of("b", "d"), identity_of("a", "b", "c", "d"))
    assert ((0, 5, 0, -5), (0, 10, 0, 12)) == (found.credit, found.served)


def test_a_removed_domain_by_hand() -> None:
    """What b was owed, 8 units, goes to a and c as 3 : 1; their weights grow in proportion."""
    planner = state_of([ROW * 3 // 8, HALF, ROW // 8], [-5, 8, -3], [10, 11, 12])
    found = followed(planner, identity_of("a", "b", "c"), identity_of("a", "c"))
    assert (ROW * 3 // 4, ROW // 4) == found.weights
    assert ((1, -1), (10, 12)) == (found.credit, found.served)


def test_other_data_start_at_the_first_row() -> None:
    """The weight and the credit stay: these are promises about the domain."""
    found = followed(AB, identity_of("a", "b"), identity_of("a", "b", data={"b": "new"}))
    assert (AB.weights, AB.credit, (10, 0)) == (found.weights, found.credit, found.served)


def test_a_removed_domain_that_comes_back_starts_anew() -> None:
    """A state remembers only the domains it was saved with."""
    without = followed(AB, identity_of("a", "b"), identity_of("a"))
    back = followed(without, identity_of("a"), identity_of("a", "b"))
    assert ((10, 0), (0, 0)) == (back.served, back.credit)


def test_other_settings_keep_weights_credits_and_places() -> None:
    """Only the version tells ranks that something happened."""
    for changes in ({"batch_rows": 8}, {"cap_rows": {"a": 3}}):
        found = followed(AB, identity_of("a", "b"), identity_of("a", "b", **changes))
        assert replace(AB, version=4) == found


def test_credits_of_another_unit_are_dropped() -> None:
    """Rows owed mean nothing where weights count tokens."""
    found = followed(AB, identity_of("a", "b"), identity_of("a", "b", count="tokens"))
    assert ((0, 0), AB.served, AB.weights) == (found.credit, found.served, found.weights)


def test_when_every_domain_is_replaced_natural_weights_start() -> None:
    """Nothing is left to be kept but the step."""
    found = followed(AB, identity_of("a", "b"), identity_of("c", "d"), (ROW // 4, ROW // 4 * 3))
    assert ((ROW // 4, ROW // 4 * 3), (0, 0), (0, 0)) == (found.weights, found.credit, found.served)
    assert 7 == found.step


def test_when_those_with_weight_are_gone_natural_weights_start() -> None:
    """a had all the weight; b, which had none, keeps its place and what it is owed."""
    planner = state_of([ROW, 0], [-5, 5], [10, 12])
    found = followed(planner, identity_of("a", "b"), identity_of("b", "c"), (ROW // 4, ROW // 4 * 3))
    assert (ROW // 4, ROW // 4 * 3) == found.weights
    assert (12, 0) == found.served
    assert 0 == sum(found.credit)


def test_a_domain_without_weight_stays_without() -> None:
    """A policy that has switched it off is not overruled by a new domain."""
    planner = state_of([ROW, 0], [0, 0], [10, 12])
    found = followed(planner, identity_of("a", "b"), identity_of("a", "b", "c"))
    assert 0 == found.weights[1]
    assert [2 / 3, 1 / 3] == pytest.approx([found.weights[0] / ROW, found.weights[2] / ROW], abs=1e-9)


Case = tuple[dict[str, str], list[int], list[int], list[int], dict[str, str], list[int]]
"""Old domains with raw weights, credits and places; new domains with their sizes."""


@st.composite
def changes_of(draw: Any) -> Case:
    """Two streams over some of eight names, with old raw weights, credits and places, and natural ones."""
    names = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from(["x", "y"]), min_size=1)
    old, new = draw(names), draw(names)
    raw = draw(st.lists(st.integers(0, 50), min_size=len(old), max_size=len(old)).filter(any))
    credit = draw(st.lists(st.integers(-2 * ROW, 2 * ROW), min_size=len(old), max_size=len(old)))
    served = draw(st.lists(st.integers(0, 10**9), min_size=len(old), max_size=len(old)))
    natural = draw(st.lists(st.integers(1, 50), min_size=len(new), max_size=len(new)))
    return old, raw, credit, served, new, natural


def check_change(case: Case) -> None:
    """What holds after any change of domains and data."""
    old, raw, credit, served, new, sizes = case
    old_names, new_names = sorted(old), sorted(new)
    credit = [*credit[:-1], -sum(credit[:-1])]
    before, natural = state_of(share_out(ROW, raw), credit, served), share_out(ROW, sizes)
    old_identity = StreamIdentity(data={n: old[n] for n in old_names}, settings=SETTINGS)
    new_identity = StreamIdentity(data={n: new[n] for n in new_names}, settings=SETTINGS)
    after = followed(before, old_identity, new_identity, natural)
    if old == new:
        assert before == after
        return
    assert (ROW, 0) == (sum(after.weights), sum(after.credit))
    assert min(after.weights) >= 0
    was = dict(zip(old_names, zip(before.weights, before.served, strict=True), strict=True))
    kept = sum(was[n][0] for n in new_names if n in was)
    rest = ROW - sum(w for n, w in zip(new_names, natural, strict=True) if n not in was)
    for i, name in enumerate(new_names):
        same = name in was and old[name] == new[name]
        assert (was[name][1] if same else 0) == after.served[i]
        share = Fraction(was[name][0] * rest, kept) if name in was and kept else natural[i]
        assert (share > 0) == (after.weights[i] > 0)
        assert abs(share - after.weights[i]) <= len(new)
    if set(old) <= set(new):
        assert [c for n, c in zip(new_names, after.credit, strict=True) if n in was] == credit, (
            "nobody's credit moves when domains are only added"
        )


@settings(deadline=None, derandomize=True, max_examples=200)
@given(changes_of())
def test_any_change_keeps_what_can_be_kept(case: Case) -> None:
    """Credits cancel, weights sum to 2^32, kept domains keep places and proportions, others start at 0."""
    check_change(case)


@pytest.mark.parametrize("sabotage", ["place", "credit"])
def test_the_check_notices_states_that_follow_badly(monkeypatch: pytest.MonkeyPatch, sabotage: str) -> None:
    """Places that go with the position instead of the name; credit that leaves with its domain."""
    case = (
        {"a": "x", "b": "x", "c": "x"},
        [1, 2, 1],
        [9, -4, -5],
        [10, 11, 12],
        {"b": "x", "c": "x"},
        [1, 1],
    )
    check_change(case)
    if sabotage == "credit":
        monkeypatch.setattr(mixture_state, "split", lambda total, parts: [0] * len(parts))
    else:
        follow = mixture_state._follow

        def by_place(planner: PlannerState, *rest: Any) -> PlannerState:
            found = follow(planner, *rest)
            return replace(found, served=planner.served[: len(found.served)])

        monkeypatch.setattr(mixture_state, "_follow", by_place)
    with pytest.raises(AssertionError):
        check_change(case)


def test_a_loan_that_is_split_loses_no_unit() -> None:
    """Also negative amounts, and weights of which some are zero."""
    for total in (-7, -1, 0, 1, 10, 3 * ROW + 1):
        shares = split(total, [3, 0, 4])
        assert total == sum(shares)
        assert 0 == shares[1]


# --- by content -------------------------------------------------------------------------------------

NAMES = ("books", "code", "math", "prose")
COUNTS = {"books": 7, "code": 12, "math": 9, "prose": 30}
FIRST = {name: 1000 * (i + 1) for i, name in enumerate(NAMES)}
Data = dict[str, DomainRows]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Four domains whose rows name themselves."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        name: numbered_rows(folder, name, COUNTS[name], length=2, seq_len=2, first=FIRST[name])
        for name in NAMES
    }


def tokens_by_domain(mixture: DomainMixture, steps: int) -> dict[str, list[int]]:
    """The rows of each domain in the order in which they arrive."""
    found: dict[str, list[int]] = {name: [] for name in NAMES}
    for _ in range(steps):
        for token in next(mixture)["input_ids"][:, 0].tolist():
            found[NAMES[token // 1000 - 1]].append(token)
    return found


@pytest.fixture(scope="module")
def alone(data: Data) -> dict[str, list[int]]:
    """The stream of each domain by itself."""
    return {
        name: tokens_by_domain(DomainMixture({name: data[name]}, batch_rows=20), 40)[name] for name in NAMES
    }


def check_chain(
    data: Data,
    alone: dict[str, list[int]],
    chain: Sequence[tuple[Sequence[str], int]],
    load: Callable[[DomainMixture, dict[str, Any]], object],
) -> None:
    """Each mixture takes the state of the one before; kept domains go on with exactly their next rows."""
    place: dict[str, int] = {}
    state = None
    for names, steps in chain:
        mixture = DomainMixture({name: data[name] for name in names}, batch_rows=6)
        if state is not None:
            load(mixture, state)
        place = {name: place.get(name, 0) for name in names}
        for name, tokens in tokens_by_domain(mixture, steps).items():
            start = place.get(name, 0)
            assert alone[name][start : start + len(tokens)] == tokens
            if name in place:
                place[name] += len(tokens)
        assert place == mixture.served
        assert 0 == sum(mixture.state.credit)
        state = json.loads(json.dumps(mixture.state_dict()))


def allowed(mixture: DomainMixture, state: dict[str, Any]) -> object:
    """Go on with whatever has changed."""
    return mixture.load_state_dict(state, allow_changes=True)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    chain=st.lists(
        st.tuples(st.lists(st.sampled_from(NAMES), min_size=1, unique=True), st.integers(0, 6)),
        min_size=2,
        max_size=6,
    )
)
def test_kept_domains_go_on_with_their_next_rows(
    data: Data, alone: dict[str, list[int]], chain: list[tuple[list[str], int]]
) -> None:
    """Through any chain of added, removed, re-added and replaced domains, by the tokens that arrive."""
    check_chain(data, alone, chain, allowed)


CHAIN = ((("code", "math"), 5), (("code", "prose"), 4), (("books", "code", "math"), 5))


def test_the_chain_check_notices_a_stream_that_starts_anew(data: Data, alone: dict[str, list[int]]) -> None:
    """A saboteur that ignores the state repeats rows."""
    check_chain(data, alone, CHAIN, allowed)
    with pytest.raises(AssertionError):
        check_chain(data, alone, CHAIN, lambda *_: None)


def test_a_stream_resumes_exactly_after_a_change(data: Data) -> None:
    """The state that follows a change is a state like any other."""
    first = DomainMixture({name: data[name] for name in ("code", "math")}, batch_rows=6)
    tokens_by_domain(first, 5)
    second = DomainMixture({name: data[name] for name in ("code", "prose")}, batch_rows=6)
    changes = second.load_state_dict(first.state_dict(), allow_changes=True)
    assert ["domain 'math' was removed", "domain 'prose' was added"] == changes
    for _ in range(4):
        again = DomainMixture({name: data[name] for name in ("code", "prose")}, batch_rows=6)
        assert [] == again.load_state_dict(json.loads(json.dumps(second.state_dict())))
        assert second.state == again.state
        assert next(second)["input_ids"].tolist() == next(again)["input_ids"].tolist()


def test_a_refused_state_changes_nothing(data: Data) -> None:
    """The mixture goes on as it was."""
    first = DomainMixture({name: data[name] for name in ("code", "math")}, batch_rows=6)
    second = DomainMixture({name: data[name] for name in ("code", "prose")}, batch_rows=6)
    tokens_by_domain(second, 2)
    before = second.state_dict()
    with pytest.raises(DataError, match="domain 'math' was removed; domain 'prose' was added"):
        second.load_state_dict(first.state_dict())
    assert before == second.state_dict()


def test_other_data_under_the_same_name_start_at_their_first_row(data: Data, tmp_path: Path) -> None:
    """Row for row, while the other domain goes on."""
    other = numbered_rows(tmp_path, "math", 9, length=2, seq_len=2, first=3000, fingerprint="other")
    first = DomainMixture({name: data[name] for name in ("code", "math")}, batch_rows=6)
    tokens_by_domain(first, 3)
    second = DomainMixture({"code": data["code"], "math": other}, batch_rows=6)
    (change,) = second.load_state_dict(first.state_dict(), allow_changes=True)
    assert "the data of domain 'math' changed (f to other)" == change
    assert first.served["code"] == second.served["code"]
    assert 0 == second.served["math"]
    next(second)


def test_a_lower_limit_may_be_resumed_under(data: Data) -> None:
    """code has made more than the one epoch that is now allowed: math goes on alone."""
    pair = {name: data[name] for name in ("code", "math")}
    first = DomainMixture(pair, batch_rows=6)
    tokens_by_domain(first, 6)
    assert first.served["code"] > COUNTS["code"]
    second = DomainMixture({**pair, "code": replace(pair["code"], max_epochs=1.0)}, batch_rows=6)
    (change,) = second.load_state_dict(first.state_dict(), allow_changes=True)
    assert "cap_rows was {} and is {'code': 12}" == change
    assert [] == tokens_by_domain(second, 5)["code"]
    assert 0 == second.state.credit[0]


def test_large_credits_of_gone_domains_are_worked_off() -> None:
    """Ten domains leave two, of which one is owed four rows: within the bound of two after a few steps."""
    rows = {name: unread_rows(name, [[1] * 50]) for name in "abcdefghij"}
    many = DomainMixture(rows, batch_rows=1)
    state = many.state_dict()
    state["planner"]["credit"] = [4 * ROW, 0, *[-ROW // 2] * 8]
    few = DomainMixture({name: rows[name] for name in "ab"}, batch_rows=1)
    few.load_state_dict(state, allow_changes=True)
    plans = few._plans
    for _ in range(8):
        plans.plan()
        plans.consume()
    assert max(map(abs, plans.consumed.credit)) < ROW
