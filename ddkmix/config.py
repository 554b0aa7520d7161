"""The whole run as one strict, frozen tree. Reading `RunConfig` tells what a run can be told.

YAML file -> dotted overrides (`trainer.steps=20`) -> checks -> `RunConfig`. The resolved tree is written
into the run directory. Paths are relative to the working directory. The parameters of the policy and of
the losses belong to their own dataclasses (`ddkmix.policies`, `ddkmix.losses`), which check them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ddkmix.errors import ConfigError
from ddkmix.overrides import apply_override, read_yaml
from ddkmix.run_average import average_of_run
from ddkmix.sections import (
    NAME,
    Evaluation,
    Guards,
    Loader,
    Mixture,
    Named,
    Optimizer,
    Pack,
    Schedule,
    Section,
    Seed,
    Signal,
    Storage,
    Student,
    Tracking,
    Trainer,
)
from ddkmix.stage_sections import Capture, Generate, Rollouts
from ddkmix.teacher_sections import FurtherTeacher, OnlineModules, Teacher
from ddkmix.validation import explain

__all__ = [
    "Capture",
    "Evaluation",
    "FurtherTeacher",
    "Generate",
    "Guards",
    "Loader",
    "Mixture",
    "Named",
    "OnlineModules",
    "Optimizer",
    "Pack",
    "Rollouts",
    "RunConfig",
    "Schedule",
    "Section",
    "Signal",
    "Storage",
    "Student",
    "Teacher",
    "Tracking",
    "Trainer",
    "load_config",
]


class RunConfig(Section):
    """A run: every setting, its default and its rule. Usually read from a file by `load_config`.

    >>> from ddkmix import RunConfig
    >>> config = RunConfig.model_validate({
    ...     "run_dir": "runs/first",
    ...     "domains": ["domains"],
    ...     "teacher": {"model": "models/teacher"},
    ...     "student": {"init": "prune", "layers": [0, 5, 11]},
    ...     "trainer": {"steps": 30_000},
    ... })
    >>> config.mixture.interval_steps, config.policy.name, config.optimizer.lr
    (1000, 'ddk', 3e-05)
    """

    run_dir: Path
    """Everything that the run writes goes here."""
    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    """Domain cards: files, globs or folders of cards."""
    teacher: Teacher
    """The model to learn from. Its tokenizer reads the text, and a student is pruned from its layers."""
    teachers: dict[Annotated[str, Field(pattern=NAME)], FurtherTeacher] = Field(default={})
    """More of them by name, for cards (`teacher: NAME`) and ensembles."""
    default_teacher: str = "teacher"
    """Who teaches domains whose cards name nobody: `teacher`, or an entry of `teachers`."""
    student: Student
    """The model to train."""
    trainer: Trainer
    """Steps, batches, precision, checkpoints."""
    seed: Seed = 0
    """Seeds the order of the rows and, for `init: config`, the student's parameters."""
    cache_dir: Path = Path(".cache/ddkmix")
    """Packed rows and teacher losses, shared by runs."""
    pack: Pack = Pack()
    """How documents become rows."""
    mixture: Mixture = Mixture()
    """How often the weights move, and what happens when a domain is used up."""
    policy: Named = Named(name="ddk")
    """How losses become mixture weights; see `ddkmix.policies`."""
    guards: Guards = Guards()
    """What holds them; `guards: off` is the policy as published."""
    selection: Named | None = None
    """Which rows of the domains teach, by what models think of them; see `ddkmix.selection`. Unset: all."""
    loss: tuple[Named, ...] = (
        Named.model_validate({"name": "cross_entropy", "weight": 1.0}),
        Named.model_validate({"name": "forward_kl", "weight": 0.2, "temperature": 1.0}),
    )
    """Weighted sum of losses; DDK: cross-entropy + 0.2 x KL(teacher || student) at temperature 1
    (arXiv 2407.16154, Eq. 3). See `ddkmix.losses`."""
    objective: Named = Named(name="distill")
    """What `loss` is applied to, and what is learnt beside it from responses; see `ddkmix.objectives`."""
    optimizer: Optimizer = Optimizer()
    """AdamW's settings."""
    schedule: Schedule = Schedule()
    """The learning rate over the run."""
    loader: Loader = Loader()
    """How rows are read."""
    storage: Storage = Storage()
    """How remote shards are read."""
    signal: Signal = Signal()
    """Where the teacher's signal comes from."""
    capture: Capture = Capture()
    """What the logits store keeps of what the teacher says."""
    generate: Generate = Generate()
    """How models answer prompts, and where the responses are kept."""
    rollouts: Rollouts = Rollouts()
    """The student's own responses during training."""
    evaluation: Evaluation = Evaluation()
    """How much held-out text is measured."""
    tracking: Tracking = Tracking()
    """Experiment trackers."""

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        if self.schedule.warmup_steps > self.trainer.steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} is more than "
                f"trainer.steps = {self.trainer.steps}; warm up for less or train for longer"
            )
        if self.schedule.name == "wsd" and not (self.schedule.decay_steps or self.schedule.decay_share):
            raise ValueError("schedule.name = 'wsd' needs schedule.decay_steps >= 1 or decay_share > 0")
        for key in ("decay_steps", "decay_share", "decay"):
            value = getattr(self.schedule, key)
            if self.schedule.name != "wsd" and value != Schedule.model_fields[key].default:
                raise ValueError(
                    f"schedule.{key} = {value!r} has no effect with schedule.name = {self.schedule.name!r}; "
                    "remove it or use 'wsd'"
                )
        return self


def load_config(path: Path, overrides: Sequence[str] = (), *, resume: bool = False) -> RunConfig:
    """Read a YAML config and apply `key=value` overrides.

        load_config(Path("configs/quickstart.yaml"), ["trainer.steps=20", "policy.uniform_mix=0.3"])

    Args:
        path: the YAML file.
        overrides: dotted keys with YAML values, applied in order.
        resume: `run_dir` holds the run already; an average of another run that it began with is taken from
            there, whatever has become of the other run.

    Raises:
        ConfigError: the file, a key or a value is wrong; the message names it and the rule.
        RunError: `policy.run` is to be averaged, and is no run that can be.
    """
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config; give the path of a YAML file.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}; a config is a mapping of sections.")
    return parse_overrides(tree, overrides, where=str(path), resume=resume)


def parse_overrides(
    tree: dict[str, Any], overrides: Sequence[str], *, where: str, resume: bool = False
) -> RunConfig:
    """A config tree with `key=value` overrides on top, checked, and with the average of another run read.

    Raises:
        ConfigError: the first thing that is wrong.
        RunError: `policy.run` is to be averaged, and is no run that can be.
    """
    for override in overrides:
        section, dot, _ = override.partition(".")
        if dot and section in ("policy", "loss") and tree.get(section) is None:
            tree[section] = _default(section)
        apply_override(tree, override)
    read_average(tree, where=where, resume=resume)
    return parse_config(tree, where=where)


def read_average(tree: dict[str, Any], *, where: str, resume: bool = False) -> None:
    """`policy: {name: static, weights: average, run: PATH}` -> the weights themselves, in place.

    Policies read no files, and a resumed run must not depend on another one that may have gone on since: the
    numbers go into the resolved config, with `averaged_from`, and are taken from there when it is resumed.

    Args:
        tree: a config, or as much of one as a policy needs.
        where: for messages.
        resume: whether `run_dir` holds the run already.

    Raises:
        ConfigError: `policy.run` is not given.
        RunError: it is no run that can be averaged.
    """
    policy = tree.get("policy")
    if not isinstance(policy, dict) or policy.get("name") != "static" or policy.get("weights") != "average":
        return
    run = policy.get("run")
    if not isinstance(run, str):
        raise ConfigError(
            f"{where}: policy.run = {run!r}; weights: average needs the folder of the run to average, as in "
            "policy: {name: static, weights: average, run: runs/ddk}."
        )
    began_with = _policy_of_run(tree) if resume else {}
    if str(began_with.get("averaged_from", "")).startswith(f"{run} ("):
        found = {key: began_with[key] for key in ("weights", "averaged_from") if key in began_with}
    else:
        weights, which = average_of_run(Path(run))
        found = {"weights": weights, "averaged_from": f"{run} ({which})"}
    tree["policy"] = {**{key: value for key, value in policy.items() if key != "run"}, **found}


def _policy_of_run(tree: dict[str, Any]) -> dict[str, Any]:
    """The policy in a run's resolved config; nothing where that cannot be read, which resuming reports."""
    try:
        saved = read_yaml((Path(tree["run_dir"]) / "config.yaml").read_text(encoding="utf-8"))
        policy = saved["policy"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return policy if isinstance(policy, dict) else {}


def parse_config(tree: dict[str, Any], *, where: str) -> RunConfig:
    """A config tree, checked.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(" ".join(explain(error, where, RunConfig).split())) from None


def dump_config(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain YAML-able values; `parse_config` reads it back unchanged."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    return tree


def _default(section: str) -> Any:
    """What `policy.uniform_mix=0.3` changes in a config that names no policy: the parameters of DDK."""
    default = RunConfig.model_fields[section].default
    return [term.model_dump() for term in default] if section == "loss" else default.model_dump()
