"""What a page or a picture tells: a run, from its directory alone, or one measurement without a run.

Everything that draws starts from a `Story`: numbers that are not known are nan in it and nothing else, and
domains stand in one order everywhere, the one furthest behind first.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float

from ddkmix.config import RunConfig, dump_config
from ddkmix.errors import DataError, RunError
from ddkmix.provenance import read_blocks
from ddkmix.records import read_lines
from ddkmix.report.history import read_intervals
from ddkmix.resolved_config import read_run_config
from ddkmix.types import DomainLosses


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One evaluation; a domain that it does not name was not in the run then."""

    step: int
    """Optimizer steps taken before."""
    losses: Mapping[str, Mapping[str, Any]]
    """`DomainLosses.to_json`; nats per token."""
    weights: Mapping[str, float]
    """Mixture weights of the steps that follow."""
    served: Mapping[str, float]
    """Rows served so far."""
    epochs: Mapping[str, float]
    """Passes over the domain's train rows so far."""
    half_width: Mapping[str, float]
    """Half of each gap's 95 % interval (`DomainLosses.gap_interval`), nats per token; nan where unknown."""

    def column(self, name: str, domains: Sequence[str]) -> Float[np.ndarray, " N"]:
        """A number of each domain; nan where unknown.

        Args:
            name: `weights`, `served`, `epochs`, `half_width`, which alone may be infinite, or a column of
                losses.
            domains: those wanted.
        """
        own = {"weights": self.weights, "served": self.served, "epochs": self.epochs}
        if name == "half_width":
            return np.array([self.half_width.get(domain, math.nan) for domain in domains])
        if name in own:
            found = [own[name].get(domain) for domain in domains]
        else:
            found = [self.losses.get(domain, {}).get(name) for domain in domains]
        values = np.array([math.nan if value is None else float(value) for value in found])
        values[~np.isfinite(values)] = math.nan
        return values

    @property
    def without_gap(self) -> frozenset[str]:
        """Domains whose gap was measured and is no number: a loss that overflowed, or a nan."""
        gaps = self.column("loss_gap", list(self.losses))
        return frozenset(name for name, gap in zip(self.losses, gaps, strict=True) if math.isnan(gap))


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """A run as a report tells it, or a single measurement."""

    title: str
    status: str
    """One sentence: where the run is."""
    share_done: float | None
    """Of the run's steps; None where there is no run."""
    facts: tuple[tuple[str, str], ...]
    """What stands under the title, as (name, value)."""
    domains: tuple[str, ...]
    """Those whose last gap is not finite, then by the last gap, largest first; those without a last one last;
    equal ones by name."""
    moments: tuple[Moment, ...]
    """At least one, by step."""
    objective: tuple[tuple[float, float], ...]
    """(step, training objective in nats per token), in order."""
    limits: Mapping[str, float | None]
    """Passes allowed over a domain; None where there is no limit or it is not known."""
    weights_title: str
    """What the weights are."""
    config: str
    """As YAML."""
    notes: tuple[str, ...] = ()
    """What a reader must know of the numbers, a sentence each."""
    same_text: bool = False
    """Student and teacher read the same text in tokens of their own (`ddkmix.same_text`)."""
    _tables: dict[str, Float[np.ndarray, "moments N"]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Columns that have been asked for: a page asks for each many times."""

    @property
    def last(self) -> Moment:
        """The newest evaluation."""
        return self.moments[-1]

    @property
    def steps(self) -> Float[np.ndarray, " moments"]:
        """Optimizer steps taken before each evaluation."""
        return np.array([float(moment.step) for moment in self.moments])

    def table(self, column: str) -> Float[np.ndarray, "moments N"]:
        """A number of every domain, in the order of `domains`, at every evaluation; nan where unknown."""
        if column not in self._tables:
            self._tables[column] = np.array([moment.column(column, self.domains) for moment in self.moments])
        return self._tables[column]

    def now(self, column: str) -> Float[np.ndarray, " N"]:
        """A number of every domain at the last evaluation."""
        return self.table(column)[-1]

    def no_gap(self, domain: str) -> str:
        """Why a domain has no last gap; empty where it has one."""
        if domain in self.last.without_gap:
            return "not finite"
        return "" if domain in self.last.losses else "not measured"


def story_of_run(run_dir: Path) -> Story:
    """A run as far as it has got; nothing outside its directory is read.

    Raises:
        RunError: the folder is not a run, nothing has been measured yet, or a file of it is damaged.
    """
    config = read_run_config(run_dir)
    path = run_dir / "intervals.jsonl"
    try:
        moments = tuple(_moment(record) for record in read_intervals(run_dir))
        path = run_dir / "metrics.jsonl"
        lines = list(read_lines(path)) if path.exists() else []
        objective = tuple((float(r["step"]), _number(r["train/objective"])) for r in lines)
    except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"{path} is damaged or of another version of ddkmix ({reason}).") from None
    done = max([moments[-1].step, *(int(step) for step, _ in objective[-1:])])
    steps = int(config["trainer"]["steps"])
    tokens = lines[-1].get("train/total_tokens") if lines else None
    return Story(
        title=run_dir.resolve().name,
        status=_status(run_dir, done=done, steps=steps, measured=moments[-1].step),
        share_done=min(done / steps, 1.0),
        facts=(
            ("policy", _one_line(config.get("policy", {}))),
            ("rows served", f"{sum(moments[-1].served.values()):,.0f}"),
            *([("tokens learned from", f"{tokens:,}")] if tokens else []),
            ("evaluations", f"{len(moments):,}"),
            ("last written", _last_written(run_dir)),
        ),
        domains=_by_gap(moments),
        moments=moments,
        objective=objective,
        limits=_limits(run_dir),
        weights_title="weight",
        config=(run_dir / "config.yaml").read_text(encoding="utf-8"),
    )


def story_of_gaps(
    losses: DomainLosses,
    weights: Mapping[str, float],
    config: RunConfig,
    *,
    references: Sequence[str] = (),
    notes: Sequence[str] = (),
    same_text: bool = False,
) -> Story:
    """One measurement without a run.

    Args:
        losses: of the student and its teacher, nats per token.
        weights: the mixture that DDK would set on them, by domain; shares.
        config: what was measured.
        references: models whose losses the cards gave in the place of a teacher's.
        notes: what a reader must know of the losses, a sentence each.
        same_text: whether the two read the same text in tokens of their own.
    """
    moment = moment_of(step=0, losses=losses.to_json(), weights=weights, served={}, epochs={})
    student, teacher = config.student, config.teacher.model
    name = student.model or f"{student.init} of {teacher}"
    against = f"the reference losses of {', '.join(references)}" if references else teacher
    return Story(
        title=f"{name} against {against}",
        status="One measurement on held-out text; nothing was trained.",
        share_done=None,
        facts=(("domains", f"{len(losses.domains):,}"), ("predicted tokens", f"{losses.num_tokens.sum():,}")),
        domains=_by_gap((moment,)),
        moments=(moment,),
        objective=(),
        limits={},
        weights_title="DDK weight",
        config=yaml.safe_dump(dump_config(config), sort_keys=False, allow_unicode=True),
        notes=tuple(notes),
        same_text=same_text,
    )


def moment_of(
    *,
    step: int,
    losses: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, float],
    served: Mapping[str, float],
    epochs: Mapping[str, float],
) -> Moment:
    """One evaluation, with the intervals that follow from its losses; arguments as in `Moment`.

    Raises:
        DataError: errors and numbers of rows are not what `DomainLosses.to_json` wrote.
    """
    # of gaps of 0, so that neither end is rounded nor spoilt by a loss that is not finite
    known = DomainLosses.from_json(
        {
            name: {
                "student_loss": 0.0,
                "teacher_loss": 0.0,
                **{column: row[column] for column in ("gap_error", "effective_rows") if column in row},
            }
            for name, row in losses.items()
        }
    )
    _, high = known.gap_interval()
    half_width = dict(zip(known.domains, high.tolist(), strict=True))
    return Moment(
        step=step, losses=losses, weights=weights, served=served, epochs=epochs, half_width=half_width
    )


def _moment(record: Mapping[str, Any]) -> Moment:
    shares = ({n: float(v) for n, v in record[key].items()} for key in ("weights", "served", "epochs"))
    weights, served, epochs = shares
    losses = {name: dict(row) for name, row in record["losses"].items()}
    return moment_of(step=int(record["step"]), losses=losses, weights=weights, served=served, epochs=epochs)


def _by_gap(moments: Sequence[Moment]) -> tuple[str, ...]:
    """Every domain that was ever in the run."""
    last = moments[-1]
    names = sorted({name for moment in moments for name in moment.losses})
    gaps = dict(zip(names, last.column("loss_gap", names).tolist(), strict=True))

    def place(name: str) -> tuple[int, float, str]:
        if name in last.without_gap:
            return 0, 0.0, name
        return (2, 0.0, name) if math.isnan(gaps[name]) else (1, -gaps[name], name)

    return tuple(sorted(names, key=place))


def _status(run_dir: Path, *, done: int, steps: int, measured: int) -> str:
    """The directory cannot tell a run that goes on from one that was killed, so neither is claimed."""
    if measured >= steps:
        return f"Finished: {steps:,} steps."
    if (run_dir / "student").exists() and measured == done:
        return f"Finished early: {done:,} of {steps:,} steps; no domain had rows left to serve."
    return f"Not finished: step {done:,} of {steps:,}, last measured at step {measured:,}."


def _limits(run_dir: Path) -> dict[str, float | None]:
    if not (run_dir / "data.json").exists():  # a run of an older version
        return {}
    block = read_blocks(run_dir)[-1]
    return {
        name: domain.max_epochs for name, domain in zip(block.settings.domains, block.domains, strict=True)
    }


def _last_written(run_dir: Path) -> str:
    logs = (run_dir / name for name in ("intervals.jsonl", "metrics.jsonl"))
    newest = max(path.stat().st_mtime for path in logs if path.exists())
    return datetime.fromtimestamp(newest, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _one_line(policy: Mapping[str, Any]) -> str:
    """`ddk, signal loss_gap, uniform_mix 0.5`."""
    others = (
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in policy.items()
        if key != "name"
    )
    return ", ".join([str(policy.get("name", "")), *others])
