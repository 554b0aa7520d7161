"""What a run will serve, and the memory it will want: before it starts, or from where it is now."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddkmix.config import RunConfig
from ddkmix.hub import parameter_counts, read_model_config
from ddkmix.loader import DomainMixture
from ddkmix.pack import PackedDomain
from ddkmix.planner import PlannerState, PlanSettings
from ddkmix.policies import build_policy
from ddkmix.policies.guards import describe, guarded
from ddkmix.projection import Projection, cap_warning, end_warning, project
from ddkmix.provenance import read_blocks
from ddkmix.report.gaps import Format, render_markdown, render_table
from ddkmix.report.history import outlook, read_intervals
from ddkmix.resolved_config import read_run_config


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    title: str
    key: str
    style: str
    """Format of the cell; None is a dash."""


_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a parameter."""
_START = (
    _Column(title="train rows", key="train_rows", style=","),
    _Column(title="train tokens", key="train_tokens", style=","),
    _Column(title="held-out rows", key="held_out_rows", style=","),
    _Column(title="weight", key="weight", style=".3f"),
    _Column(title="rows served", key="rows", style=",.0f"),
    _Column(title="epochs", key="epochs", style=".2f"),
    _Column(title="max epochs", key="max_epochs", style="g"),
    _Column(title="reached at", key="cap_step", style=","),
)
_MIDWAY = (
    _Column(title="train rows", key="train_rows", style=","),
    _Column(title="weight", key="weight", style=".3f"),
    _Column(title="served", key="served", style=","),
    _Column(title="epochs", key="epochs_served", style=".2f"),
    _Column(title="rows at end", key="rows", style=",.0f"),
    _Column(title="epochs at end", key="epochs", style=".2f"),
    _Column(title="max epochs", key="max_epochs", style="g"),
    _Column(title="reached at", key="cap_step", style=","),
)


def render_plan(
    config: RunConfig,
    packed: Mapping[str, PackedDomain],
    mixture: DomainMixture,
    style: Format = "table",
    selection: str | None = None,
) -> str:
    """Rows, tokens and epochs per domain under the mixture's present weights, and memory; `selection` is a
    line about the rows that are left out of them."""
    steps, weights = config.trainer.steps, mixture.weights
    sizes = None
    if config.mixture.count == "tokens":
        trains = [packed[name].train for name in mixture.domains]
        sizes = [train.counted_tokens / train.num_rows for train in trains]
    projection = project(mixture.settings, mixture.state, steps, sizes)
    policy = guarded(build_policy(config.policy), config.guards)
    domains = _domains(mixture.settings, mixture.state, projection)
    for name, row in domains.items():
        row["weight"] = weights[name]
        row["train_tokens"] = packed[name].train.counted_tokens
        row["held_out_rows"] = min(packed[name].held_out.num_rows, config.evaluation.rows)
    per_step = config.trainer.batch_rows * config.pack.seq_len
    updates = -(-steps // config.mixture.interval_steps) - 1
    tree = {
        "step": 0,
        "steps": steps,
        "end_step": projection.end_step,
        "tokens": steps * per_step,
        "weight_updates": updates,
        "policy": config.policy.name,
        "guards": describe(policy, len(domains)),
        "selection": selection,
        "domains": domains,
        "warnings": _warnings(mixture.settings, projection, steps),
        "memory": _memory(config),
    }
    sizes_line = (
        f"{steps:,} steps x {config.trainer.batch_rows} rows x {config.pack.seq_len} tokens = "
        f"{steps * per_step:,} tokens ({per_step:,} a step); {updates} weight updates after the first "
        f"interval ({config.mixture.interval_steps:,} steps each)."
    )
    title = "under the weights of the first interval"
    policy_line = f"policy {tree['policy']}, guards: {tree['guards']}."
    before = [sizes_line, policy_line, *([] if selection is None else [selection])]
    return _render(tree, style, title, _START, before, [str(tree["memory"])])


def render_run_plan(run_dir: Path, style: Format = "table") -> str:
    """Where a run is heading from its last weight update: rows and epochs so far, and at its end.

    Raises:
        RunError: the folder is not a run, or has no weight update that says the planner's state.
    """
    steps = int(read_run_config(run_dir)["trainer"]["steps"])
    record = read_intervals(run_dir)[-1]
    settings, state, projection = outlook(record, read_blocks(run_dir), steps, run_dir)
    domains = _domains(settings, state, projection)
    for i, (name, row) in enumerate(domains.items()):
        row["weight"] = record["weights"][name]
        row["served"] = state.served[i]
        row["epochs_served"] = state.served[i] / settings.num_rows[i]
    tree = {
        "step": state.step,
        "steps": steps,
        "end_step": projection.end_step,
        "domains": domains,
        "warnings": _warnings(settings, projection, steps),
    }
    title = f"after step {state.step:,} of {steps:,}, under the weights since then"
    return _render(tree, style, title, _MIDWAY, [], [])


def _domains(
    settings: PlanSettings, state: PlannerState, projection: Projection
) -> dict[str, dict[str, Any]]:
    found = {}
    for i, name in enumerate(settings.domains):
        cap, domain = settings.cap_rows[i], projection.domains[name]
        found[name] = {
            "train_rows": settings.num_rows[i],
            "rows": domain.rows,
            "epochs": domain.epochs,
            "max_epochs": None if cap is None else cap / settings.num_rows[i],
            "cap_step": domain.cap_step,
        }
    return found


def _warnings(settings: PlanSettings, projection: Projection, steps: int) -> list[str]:
    capped = [name for name, domain in projection.domains.items() if domain.cap_step is not None]
    return [
        *(cap_warning(settings, name, projection, steps) for name in capped),
        *end_warning(settings, projection, steps),
    ]


def _render(
    tree: Mapping[str, Any],
    style: Format,
    title: str,
    columns: Sequence[_Column],
    before: Sequence[str],
    after: Sequence[str],
) -> str:
    """The tree as JSON, or its domains as a table with lines around the warnings."""
    if style == "json":
        return json.dumps(tree, indent=1, allow_nan=False)
    header = ["domain", *(column.title for column in columns)]
    rows = [
        [name, *("-" if row[c.key] is None else format(row[c.key], c.style) for c in columns)]
        for name, row in tree["domains"].items()
    ]
    lines = [*before, *(f"warning: {warning}" for warning in tree["warnings"]), *after]
    if style == "markdown":
        return "\n\n".join([f"**{title}**", render_markdown(header, rows), *lines])
    return "\n".join([render_table(header, rows, title), *lines])


def _memory(config: RunConfig) -> str:
    """Parameters, gradients, AdamW's moments, and the logits that exist at one time."""
    counts = parameter_counts(config.teacher.model, config.teacher.revision)
    if counts is None:
        return "memory: the teacher's parameters are not on this machine yet, so no estimate."
    teacher = _WIDTH[config.teacher.dtype] * sum(counts.values())
    for further in (entry for entry in config.teachers.values() if entry.model is not None):
        assert further.model is not None
        others = parameter_counts(further.model, further.revision) or {}
        teacher += _WIDTH[further.dtype] * sum(others.values())
    student = _student_parameters(config, counts)
    vocab = read_model_config(config.teacher.model, config.teacher.revision).get("vocab_size", 0)
    logits = 1e6 * config.trainer.logits_memory_mb
    if config.trainer.logits_chunk_tokens is not None:  # one buffer of the student's, one of the teacher's
        computed = 2 if config.trainer.mixed_precision == "bf16" else 4
        logits = (computed + _WIDTH[config.teacher.dtype]) * config.trainer.logits_chunk_tokens * vocab
    if student is None:
        return (
            f"memory: teacher {teacher / 1e9:.2f} GB, logits {logits / 1e9:.2f} GB; the student's size is "
            "known only after it is built."
        )
    return (
        f"memory: teacher {teacher / 1e9:.2f} GB ({sum(counts.values()) / 1e6:.0f}M parameters), student "
        f"{16 * student / 1e9:.2f} GB ({student / 1e6:.0f}M parameters with gradients and AdamW moments, "
        f"16 bytes each), logits {logits / 1e9:.2f} GB; activations come on top."
    )


def _student_parameters(config: RunConfig, teacher: Mapping[str, int]) -> int | None:
    student = config.student
    if student.init == "load":
        assert student.model is not None
        counts = parameter_counts(student.model, student.revision)
        return None if counts is None else sum(counts.values())
    if student.init == "config" or student.layers is None:
        return None
    kept = set(student.layers)
    total = 0
    for name, count in teacher.items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number is None or number in kept:
            total += count
    return total
