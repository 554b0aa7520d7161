"""The config that a run wrote down, also one of an older version."""

from pathlib import Path
from typing import Any

from ddkmix.config import Generate, Guards, Rollouts, RunConfig
from ddkmix.errors import RunError
from ddkmix.overrides import read_yaml


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The resolved config tree of a run.

    Raises:
        RunError: the folder is not a run, or its config is damaged.
    """
    try:
        return read_resolved(run_dir / "config.yaml")
    except FileNotFoundError:
        raise RunError(f"{run_dir} is not a run directory (no config.yaml).") from None


def read_resolved(path: Path) -> dict[str, Any]:
    """A resolved config tree that a run wrote: `config.yaml`, or one that was replaced.

    Raises:
        RunError: it is damaged.
        FileNotFoundError: there is none.
    """
    try:
        tree: Any = read_yaml(path.read_text(encoding="utf-8"))
        steps = tree["trainer"]["steps"]
        if not isinstance(steps, int) or not isinstance(tree.get("policy", {}), dict):
            raise ValueError(f"trainer.steps is {steps!r}, policy {tree.get('policy')!r}")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(path) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, LookupError | TypeError):
            reason = "no trainer.steps"
        raise RunError(
            f"{path} is damaged ({reason[:200]}): it is no config that a run wrote. Bring it back from a "
            "copy, or write the one that the run was started with."
        ) from None
    # a run from before there were guards had none, nor responses; made here, because callers change the tree
    off = Guards.model_validate(False).model_dump(mode="json")
    new = {
        "objective": RunConfig.model_fields["objective"].default.model_dump(mode="json"),
        "generate": Generate().model_dump(mode="json"),
        "rollouts": Rollouts().model_dump(mode="json"),
    }
    return {"guards": off, **new, **tree}
