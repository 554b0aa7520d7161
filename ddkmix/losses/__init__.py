"""Losses, each per token and in nats. One divergence a file; the trainer alone normalises.

This file holds what a config can say about them, and is free of torch so that `lint` can check it: a frozen
dataclass per loss whose fields are its parameters. Calling one with the logits of a chunk of tokens calls
the function in the file of its name. To add a loss: write the file, add its dataclass and a line to
`LOSSES`. Outside the package: `name: package.module:Class`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from pydantic import Field

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.plugins import build


@runtime_checkable
class TokenLoss(Protocol):
    """What a loss must offer."""

    needs_teacher: ClassVar[bool]

    def __call__(self, student_logits: Any, teacher_logits: Any, labels: Any) -> Any:
        """(n, V) float32 logits of student and teacher, (n,) labels -> (n,) nats.

        Differentiable in `student_logits`. `teacher_logits` is None if no term needs them.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """The language-modelling loss, -log q(x)."""

    needs_teacher: ClassVar[bool] = False

    def __call__(self, student_logits: Any, teacher_logits: Any, labels: Any) -> Any:
        """See `losses.cross_entropy`."""
        from ddkmix.losses.cross_entropy import cross_entropy

        return cross_entropy(student_logits, labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardKL:
    """KL(teacher || student), the standard distillation term."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of both."""
    scale_by_temperature: bool = True
    """Multiply value and gradient by temperature**2."""
    needs_teacher: ClassVar[bool] = True

    def __call__(self, student_logits: Any, teacher_logits: Any, labels: Any) -> Any:
        """See `losses.forward_kl`."""
        from ddkmix.losses.forward_kl import forward_kl

        return forward_kl(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            scale_by_temperature=self.scale_by_temperature,
        )


LOSSES: dict[str, type] = {"cross_entropy": CrossEntropy, "forward_kl": ForwardKL}


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One summand of the objective."""

    name: str
    weight: float
    loss: TokenLoss


def build_terms(specs: Sequence[Named]) -> tuple[LossTerm, ...]:
    """The weighted sum that a config names; each entry is `{name, weight, parameters}`.

    Raises:
        ConfigError: a name, a weight or a parameter is wrong, or there is no term.
    """
    terms = []
    for i, spec in enumerate(specs):
        parameters = spec.model_dump()
        weight = parameters.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
            raise ConfigError(f"loss.{i}.weight = {weight!r}; a loss weight is a finite number >= 0.")
        terms.append(LossTerm(spec.name, float(weight), build(parameters, LOSSES, where=f"loss.{i}")))
    if not any(term.weight > 0 for term in terms):
        raise ConfigError("loss: every weight is 0 or there is no term; nothing would be learnt.")
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ConfigError(f"loss: {names} names a loss twice; metrics need each name once.")
    return tuple(terms)
