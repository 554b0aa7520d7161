"""The commands that measure, and tell what was measured and served: `gaps`, `rouge`, `show`, `seen`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ddkmix.errors import ConfigError

Config = Annotated[Path, typer.Argument(help="YAML config.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value for a config field: trainer.steps=20.", show_default=False),
]
ReportFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="table, json, markdown, html or png; by the ending of --output when unset, else table.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="File to write instead of printing.", show_default=False)
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the file of --output, whatever it is.", show_default=False)
]


def gaps(
    config: Annotated[Path | None, typer.Argument(help="YAML config.", show_default=False)] = None,
    overrides: Overrides = None,
    student: Annotated[
        str | None, typer.Option(help="Folder or Hub id; the config's student when unset.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or Hub id.")] = None,
    domains: Annotated[str | None, typer.Option(help="Cards: a file, glob or folder.")] = None,
    style: ReportFormat = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """Report how far a student is from a teacher in each domain."""
    from ddkmix.report.output import destination

    target = destination(style, output, force=force)
    if config is not None and "=" in config.name and not config.exists():
        overrides, config = [str(config), *(overrides or [])], None
    from ddkmix.options import gaps_config, quiet_libraries

    run = gaps_config(config, overrides, student, teacher, domains)
    quiet_libraries()
    from ddkmix.gaps import measure_and_tell
    from ddkmix.policies.ddk import Ddk
    from ddkmix.report.gaps import ddk_weights, render_gaps
    from ddkmix.report.story import story_of_gaps

    found = measure_and_tell(run)
    weights = ddk_weights(found.losses, found.policy if isinstance(found.policy, Ddk) else None)
    target.send(
        lambda: story_of_gaps(
            found.losses,
            weights,
            run,
            references=found.references,
            notes=found.notes,
            same_text=found.same_text,
        ),
        words=lambda words_style: render_gaps(found.losses, weights, words_style),
    )


def rouge(
    config: Annotated[Path, typer.Argument(help="YAML config, or run directory.", show_default=False)],
    overrides: Overrides = None,
    student: Annotated[
        str | None, typer.Option(help="Folder or Hub id; the run's or config's student when unset.")
    ] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="Let the teacher answer, too.")] = False,
    style: Annotated[str, typer.Option("--format", help="table, json or markdown.")] = "table",
) -> None:
    """Report Rouge-L of a student's responses to held-out prompts, decoded greedily."""
    from ddkmix.options import quiet_libraries, run_or_config

    check_format(style)
    run, found = run_or_config(config, overrides, student)
    quiet_libraries()
    from ddkmix.ranks import current_rank
    from ddkmix.report.rouge import render_rouge
    from ddkmix.rouge import answered, open_asked

    # all is checked before the first of them answers
    asked = [open_asked(run, student=found)]
    if teacher:
        asked.append(open_asked(run, student=found, by="teacher"))
    scored = [answered(one) for one in asked]
    if current_rank()[0]:
        return
    if scored[0].left_out:
        print(f"ddkmix: without prompts, left out: {', '.join(scored[0].left_out)}.", file=sys.stderr)
    print(render_rouge(scored, style))  # type: ignore[arg-type]  # checked above


def show(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.", show_default=False)],
    style: ReportFormat = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """Show a run's history: gaps, weights, rows served, epochs so far and at the end."""
    from ddkmix.report.history import render_history
    from ddkmix.report.output import destination
    from ddkmix.report.story import story_of_run

    target = destination(style, output, force=force)
    target.send(lambda: story_of_run(run_dir), words=lambda words_style: render_history(run_dir, words_style))


def seen(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.", show_default=False)],
    step: Annotated[
        str, typer.Option(help="Optimizer step, counted from 1 as in metrics.jsonl; 10:20 for several.")
    ],
    domain: Annotated[str | None, typer.Option(help="Only the rows of this domain.")] = None,
    style: Annotated[str, typer.Option("--format", help="table, json, markdown or text.")] = "table",
    chars: Annotated[
        int | None,
        typer.Option(min=0, help="Characters of text per row: 80 in tables, all elsewhere; 0 for no text."),
    ] = None,
) -> None:
    """Show the rows that a past step was served: name, place, epoch and text."""
    from ddkmix.report.seen import parse_steps, render_seen

    check_format(style, "table", "json", "markdown", "text")
    report = render_seen(run_dir, parse_steps(step), style, domain=domain, chars=chars)  # type: ignore[arg-type]
    print(report.text)
    for note in report.notes:
        print(f"ddkmix: {note}", file=sys.stderr)


def check_format(style: str, *known: str) -> None:
    """Refuse a format that a command does not have.

    Raises:
        ConfigError: `style` is not among `known`; table, json and markdown when none are given.
    """
    known = known or ("table", "json", "markdown")
    if style not in known:
        raise ConfigError(f"--format {style}: must be {', '.join(known[:-1])} or {known[-1]}.")
