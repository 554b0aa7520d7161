"""The gap report: how far a student is from a teacher in each domain."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddkmix.policies.ddk import Ddk
from ddkmix.policies.update import exponentiated_update
from ddkmix.report.markup import visible
from ddkmix.types import DomainLosses

Format = Literal["table", "json", "markdown"]


def ddk_weights(losses: DomainLosses, policy: Ddk | None = None) -> dict[str, float]:
    """The mixture that one update of DDK (Eq. 2) gives from the uniform one."""
    policy = policy or Ddk()
    zeros = np.zeros(len(losses.domains))
    log_weights = exponentiated_update(
        zeros, policy.score(losses), step_size=1.0, uniform_mix=policy.uniform_mix
    )
    return dict(zip(losses.domains, np.exp(log_weights).tolist(), strict=True))


def render_gaps(
    losses: DomainLosses,
    weights: Mapping[str, float],
    style: Format,
    *,
    title: str = "",
    weights_title: str = "DDK weight",
) -> str:
    """Losses and weights of every domain and their means over domains, in the format asked for.

    Losses are nats per token of the student, the +- is the gap's standard error, b/B is bits per byte of
    text; excess is the mean of max(0, student - teacher), KL that of KL(teacher || student), where measured.
    """
    if style == "json":
        table = {name: {**row, "weight": weights[name]} for name, row in losses.to_json().items()}
        return json.dumps(table, indent=1, allow_nan=False)
    header = [
        "domain", "teacher", "student", "gap", "+-", "ratio", "teacher b/B", "student b/B", weights_title
    ]  # fmt: skip
    rows = [_cells(losses, weights, i) for i in range(len(losses.domains))]
    rows.append(_mean_cells(losses))
    _add_measured(losses, header, rows)
    if style == "markdown":
        return render_markdown(header, rows)
    return render_table(header, rows, title)


def render_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is left-aligned, the others right-aligned."""
    rule = "| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |"
    first, *others = (markdown_line(line) for line in (header, *rows))
    return "\n".join([first, rule, *others])


def markdown_line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown: a | in a cell does not end it, nor does the end of a line."""
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _one_line(cell: str) -> str:
    """A cell as it may be shown: what would steer a terminal or turn the reading order is shown by number."""
    return visible(cell).replace("\t", "\\t").replace("\n", "\\n")


def render_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", *, left: Sequence[str] = ()
) -> str:
    """A table of text; the first column and those named in `left` are left-aligned, the others right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(
            Text(_one_line(name)), justify="right" if i and name not in left else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*(Text(_one_line(cell)) for cell in row))
    # wide enough for any number of domains: text that goes to files and issues must not be cut
    console = Console(width=10_000, color_system=None, force_terminal=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    # not rich's own title, which is folded to the width of the table
    return "\n".join(
        [*([_one_line(title)] if title else []), *(line.rstrip() for line in capture.get().splitlines())]
    )


def _cells(losses: DomainLosses, weights: Mapping[str, float], i: int) -> list[str]:
    name = losses.domains[i]
    return [
        name,
        f"{losses.teacher_loss[i]:.3f}",
        f"{losses.student_loss[i]:.3f}",
        f"{losses.loss_gap[i]:.3f}",
        f"{losses.gap_error[i]:.3f}",
        f"{losses.perplexity_ratio[i]:.4g}",
        f"{losses.teacher_bits_per_byte[i]:.3f}",
        f"{losses.student_bits_per_byte[i]:.3f}",
        f"{weights[name]:.3f}",
    ]


def _mean_cells(losses: DomainLosses) -> list[str]:
    columns = (
        losses.teacher_loss,
        losses.student_loss,
        losses.loss_gap,
        None,
        None,
        losses.teacher_bits_per_byte,
        losses.student_bits_per_byte,
    )
    return ["mean", *("" if c is None else f"{c.mean():.3f}" for c in columns), ""]


def _add_measured(losses: DomainLosses, header: list[str], rows: list[list[str]]) -> None:
    """Columns of what was measured beside the losses, before the weights."""
    for title, column in (("excess", losses.excess_loss), ("KL", losses.forward_kl)):
        if column is not None:
            header.insert(-1, title)
            for row, value in zip(rows, [*column, column.mean()], strict=True):
                row.insert(-1, f"{value:.3f}")


def print_gaps(step: int, losses: DomainLosses, weights: dict[str, float]) -> None:
    """The table of a step, with the mixture weights in force."""
    title = f"step {step:,}"
    print(render_gaps(losses, weights, "table", title=title, weights_title="weight"), flush=True)
