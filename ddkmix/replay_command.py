"""`ddkmix replay`, a command of `cli` in a file of its own; what it does is in `report.policy_replay`."""

from pathlib import Path
from typing import Annotated

import typer

from ddkmix.errors import ConfigError


def replay(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.", show_default=False)],
    parameters: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value for the policy (signal=loss_gap) or its guards (guards=off, guards.cap=0.4).",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Its name; the run's own with its parameters when unset.")
    ] = None,
    style: Annotated[str, typer.Option("--format", help="table, json or markdown.")] = "table",
) -> None:
    """Show the weights that another policy would have set on a run's recorded losses."""
    from ddkmix.report.policy_replay import render_policy_replay, replay_policy

    if style not in ("table", "json", "markdown"):
        raise ConfigError(f"--format {style}: must be table, json or markdown.")
    replayed = replay_policy(run_dir, policy, parameters or ())
    print(render_policy_replay(replayed, style))  # type: ignore[arg-type]  # checked above
