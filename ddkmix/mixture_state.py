"""The saved state of a mixture: what it must agree with, and how it follows a change of domains.

A state names the data and the settings that shape the stream. Where they are the same, the stream goes on
exactly. Where they differ, it does so only on request: domains are told apart by name, one whose data are the
same keeps its place, and nothing that happens to one domain moves another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ddkmix.apportion import ROW, share_out, split
from ddkmix.errors import DataError
from ddkmix.planner import PlannerState

STATE_FORMAT = 2
_ORDER = ("seed", "block_rows")
"""Settings that say which row is a domain's j-th; others would repeat rows of the epoch and lose some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamIdentity:
    """What the order of a stream depends on, beside the planner's state."""

    data: Mapping[str, str]
    """Fingerprint of each domain's rows, sorted by domain."""
    settings: Mapping[str, Any]
    """JSON-able settings that shape the stream."""


def to_json(identity: StreamIdentity, planner: PlannerState) -> dict[str, Any]:
    """A JSON-able state."""
    return {
        "format": STATE_FORMAT,
        "data": dict(identity.data),
        "settings": dict(identity.settings),
        "planner": planner.to_json(),
    }


def from_json(
    state: Mapping[str, Any],
    identity: StreamIdentity,
    natural: Sequence[int],
    *,
    allow_changes: bool = False,
) -> tuple[PlannerState, list[str]]:
    """The planner's state, and what has changed since it was saved.

    Args:
        state: what `to_json` gave.
        identity: of the mixture that is to go on.
        natural: its natural weights in units of 2^-32, for domains that are new.
        allow_changes: go on with other domains, other data or other settings.

    Raises:
        DataError: it is no state of this format, something has changed and `allow_changes` is not set, or
            what orders the rows (seed, block_rows) has changed.
    """
    if state.get("format") != STATE_FORMAT:
        raise DataError(
            f"the saved mixture state has format {state.get('format')!r} and this version reads "
            f"{STATE_FORMAT}; go on with the version that saved it."
        )
    try:
        planner = PlannerState.from_json(dict(state["planner"]))
        changes = _changes(state, identity)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the saved mixture state is damaged ({type(error).__name__}: {error}); resume from an older one."
        ) from None
    if not changes:
        return planner, []
    for name in _ORDER:
        was, now = state["settings"].get(name), identity.settings.get(name)
        if was != now:
            raise DataError(
                f"the saved mixture state has {name} = {was!r} and this mixture {now!r}; it orders the rows, "
                "so a change would repeat some and lose others. Restore it, or start a new run."
            )
    if not allow_changes:
        raise DataError(
            f"the saved mixture state is of another stream: {'; '.join(changes)}. Restore these to go on "
            "exactly, or allow changes (load_state_dict(..., allow_changes=True); ddkmix train --resume "
            "--allow-changes)."
        )
    return _follow(planner, state, identity, natural), changes


def _changes(state: Mapping[str, Any], identity: StreamIdentity) -> list[str]:
    """One sentence part for each difference."""
    old, new = state["data"], identity.data
    changes = [f"domain {name!r} was removed" for name in old if name not in new]
    changes += [f"domain {name!r} was added" for name in new if name not in old]
    changes += [
        f"the data of domain {name!r} changed ({old[name][:12]} to {new[name][:12]})"
        for name in new
        if name in old and old[name] != new[name]
    ]
    changes += [
        f"{name} was {state['settings'].get(name)!r} and is {value!r}"
        for name, value in identity.settings.items()
        if state["settings"].get(name) != value
    ]
    return changes


def _follow(
    planner: PlannerState, state: Mapping[str, Any], identity: StreamIdentity, natural: Sequence[int]
) -> PlannerState:
    """The state for other domains.

    Kept domains keep weights in proportion, credits and places; what removed ones were owed goes to the kept
    ones; new domains start with their natural weight, and those with other data at their first row.
    """
    old = sorted(state["data"])
    place = {name: i for i, name in enumerate(old)}
    kept = [name for name in identity.data if name in place]
    added = sum(w for name, w in zip(identity.data, natural, strict=True) if name not in place)
    kept_weight = sum(planner.weights[place[name]] for name in kept)
    wanted: list[Fraction | int] = []
    for name, weight in zip(identity.data, natural, strict=True):
        if name not in place:
            wanted.append(weight)
        elif kept_weight:
            wanted.append(Fraction(planner.weights[place[name]] * (ROW - added), kept_weight))
        else:  # all that had weight are gone
            wanted.append(weight)
    weights = share_out(ROW, wanted)
    same_unit = state["settings"].get("count") == identity.settings.get("count")
    credit = [planner.credit[place[name]] if name in place and same_unit else 0 for name in identity.data]
    heirs = [i for i, name in enumerate(identity.data) if name in place] or list(range(len(credit)))
    owed, parts = -sum(credit), [weights[i] for i in heirs]
    shares = split(owed, parts if any(parts) else [1] * len(parts))
    for i, share in zip(heirs, shares, strict=True):
        credit[i] += share
    served = [
        planner.served[place[name]] if name in place and state["data"][name] == fingerprint else 0
        for name, fingerprint in identity.data.items()
    ]
    return replace(
        planner, version=planner.version + 1, weights=weights, credit=tuple(credit), served=tuple(served)
    )
