"""Whether a run has what its objective needs, as far as the config tells."""

from collections.abc import Sequence

from ddkmix.config import RunConfig
from ddkmix.domains import Domain
from ddkmix.errors import ConfigError
from ddkmix.losses import LossTerm
from ddkmix.objectives import GKD, DistiLLM, MiniLLMObjective, Objective
from ddkmix.teachers import Teachers

_SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")
"""Accelerate's names of what leaves a rank with a part of the student."""


def check_objective(
    objective: Objective,
    config: RunConfig,
    *,
    terms: Sequence[LossTerm],
    one_tokenizer: bool,
    teachers: Teachers,
    domains: Sequence[Domain],
) -> None:
    """Refuse objectives that the rest of a config cannot serve.

    Args:
        objective: what `config.objective` names.
        config: the run.
        terms: what `config.loss` names.
        one_tokenizer: whether student and teacher share theirs.
        teachers: of the run.
        domains: of the run.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    if not objective.needs:
        return
    name = config.objective.name
    _check_prompts(config, domains)
    _check_terms(objective, name, terms)
    if not one_tokenizer:
        raise ConfigError(
            f"objective {name} learns from responses in the tokens of one tokenizer, and student and teacher "
            "have different ones; use objective distill, or models that share a tokenizer."
        )
    if config.signal.source != "live":
        raise ConfigError(
            f"objective {name} asks the teacher about responses that no logits store knows; set "
            "signal.source to live."
        )
    if config.teacher.online is not None:
        raise ConfigError(
            f"teacher.online with objective {name}: the teacher's modules learn from rows of data, and are "
            "not made for responses; leave teacher.online out, or use objective distill."
        )
    if config.trainer.document_boundaries:
        raise ConfigError(
            f"trainer.document_boundaries = true with objective {name}: a response may hold the separator, "
            "which would cut it in two; set it to false (a row of prompts holds one of them anyway)."
        )
    _check_buffer(objective, config)
    _check_micro_batches(config)
    if isinstance(objective, MiniLLMObjective):
        _check_policy_gradient(objective, config, teachers)


def _check_prompts(config: RunConfig, domains: Sequence[Domain]) -> None:
    if all(domain.rows is None and domain.prompt_response is None for domain in domains):
        raise ConfigError(
            f"objective {config.objective.name} learns from responses, and none of the domains "
            f"{', '.join(domain.name for domain in domains)} has prompts; add one whose card has "
            "`prompt_response`."
        )


def _check_terms(objective: Objective, name: str, terms: Sequence[LossTerm]) -> None:
    if isinstance(objective, GKD | DistiLLM):
        for term in terms:
            if not term.loss.needs_teacher:
                raise ConfigError(
                    f"loss {term.name} with objective {name}: on the student's own responses it teaches what "
                    "the student says already. Every term must look at the teacher; take jsd (GKD), skew_kl "
                    "(DistiLLM) or another divergence."
                )


def check_processes(objective: Objective, config: RunConfig, distributed_type: str) -> None:
    """Refuse what asks the student itself, or not all ranks equally often, where each holds a part of it.

    Args:
        objective: what `config.objective` names.
        config: the run.
        distributed_type: Accelerate's, such as `MULTI_GPU` (DDP) or `FSDP`.

    Raises:
        ConfigError: the student is sharded, and has to answer, to teach its teacher's modules, or to read as
            many rows as there are responses that say something.
    """
    kind, what = getattr(distributed_type, "value", distributed_type), None
    if config.teacher.online is not None:
        what = "teacher.online"
    if objective.needs:
        what = f"objective {config.objective.name}"
    if what is not None and kind in _SHARDED:
        raise ConfigError(
            f"{what} needs the whole student on every rank, and under {kind} each has a part of it; launch "
            "with DDP (accelerate launch --multi_gpu)."
        )


def _check_buffer(objective: Objective, config: RunConfig) -> None:
    stored, rows = config.rollouts.buffer_rows, config.trainer.batch_rows
    if "student_responses" in objective.needs and stored < rows:
        raise ConfigError(
            f"rollouts.buffer_rows = {stored} holds less than the {rows} responses of a step "
            "(trainer.batch_rows); make it at least as large."
        )
    if isinstance(objective, DistiLLM) and objective.capacity > stored:
        raise ConfigError(
            f"objective.capacity = {objective.capacity}, at which the replay buffer counts as full, and "
            f"rollouts.buffer_rows = {stored}: it would never be. Make capacity at most {stored}."
        )


def _check_micro_batches(config: RunConfig) -> None:
    spec = config.objective.model_dump()
    for option in ("moving_skew", "whiten"):
        if spec.get(option) and config.trainer.microbatch_rows == 1:
            raise ConfigError(
                f"objective.{option} compares the rows of a micro-batch, and trainer.microbatch_rows = 1 "
                "leaves nothing to compare with; use 2 or more, or leave it out."
            )


def _check_policy_gradient(objective: MiniLLMObjective, config: RunConfig, teachers: Teachers) -> None:
    drawn = config.rollouts
    if drawn.temperature != 1.0 or drawn.top_k is not None or drawn.top_p != 1.0:
        raise ConfigError(
            f"rollouts has temperature = {drawn.temperature:g}, top_k = {drawn.top_k}, top_p = "
            f"{drawn.top_p:g}; objective minillm weighs responses by the probability with which they were "
            "drawn, and knows that only at temperature 1 without top_k and top_p."
        )
    alone = len(teachers.members) == 1 and all(len(shares) == 1 for shares in teachers.members.values())
    if objective.teacher_share and not alone:
        raise ConfigError(
            f"objective.teacher_share = {objective.teacher_share:g}: one teacher draws responses together "
            "with the student, and this run has several; set it to 0, or let one model teach all domains."
        )
