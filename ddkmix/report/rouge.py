"""Rouge-L of held-out responses, per domain and over all rows."""

import json
from collections.abc import Mapping, Sequence

from ddkmix.report.gaps import Format, render_markdown, render_table
from ddkmix.rouge import ResponseRouge, RougeRows


def render_rouge(found: Sequence[ResponseRouge], style: Format) -> str:
    """What each of some models reached on the same rows, in the format asked for.

    Rouge-L is a mean over rows in [0, 1], the +- its standard error; tokens are those of a response or a
    reference on average; ended is the share of responses that ended by themselves.
    """
    if style == "json":
        return json.dumps({one.by: one.to_json() for one in found}, indent=1, allow_nan=False)
    header = ["domain", "rows", "reference tokens"]
    for one in found:
        header += [one.by, "+-", f"{one.by} tokens", "ended"]
    rows = [[name, *_cells([one.domains[name] for one in found])] for name in found[0].domains]
    rows.append(["all rows", *_cells([one.together for one in found])])
    return render_markdown(header, rows) if style == "markdown" else render_table(header, rows, "Rouge-L")


def _cells(measured: Sequence[RougeRows]) -> list[str]:
    numbers: list[Mapping[str, float | None]] = [one.to_json() for one in measured]
    cells = [f"{numbers[0]['rows']:,}", f"{numbers[0]['reference_tokens']:.1f}"]
    for one in numbers:
        error = "-" if one["error"] is None else f"{one['error']:.4f}"
        cells += [f"{one['rouge_l']:.4f}", error, f"{one['tokens']:.1f}", f"{one['ended']:.3f}"]
    return cells
