"""What a run will serve, and the memory it will want, before any model is loaded."""

from collections.abc import Mapping

from ddkmix.config import RunConfig
from ddkmix.hub import parameter_counts, read_model_config
from ddkmix.loader import DomainMixture
from ddkmix.pack import PackedDomain
from ddkmix.planner import project_epochs
from ddkmix.report.gaps import render_table


def render_plan(config: RunConfig, packed: Mapping[str, PackedDomain], mixture: DomainMixture) -> str:
    """Rows, tokens and epochs per domain under the mixture's present weights, and memory."""
    steps, weights = config.trainer.steps, mixture.weights
    projection = project_epochs(mixture.settings, mixture.state, steps)
    rows, warnings = [], []
    for i, name in enumerate(mixture.domains):
        train, held_out = packed[name].train, packed[name].held_out
        epochs, cap_step = projection[name]
        cap = mixture.settings.cap_rows[i]
        rows.append(
            [
                name,
                f"{train.num_rows:,}",
                f"{train.num_tokens:,}",
                f"{min(held_out.num_rows, config.evaluation.rows):,}",
                f"{weights[name]:.3f}",
                f"{epochs * train.num_rows:,.0f}",
                f"{epochs:.2f}",
                "-" if cap is None else f"{cap / train.num_rows:g}",
            ]
        )
        if cap_step is not None:
            warnings.append(
                f"{name} reaches its max_epochs at step {cap_step:,}; then mixture.on_cap = "
                f"{config.mixture.on_cap!r}."
            )
    header = [
        "domain", "train rows", "train tokens", "held-out rows", "weight", "rows served", "epochs",
        "max epochs",
    ]  # fmt: skip
    per_step = config.trainer.batch_rows * config.pack.seq_len
    updates = -(-steps // config.mixture.interval_steps) - 1
    lines = [
        render_table(header, rows, "under the weights of the first interval"),
        f"{steps:,} steps x {config.trainer.batch_rows} rows x {config.pack.seq_len} tokens = "
        f"{steps * per_step:,} tokens ({per_step:,} a step); {updates} weight updates after the first "
        f"interval ({config.mixture.interval_steps:,} steps each).",
        *(f"warning: {warning}" for warning in warnings),
        _memory(config),
    ]
    return "\n".join(lines)


def _memory(config: RunConfig) -> str:
    """Parameters, gradients, AdamW's moments, and the logits that exist at one time."""
    counts = parameter_counts(config.teacher.model, config.teacher.revision)
    if counts is None:
        return "memory: the teacher's parameters are not on this machine yet, so no estimate."
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[config.teacher.dtype]
    teacher = width * sum(counts.values())
    student = _student_parameters(config, counts)
    vocab = read_model_config(config.teacher.model, config.teacher.revision).get("vocab_size", 0)
    # student and teacher logits, their log-softmaxes, products and the gradient: about 8 float32 buffers
    logits = 8 * 4 * config.trainer.logits_chunk_tokens * vocab
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
