"""Who teaches which domain: models by name, ensembles of them, and what tells them apart. No torch.

    teacher: {model: models/general}             # reads the text for all of them
    teachers:
      math: {model: models/math}
      both: {ensemble: {teacher: 0.3, math: 0.7}}
    default_teacher: teacher                     # of domains whose cards name nobody

and in the card of a domain `teacher: both`. A model alone is an ensemble of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddkmix.config import RunConfig, Teacher
from ddkmix.domains import Domain
from ddkmix.errors import ConfigError, DataError, did_you_mean
from ddkmix.fingerprint import hash_json
from ddkmix.hub import model_fingerprint

DEFAULT = "teacher"
"""What the config's `teacher` is called among the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teachers:
    """The teachers of a run's domains."""

    of_domain: Mapping[str, str]
    """Domain -> name of its teacher."""
    members: Mapping[str, Mapping[str, float]]
    """Name of a teacher in use -> share of each model in it; the shares sum to 1."""
    models: Mapping[str, Teacher]
    """The models in use, by name."""

    def domains_of(self, name: str) -> tuple[str, ...]:
        """The domains of one teacher."""
        return tuple(domain for domain, teacher in self.of_domain.items() if teacher == name)

    def fingerprint(self, name: str, cache_dir: Path) -> str:
        """Changes with parameters, data types and shares of a teacher's models; not with names or folders.

        Raises:
            ModelError: a model has no safetensors.
        """
        parts = []
        for member, share in self.members[name].items():
            model = self.models[member]
            parts.append([model_fingerprint(model.model, model.revision, cache_dir), model.dtype, share])
        return hash_json(sorted(parts))


def find_teachers(config: RunConfig, domains: Sequence[Domain]) -> Teachers:
    """The teacher of each domain, from its card or the config.

    Raises:
        ConfigError: the config's teachers do not fit together.
        DataError: a card names a teacher that the config does not have.
    """
    members = _members(config)
    if config.default_teacher not in members:
        raise ConfigError(
            f"default_teacher = {config.default_teacher!r} is no entry of `teachers`; "
            f"{did_you_mean(config.default_teacher, members)}"
        )
    _check_cards(members, domains)
    of_domain = {domain.name: domain.teacher or config.default_teacher for domain in domains}
    used = {name: members[name] for name in members if name in of_domain.values()}
    wanted = {member for shares in used.values() for member in shares}
    models = {name: model for name, model in _models(config).items() if name in wanted}
    return Teachers(of_domain=of_domain, members=used, models=models)


def check_online(config: RunConfig, teachers: Teachers, *, one_tokenizer: bool, asked: bool) -> None:
    """Refuse `teacher.online` where there is not one live teacher whose signal the student learns from.

    Args:
        config: the run.
        teachers: those in use.
        one_tokenizer: whether teacher and student read text alike.
        asked: whether a loss of the student looks at the teacher.

    Raises:
        ConfigError: the modules could not be trained.
    """
    if config.teacher.online is None:
        return
    rule, way = "", "or leave teacher.online out"
    if config.signal.source != "live":
        rule = "signal.source = 'store' holds what the teacher said before it had modules; set it to 'live'"
    elif list(teachers.members) != [DEFAULT]:
        names = ", ".join(teachers.members)
        rule = f"the domains are taught by {names}; let the one `teacher` teach all of them"
    elif not one_tokenizer:
        rule = f"the teacher {config.teacher.model} has other tokens than the student; let them share theirs"
    elif not asked:
        losses = ", ".join(term.name for term in config.loss)
        rule = f"no loss of {losses} looks at the teacher, so its modules would serve nothing; add forward_kl"
    if rule:
        raise ConfigError(f"teacher.online trains one live teacher beside the student, and {rule}, {way}.")


def _models(config: RunConfig) -> dict[str, Teacher]:
    """The models of a config, used or not."""
    further = {
        name: Teacher(model=entry.model, revision=entry.revision, dtype=entry.dtype)
        for name, entry in config.teachers.items()
        if entry.model is not None
    }
    return {DEFAULT: config.teacher, **further}


def _members(config: RunConfig) -> dict[str, dict[str, float]]:
    """Every teacher of a config as shares of models."""
    if DEFAULT in config.teachers:
        raise ConfigError(
            f"teachers.{DEFAULT} would be a second {DEFAULT!r}; that name is the section `teacher`. Choose "
            "another one."
        )
    models = _models(config)
    members = {name: {name: 1.0} for name in models}
    for name, entry in config.teachers.items():
        if entry.ensemble is None:
            continue
        for member in entry.ensemble:
            if member not in models:
                rule = "an ensemble itself" if member in config.teachers else "no entry of `teachers`"
                raise ConfigError(
                    f"teachers.{name}.ensemble names {member!r}, which is {rule}; members are models: "
                    f"{', '.join(models)}."
                )
        total = sum(entry.ensemble.values())
        members[name] = {member: weight / total for member, weight in entry.ensemble.items()}
    return members


def _check_cards(members: Mapping[str, object], domains: Sequence[Domain]) -> None:
    unknown = sorted({domain.teacher for domain in domains if domain.teacher} - set(members))
    if unknown:
        cards = ", ".join(str(domain.card) for domain in domains if domain.teacher == unknown[0])
        raise DataError(
            f"{cards}: teacher = {unknown[0]!r} is no entry of the config's `teachers`; "
            f"{did_you_mean(unknown[0], members)}"
        )
