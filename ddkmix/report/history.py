"""The history of a run, from its directory alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddkmix.errors import RunError
from ddkmix.planner import PlannerState, PlanSettings
from ddkmix.projection import Projection, project
from ddkmix.provenance import DataBlock, read_blocks
from ddkmix.records import read_evaluations
from ddkmix.report.gaps import Format, markdown_line, render_table
from ddkmix.resolved_config import read_run_config
from ddkmix.run_average import policy_average


def read_intervals(run_dir: Path) -> list[dict[str, Any]]:
    """One record per evaluation: step, losses, weights, rows served, epochs.

    Raises:
        RunError: the folder is not a run, its record is damaged, or nothing has been measured yet.
    """
    read_run_config(run_dir)
    records = read_evaluations(run_dir / "intervals.jsonl", needs=("losses", "weights", "served", "epochs"))
    if not records:
        raise RunError(f"{run_dir} has no evaluation yet; it writes the first one before training.")
    return records


def outlook(
    record: Mapping[str, Any], blocks: Sequence[DataBlock], steps: int, run_dir: Path
) -> tuple[PlanSettings, PlannerState, Projection]:
    """Where a run was heading at one of its evaluations, under the weights that it then set.

    Raises:
        RunError: an older ddkmix wrote the record, or its data are not known.
    """
    if "planner" not in record:
        raise RunError(
            f"{run_dir / 'intervals.jsonl'} has no planner state at step {record['step']}; an older ddkmix "
            "wrote it, so there is nothing to project from."
        )
    state = PlannerState.from_json(record["planner"])
    # data that change after the last step were never served: the record is of those before
    block = next((b for b in reversed(blocks) if b.from_step <= state.step), None)
    if block is None:
        raise RunError(f"{run_dir / 'data.json'} does not say what was served at step {state.step}.")
    return block.settings, state, project(block.settings, state, steps, block.row_sizes)


def render_history(run_dir: Path, style: Format) -> str:
    """Gaps, weights, rows served and epochs of every domain over the run."""
    records = read_intervals(run_dir)
    if style == "json":
        return json.dumps(records, indent=1)
    domains = sorted({name for record in records for name in record["losses"]})
    sections: dict[str, Callable[[Any, str], str]] = {
        "loss gap (nats per token)": lambda r, d: _number(r["losses"][d].get("loss_gap")),
        "mixture weight of the steps that follow": lambda r, d: f"{r['weights'][d]:.3f}",
        "rows served so far": lambda r, d: str(r["served"][d]),
        "epochs so far": lambda r, d: f"{r['epochs'][d]:.2f}",
    }
    averages = {r["step"]: average for r in records if (average := policy_average(r)) is not None}
    if len(averages) > 1:  # the first is of no update
        title = "average that the policy keeps of its weights (its result; before guards)"
        sections[title] = lambda r, d: f"{averages[r['step']][d]:.3f}" if r["step"] in averages else ""
    if (run_dir / "data.json").exists() and all("planner" in record for record in records):
        ends = _epochs_at_end(run_dir, records)
        sections["epochs at the end if the weights stayed (* at its limit)"] = lambda r, d: ends[r["step"]][d]
    blocks = []
    for title, cell in sections.items():
        header = ["step", *domains]
        rows = [[str(r["step"]), *(cell(r, d) if d in r["losses"] else "" for d in domains)] for r in records]
        if style == "markdown":
            lines = [header, ["---:"] * len(header), *rows]
            block = f"**{title}**\n\n" + "\n".join(map(markdown_line, lines))
        else:
            block = render_table(header, rows, title)
        blocks.append(block)
    return "\n\n".join(blocks)


def _epochs_at_end(run_dir: Path, records: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, str]]:
    """By step of the evaluation and domain: projected epochs, with a mark where a limit ends them."""
    steps, blocks = int(read_run_config(run_dir)["trainer"]["steps"]), read_blocks(run_dir)
    cells = {}
    for record in records:
        _, _, projection = outlook(record, blocks, steps, run_dir)
        cells[record["step"]] = {
            name: f"{domain.epochs:.2f}{'' if domain.cap_step is None else '*'}"
            for name, domain in projection.domains.items()
        }
    return cells


def _number(value: float | None) -> str:
    """Three digits; a dash for what was not finite."""
    return "-" if value is None else f"{value:.3f}"
