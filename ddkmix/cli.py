"""The commands. Everything heavy is imported inside them, so that help, lint and plan answer at once.

A mistake of the user's is one line on stderr and exit code 2.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ddkmix.errors import ConfigError, DdkmixError, Interrupted
from ddkmix.replay_command import replay
from ddkmix.report_commands import Config, Overrides, check_format, gaps, rouge, seen, show

app = typer.Typer(
    name="ddkmix",
    help="Distil a large language model into a small one, with a data mixture that follows the student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

FormatOption = Annotated[str, typer.Option("--format", help="table, json or markdown.")]


@app.command()
def pack(
    config: Config,
    overrides: Overrides = None,
    part: Annotated[
        str | None,
        typer.Option(help="3/16: pack every 16th shard, from the third; run the other parts anywhere."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder to copy the packed rows to, one folder per domain.")
    ] = None,
    style: FormatOption = "table",
) -> None:
    """Turn the documents of a config's domains into rows of tokens."""
    from ddkmix.common_tokenizer import read_tokenizers
    from ddkmix.domains import load_domains
    from ddkmix.losses import build_terms
    from ddkmix.pack import pack_report, parse_part
    from ddkmix.prepare import pack_rows, publish_rows
    from ddkmix.report.packing import render_packing

    check_format(style)
    share = parse_part(part) if part is not None else None
    run = _load(config, overrides)
    tokenizer, _ = read_tokenizers(run, build_terms(run.loss, may_be_empty=True))
    domains = load_domains(run.domains, run.storage)
    packed = pack_rows(run, domains, tokenizer, part=share)
    print(render_packing(pack_report(packed), style))  # type: ignore[arg-type]  # checked above
    waiting = [domain.name for domain in domains if domain.name not in packed]
    if waiting:
        print(f"part {part} is done; other parts are not, of {', '.join(waiting)}.", file=sys.stderr)
    if out is not None:
        for folder in publish_rows(packed, out):
            print(f"rows: {folder}", file=sys.stderr)


@app.command()
def index(
    folder: Annotated[
        Path, typer.Argument(help="Has train/*.tar and held_out/*.tar of .npy rows.", show_default=False)
    ],
    tokenizer: Annotated[str, typer.Option(help="Folder or Hub id of the tokenizer that made them.")],
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of the longest row.")],
    license: Annotated[str, typer.Option(help="Of the text.")],
    name: Annotated[str | None, typer.Option(help="Of the domain; the folder's when unset.")] = None,
    separator: Annotated[str | None, typer.Option(help="Token between documents.")] = None,
    style: FormatOption = "table",
) -> None:
    """Make rows that others packed usable: an index beside each tar, and rows.json for a card to name."""
    from ddkmix.pack import pack_report
    from ddkmix.pack.foreign import index_rows
    from ddkmix.pack.opening import open_packed
    from ddkmix.report.packing import render_packing
    from ddkmix.tokenizer import read_tokenizer

    check_format(style)
    card = read_tokenizer(tokenizer, separator=separator)
    domain = name or folder.resolve().name
    manifest = index_rows(folder, card, seq_len=seq_len, name=domain, license=license)
    packed = open_packed(str(folder), manifest=manifest, cache_dir=folder)
    print(render_packing(pack_report({domain: packed}), style))  # type: ignore[arg-type]  # checked above


@app.command()
def lint(
    config: Config,
    overrides: Overrides = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Also ask the stores for every remote shard.")
    ] = False,
) -> None:
    """Check everything that a config names, without loading a model."""
    from ddkmix.policies.guards import describe
    from ddkmix.preflight import check
    from ddkmix.prepare import check_remote

    prepared = check(_load(config, overrides))
    if remote:
        check_remote(prepared)
    shards = sum(1 for domain in prepared.domains for _ in domain.shards())
    packed = sum(1 for domain in prepared.domains if domain.rows is not None)
    print(
        f"{config}: fine. {len(prepared.domains)} domains{f' ({packed} packed)' if packed else ''}, {shards} "
        f"shards, tokenizer {prepared.tokenizer.name} ({prepared.tokenizer.vocab_size:,} tokens), policy "
        f"{prepared.config.policy.name}, guards: {describe(prepared.policy, len(prepared.domains))}."
    )


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML config, or run directory.", show_default=False)],
    overrides: Overrides = None,
    style: FormatOption = "table",
) -> None:
    """Show what a run will serve, or where it is heading: rows, tokens and epochs per domain, limits."""
    check_format(style)
    if config.is_dir():
        from ddkmix.report.plan import render_run_plan

        if overrides:
            raise ConfigError(f"{overrides[0]}: {config} is a run directory; its config is fixed.")
        print(render_run_plan(config, style))  # type: ignore[arg-type]  # checked above
        return
    from ddkmix.policies import next_state, weights_of
    from ddkmix.preflight import check, dummy_losses
    from ddkmix.prepare import open_mixture, open_rows
    from ddkmix.report.plan import render_plan
    from ddkmix.selected import planned

    run = _load(config, overrides)
    prepared = check(run)
    packed = open_rows(prepared, shown=True)
    packed, selection = planned(prepared, packed)
    mixture = open_mixture(run, packed)
    losses = dummy_losses(mixture.domains)
    first = next_state(prepared.policy, None, losses, mixture.natural_weights)
    mixture.set_weights(weights_of(first, losses))
    print(render_plan(run, packed, mixture, style, selection))  # type: ignore[arg-type]  # checked above


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of run_dir.")
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Resume with other domains, data, teachers of domains, mixture, selection, policy or "
            "batch_rows.",
        ),
    ] = False,
) -> None:
    """Distil: measure the gaps, follow them with the mixture, save the student."""
    if allow_changes and not resume:
        raise ConfigError("--allow-changes is for --resume; a new run has nothing to differ from.")
    run = _load(config, overrides, resume=resume)
    from ddkmix.options import quiet_libraries
    from ddkmix.report.gaps import print_gaps
    from ddkmix.setup import train as train_run

    quiet_libraries()
    seen: dict[int, dict[str, float]] = {}

    def note(step: int, losses: Any, weights: dict[str, float]) -> None:
        if not seen and step == 0:
            print_gaps(step, losses, weights)
        seen[step] = weights

    losses = train_run(run, resume=resume, allow_changes=allow_changes, on_losses=note)
    if seen:  # only the main rank is told
        step, weights = seen.popitem()
        print_gaps(step, losses, weights)
        print(f"student: {run.run_dir / 'student'}    history: ddkmix show {run.run_dir}")


@app.command()
def capture(
    config: Config,
    overrides: Overrides = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read all records back, and ask the teacher again about a few rows."),
    ] = False,
    part: Annotated[str | None, typer.Option(help="3/16: every 16th shard, from the third.")] = None,
    style: FormatOption = "table",
) -> None:
    """Write what the teacher says about all train rows into the logits store."""
    from ddkmix.options import quiet_libraries
    from ddkmix.pack import parse_part

    check_format(style)
    share = parse_part(part) if part is not None else None
    run = _load(config, overrides)
    quiet_libraries()
    from ddkmix.capture import capture as capture_run
    from ddkmix.report.captured import render_captured, render_verified
    from ddkmix.verifying import verify_store

    if verify:
        checked = verify_store(run, part=share)
        print(render_verified(checked, style))  # type: ignore[arg-type]  # checked above
        checked.raise_if_damaged()
        return
    totals = capture_run(run, part=share)
    if totals is not None:  # only the main rank is told
        print(render_captured(totals, style))  # type: ignore[arg-type]  # checked above


@app.command()
def generate(
    config: Config,
    by: Annotated[str, typer.Option(help="Who answers: teacher or student.", show_default=False)],
    overrides: Overrides = None,
    part: Annotated[str | None, typer.Option(help="3/16: every 16th shard, from the third.")] = None,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Print so many prompts of each domain with responses.")
    ] = 0,
    style: FormatOption = "table",
) -> None:
    """Let the teacher or the student answer the prompts of all train rows, and store the responses."""
    from ddkmix.options import quiet_libraries
    from ddkmix.pack import parse_part

    check_format(style)
    if by not in ("teacher", "student"):
        raise ConfigError(f"--by {by}: must be teacher or student.")
    if show and style == "json":
        raise ConfigError(f"--show {show}: text cannot follow JSON; use --format table or markdown.")
    share = parse_part(part) if part is not None else None
    run = _load(config, overrides)
    quiet_libraries()
    from ddkmix.generate import answer, open_generating
    from ddkmix.report.generated import render_exchanges, render_generated

    job = open_generating(run, by)  # type: ignore[arg-type]  # checked above
    if job.left_out and job.rank == 0:
        print(f"ddkmix: without prompts, left out: {', '.join(job.left_out)}.", file=sys.stderr)
    totals = answer(job, part=share)
    if totals is None:  # only the main rank is told
        return
    stores = {name: job.folder(name) for name in totals}
    print(render_generated(totals, stores, style))  # type: ignore[arg-type]  # checked above
    if show:
        print(render_exchanges(job, show))


for command in (gaps, rouge, show, replay, seen):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit code 0, 2 for a user's mistake, 130 after an interruption."""
    try:
        app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except Interrupted as error:
        print(f"ddkmix: {error}", file=sys.stderr)
        sys.exit(130)
    except DdkmixError as error:
        print(f"ddkmix: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "exit_code"):  # not one of click's own usage errors
            raise
        error.show() if hasattr(error, "show") else print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _load(config: Path, overrides: Sequence[str] | None, *, resume: bool = False) -> Any:
    from ddkmix.config import load_config

    return load_config(config, overrides or [], resume=resume)
