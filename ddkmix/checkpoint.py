"""The run directory: who may write it, and checkpoints from which a run goes on exactly.

    RUN/config.yaml versions.json            what runs
    RUN/metrics.jsonl intervals.jsonl        what happened; the same after any interruption
    RUN/timings.jsonl                        how fast; never the same twice
    RUN/tracker_id                           what experiment trackers know it by, where there are some
    RUN/checkpoints/step-000040/             parameters, optimizer and random state (Accelerate), state.json,
                                             arrays.safetensors of what is too large for JSON
    RUN/student/                             the result, written last

A checkpoint is written under a hidden name and renamed when whole and on disk. Tensors are safetensors;
the optimizer's file is loaded with weights_only.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ddkmix.config import RunConfig, dump_config
from ddkmix.errors import RunError
from ddkmix.fingerprint import write_atomically
from ddkmix.run_changes import differences_from, follows, refusal

_ARRAYS = "arrays.safetensors"


def find_run(config: RunConfig, *, resume: bool, allow_changes: bool = False) -> Path | None:
    """Check that the run directory is free, or find the checkpoint to resume from. Writes nothing.

    Returns:
        The newest checkpoint, or None to start at step 0 (a new run, or one that was stopped before its
        first checkpoint).

    Raises:
        RunError: the directory holds another run, or a run and `resume` is not given, or is not a run.
    """
    run_dir = config.run_dir
    saved = run_dir / "config.yaml"
    if saved.exists():
        if not resume:
            raise RunError(f"{run_dir} already holds a run; go on with --resume, or choose another run_dir.")
        for key, was, now in differences_from(config, saved):
            if not (allow_changes and follows(key)):
                raise RunError(refusal(saved.parent, key, was, now))
        return latest_checkpoint(run_dir)
    if resume:
        raise RunError(f"{run_dir} holds no run to resume (no config.yaml); leave --resume out to start.")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise RunError(f"{run_dir} exists and is not a run; choose another run_dir or empty it.")
    return None


def claim_run(config: RunConfig, *, changed_at: int | None = None) -> None:
    """Write down what runs, once everything that can be checked has been, and clear half-written parts.

    Args:
        config: the run.
        changed_at: the step from which on this config replaces the one before, which is kept as
            `config-until-step-000040.yaml`.

    Raises:
        RunError: the directory cannot be written.
    """
    run_dir = config.run_dir
    try:
        remove_partial(run_dir)
        saved = run_dir / "config.yaml"
        if changed_at is not None:
            write_atomically(run_dir / f"config-until-step-{changed_at:06d}.yaml", saved.read_text("utf-8"))
        if changed_at is not None or not saved.exists():
            write_atomically(run_dir / "versions.json", json.dumps(_versions(), indent=1))
            tree = yaml.safe_dump(dump_config(config), sort_keys=False, allow_unicode=True)
            write_atomically(saved, tree)
    except OSError as error:
        raise RunError(f"{run_dir} cannot be written ({error.strerror}); choose another run_dir.") from None


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = sorted((run_dir / "checkpoints").glob("step-*"), key=_step_of)
    return found[-1] if found else None


def remove_partial(run_dir: Path) -> None:
    """Delete what an interrupted save left behind."""
    for path in (run_dir / "checkpoints").glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    accelerator: Any,
    run_dir: Path,
    state: dict[str, Any],
    *,
    keep: int,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a checkpoint of everything that Accelerate prepared and of `state`, then prune old ones.

    Args:
        accelerator: all ranks call this together.
        run_dir: the run.
        state: JSON-able; `state["step"]` is the number of completed steps.
        keep: checkpoints to keep.
        arrays: equal on all ranks, such as the rollouts of a replay buffer.

    Raises:
        RunError: it cannot be written; older checkpoints are untouched and no part of this one remains.
    """
    name = f"step-{state['step']:06d}"
    final, partial = (run_dir / "checkpoints" / text for text in (name, f".partial-{name}"))
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        _save_random_state(partial, accelerator.process_index)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / "state.json").write_text(json.dumps(state))
            if arrays is not None:
                _save_arrays(partial, arrays)
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            if final.exists():  # resumed exactly here: the same content again
                shutil.rmtree(final)
            partial.replace(final)
            _sync(final.parent)
            prune(run_dir, keep)
    except Exception as error:  # torch and safetensors raise their own types for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        last = latest_checkpoint(run_dir)
        way = f"go on from {last.name} with --resume" if last else "start again with --resume"
        raise RunError(
            f"checkpoint {final} cannot be written ({reason}); nothing of it was kept. "
            f"Free space, then {way}."
        ) from error
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Any, path: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote; returns its `state`.

    Raises:
        RunError: it is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        accelerator.load_state(str(path))
        _load_random_state(path, accelerator.process_index)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"checkpoint {path} cannot be read ({reason}); delete that folder and resume from an older one."
        ) from error
    return state


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The `arrays` of a checkpoint; none of one that was written without.

    Raises:
        RunError: they are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (path / _ARRAYS).exists():
        return {}
    try:
        arrays: dict[str, np.ndarray] = load_file(path / _ARRAYS)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"checkpoint {path} cannot be read ({reason}); delete that folder and resume from an older one."
        ) from None
    return arrays


def _save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(dict(arrays), folder / _ARRAYS)


def _random_file(folder: Path, rank: int) -> Path:
    return folder / f"random-rank{rank}.safetensors"


def _save_random_state(folder: Path, rank: int) -> None:
    """torch's random state beside the one that Accelerate pickles, which it skips silently if unreadable."""
    import torch
    from safetensors.torch import save_file

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, _random_file(folder, rank))


def _load_random_state(folder: Path, rank: int) -> None:
    """Nothing to load for a rank that the saving run did not have; it keeps the seed of its start."""
    import torch
    from safetensors.torch import load_file

    if not _random_file(folder, rank).exists() and rank > 0:
        return
    states = load_file(_random_file(folder, rank))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in sorted((run_dir / "checkpoints").glob("step-*"), key=_step_of)[:-keep]:
        doomed = path.with_name(f".partial-{path.name}")
        path.replace(doomed)  # first out of sight: a half-deleted checkpoint must not be found
        shutil.rmtree(doomed, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    packages = (
        "ddkmix",
        "torch",
        "transformers",
        "accelerate",
        "tokenizers",
        "numpy",
        "safetensors",
    )
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
