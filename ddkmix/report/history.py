"""The history of a run, from its directory alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddkmix.checkpoint import read_run_config
from ddkmix.errors import RunError
from ddkmix.report.gaps import Format, render_table
from ddkmix.tracking import read_lines


def read_intervals(run_dir: Path) -> list[dict[str, Any]]:
    """One record per evaluation: step, losses, weights, rows served, epochs.

    Raises:
        RunError: the folder is not a run, or nothing has been measured yet.
    """
    read_run_config(run_dir)
    path = run_dir / "intervals.jsonl"
    records = list(read_lines(path)) if path.exists() else []
    if not records:
        raise RunError(f"{run_dir} has no evaluation yet; it writes the first one before training.")
    return records


def render_history(run_dir: Path, style: Format) -> str:
    """Gaps, weights, rows served and epochs of every domain over the run."""
    records = read_intervals(run_dir)
    if style == "json":
        return json.dumps(records, indent=1)
    domains = sorted(records[0]["losses"])
    sections: dict[str, Callable[[Any, str], str]] = {
        "loss gap (nats per token)": lambda r, d: _number(r["losses"][d]["loss_gap"]),
        "mixture weight of the steps that follow": lambda r, d: f"{r['weights'][d]:.3f}",
        "rows served so far": lambda r, d: str(r["served"][d]),
        "epochs so far": lambda r, d: f"{r['epochs'][d]:.2f}",
    }
    blocks = []
    for title, cell in sections.items():
        header = ["step", *domains]
        rows = [[str(r["step"]), *(cell(r, d) for d in domains)] for r in records]
        if style == "markdown":
            lines = [header, ["---:"] * len(header), *rows]
            block = f"**{title}**\n\n" + "\n".join("| " + " | ".join(x) + " |" for x in lines)
        else:
            block = render_table(header, rows, title)
        blocks.append(block)
    return "\n\n".join(blocks)


def _number(value: float | None) -> str:
    """Three digits; a dash for what was not finite."""
    return "-" if value is None else f"{value:.3f}"
