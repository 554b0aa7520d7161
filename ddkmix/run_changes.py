"""What of a run's config may differ when it is resumed, and how it does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddkmix.config import RunConfig, dump_config
from ddkmix.resolved_config import read_run_config

_MAY_CHANGE = ("loader", "storage", "tracking", "run_dir", "cache_dir")
"""Sections that change neither the data nor the arithmetic."""
_KEYS_THAT_MAY_CHANGE = (
    *(("trainer", key) for key in ("checkpoint_steps", "keep_checkpoints", "microbatch_rows")),
    *((section, key) for section in ("generate", "capture") for key in ("folder", "batch_rows")),
)
"""Stores may be moved: what is in them is known by its content."""
_MAY_CHANGE_ON_REQUEST = (
    *("domains", "mixture", "policy", "guards", "teachers", "default_teacher"),
    "selection",
)
"""Sections that change which rows come next or who comments on them, but not what was learned."""


def config_changes(config: RunConfig) -> list[str]:
    """What was let pass on request: one phrase for each key that differs from the run's config."""
    saved = config.run_dir / "config.yaml"
    if not saved.exists():
        return []
    return [
        f"{'.'.join(key)} was {was!r} and is {now!r}" for key, was, now in differences_from(config, saved)
    ]


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The sections that may change on request, as plain values: what a checkpoint was written under.

    Args:
        config: the run.
    """
    tree = dump_config(config)
    found = {name: tree[name] for name in _MAY_CHANGE_ON_REQUEST if name in tree}
    return {**found, "trainer": {"batch_rows": config.trainer.batch_rows}}


def changes_since(state: Mapping[str, Any], config: RunConfig) -> list[str]:
    """How the settings of a checkpoint differ from a config's: one phrase for each key.

    `config.yaml` has the settings of the last start, which may have been killed before its first checkpoint.

    Args:
        state: of the checkpoint.
        config: the run.
    """
    if "settings" not in state:
        return []
    return [
        f"{'.'.join(key)} was {was!r} and is {now!r}"
        for key, was, now in _differences(state["settings"], settings_of(config))
    ]


def differences_from(config: RunConfig, saved: Path) -> list[tuple[tuple[str, ...], Any, Any]]:
    """(key, was, now) of everything that differs and may not differ freely."""
    old, new = read_run_config(saved.parent), dump_config(config)
    return [
        (key, was, now)
        for key, was, now in _differences(old, new)
        if key[0] not in _MAY_CHANGE and not _is_free(key, config)
    ]


def _is_free(key: tuple[str, ...], config: RunConfig) -> bool:
    """Whether a key changes neither data nor arithmetic."""
    objective = config.objective.model_dump()
    over_micro_batches = objective.get("moving_skew") or objective.get("whiten")
    if key == ("trainer", "microbatch_rows") and over_micro_batches:
        return False
    return key[:2] in _KEYS_THAT_MAY_CHANGE


def follows(key: tuple[str, ...]) -> bool:
    """Whether a key may differ on request."""
    return key[0] in _MAY_CHANGE_ON_REQUEST or key == ("trainer", "batch_rows")


def refusal(run_dir: Path, key: tuple[str, ...], was: Any, now: Any) -> str:
    """One line for a key that may not differ, or not without being asked for."""
    way = "Resume with the old value, or choose another run_dir."
    if follows(key):
        way = "Resume with the old value, add --allow-changes, or choose another run_dir."
    return f"{run_dir} holds another run: {'.'.join(key)} was {was!r} and is now {now!r}. {way}"


def _differences(old: Any, new: Any, key: tuple[str, ...] = ()) -> Sequence[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for name in [*old, *(n for n in new if n not in old)]
            for difference in _differences(old.get(name), new.get(name), (*key, name))
        ]
    return [] if old == new else [(key, old, new)]
