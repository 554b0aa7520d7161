"""Going on from a checkpoint: what is taken up, and what begins anew because something else has changed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddkmix.errors import RunError
from ddkmix.run import Run


def restore(run: Run, state: dict[str, Any], changes: list[str], *, allow_changes: bool) -> list[str]:
    """Take up a checkpoint; returns what has changed in the stream since, beside the config's `changes`.

    Other domains, another policy or other guards begin with a measurement, a policy with no memory; metrics
    of steps that were not written yet are dropped where the domains differ.

    Args:
        run: as it would begin.
        state: of the checkpoint.
        changes: of the config, as text.
        allow_changes: whether the stream may differ.

    Raises:
        RunError: the teacher of a domain is another one and may not be.
    """
    found = run.mixture.load_state_dict(state["mixture"], allow_changes=allow_changes)
    same = same_domains(run, state)
    same_policy = not any(change.startswith(("policy", "guards")) for change in changes)
    others = _other_teachers(run, state.get("teachers", {}), allow_changes=allow_changes)
    if same and same_policy:
        run.reweighter.policy_state = state["policy"]
    run.measure_now = not (same and same_policy) or bool(others)
    run.total_tokens = state["total_tokens"]
    same_selection = not any(change.startswith("selection") for change in changes)
    if run.row_weights is not None and same and same_selection and "selection" in state:
        run.row_weights.state = state["selection"]
    if same:
        run.window.load_json(state["window"], is_main=run.main)
    return [*found, *others]


def restore_answers(
    run: Run, state: dict[str, Any], arrays: Mapping[str, np.ndarray], *, afresh: bool
) -> list[str]:
    """Take up what the student has said; where the stream has changed, its answers are to other rows.

    Args:
        run: as it would begin.
        state: of the checkpoint.
        arrays: of the checkpoint.
        afresh: whether the config or the stream has changed.

    Raises:
        RunError: the answers are damaged.
    """
    if run.answers is None:
        return []
    if afresh or "objective" not in state:
        return ["the replay buffer begins empty, and the objective anew"]
    run.answers.load_state(arrays)
    run.objective_state = state["objective"]["state"]
    for name, window in run.windows.items():
        window.load_json(state["objective"]["windows"][name], is_main=run.main)
    return []


def same_domains(run: Run, state: dict[str, Any]) -> bool:
    """Whether a checkpoint is of the run's domains, in their order.

    Args:
        run: as it would begin.
        state: of the checkpoint.
    """
    return list(state["mixture"]["data"]) == list(run.mixture.domains)


def _other_teachers(run: Run, before: Mapping[str, str], *, allow_changes: bool) -> list[str]:
    """Domains whose teacher is another one than in a checkpoint: the cards name it, or its files changed."""
    names = [name for name, key in run.teacher_keys.items() if before.get(name, key) != key]
    if names and not allow_changes:
        raise RunError(
            f"{run.config.run_dir}: the teacher of {', '.join(names)} is not the one that the run began "
            "with (its name in the card, its files, dtype or shares); take that one again, or go on with "
            "--allow-changes."
        )
    return [f"{name} has another teacher" for name in names]
