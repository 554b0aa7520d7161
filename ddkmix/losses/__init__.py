"""Losses, each per token and in nats. One divergence a file; the trainer alone normalises.

This file holds what a config can say about them, and is free of torch so that `lint` can check it: a frozen
dataclass per loss whose fields are its parameters. Calling one with the logits of a chunk of tokens calls
the function in the file of its name. To add a loss: write the file, add its dataclass and a line to
`LOSSES`. Outside the package: `name: package.module:Class`.

Axis letters: n tokens that are predicted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from pydantic import Field

from ddkmix.config import Named
from ddkmix.errors import ConfigError
from ddkmix.plugins import build

__all__ = ["LOSSES", "CrossEntropy", "ForwardKL", "TokenLoss"]


@runtime_checkable
class TokenLoss(Protocol):
    """What a loss must offer. Its tensors are torch's; their types are left open to stay free of torch."""

    needs_teacher: ClassVar[bool]
    """Whether it looks at `teacher_logits`."""

    def __call__(self, student_logits: Any, teacher_logits: Any, labels: Any) -> Any:
        """(n, V) float32 logits of student and teacher, (n,) labels -> (n,) nats.

        Args:
            student_logits: (n, V) float32; the result is differentiable in them.
            teacher_logits: (n, V) float32; None if no term of the objective needs them.
            labels: (n,) int64, the next tokens.

        Returns:
            (n,) float32, nats per token. Normalising them is not its business.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """The language-modelling loss, the first term of DDK's objective (arXiv 2407.16154, Eq. 3).

        CE[i] = -log q_i(x_i),  q_i = softmax(student_logits[i]),  x_i = labels[i]

    A student that thinks four tokens equally likely is ln 4 nats away from any of them:

    >>> import torch
    >>> from ddkmix.losses import CrossEntropy
    >>> nats = CrossEntropy()(torch.zeros(2, 4), None, torch.tensor([3, 0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [1.3863, 1.3863]
    """

    needs_teacher: ClassVar[bool] = False
    """Whether it looks at `teacher_logits`."""

    def __call__(self, student_logits: Any, teacher_logits: Any, labels: Any) -> Any:
        """`ddkmix.losses.cross_entropy.cross_entropy` of the student.

        Args:
            student_logits: (n, V) float32.
            teacher_logits: not looked at.
            labels: (n,) int64, the next tokens.

        Returns:
            (n,) float32, nats per token.
        """
        from ddkmix.losses.cross_entropy import cross_entropy

        return cross_entropy(student_logits, labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardKL:
    """KL(teacher || student), the standard distillation term (Hinton et al. 2015, arXiv 1503.02531).

        KL[i] = temperature**2 * sum_v p_i(v) (log p_i(v) - log q_i(v))
        p = softmax(teacher_logits / temperature),  q = softmax(student_logits / temperature)

    The second term of DDK's objective (arXiv 2407.16154, Eq. 3) with weight 0.2 and temperature 1.

    A teacher with p = (3/4, 1/4) and an undecided student: 3/4 ln(3/2) + 1/4 ln(1/2).

    >>> import torch
    >>> from ddkmix.losses import ForwardKL
    >>> teacher_logits = torch.tensor([[3.0, 1.0]]).log()
    >>> nats = ForwardKL()(torch.zeros(1, 2), teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [0.1308]
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of both."""
    scale_by_temperature: bool = True
    """Multiply value and gradient by temperature**2, without which the gradient would shrink with it."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at `teacher_logits`."""

    def __call__(self, student_logits: Any, teacher_logits: Any, labels: Any) -> Any:
        """`ddkmix.losses.forward_kl.forward_kl` with these parameters.

        Args:
            student_logits: (n, V) float32.
            teacher_logits: (n, V) float32.
            labels: not looked at.

        Returns:
            (n,) float32, nats per token (times temperature**2 if so scaled).
        """
        from ddkmix.losses.forward_kl import forward_kl

        return forward_kl(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            scale_by_temperature=self.scale_by_temperature,
        )


LOSSES: dict[str, type] = {"cross_entropy": CrossEntropy, "forward_kl": ForwardKL}
"""The losses that a config can name; see `CrossEntropy` and `ForwardKL`."""


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
