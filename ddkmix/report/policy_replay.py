"""`ddkmix replay`: the weights that another policy would have set on the losses that a run has recorded.

It answers "how would this rule have moved", not "where would it have led": the losses are those of the
student that trained on the recorded mixture. (`replay.Replay` plans past steps again; it knows nothing of
policies.)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ddkmix.config import Guards, read_average
from ddkmix.errors import RunError
from ddkmix.overrides import Tree, apply_override
from ddkmix.policies import PolicyState, WeightPolicy, next_state, policy_of
from ddkmix.policies.guards import Guarded, guarded
from ddkmix.policies.protocol import at_interval
from ddkmix.report.gaps import Format, render_markdown, render_table
from ddkmix.report.history import read_intervals
from ddkmix.resolved_config import read_resolved, read_run_config
from ddkmix.types import DomainLosses

CAVEAT = (
    "The losses are those of the recorded mixture: under other weights the student would have learned "
    "otherwise, and other losses would have been measured."
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReplayedUpdate:
    """One weight update of a run, and what the policy makes of the same losses.

    Axis letter: N domains.
    """

    step: int
    domains: tuple[str, ...]
    was: Float[np.ndarray, " N"]
    """Mixture weights that the run's policy set."""
    would: Float[np.ndarray, " N"]
    """Mixture weights that the replayed policy sets."""

    @property
    def moved(self) -> float:
        """Share of the rows that would have been of other domains: half the sum of |would - was|."""
        return float(np.abs(self.would - self.was).sum() / 2)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PolicyReplay:
    """A policy, its guards, and its answers to a run's losses."""

    policy: Mapping[str, Any]
    """Name and parameters that were given."""
    guards: Guards | None
    """None where nothing holds the weights."""
    updates: tuple[ReplayedUpdate, ...]
    notes: tuple[str, ...]
    """What the record does not say, one line each."""


def replay_policy(run_dir: Path, name: str | None = None, overrides: Sequence[str] = ()) -> PolicyReplay:
    """Ask a policy about every measurement that a run's weights were set from.

    Args:
        run_dir: the run.
        name: of the policy; the run's own with its parameters when None.
        overrides: `signal=loss_gap` for a parameter, `guards=off` or `guards.cap=0.4` for the guards, which
            are the run's otherwise.

    Raises:
        ConfigError: the policy, a parameter or the guards are wrong, or the policy needs what the run has not
            measured.
        RunError: the folder is no run, a file of it is damaged, nothing has been measured, or another run
            is to be averaged and cannot be.
    """
    config, records = read_run_config(run_dir), read_intervals(run_dir)
    spec: Tree = config.get("policy", {}) if name is None else {"name": name}
    tree: Tree = {"policy": dict(spec), "guards": config["guards"]}
    for override in overrides:
        whole = override.startswith(("guards.", "guards=", "policy.")) or "=" not in override
        apply_override(tree, override if whole else f"policy.{override}")
    read_average(tree, where="the options")
    interval = (config.get("mixture") or {}).get("interval_steps")
    asked = policy_of(tree["policy"])
    policy = guarded(asked if interval is None else at_interval(asked, int(interval)), tree["guards"])
    anew, notes = (_changes(run_dir, config) if name is None else frozenset()), []
    if anew:
        steps = ", ".join(map(str, sorted(anew)))
        notes.append(f"the policy or its guards were changed at step {steps}; here they are the last ones.")
    if "natural" not in records[0]:
        notes.append(
            "an older ddkmix wrote the run, without natural weights; those of the first interval stand in."
        )
    return PolicyReplay(
        policy=tree["policy"],
        guards=policy.guards if isinstance(policy, Guarded) else None,
        updates=tuple(_updates(policy, records, anew, int(config["trainer"]["steps"]))),
        notes=tuple(notes),
    )


def _updates(
    policy: WeightPolicy, records: Sequence[Mapping[str, Any]], anew: frozenset[int], steps: int
) -> list[ReplayedUpdate]:
    state: PolicyState | None = None
    found: list[ReplayedUpdate] = []
    before: Mapping[str, Any] | None = None
    for record in records:
        if not _is_update(record, before, steps):
            continue
        losses = DomainLosses.from_json(record["losses"])
        served = np.array([record["served"][domain] for domain in losses.domains])
        losses = replace(losses, rows_served=served)
        if record["step"] in anew or (found and found[-1].domains != losses.domains):
            state = None
        was = _set_weights(record, losses.domains)
        natural = record.get("natural")
        start = was if natural is None else _by_domain(natural, losses.domains, record, "natural")
        state = next_state(policy, state, losses, start)
        would = np.array(state["mixture_weights"])
        found.append(ReplayedUpdate(step=record["step"], domains=losses.domains, was=was, would=would))
        before = record
    return found


def _is_update(record: Mapping[str, Any], before: Mapping[str, Any] | None, steps: int) -> bool:
    """Whether weights were set from a record; the measurement at a run's end moves nothing."""
    if before is None:
        return True
    if "planner" in record and "planner" in before:
        return bool(record["planner"]["version"] != before["planner"]["version"])
    return bool(record["step"] < steps and record["step"] != before["step"])


def _set_weights(record: Mapping[str, Any], domains: Sequence[str]) -> Float[np.ndarray, " N"]:
    """What the policy asked for; the mixture's own weights are rounded, and without domains at their cap."""
    asked = (record.get("policy") or {}).get("mixture_weights")
    if asked is None:
        return _by_domain(record["weights"], domains, record, "weights")
    named = dict(zip(domains, asked, strict=False)) if isinstance(asked, list) else {}
    return _by_domain(named, domains, record, "policy.mixture_weights")


def _by_domain(
    column: Mapping[str, Any], domains: Sequence[str], record: Mapping[str, Any], name: str
) -> Float[np.ndarray, " N"]:
    try:
        return np.array([float(column[domain]) for domain in domains])
    except (KeyError, TypeError, ValueError):
        raise RunError(
            f"intervals.jsonl at step {record['step']}: {name} is not a number for each of "
            f"{list(domains)}; the record is damaged or of another version of ddkmix."
        ) from None


def _changes(run_dir: Path, config: Tree) -> frozenset[int]:
    """Steps at which the run's own policy was changed on request, and so lost its memory."""
    kept = sorted(run_dir.glob("config-until-step-*.yaml"), key=_step_of)
    trees = [read_resolved(path) for path in kept]
    return frozenset(
        _step_of(path)
        for path, old, new in zip(kept, trees, [*trees, config][1:], strict=True)
        if old.get("policy") != new.get("policy")
        or _off_is_none(old["guards"]) != _off_is_none(new["guards"])
    )


def _off_is_none(guards: Any) -> Any:
    """Guards as they act: a run from before there were any had none."""
    settings = Guards.model_validate(False if guards is None else guards)
    return None if settings == Guards.model_validate(False) else settings


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def render_policy_replay(replay: PolicyReplay, style: Format) -> str:
    """The weights that were set and those that would have been, by step and domain, in the format asked for.

    `moved` is the share of the rows that would have been of other domains.
    """
    if style == "json":
        return json.dumps(_to_json(replay), indent=1, allow_nan=False)
    domains = sorted({name for update in replay.updates for name in update.domains})
    sections = []
    for title, which in (
        ("mixture weight that was set", "was"),
        (f"mixture weight that {_named(replay)} would have set", "would"),
    ):
        last = ["moved"] if which == "would" else []
        rows = []
        for update in replay.updates:
            weights = dict(zip(update.domains, getattr(update, which), strict=True))
            cells = [f"{weights[name]:.3f}" if name in weights else "" for name in domains]
            rows.append([str(update.step), *cells, *([f"{update.moved:.3f}"] if last else [])])
        header = ["step", *domains, *last]
        if style == "markdown":
            sections.append(f"**{title}**\n\n{render_markdown(header, rows)}")
        else:
            sections.append(render_table(header, rows, title))
    return "\n\n".join([*sections, "\n".join([CAVEAT, *(f"note: {note}" for note in replay.notes)])])


def _named(replay: PolicyReplay) -> str:
    parameters = [f"{key}={value}" for key, value in replay.policy.items() if key != "name"]
    held = "without guards"
    if replay.guards is not None:
        settings = replay.guards.model_dump(exclude_defaults=True)
        own = [f"{key}={value:g}" for key, value in settings.items()]
        held = f"guards {' '.join(own)}" if own else "default guards"
    return f"{' '.join([str(replay.policy['name']), *parameters])} ({held})"


def _to_json(replay: PolicyReplay) -> dict[str, Any]:
    return {
        "policy": dict(replay.policy),
        "guards": None if replay.guards is None else replay.guards.model_dump(mode="json"),
        "caveat": CAVEAT,
        "notes": list(replay.notes),
        "updates": [
            {
                "step": update.step,
                "was": dict(zip(update.domains, update.was.tolist(), strict=True)),
                "would": dict(zip(update.domains, update.would.tolist(), strict=True)),
                "moved": update.moved,
            }
            for update in replay.updates
        ],
    }
