"""Distance between hidden states of student and teacher: intermediate-layer distillation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ddkmix.errors import ConfigError

__all__ = ["HiddenMatch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenMatch:
    """Hidden states of pairs of layers, the student's through a learned map (TinyBERT, arXiv 1909.10351).

        mse:     L[i] = 1/P sum_pairs 1/D sum_d (W h_S[i] + b - h_T[i])_d ** 2
        cosine:  L[i] = 1/P sum_pairs (1 - cos(W h_S[i] + b, h_T[i]))

    P pairs, D the teacher's hidden size, W and b of each pair. TinyBERT's Eq. 8 is `mse`, summed over the
    pairs where this is their mean, so that the weight does not depend on their number. No nats: squares, or
    a cosine. A few dimensions of a big model's residual stream are hundreds of times larger than the others
    and are most of an `mse`; the size of `cosine` does not depend on the teacher.

    W and b are trained with the student and are part of checkpoints, but not of the saved student. They begin
    as the identity where both models have one hidden size. Needs a live teacher, one for all domains.

    As a function it is the distance of one pair: an error of 1 in one of two dimensions.

    >>> import torch
    >>> from ddkmix.losses import HiddenMatch
    >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]])
    >>> HiddenMatch()(student, teacher, torch.tensor([0])).tolist()
    [0.5]
    """

    pairs: Annotated[tuple[tuple[int, int], ...], Field(min_length=1)] = ((-1, -1),)
    """[student layer, teacher layer] whose outputs are compared, before the final norm. Layers are counted
    from 0 as in `student.layers`, or from the end: -1 is the last one. Distilling the last
    layer alone is the first of the remedies against overfitting in arXiv 2302.01530."""
    distance: Literal["mse", "cosine"] = "mse"
    """How two states are compared."""
    projection: Literal["linear", "none"] = "linear"
    """`none`: the student's states as they are; both models must have one hidden size."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})
    """Kinds of signals that it is defined for; what was captured holds no hidden states of other layers."""

    def __post_init__(self) -> None:
        if len(set(self.pairs)) < len(self.pairs):
            raise ValueError("a pair stands there twice")

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Layers of the student whose outputs are wanted."""
        return tuple(sorted({student for student, _ in self.pairs}))

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Layers of the teacher whose outputs are wanted."""
        return tuple(sorted({teacher for _, teacher in self.pairs}))

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """The distance of each token's two states, of one pair.

        Args:
            student_logits: not logits: (n, D) states of the student after its projection, differentiable.
            teacher: (n, D) states of the teacher.
            labels: not looked at.

        Returns:
            (n,) mean squared difference, or 1 - cosine; no nats.
        """
        return distance_between(self.distance, student_logits, teacher)


def distance_between(distance: Literal["mse", "cosine"], states: Any, others: Any) -> Any:
    """(n,) mean squared difference over the dimensions, or 1 - cosine, of (n, D) states."""
    if distance == "mse":
        return (states - others).square().mean(-1)
    from torch.nn.functional import cosine_similarity

    return 1 - cosine_similarity(states, others, dim=-1)


def check_layers_exist(who: str, wanted: Sequence[int], num_layers: int) -> None:
    """Refuse layers that a model does not have.

    Raises:
        ConfigError: one of them does not exist.
    """
    for layer in wanted:
        if not -num_layers <= layer < num_layers:
            raise ConfigError(
                f"loss: layer {layer} of the {who} is to be compared, which has layers 0 to {num_layers - 1} "
                "(-1 is the last)."
            )
